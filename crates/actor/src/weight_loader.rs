//! Loads announced weights into the sampler.
//!
//! Promises that versions only grow and that a superseded version is skipped. Does not know when the sampler is idle:
//! the actor's loop decides when to load.

use std::time::Duration;

use messages::WeightsVersion;
use model::PublishedWeights;
use telemetry::Measurements;
use tokio::sync::watch;
use transport::{TransportError, WeightStore, WeightUpdates};

use crate::{error::ActorError, sampler_thread::SamplerThread};

/// Delay before a corrupt blob is fetched again.
const RETRY_DELAY: Duration = Duration::from_millis(500);

/// Follows the weight store and loads its newest version.
pub(crate) struct WeightLoader {
    actor: String,
    weight_store: WeightStore<PublishedWeights>,
    updates: WeightUpdates,
    /// Version that the sampler has, or is loading.
    version: WeightsVersion,
    /// Announced version that is not loaded yet.
    pending: Option<WeightsVersion>,
    /// Number of corrupt fetches.
    failures: u32,
    loaded: watch::Sender<WeightsVersion>,
}

impl WeightLoader {
    /// A loader for an actor that begins with the reference.
    pub(crate) fn new(actor: &str, weight_store: WeightStore<PublishedWeights>) -> Self {
        Self {
            actor: actor.to_owned(),
            updates: weight_store.subscribe(),
            weight_store,
            version: WeightsVersion::REFERENCE,
            pending: None,
            failures: 0,
            loaded: watch::Sender::new(WeightsVersion::REFERENCE),
        }
    }

    /// Version that new prompts are sampled with.
    pub(crate) fn version(&self) -> WeightsVersion {
        self.version
    }

    /// Newest announced version.
    pub(crate) fn announced(&self) -> WeightsVersion {
        self.latest().unwrap_or(WeightsVersion::REFERENCE)
    }

    /// Reads the announcement from the weight store. A failure is logged: the announcement is followed anyway.
    pub(crate) async fn refresh(&self) {
        if let Err(error) = self.weight_store.refresh().await {
            tracing::warn!(actor = self.actor, %error, "the announcement of weights could not be read");
        }
    }

    /// Whether an announced version is not loaded yet.
    pub(crate) fn is_pending(&self) -> bool {
        self.pending.is_some()
    }

    /// Watches the version that is loaded.
    pub(crate) fn loaded(&self) -> watch::Receiver<WeightsVersion> {
        self.loaded.subscribe()
    }

    /// Waits for a version newer than the loaded one; it is pending from now on. Cancel-safe.
    ///
    /// # Errors
    /// If the weight store is closed.
    pub(crate) async fn newer(&mut self) -> Result<WeightsVersion, ActorError> {
        let newer = self.updates.newer_than(self.version).await;
        let version = newer.map_err(|source| self.error(source))?;
        self.pending = Some(version);
        Ok(version)
    }

    /// Fetches the pending version and has the idle sampler load it. Returns before loading has ended: see
    /// [`Self::finish`]. Returns at once if the sampler is loading already.
    ///
    /// # Errors
    /// If the weights cannot be fetched or the sampler thread has ended.
    pub(crate) async fn load_into(&mut self, sampler: &SamplerThread) -> Result<(), ActorError> {
        while let Some(version) = self.pending
            && version > self.version
        {
            match self.weight_store.fetch(version).await {
                Ok(weights) => {
                    self.version = version;
                    sampler.load(version, weights)?;
                }
                // Superseded while completions were being sampled: a newer version is announced already.
                Err(TransportError::Pruned { .. }) => self.pending = self.latest(),
                // The publisher has been notified and uploads it again.
                Err(corrupt @ TransportError::Corrupt { .. }) => {
                    self.count_failure(&corrupt);
                    tokio::time::sleep(RETRY_DELAY).await;
                    self.pending = self.latest();
                }
                Err(source) => return Err(self.error(source)),
            }
        }
        Ok(())
    }

    /// Records that the sampler has loaded this version.
    pub(crate) fn finish(&mut self, version: WeightsVersion) {
        tracing::debug!(actor = self.actor, %version, "weights loaded");
        self.pending = None;
        self.loaded.send_replace(version);
    }

    fn latest(&self) -> Option<WeightsVersion> {
        self.updates.latest()
    }

    fn count_failure(&mut self, error: &TransportError) {
        tracing::warn!(actor = self.actor, %error, "corrupt weights are fetched again");
        self.failures += 1;
        let mut measurements = Measurements::new();
        measurements.set("weight_sync/failures", f64::from(self.failures));
        telemetry::publish(&measurements, &[("actor", &self.actor)]);
    }

    fn error(&self, source: TransportError) -> ActorError {
        ActorError::Weights {
            actor: self.actor.clone(),
            source,
        }
    }
}
