//! Runs all roles in one process, connected by streams in memory.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, anyhow};
use hub::CancelToken;
use learner::{Learner, Summary};
use messages::Stage;
use telemetry::{StageCounters, Waits};
use tokio::{sync::watch, task::JoinSet, time::timeout};
use transport::Transport;

use crate::{
    assembly::JudgeSource,
    cluster::{
        membership::{RunPhase, RunRecord},
        status::{MemberSource, StatusPublisher},
    },
    run::{
        ApoSession, EXIT_GRACE, InitialActorPolicy, Role, RoleBuilder, RunContext, RunOutcome,
        RunStreams, StageMember, with_judge_outage,
    },
    signals,
};

/// Builds all roles that the run needs, runs them until the learner is done or shutdown is requested, then lets the others finish.
/// `judge` is absent if nothing is judged; `metrics` is the URL of this process's Prometheus metrics.
pub(crate) async fn run_single_process(
    context: RunContext<'_>,
    judge: Option<&Arc<JudgeSource>>,
    metrics: &str,
    shutdown: &watch::Sender<bool>,
) -> anyhow::Result<RunOutcome> {
    let settings = context.settings;
    // Both ends of every stream stay open until all roles have ended, so that none fails because another ended first.
    let streams = RunStreams::open(&Transport::in_memory(), settings).await?;
    let start = context.start()?;
    let (finish, finishing) = watch::channel(false);
    let builder = RoleBuilder {
        settings,
        streams: &streams,
        metrics,
        shutdown: finishing,
    };
    let mut roles = RunningRoles::default();
    let cancel = signals::cancel_token(shutdown);
    let others = other_roles(&builder, &context, judge, &cancel).await?;
    let mut statuses = Vec::new();
    for role in others {
        role.tasks.into_iter().for_each(|task| {
            roles.tasks.spawn(task);
        });
        roles.waits.extend(role.status_source.waits.clone());
        statuses.push(role.status_source);
    }
    let others: Vec<StageCounters> = statuses.iter().map(|s| s.counters.clone()).collect();
    let (learner, learner_status) = builder.learner("learner", &context, &others).await?;

    let counters: Vec<StageCounters> =
        [&others[..], std::slice::from_ref(&learner_status.counters)].concat();
    let source = MemberSource::SingleProcess {
        record: Box::new(RunRecord::new(context.directory, context.config, start)),
        roles: statuses.into_iter().chain([learner_status]).collect(),
    };
    let publisher = StatusPublisher::start(context.directory, settings, streams.clone(), source);
    let result = supervise(learner, roles, finish, shutdown).await;
    let ending = result.as_ref().ok().map(|summary| summary.ending);
    publisher.end(RunPhase::after(ending)).await;
    let stages = counters.iter().map(|c| (c.stage(), c.snapshot()));
    context.outcome(result?, stages.collect())
}

/// The actors and the preference service at work.
#[derive(Default)]
struct RunningRoles {
    tasks: JoinSet<anyhow::Result<()>>,
    waits: Vec<Waits>,
}

impl RunningRoles {
    /// Reasons and durations in seconds of the open waits.
    fn open_waits(&self) -> Vec<(String, f64)> {
        let waits = self.waits.iter().flat_map(Waits::current);
        waits
            .map(|wait| (wait.reason.to_owned(), wait.elapsed.as_secs_f64()))
            .collect()
    }
}

/// The actors and the preference service, as far as the run needs them.
async fn other_roles(
    builder: &RoleBuilder<'_>,
    context: &RunContext<'_>,
    judge: Option<&Arc<JudgeSource>>,
    cancel: &CancelToken,
) -> anyhow::Result<Vec<Role>> {
    let inputs = context.inputs;
    let mut roles = Vec::new();
    if context.settings.needs_samples() {
        let policy = || {
            Ok(InitialActorPolicy {
                reference: &inputs.model,
                policy: inputs.policy()?,
            })
        };
        roles.push(builder.actors("actors", |index| format!("actor-{index}"), policy)?);
    }
    if let Some(judge) = judge {
        let session = ApoSession {
            policy: &inputs.model,
            run_dir: context.directory.root(),
            rounds_before: context.start()?.rounds_before(),
        };
        let member = StageMember {
            name: "preference",
            counters: StageCounters::new(Stage::Preference),
        };
        roles.push(builder.preference(member, judge, session, cancel).await?);
    }
    Ok(roles)
}

/// Waits for the learner, then lets the other roles finish. A role that ends unrequested, with or without an error, is
/// a failure: the learner saves, and the run ends with that role's error.
async fn supervise(
    learner: Learner,
    mut roles: RunningRoles,
    finish: watch::Sender<bool>,
    shutdown: &watch::Sender<bool>,
) -> anyhow::Result<Summary> {
    let mut learning = tokio::spawn(learner.run(shutdown.subscribe()));
    let summary = tokio::select! {
        result = &mut learning => {
            let result = result.context("the learner panicked")?;
            result.map_err(|error| with_judge_outage(error.into(), roles.open_waits()))?
        }
        Some(ended) = roles.tasks.join_next() => {
            let unrequested = || Err(anyhow!("an actor or the preference service ended unexpectedly"));
            let error = ended.context("a role panicked").and_then(|result| result);
            let error = error.and_then(|()| unrequested());
            shutdown.send_replace(true);
            if let Err(late) = within(EXIT_GRACE, "the learner", learning).await {
                tracing::error!("{late}; its work since the last checkpoint is lost");
            }
            return error;
        }
    };
    finish.send_replace(true);
    within(EXIT_GRACE, "actors or judge", join_all(&mut roles.tasks)).await??;
    Ok(summary)
}

/// Waits for all roles to end.
pub(crate) async fn join_all(roles: &mut JoinSet<anyhow::Result<()>>) -> anyhow::Result<()> {
    while let Some(ended) = roles.join_next().await {
        ended.context("a role panicked")??;
    }
    Ok(())
}

async fn within<T>(grace: Duration, name: &str, end: impl Future<Output = T>) -> anyhow::Result<T> {
    let late = |_| anyhow!("{name} did not finish within {} s", grace.as_secs());
    timeout(grace, end).await.map_err(late)
}
