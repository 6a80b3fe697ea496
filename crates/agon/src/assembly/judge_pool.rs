//! Builds judge pools of the configured judge and of the gold judge, and the HTTP server in front of a pool.

use std::sync::Arc;

use preference::{
    JudgeError, JudgePool, JudgeReplicas, PoolSettings, Rebuild, Server, ServerParts,
};
use settings::{JudgeSettings, PreferenceSettings, Settings};

use crate::assembly::{JudgeSource, judge_digest};

/// A pool of replicas of this judge; its tasks run on the current runtime.
pub(crate) fn pool(settings: &Settings, judge: &Arc<JudgeSource>) -> anyhow::Result<JudgePool> {
    let replicas = judge_replicas(&settings.preference, judge)?;
    Ok(JudgePool::new(
        replicas,
        PoolSettings::from(&settings.preference),
    ))
}

/// A pool of the playground's gold judge, for evaluations; `None` for other prompts.
pub(crate) fn gold_pool(settings: &Settings) -> anyhow::Result<Option<JudgePool>> {
    let Some(gold) = crate::assembly::gold_judge(settings) else {
        return Ok(None);
    };
    let replicas = JudgeReplicas {
        // Distinguishes its metrics from those of the configured judge, which may be a gold judge too.
        name: "gold-evaluation".into(),
        ..JudgeReplicas::on_threads(vec![gold], None)?
    };
    let pool = PoolSettings::from(&settings.preference);
    Ok(Some(JudgePool::new(replicas, pool)))
}

/// Replicas of this judge: on threads of this process, or remote services.
pub(crate) fn judge_replicas(
    settings: &PreferenceSettings,
    judge: &Arc<JudgeSource>,
) -> anyhow::Result<JudgeReplicas> {
    match &settings.judge {
        JudgeSettings::Http(endpoints) => Ok(JudgeReplicas::chat(endpoints, &settings.chat)?),
        JudgeSettings::Service { urls, token_path } => {
            Ok(JudgeReplicas::services(urls, token_path)?)
        }
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
