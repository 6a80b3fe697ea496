//! Recovery from non-finite steps: quarantines their batches and rolls back to the last checkpoint.
//!
//! Does not know when weights are published or saved.

use std::{path::PathBuf, sync::Arc};

use messages::LabelledPair;
use serde::{Deserialize, Serialize};
use telemetry::{RunDirectory, SampleLog};

use crate::{
    checkpoint::{self, encode_pairs},
    error::LearnerError,
    trainer::thread::TrainerThread,
};

/// Rollbacks after which a run has diverged.
const MAX_ROLLBACKS: u64 = 3;

/// Counts of non-finite steps and rollbacks; part of every checkpoint.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct RecoveryCounts {
    /// Non-finite steps in a row.
    consecutive_nonfinite: u64,
    /// Non-finite steps in total.
    pub(crate) nonfinite: u64,
    /// Rollbacks to a checkpoint.
    pub(crate) rollbacks: u64,
}

/// Recovers a run from non-finite steps.
pub(crate) struct Recovery {
    directory: Arc<RunDirectory>,
    /// Non-finite steps in a row after which the run rolls back.
    rollback_after: u64,
    counts: RecoveryCounts,
}

impl Recovery {
    /// Continues from these counts.
    pub(crate) fn new(
        directory: Arc<RunDirectory>,
        rollback_after: u64,
        counts: RecoveryCounts,
    ) -> Self {
        Self {
            directory,
            rollback_after,
            counts,
        }
    }

    pub(crate) fn counts(&self) -> RecoveryCounts {
        self.counts
    }

    /// Counts a finite step.
    pub(crate) fn count_finite(&mut self) {
        self.counts.consecutive_nonfinite = 0;
    }

    /// Counts a non-finite step and writes its batch into the run's quarantine.
    ///
    /// # Errors
    /// If the files cannot be written.
    pub(crate) fn quarantine(
        &mut self,
        step: u64,
        pairs: &[LabelledPair],
    ) -> Result<(), LearnerError> {
        self.counts.nonfinite += 1;
        self.counts.consecutive_nonfinite += 1;
        let path = write_quarantine(&self.directory, step, self.counts.nonfinite, pairs)?;
        tracing::warn!(step, batch = %path.display(), "a step was not finite and changed nothing");
        Ok(())
    }

    /// Whether the number of consecutive non-finite steps requires a rollback.
    pub(crate) fn must_roll_back(&self) -> bool {
        self.counts.consecutive_nonfinite >= self.rollback_after
    }

    /// Restores the trainer from the last checkpoint.
    ///
    /// # Errors
    /// [`LearnerError::Diverged`] after [`MAX_ROLLBACKS`], or without a checkpoint. If the checkpoint cannot be read.
    pub(crate) async fn roll_back(&mut self, trainer: &TrainerThread) -> Result<(), LearnerError> {
        let rollbacks = self.counts.rollbacks;
        let last = checkpoint::latest(&self.directory.checkpoints())?;
        let Some(last) = last.filter(|_| rollbacks < MAX_ROLLBACKS) else {
            let quarantine = self.directory.quarantine();
            return Err(LearnerError::Diverged {
                rollbacks,
                quarantine,
            });
        };
        tracing::warn!(checkpoint = %last.display(), "going back to the last checkpoint");
        trainer.restore(last).await?;
        self.counts.rollbacks += 1;
        self.counts.consecutive_nonfinite = 0;
        Ok(())
    }
}

/// Writes the batch of the `count`-th non-finite step into the run's quarantine: its wire encoding, and its samples
/// as JSON lines. Returns the path of the former.
fn write_quarantine(
    directory: &RunDirectory,
    step: u64,
    count: u64,
    pairs: &[LabelledPair],
) -> Result<PathBuf, LearnerError> {
    let folder = directory.quarantine();
    let name = format!("step_{step}_{count}");
    let path = folder.join(format!("{name}.pairs"));
    let unwritable = |reason: std::io::Error| LearnerError::Unwritable {
        path: path.clone(),
        reason: reason.to_string(),
    };
    std::fs::create_dir_all(&folder).map_err(unwritable)?;
    telemetry::write_atomically(&path, &encode_pairs(pairs))?;
    let mut samples = SampleLog::open(&folder.join(format!("{name}.jsonl")))?;
    for pair in pairs {
        samples.append(step, pair)?;
    }
    Ok(path)
}
