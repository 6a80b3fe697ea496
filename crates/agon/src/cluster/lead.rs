//! The leader of a multi-process run: uploads the initial model, runs the learner, and waits for the other processes.

use learner::Ending;
use messages::Stage;
use telemetry::StageSnapshot;
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};
use transport::RunRegistry;

use crate::{
    cluster::{
        membership::{self, Peer, RunPhase, RunRecord},
        model_files::{ModelFileKind, upload},
        session::{ClusterSession, POLL_INTERVAL},
        status::{MemberSource, StatusPublisher},
    },
    run::{EXIT_GRACE, RoleBuilder, RunContext, RunOutcome, RunStreams, with_judge_outage},
};

/// Leads the run under the leader lease: publishes its record and initial model, runs the learner until all steps are
/// done or shutdown is requested, and collects the counters of all processes.
pub(crate) async fn lead(
    session: &ClusterSession,
    context: RunContext<'_>,
    shutdown: &watch::Sender<bool>,
) -> anyhow::Result<RunOutcome> {
    let (settings, directory) = (context.settings, context.directory);
    let registry = &session.registry;
    let streams = RunStreams::open(&session.transport, settings).await?;
    let mut record = initial_record(&context, registry, &streams).await?;
    let kept = record.keep(registry).await?;
    session.transport.set_started();
    let builder = RoleBuilder {
        settings,
        streams: &streams,
        metrics: &session.metrics,
        shutdown: shutdown.subscribe(),
    };
    let (learner, status_source) = builder.learner(&session.name, &context, &[]).await?;
    let counters = status_source.counters.clone();
    let membership = session.start_membership(status_source);
    let source = MemberSource::Registry(registry.clone());
    let publisher = StatusPublisher::start(directory, settings, streams.clone(), source);
    let result = learner.run(shutdown.subscribe()).await;
    drop(kept);
    record.state = RunPhase::after(result.as_ref().ok().map(|summary| summary.ending));
    let end = async {
        record.write(registry).await?;
        membership.leave().await;
        publisher.end(record.state).await;
        session.transport.flush().await;
        anyhow::Ok(())
    };
    let peers = match result.as_ref().map(|summary| summary.ending) {
        Ok(Ending::Finished) => {
            end.await?;
            wait_for_peers(registry).await?
        }
        Ok(Ending::Interrupted) | Err(_) => {
            let end = async {
                end.await?;
                membership::peers(registry).await
            };
            within_leave_timeout(end).await
        }
    };
    let waits = peers.iter().filter(|peer| !peer.heartbeat.left);
    let waits = waits.flat_map(|peer| peer.heartbeat.waits.clone());
    let summary = result.map_err(|error| with_judge_outage(error.into(), waits))?;
    let mut stages: Vec<(Stage, StageSnapshot)> = [Stage::Actor, Stage::Preference]
        .map(|stage| (stage, membership::stage_counters(&peers, stage)))
        .to_vec();
    stages.push((Stage::Learner, counters.snapshot()));
    context.outcome(summary, stages)
}

/// The other processes of a run that ends before it is finished. Its state is saved, so a server that is away is not waited
/// for: then the other processes are unknown, and see from the lease that the learner has gone.
async fn within_leave_timeout(end: impl Future<Output = anyhow::Result<Vec<Peer>>>) -> Vec<Peer> {
    let failure = match timeout(membership::LEAVE_TIMEOUT, end).await {
        Ok(Ok(peers)) => return peers,
        Ok(Err(error)) => format!("{error:#}"),
        Err(elapsed) => elapsed.to_string(),
    };
    tracing::warn!(
        failure,
        "could not publish that this learner has ended; others see it from its lease"
    );
    Vec::new()
}

/// The record of this session, with the initial model's files, which are uploaded unless an earlier session did.
async fn initial_record(
    context: &RunContext<'_>,
    registry: &RunRegistry,
    streams: &RunStreams,
) -> anyhow::Result<RunRecord> {
    let inputs = context.inputs;
    let folder = &inputs.model.folder;
    let uploaded = RunRecord::read(registry).await?;
    let uploaded = uploaded.map(|before| [before.model, before.adapter].concat());
    let uploaded = uploaded.unwrap_or_default();
    let mut record = RunRecord::new(context.directory, context.config, context.start()?);
    record.base_model = folder.base_model.clone();
    let weight_store = &streams.weight_store;
    record.model = upload(&folder.path, ModelFileKind::Model, weight_store, &uploaded).await?;
    if let Some(folder) = &inputs.adapter_folder {
        record.adapter = upload(folder, ModelFileKind::Adapter, weight_store, &uploaded).await?;
    }
    Ok(record)
}

/// Waits until all other processes have left or their heartbeats have stopped.
async fn wait_for_peers(registry: &RunRegistry) -> anyhow::Result<Vec<Peer>> {
    let waiting = async {
        loop {
            let peers = membership::peers(registry).await?;
            let has_left = |peer: &Peer| peer.heartbeat.left || peer.age > registry.lease();
            if peers.iter().all(has_left) {
                return anyhow::Ok(peers);
            }
            sleep(POLL_INTERVAL).await;
        }
    };
    match timeout(EXIT_GRACE + registry.lease(), waiting).await {
        Ok(peers) => peers,
        Err(_) => {
            tracing::warn!("not all processes have left the run in time");
            membership::peers(registry).await
        }
    }
}
