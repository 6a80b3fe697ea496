//! Actors and preference services in processes of their own: each joins the run on its server, works until the run is
//! done, and leaves.

use std::{path::Path, sync::Arc};

use anyhow::{Context, anyhow};
use messages::Stage;
use settings::Settings;
use telemetry::StageCounters;
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{sleep, timeout},
};
use transport::{RunRegistry, Transport};

use crate::{
    assembly::{CompletionOrigin, JudgeSource},
    cluster::{
        membership::{Followed, LEAVE_TIMEOUT, RunPhase, RunRecord},
        model_files::FetchedModel,
        session::{ClusterSession, POLL_INTERVAL},
    },
    exit_code::sentence,
    run::{ApoSession, EXIT_GRACE, Role, RoleBuilder, RunStreams, StageMember, join_all},
    signals,
};

/// Joins the run as one actor, or as many as `actor.count` says, until it is done or shutdown is requested.
pub(crate) async fn join_actor(
    session: &ClusterSession,
    settings: &Settings,
    shutdown: &watch::Sender<bool>,
) -> anyhow::Result<()> {
    let mut requested = shutdown.subscribe();
    let Some(record) = session.wait_for_run(settings, &mut requested).await? else {
        return Ok(());
    };
    let streams = RunStreams::open(&session.transport, settings).await?;
    let model = FetchedModel::fetch(settings, &record, &streams.weight_store).await?;
    let model = model.packed(settings)?;
    let (finish, finishing) = watch::channel(false);
    let builder = session.role_builder(settings, &streams, finishing);
    let actor_name = |index| match settings.actor.count {
        1 => session.name.clone(),
        _ => format!("{}.{index}", session.name),
    };
    let role = builder.actors(&session.name, actor_name, || model.policy(settings))?;
    tracing::info!(actor = session.name, "joined the run");
    let run_end = RunEnd {
        finish,
        shutdown: requested,
        leaves_after: None,
    };
    run_role(session, role, run_end).await.map(drop)
}

/// Joins the run as a preference service until it is done or shutdown is requested. With adversarial preference
/// optimisation, rejoins when the run is resumed by another session, with the judge of its checkpoint.
pub(crate) async fn join_preference(
    session: &ClusterSession,
    settings: &Settings,
    run_dir: &Path,
    shutdown: &watch::Sender<bool>,
) -> anyhow::Result<()> {
    let mut requested = shutdown.subscribe();
    let cancel = signals::cancel_token(shutdown);
    let mut counters = StageCounters::new(Stage::Preference);
    loop {
        let Some(record) = session.wait_for_run(settings, &mut requested).await? else {
            return Ok(());
        };
        let streams = RunStreams::open(&session.transport, settings).await?;
        let model = FetchedModel::fetch(settings, &record, &streams.weight_store).await?;
        let judge = tokio::task::block_in_place(|| {
            JudgeSource::open(settings, CompletionOrigin::Policy(&model.base), &cancel)
        })?;
        let apo_session = ApoSession {
            policy: &model.base,
            run_dir,
            rounds_before: record.start().rounds_before(),
        };
        let (finish, finishing) = watch::channel(false);
        let builder = session.role_builder(settings, &streams, finishing);
        let member = StageMember {
            name: &session.name,
            counters: counters.clone(),
        };
        let role = builder
            .preference(member, &Arc::new(judge), apo_session, &cancel)
            .await?;
        if let Some(address) = role.http_address {
            out!("http://{address}")?;
        }
        tracing::info!(
            service = session.name,
            session = record.session,
            "joined the run"
        );
        let apo = settings.preference.apo.refresh_steps > 0;
        let run_end = RunEnd {
            finish,
            shutdown: requested.clone(),
            leaves_after: apo.then_some(record.session),
        };
        if run_role(session, role, run_end).await? == ExitReason::Over {
            return Ok(());
        }
        counters = counters.following();
    }
}

