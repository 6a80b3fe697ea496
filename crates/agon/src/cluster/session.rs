//! The connection of a process to the server of its run: waiting for the run, and the leader lease.

use std::{path::Path, time::Duration};

use anyhow::{Context, anyhow};
use settings::{JetStreamSettings, Settings, TransportSettings};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use transport::{LeaderLease, RunRegistry, Transport};

use crate::{
    cluster::{
        membership::{self, Membership, RunPhase, RunRecord, StatusSource, home},
        server_users::{ServerRole, message_bytes},
    },
    exit_code::{RefusedRecord, UsageError},
    run::STREAM_NAMES,
};

/// Time for a run to start that a role is to join; training a base policy may take long.
const JOIN_TIMEOUT: Duration = Duration::from_secs(1800);

/// Interval between two reads of the run's record.
pub(super) const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// The connection of a process to the server of its run.
pub(crate) struct ClusterSession {
    pub(super) transport: Transport,
    pub(super) registry: RunRegistry,
    /// Name of the process in the run.
    pub(super) name: String,
    /// URL of its Prometheus metrics.
    pub(super) metrics: String,
}

impl ClusterSession {
    /// Connects to the server of the settings as the run's leader. `metrics` is the URL of this process's Prometheus
    /// metrics.
    pub(crate) async fn connect(
        settings: &Settings,
        name: String,
        metrics: String,
    ) -> anyhow::Result<Self> {
        let transport = Transport::connect(server_of(settings)?, &settings.run.name).await?;
        let session = Self::over(transport, settings, name, metrics)?;
        if !session.registry.is_signed() {
            tracing::warn!(
                "transport.run_key_path is not set: every client that the NATS server lets write can publish weights in \
                 this run; agon nats-config makes keys and permissions"
            );
        }
        Ok(session)
    }

    /// Connects to the server of the settings as a process of this role, and waits for the run to be there. `None` when
    /// shutdown is requested.
    pub(crate) async fn join(
        settings: &Settings,
        role: ServerRole,
        names: ProcessNames,
        shutdown: &mut watch::Receiver<bool>,
    ) -> anyhow::Result<Option<Self>> {
        let (jetstream, run) = (server_of(settings)?, &settings.run.name);
        let waiting = async {
            let mut logged = false;
            loop {
                if let Some(found) = Transport::find(jetstream, run, role.name()).await? {
                    return anyhow::Ok(found);
                }
                log_waiting(run, &mut logged);
                sleep(POLL_INTERVAL).await;
            }
        };
        tokio::select! {
            found = timeout(JOIN_TIMEOUT, waiting) => {
                let transport = found.map_err(|_| no_leader(run))??;
                let ProcessNames { name, metrics } = names;
                Self::over(transport, settings, name, metrics).map(Some)
            }
            _ = shutdown.wait_for(|requested| *requested) => Ok(None),
        }
    }

    fn over(
        transport: Transport,
        settings: &Settings,
        name: String,
        metrics: String,
    ) -> anyhow::Result<Self> {
        transport.require_payload(message_bytes(settings))?;
        let registry = transport
            .registry()
            .context("a server has a registry")?
            .clone();
        Ok(Self {
            transport,
            registry,
            name,
            metrics,
        })
    }

    /// Waits until the run is led and checks that this process may join it. `None` when shutdown is requested.
    pub(super) async fn wait_for_run(
        &self,
        settings: &Settings,
        shutdown: &mut watch::Receiver<bool>,
    ) -> anyhow::Result<Option<RunRecord>> {
        let waiting = async {
            let (mut logged, mut refused_at) = (false, None);
            loop {
                match RunRecord::read(&self.registry).await {
                    Ok(Some(record)) if record.state == RunPhase::Running => {
                        return anyhow::Ok(record);
                    }
                    Ok(_) => refused_at = None,
                    // A learner that leads the run writes its record again.
                    Err(error) if error.is::<RefusedRecord>() => {
                        let first = *refused_at.get_or_insert_with(Instant::now);
                        if first.elapsed() > self.registry.lease() {
                            return Err(error);
                        }
                    }
                    Err(error) => return Err(error),
                }
                log_waiting(&settings.run.name, &mut logged);
                sleep(POLL_INTERVAL).await;
            }
        };
        tokio::select! {
            record = timeout(JOIN_TIMEOUT, waiting) => {
                let record = record.map_err(|_| no_leader(&settings.run.name))??;
                record.check_compatible(settings)?;
                Ok(Some(record))
            }
            _ = shutdown.wait_for(|requested| *requested) => Ok(None),
        }
    }

    /// Starts publishing heartbeats.
    pub(super) fn start_membership(&self, status_source: StatusSource) -> Membership {
        Membership::start(&self.registry, status_source)
    }

    /// Acquires the leader lease of the run in `directory`, so that no other learner leads it. `None` when the remains
    /// of an earlier run of this directory were removed from the server: connect again.
    ///
    /// # Errors
    /// When another learner holds the lease, or the name belongs to another run.
    pub(crate) async fn lease(
        &self,
        settings: &Settings,
        directory: &Path,
        resuming: bool,
    ) -> anyhow::Result<Option<LeaderLease>> {
        let owner = format!("the learner {} of {}", std::process::id(), home(directory));
        let lease = self.registry.acquire(membership::LEASE_KEY, &owner).await?;
        let Some(record) = RunRecord::read(&self.registry).await? else {
            return Ok(Some(lease));
        };
        if resuming {
            return Ok(Some(lease));
        }
        lease.release().await;
        if record.home != home(directory) {
            let name = &settings.run.name;
            return Err(UsageError(format!(
                "a run {name} is on the server already, led from {}: choose another run.name, resume \
                 it with --resume, or remove it with agon status {name} --remove",
                record.home
            ))
            .into());
        }
        tracing::warn!("removing the data of an earlier run of this directory from the server");
        self.clear().await?;
        Ok(None)
    }

    /// Removes the run from the server, once it is finished and its results are in its directory.
    pub(crate) async fn clear(&self) -> anyhow::Result<()> {
        Ok(self.transport.remove(&STREAM_NAMES).await?)
    }
}

/// Identity of a process in the run: its name and metrics URL.
pub(crate) struct ProcessNames {
    /// Name of the process.
    pub(crate) name: String,
    /// URL of its Prometheus metrics.
    pub(crate) metrics: String,
}

/// The server of the settings.
fn server_of(settings: &Settings) -> anyhow::Result<&JetStreamSettings> {
    let TransportSettings::Jetstream(jetstream) = &settings.transport else {
        return Err(UsageError(
            "transport.kind is \"memory\": a role of its own needs transport.kind = \"jetstream\"; \
             agon train runs all roles in one process"
                .into(),
        )
        .into());
    };
    if jetstream.url.is_empty() {
        return Err(UsageError(
            "transport.url is empty: set the URL of the run's NATS server, as in \
             --set transport.url=nats://host:4222"
                .into(),
        )
        .into());
    }
    Ok(jetstream)
}

fn log_waiting(run: &str, logged: &mut bool) {
    if !std::mem::replace(logged, true) {
        tracing::info!(run, "waiting for a learner to lead the run");
    }
}

fn no_leader(run: &str) -> anyhow::Error {
    anyhow!(
        "no learner led the run {run} within {} s; start one with agon learner",
        JOIN_TIMEOUT.as_secs()
    )
}
