//! The connection of a process to the server of its run: waiting for the run, and the leader lease.

use std::{path::Path, time::Duration};

use anyhow::{Context, anyhow};
use settings::{Settings, TransportSettings};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};
use transport::{LeaderLease, RunRegistry, Transport};

use crate::{
    cluster::membership::{self, Membership, RunPhase, RunRecord, StatusSource, home},
    exit_code::UsageError,
};

/// Time for a run to start that a role is to join; training a base policy may take long.
const JOIN_TIMEOUT: Duration = Duration::from_secs(1800);

/// Interval between two reads of the run's record.
pub(super) const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// Time for roles to finish their messages in flight once the run is done.
pub(super) const EXIT_GRACE: Duration = Duration::from_secs(60);

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
    /// Connects to the server of the settings. `metrics` is the URL of this process's Prometheus metrics.
    pub(crate) async fn connect(
        settings: &Settings,
        name: String,
        metrics: String,
    ) -> anyhow::Result<Self> {
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
        let transport = Transport::connect(jetstream, &settings.run.name).await?;
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
            let mut logged = false;
            loop {
                if let Some(record) = RunRecord::read(&self.registry).await?
                    && record.state == RunPhase::Running
                {
                    return anyhow::Ok(record);
                }
                if !std::mem::replace(&mut logged, true) {
                    tracing::info!(
                        run = settings.run.name,
                        "waiting for a learner to lead the run"
                    );
                }
                sleep(POLL_INTERVAL).await;
            }
        };
        tokio::select! {
            record = timeout(JOIN_TIMEOUT, waiting) => {
                let record = record.map_err(|_| anyhow!(
                    "no learner led the run {} within {} s; start one with agon learner",
                    settings.run.name, JOIN_TIMEOUT.as_secs()
                ))??;
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
        self.transport.remove().await?;
        Ok(None)
    }

    /// Removes the run from the server, once it is finished and its results are in its directory.
    pub(crate) async fn clear(&self) -> anyhow::Result<()> {
        Ok(self.transport.remove().await?)
    }
}