impl ClusterSession {
    fn role_builder<'a>(
        &'a self,
        settings: &'a Settings,
        streams: &'a RunStreams,
        shutdown: watch::Receiver<bool>,
    ) -> RoleBuilder<'a> {
        RoleBuilder {
            settings,
            streams,
            metrics: &self.metrics,
            shutdown,
        }
    }
}

/// Reason why a role ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ExitReason {
    /// The run is done, or shutdown was requested.
    Over,
    /// Another session leads the run.
    NewSession,
}

/// Events that end a role.
struct RunEnd {
    /// Tells the role to finish.
    finish: watch::Sender<bool>,
    /// Turns true when shutdown is requested.
    shutdown: watch::Receiver<bool>,
    /// Session of the run after which the role ends; `None` if it outlives sessions.
    leaves_after: Option<u64>,
}

/// Runs a role as a member of the run until it ends, then lets it finish its messages in flight.
async fn run_role(
    session: &ClusterSession,
    role: Role,
    run_end: RunEnd,
) -> anyhow::Result<ExitReason> {
    session.transport.set_started();
    let membership = session.start_membership(role.status_source);
    let mut tasks = JoinSet::new();
    role.tasks.into_iter().for_each(|task| {
        tasks.spawn(task);
    });
    let result = run_until_end(session, tasks, run_end).await;
    let leaving = async {
        membership.leave().await;
        session.transport.flush().await;
    };
    if timeout(LEAVE_TIMEOUT, leaving).await.is_err() {
        tracing::warn!(
            "could not publish that this process has left; others see it from its lease"
        );
    }
    result
}

async fn run_until_end(
    session: &ClusterSession,
    mut tasks: JoinSet<anyhow::Result<()>>,
    mut run_end: RunEnd,
) -> anyhow::Result<ExitReason> {
    let reason = tokio::select! {
        Some(ended) = tasks.join_next() => {
            ended
                .context("a role panicked")?
                .map_err(|error| failure(&error))?;
            return Err(anyhow!("a role ended unexpectedly"));
        }
        reason = wait_until_over(&session.registry, run_end.leaves_after) => reason?,
        _ = run_end.shutdown.wait_for(|requested| *requested) => ExitReason::Over,
    };
    run_end.finish.send_replace(true);
    let late = |_| {
        anyhow!(
            "messages in flight were not finished within {} s",
            EXIT_GRACE.as_secs()
        )
    };
    tokio::select! {
        ended = timeout(EXIT_GRACE, join_all(&mut tasks)) => {
            ended.map_err(late)?.map_err(|error| failure(&error))?;
        }
        () = long_outage(&session.transport) => {
            tracing::warn!("the NATS server is unreachable: messages in flight are left to other processes");
        }
    }
    Ok(reason)
}

/// Waits until the server was unreachable for [`LEAVE_TIMEOUT`] in all, from now on.
async fn long_outage(transport: &Transport) {
    let before = transport.outage_time();
    while transport.outage_time() - before < LEAVE_TIMEOUT {
        sleep(POLL_INTERVAL).await;
    }
}

/// Error of a role that had joined. It loses its class, so that the process exits 1 and supervisors restart it: a
/// missing resource is final only before a process has joined.
fn failure(error: &anyhow::Error) -> anyhow::Error {
    anyhow!(sentence(error))
}

/// Waits until the run is done, removed from the server, or led by another session than `session`.
async fn wait_until_over(
    registry: &RunRegistry,
    session: Option<u64>,
) -> anyhow::Result<ExitReason> {
    let mut refused = None;
    loop {
        sleep(POLL_INTERVAL).await;
        match RunRecord::follow(registry, &mut refused).await? {
            Followed::Removed => return Ok(ExitReason::Over),
            Followed::Record(record) if record.state == RunPhase::Done => {
                return Ok(ExitReason::Over);
            }
            Followed::Record(record)
                if session.is_some_and(|session| session != record.session) =>
            {
                return Ok(ExitReason::NewSession);
            }
            Followed::Record(_) | Followed::Refused => {}
        }
    }
}
