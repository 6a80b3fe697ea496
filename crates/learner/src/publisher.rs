//! Publishes weights to the weight store.
//!
//! Promises that versions only grow, and that one upload runs at a time, in the background: training blocks only
//! while the weights are copied, not during the upload. Does not know when to publish, or which weights are valid.

use std::time::{Duration, Instant};

use messages::WeightsVersion;
use model::{PublishedForm, PublishedWeights};
use telemetry::Measurements;
use tokio::{sync::watch, task::JoinHandle, time::sleep};
use transport::WeightStore;

use crate::{
    error::LearnerError,
    trainer::{
        followers::Publication,
        thread::{CopiedWeights, PublishedContent, TrainerThread},
    },
};

/// Time for an upload to end after a shutdown was requested: a run that is saved does not wait for a server that is
/// unreachable.
const LAST_UPLOAD: Duration = Duration::from_secs(10);

/// Publisher of a session's weights.
pub(crate) struct Publisher {
    weight_store: WeightStore<PublishedWeights>,
    /// Form of published weights.
    form: PublishedForm,
    session: u64,
    /// Last published version, of this or an earlier session.
    version: WeightsVersion,
    /// Models that were published with it.
    content: PublishedContent,
    upload: Option<JoinHandle<Result<(), LearnerError>>>,
    /// Turns true when the run is to end early.
    shutdown: watch::Receiver<bool>,
}

impl Publisher {
    /// A publisher for `session`, after `version` was published.
    pub(crate) fn new(
        weight_store: WeightStore<PublishedWeights>,
        form: PublishedForm,
        session: u64,
        version: WeightsVersion,
    ) -> Self {
        Self {
            shutdown: watch::channel(false).1,
            weight_store,
            form,
            session,
            version,
            content: PublishedContent::default(),
            upload: None,
        }
    }

    /// Abandons uploads that last for too long after `shutdown` has turned true.
    pub(crate) fn abandon_after(&mut self, shutdown: watch::Receiver<bool>) {
        self.shutdown = shutdown;
    }

    /// Last published version.
    pub(crate) fn version(&self) -> WeightsVersion {
        self.version
    }

    /// Models that were published with the last version.
    pub(crate) fn content(&self) -> PublishedContent {
        self.content
    }

    /// Whether the weights of `step` are published, or newer ones.
    pub(crate) fn has_published(&self, step: u64) -> bool {
        self.version >= self.version_of(step)
    }

    fn version_of(&self, step: u64) -> WeightsVersion {
        WeightsVersion {
            session: self.session,
            step,
        }
    }

    /// Publishes the trainer's weights as the version of `step`, unless it is published already: the policy's, those of
    /// a reference that has moved, and those that an evaluation needs. Returns once the upload has started.
    ///
    /// # Errors
    /// If the trainer or the previous upload fails.
    pub(crate) async fn publish(
        &mut self,
        trainer: &TrainerThread,
        step: u64,
        publication: Publication,
    ) -> Result<(), LearnerError> {
        if self.has_published(step) {
            return Ok(());
        }
        let started = Instant::now();
        // Before they are copied: no copy waits for an upload.
        self.settle().await?;
        let CopiedWeights { weights, content } = trainer.publish(self.form, publication).await?;
        let version = self.version_of(step);
        (self.version, self.content) = (version, content);
        let weight_store = self.weight_store.clone();
        self.upload = Some(tokio::spawn(upload(
            weight_store,
            version,
            weights,
            started,
        )));
        Ok(())
    }

    /// Waits for the upload in progress, if any; abandons it if it lasts for too long after a shutdown was requested.
    ///
    /// # Errors
    /// If it fails.
    pub(crate) async fn settle(&mut self) -> Result<(), LearnerError> {
        if self.upload.is_none() {
            return Ok(());
        }
        let mut shutdown = self.shutdown.clone();
        let is_late = async {
            if shutdown.wait_for(|requested| *requested).await.is_err() {
                // Nobody can request it any more.
                std::future::pending::<()>().await;
            }
            sleep(LAST_UPLOAD).await;
        };
        tokio::select! {
            ended = self.uploaded() => return ended,
            () = is_late => {}
        }
        if let Some(upload) = self.upload.take() {
            upload.abort();
            tracing::warn!(version = %self.version, "the upload of weights is abandoned: the run is saved without it");
        }
        Ok(())
    }

    /// Waits for the upload in progress; for ever if there is none. Cancel-safe.
    ///
    /// # Errors
    /// If it fails.
    pub(crate) async fn uploaded(&mut self) -> Result<(), LearnerError> {
        let Some(upload) = &mut self.upload else {
            return std::future::pending().await;
        };
        let ended = upload.await;
        self.upload = None;
        ended.map_err(|_| LearnerError::UploadPanicked)?
    }
}

async fn upload(
    weight_store: WeightStore<PublishedWeights>,
    version: WeightsVersion,
    weights: PublishedWeights,
    started: Instant,
) -> Result<(), LearnerError> {
    let bytes = weights.bytes();
    weight_store.publish(version, weights).await?;
    let mut measurements = Measurements::new();
    measurements.set("weight_sync/seconds", started.elapsed().as_secs_f64());
    measurements.set("weight_sync/bytes", bytes as f64);
    measurements.set("weight_sync/version", version.step as f64);
    telemetry::publish(&measurements, &[("role", "learner")]);
    Ok(())
}
