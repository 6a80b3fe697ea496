//! Recovery from divergence: quarantines the batches of rejected steps and rolls back to a checkpoint.
//!
//! A step is rejected, and weights are invalid, if they are not finite or far beyond the run's own past. Does not know
//! when weights are published or saved.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use messages::LabelledPair;
use serde::{Deserialize, Serialize};
use telemetry::{Measurements, RunDirectory, SampleLog};

use crate::{
    error::LearnerError,
    pair_file::encode_pairs,
    run_scale::{RunScale, StepLimits},
    trainer::thread::TrainerThread,
};

/// Rollbacks after which a run has diverged.
const MAX_ROLLBACKS: u64 = 3;

/// Counts of rejected steps and rollbacks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoveryCounts {
    /// Rejected steps in a row.
    consecutive_rejected: u64,
    /// Steps that were rejected because they were not finite or far beyond the run's past.
    pub rejected: u64,
    /// Steps among them whose loss or gradient was not finite.
    pub nonfinite: u64,
    /// Rollbacks to a checkpoint.
    pub rollbacks: u64,
}

/// State of a [`Recovery`]; part of every checkpoint.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct RecoveryState {
    counts: RecoveryCounts,
    scale: RunScale,
}

/// Recovers a run from divergence.
pub(crate) struct Recovery {
    directory: Arc<RunDirectory>,
    /// Rejected steps in a row after which the run rolls back.
    rollback_after: u64,
    state: RecoveryState,
}

impl Recovery {
    /// Continues from this state.
    pub(crate) fn new(
        directory: Arc<RunDirectory>,
        rollback_after: u64,
        state: RecoveryState,
    ) -> Self {
        Self {
            directory,
            rollback_after,
            state,
        }
    }

    pub(crate) fn counts(&self) -> RecoveryCounts {
        self.state.counts
    }

    /// State for a checkpoint.
    pub(crate) fn state(&self) -> RecoveryState {
        self.state
    }

    /// Limits of the next step.
    pub(crate) fn step_limits(&self) -> StepLimits {
        self.state.scale.step_limits()
    }

    /// Counts a step that was applied, with its metrics.
    pub(crate) fn count_applied(&mut self, measurements: &Measurements) {
        self.state.counts.consecutive_rejected = 0;
        let of = |name| measurements.get(name).unwrap_or(0.0);
        self.state.scale.observe_step(of("loss"), of("grad_norm"));
    }

    /// Counts a rejected step and writes its batch into the run's quarantine.
    ///
    /// # Errors
    /// If the files cannot be written.
    pub(crate) fn quarantine(
        &mut self,
        step: u64,
        pairs: &[LabelledPair],
        measurements: &Measurements,
    ) -> Result<(), LearnerError> {
        let counts = &mut self.state.counts;
        counts.rejected += 1;
        counts.consecutive_rejected += 1;
        let path = write_quarantine(&self.directory, step, counts.rejected, pairs)?;
        let [loss, grad_norm] =
            ["loss", "grad_norm"].map(|name| measurements.get(name).unwrap_or(f64::NAN));
        let is_finite = loss.is_finite() && grad_norm.is_finite();
        counts.nonfinite += u64::from(!is_finite);
        let reason = match is_finite {
            true => "a step was far beyond the run's past and changed nothing",
            false => "a step was not finite and changed nothing",
        };
        tracing::warn!(step, loss, grad_norm, batch = %path.display(), "{reason}");
        Ok(())
    }

    /// Whether the number of consecutive rejected steps requires a rollback.
    pub(crate) fn must_roll_back(&self) -> bool {
        self.state.counts.consecutive_rejected >= self.rollback_after
    }

    /// Whether the trainer's weights are valid, to be published or saved; logs why not.
    ///
    /// # Errors
    /// If the trainer fails.
    pub(crate) async fn has_valid_weights(
        &mut self,
        trainer: &TrainerThread,
        step: u64,
    ) -> Result<bool, LearnerError> {
        let norm = trainer.weight_norm().await?;
        let is_valid = self.state.scale.accept_weights(norm);
        if !norm.is_finite() {
            tracing::warn!(
                step,
                "the weights are not finite: they are neither published nor saved"
            );
        } else if !is_valid {
            let largest = self.state.scale.weight_norm();
            tracing::warn!(
                step,
                norm,
                largest,
                "the weights have grown far beyond the run's past: they are neither published nor saved"
            );
        }
        Ok(is_valid)
    }

    /// Restores the trainer from the checkpoint `last`.
    ///
    /// # Errors
    /// [`LearnerError::Diverged`] after [`MAX_ROLLBACKS`], or without a checkpoint. If the checkpoint cannot be read.
    pub(crate) async fn roll_back(
        &mut self,
        trainer: &TrainerThread,
        last: Option<PathBuf>,
    ) -> Result<(), LearnerError> {
        let rollbacks = self.state.counts.rollbacks;
        let Some(last) = last.filter(|_| rollbacks < MAX_ROLLBACKS) else {
            let quarantine = self.directory.quarantine();
            return Err(LearnerError::Diverged {
                rollbacks,
                quarantine,
            });
        };
        tracing::warn!(checkpoint = %last.display(), "rolling back to the last checkpoint");
        trainer.restore(last).await?;
        self.state.counts.rollbacks += 1;
        self.state.counts.consecutive_rejected = 0;
        Ok(())
    }
}

/// Writes the batch of the `count`-th rejected step into the run's quarantine: its wire encoding, and its samples as
/// JSON lines. Returns the path of the former.
fn write_quarantine(
    directory: &RunDirectory,
    step: u64,
    count: u64,
    pairs: &[LabelledPair],
) -> Result<PathBuf, LearnerError> {
    let folder = directory.quarantine();
    let name = format!("step_{step}_{count}");
    let path = folder.join(format!("{name}.pairs"));
    create_folder(&folder)?;
    telemetry::write_atomically(&path, &encode_pairs(pairs))?;
    let mut samples = SampleLog::open(&folder.join(format!("{name}.jsonl")))?;
    for pair in pairs {
        samples.append(step, pair)?;
    }
    Ok(path)
}

fn create_folder(path: &Path) -> Result<(), LearnerError> {
    telemetry::create_private_directory(path).map_err(|reason| LearnerError::Unwritable {
        path: path.to_owned(),
        reason: reason.to_string(),
    })
}
