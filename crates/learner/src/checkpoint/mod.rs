//! Checkpoints: the whole run, written to a temporary path, synced and renamed.
//!
//! A checkpoint is also a Hugging Face folder of the policy, or a PEFT folder of its adapter. Beside the model it holds
//! the optimiser's state, `state.json` with all counters and the prompts' cursor, `buffered.pairs` with the labelled
//! pairs that were not trained on, and `checksums.json`. Promises that a checkpoint is whole or absent, and that the
//! newest one is of the run's branch. Does not know when to save.

mod branch;
mod checksums;
mod files;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use messages::{LabelledPair, WeightsVersion};
use serde::{Deserialize, Serialize};
use settings::Settings;
use telemetry::{RunDirectory, StageCounters, StageSnapshot};

use crate::{
    checkpoint::branch::Branch,
    error::LearnerError,
    evaluation::Evaluation,
    file_pairs::{FilePairsState, planned_steps},
    input_record::InputRecord,
    pair_file::decode_pairs,
    progress::{RunTotals, SessionLineage},
    prompt_scheduler::PromptSchedulerState,
    recovery::RecoveryState,
    trainer::thread::TrainerThread,
};

pub use branch::{
    NewestCheckpoint, SkippedCheckpoint, latest, newest_model, newest_whole, version_of,
};
pub use files::tidy;

/// State of a run without its tensors and pairs: `state.json`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct RunSnapshot {
    pub(crate) totals: RunTotals,
    pub(crate) lineage: SessionLineage,
    /// Last published version.
    pub(crate) version: WeightsVersion,
    pub(crate) recovery: RecoveryState,
    pub(crate) scheduler: PromptSchedulerState,
    pub(crate) files: FilePairsState,
    /// Step of the last completed APO round; 0: none.
    pub(crate) apo_step: u64,
    /// Record of the run's inputs.
    pub(crate) inputs: InputRecord,
    /// Counters of every stage, by name.
    pub(crate) stages: BTreeMap<String, StageSnapshot>,
    /// Evaluations so far, oldest first.
    pub(crate) evaluations: Vec<Evaluation>,
}

/// A checkpoint without its tensors.
pub(crate) struct Checkpoint {
    pub(crate) snapshot: RunSnapshot,
    /// Labelled pairs that were not trained on.
    pub(crate) buffered: Vec<LabelledPair>,
}

/// Writes the checkpoints of a run.
pub(crate) struct Checkpoints {
    directory: Arc<RunDirectory>,
    /// Number of checkpoints kept.
    limit: usize,
    /// Record of the run's inputs.
    inputs: InputRecord,
    /// Counters of the stages in this process.
    counters: Vec<StageCounters>,
    /// Counts of the checkpoint that the run continues from, by stage; the other stages' are kept.
    restored: BTreeMap<String, StageSnapshot>,
}

impl RunSnapshot {
    /// The snapshot of a run that has not begun.
    pub(crate) fn initial(session: u64) -> Self {
        Self {
            lineage: SessionLineage::new(session),
            version: WeightsVersion::REFERENCE,
            ..Self::default()
        }
    }

    /// The snapshot from which `session` continues.
    pub(crate) fn resumed_by(self, session: u64) -> Self {
        Self {
            lineage: self.lineage.resumed_at(self.totals.step, session),
            ..self
        }
    }
}

impl Checkpoints {
    pub(crate) fn new(
        directory: Arc<RunDirectory>,
        limit: usize,
        inputs: InputRecord,
        counters: Vec<StageCounters>,
    ) -> Self {
        Self {
            directory,
            limit,
            inputs,
            counters,
            restored: BTreeMap::new(),
        }
    }

