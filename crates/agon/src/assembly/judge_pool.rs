//! Builds judge pools of the configured judge and of the evaluation judges, and the HTTP server in front of a pool.

use std::sync::Arc;

use anyhow::Context;
use hub::CancelToken;
use messages::GOLD;
use preference::{
    Composition, EvaluationJudge, JudgeError, JudgePool, JudgeReplicas, PoolSettings, Rebuild,
    Server, ServerParts,
};
use settings::{JudgeSettings, PreferenceSettings, Settings};

use crate::assembly::{CompletionOrigin, JudgeSource, gold_judge, judge_digest};

/// A pool of replicas of this judge; its tasks run on the current runtime.
pub(crate) fn pool(settings: &Settings, judge: &Arc<JudgeSource>) -> anyhow::Result<JudgePool> {
    let replicas = judge_replicas(&settings.preference, judge)?;
    Ok(JudgePool::new(
        replicas,
        PoolSettings::from(&settings.preference),
    ))
}

/// The evaluation judges: the playground's gold judge where there is one, and those of `[evaluation.judge]`.
/// Loading them blocks; ends early once `cancel` is cancelled. Their tasks run on the current runtime.
pub(crate) fn evaluation_judges(
    settings: &Settings,
    origin: CompletionOrigin<'_>,
    cancel: &CancelToken,
) -> anyhow::Result<Vec<EvaluationJudge>> {
    let mut judges = Vec::new();
    if let Some(gold) = gold_judge(settings) {
        let replicas = JudgeReplicas::on_threads(vec![gold], None)?;
        judges.push(evaluation_judge(settings, GOLD, replicas));
    }
    for (name, judge) in &settings.evaluation.judge {
        if name == GOLD {
            continue;
        }
        let load = || {
            let source = JudgeSource::load(settings, judge, origin, cancel)?;
            judge_replicas(&settings.preference, &Arc::new(source))
        };
        let replicas = load().with_context(|| format!("evaluation.judge.{name}"))?;
        judges.push(evaluation_judge(settings, name, replicas));
    }
    Ok(judges)
}

fn evaluation_judge(settings: &Settings, name: &str, replicas: JudgeReplicas) -> EvaluationJudge {
    let replicas = JudgeReplicas {
        // Distinguishes its metrics from those of the run's judge, which may have the same name.
        name: format!("{name}-evaluation"),
        ..replicas
    };
    let pool = JudgePool::new(replicas, PoolSettings::from(&settings.preference));
    EvaluationJudge::new(name.to_owned(), pool)
}

/// Replicas of this judge: on threads of this process, or remote services.
pub(crate) fn judge_replicas(
    settings: &PreferenceSettings,
    judge: &Arc<JudgeSource>,
) -> anyhow::Result<JudgeReplicas> {
    match &**judge {
        JudgeSource::Plain(JudgeSettings::Http(endpoints)) => {
            Ok(JudgeReplicas::chat(endpoints, &settings.chat)?)
        }
        JudgeSource::Plain(JudgeSettings::Service { urls, token_path }) => {
            Ok(JudgeReplicas::services(urls, token_path)?)
        }
        JudgeSource::Composed {
            members,
            composition,
        } if judge.is_remote() => composed(settings, members, composition),
        _ => {
            let replicas = (0..settings.replicas).map(|_| judge.make());
            let replicas = replicas.collect::<anyhow::Result<_>>()?;
            let digest = Some(judge_digest(judge)?);
            let judge = Arc::clone(judge);
            let rebuild: Rebuild = Arc::new(move || {
                let judge = judge.make();
                judge.map_err(|error| JudgeError::new(format!("{error:#}")))
            });
            Ok(JudgeReplicas {
                digest,
                ..JudgeReplicas::on_threads(replicas, Some(&rebuild))?
            })
        }
    }
}

/// Replicas of a judge of which a member is remote: every member has a pool of its own.
fn composed(
    settings: &PreferenceSettings,
    members: &[Arc<JudgeSource>],
    composition: &Composition,
) -> anyhow::Result<JudgeReplicas> {
    let members = members
        .iter()
        .map(|member| judge_replicas(settings, member));
    let members = members.collect::<anyhow::Result<Vec<_>>>()?;
    let pool = PoolSettings::from(settings);
    Ok(JudgeReplicas::composed(members, composition.clone(), pool)?)
}

/// The HTTP server of `pool`, bound to the address of the settings.
pub(crate) async fn server(
    settings: &Settings,
    judge: &JudgeSource,
    pool: JudgePool,
) -> anyhow::Result<Server> {
    let parts = ServerParts {
        pool,
        orders: settings.preference.orders,
        encoder: crate::assembly::prompt_encoder(settings, judge)?,
        settings: settings.preference.http.clone(),
    };
    Ok(Server::bind(parts).await?)
}