    /// Begins the session of this lineage: records it, and makes the run directory's own names durable.
    ///
    /// # Errors
    /// If the folder of checkpoints cannot be written.
    pub(crate) fn begin(&self, lineage: &SessionLineage) -> Result<(), LearnerError> {
        let folder = self.directory.checkpoints();
        branch::write_lineage(&folder, lineage)?;
        Branch::read(&folder)?.log_abandoned();
        let root = self.directory.root();
        files::sync_folder(root)?;
        let parent = root
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty());
        files::sync_folder(parent.unwrap_or(Path::new(".")))
    }

    /// Folder of the checkpoint of step `step`.
    pub(crate) fn path(&self, step: u64) -> PathBuf {
        self.directory.checkpoint(step)
    }

    /// Newest whole checkpoint of the run, to roll back to; `None` if there is none. Damaged ones are logged.
    ///
    /// # Errors
    /// If the folder of checkpoints cannot be read.
    pub(crate) fn newest(&self) -> Result<Option<PathBuf>, LearnerError> {
        let NewestCheckpoint { path, skipped } = newest_whole(&self.directory.checkpoints())?;
        for SkippedCheckpoint { path, reason } in skipped {
            tracing::warn!(checkpoint = %path.display(), reason, "a checkpoint is incomplete or damaged and is skipped");
        }
        Ok(path)
    }

    /// Restores the stages' counters from the counts of a checkpoint.
    pub(crate) fn restore_counters(&mut self, stages: BTreeMap<String, StageSnapshot>) {
        for counters in &self.counters {
            if let Some(counts) = stages.get(counters.stage().name()) {
                counters.restore(counts.clone());
            }
        }
        self.restored = stages;
    }

    /// Writes a checkpoint of the trainer's weights and removes the oldest ones of the run beyond the limit.
    ///
    /// # Errors
    /// If a file cannot be written or the trainer fails; earlier checkpoints are unchanged.
    pub(crate) async fn save(
        &self,
        trainer: &TrainerThread,
        mut checkpoint: Checkpoint,
    ) -> Result<(), LearnerError> {
        checkpoint.snapshot.stages = self.stage_counts();
        checkpoint.snapshot.inputs = self.inputs.clone();
        let path = self.path(checkpoint.snapshot.totals.step);
        let to = path.clone();
        trainer
            .inspect(move |trainer| files::write(&to, &checkpoint, trainer))
            .await?;
        Branch::read(&self.directory.checkpoints())?.prune(self.limit)?;
        tracing::debug!(path = %path.display(), "saved");
        Ok(())
    }

    /// Counts of every stage, without what is in flight: the stage will receive it again.
    fn stage_counts(&self) -> BTreeMap<String, StageSnapshot> {
        let mut stages = self.restored.clone();
        for counters in &self.counters {
            let mut counts = counters.snapshot();
            counts.received = counts.emitted + counts.total_dropped();
            counts.in_flight = 0;
            stages.insert(counters.stage().name().to_owned(), counts);
        }
        stages
    }
}

/// Reads a checkpoint without its tensors. That it is whole was checked when it was chosen.
pub(crate) fn read(path: &Path) -> Result<Checkpoint, LearnerError> {
    let snapshot = read_snapshot(path)?;
    let buffered = decode_pairs(&read_file(path, "buffered.pairs")?)
        .map_err(|reason| broken(path, "buffered.pairs", &reason))?;
    Ok(Checkpoint { snapshot, buffered })
}

fn read_snapshot(path: &Path) -> Result<RunSnapshot, LearnerError> {
    let state = read_file(path, "state.json")?;
    serde_json::from_slice(&state).map_err(|error| broken(path, "state.json", &error))
}

fn broken(path: &Path, name: &str, reason: &dyn std::fmt::Display) -> LearnerError {
    LearnerError::Checkpoint {
        path: path.to_owned(),
        reason: format!("{name}: {reason}"),
    }
}

/// Step of the last APO round that the run of a checkpoint had completed when it was saved; 0: none. A round at the
/// checkpoint's own step may have followed it.
///
/// # Errors
/// If the checkpoint cannot be read.
pub fn apo_step_of(checkpoint: &Path) -> Result<u64, LearnerError> {
    Ok(read_snapshot(checkpoint)?.apo_step)
}

fn read_file(folder: &Path, name: &str) -> Result<Vec<u8>, LearnerError> {
    let path = folder.join(name);
    files::read_regular(&path).map_err(|source| LearnerError::Unreadable { path, source })
}

/// Checks that a checkpoint is whole and of this build.
///
/// # Errors
/// If it is not.
pub fn check_whole(path: &Path) -> Result<(), LearnerError> {
    if !path.is_dir() {
        return Err(LearnerError::Unreadable {
            path: path.to_owned(),
            source: std::io::ErrorKind::NotFound.into(),
        });
    }
    checksums::verify(path).map_err(|defect| LearnerError::DamagedCheckpoint {
        path: path.to_owned(),
        reason: defect.to_string(),
    })
}

/// Whether the run of a checkpoint has taken the steps of these settings or more, and has evaluated its last weights if
/// they are to be.
///
/// # Errors
/// If the checkpoint cannot be read.
pub fn is_complete(path: &Path, settings: &Settings) -> Result<bool, LearnerError> {
    let RunSnapshot {
        totals,
        evaluations,
        files,
        ..
    } = read_snapshot(path)?;
    let steps = planned_steps(&settings.learner, &settings.pairs, files.count);
    let evaluated = evaluations.last().is_some_and(|e| e.step == totals.step);
    Ok(totals.step >= steps && (evaluated || settings.evaluation.prompts == 0))
}
