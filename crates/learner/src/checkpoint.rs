//! Checkpoints: the whole run, written to a temporary path, synced and renamed.
//!
//! A checkpoint is also a Hugging Face folder of the policy, or a PEFT folder of its adapter. Beside the model it holds
//! the optimiser's state, `state.json` with all counters and the prompts' cursor, and `buffered.pairs` with the
//! labelled pairs that were not trained on. Promises that a checkpoint is complete or absent, and that its weights are
//! finite. Does not know when to save.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use messages::{LabelledPair, WeightsVersion, wire};
use serde::{Deserialize, Serialize};
use telemetry::{RunDirectory, StageCounters, StageSnapshot};

use crate::{
    error::LearnerError,
    evaluation::Evaluation,
    progress::{RunTotals, SessionLineage},
    prompt_scheduler::PromptSchedulerState,
    recovery::RecoveryCounts,
    trainer::{Trainer, thread::TrainerThread},
};

/// State of a run without its tensors and pairs: `state.json`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct RunSnapshot {
    pub(crate) totals: RunTotals,
    pub(crate) lineage: SessionLineage,
    /// Last published version.
    pub(crate) version: WeightsVersion,
    pub(crate) recovery: RecoveryCounts,
    pub(crate) scheduler: PromptSchedulerState,
    /// Step of the last completed APO round; 0: none.
    pub(crate) apo_step: u64,
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
    /// Counters of the stages in this process.
    counters: Vec<StageCounters>,
    /// Counts of the checkpoint that the run continues from, by stage; the other stages' are kept.
    restored: BTreeMap<String, StageSnapshot>,
}

/// Outcome of saving a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SaveOutcome {
    /// The checkpoint is complete.
    Written,
    /// The weights are not finite; nothing was written.
    NonFinite,
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
        counters: Vec<StageCounters>,
    ) -> Self {
        Self {
            directory,
            limit,
            counters,
            restored: BTreeMap::new(),
        }
    }

    /// Folder of the checkpoint of step `step`.
    pub(crate) fn path(&self, step: u64) -> PathBuf {
        self.directory.checkpoint(step)
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

    /// Writes a checkpoint and removes the oldest ones beyond the limit.
    ///
    /// # Errors
    /// If a file cannot be written or the trainer fails; earlier checkpoints are unchanged.
    pub(crate) async fn save(
        &self,
        trainer: &TrainerThread,
        mut checkpoint: Checkpoint,
    ) -> Result<SaveOutcome, LearnerError> {
        let step = checkpoint.snapshot.totals.step;
        if !trainer.is_finite().await? {
            tracing::warn!(step, "the weights are not finite and are not saved");
            return Ok(SaveOutcome::NonFinite);
        }
        checkpoint.snapshot.stages = self.stage_counts();
        let path = self.path(step);
        trainer.save(path.clone(), checkpoint).await?;
        prune(&self.directory.checkpoints(), self.limit)?;
        tracing::debug!(path = %path.display(), "saved");
        Ok(SaveOutcome::Written)
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

/// Writes a checkpoint to a temporary path and renames it to the folder `to`.
pub(crate) fn write(
    to: &Path,
    checkpoint: &Checkpoint,
    trainer: &Trainer,
) -> Result<(), LearnerError> {
    let tmp_path = tmp_path(to);
    let written = write_files(&tmp_path, checkpoint, trainer);
    let renamed = written.and_then(|()| rename(&tmp_path, to));
    if renamed.is_err()
        && let Err(error) = fs::remove_dir_all(&tmp_path)
    {
        tracing::warn!(path = %tmp_path.display(), %error, "an unfinished checkpoint could not be removed");
    }
    renamed
}

/// Path of a checkpoint until it is complete.
fn tmp_path(to: &Path) -> PathBuf {
    let name = to
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    to.with_file_name(format!(".{name}.unfinished"))
}

fn write_files(
    folder: &Path,
    checkpoint: &Checkpoint,
    trainer: &Trainer,
) -> Result<(), LearnerError> {
    if folder.exists() {
        fs::remove_dir_all(folder).map_err(|error| unwritable(folder, &error))?;
    }
    fs::create_dir_all(folder).map_err(|error| unwritable(folder, &error))?;
    model::save_policy(folder, trainer.folder(), trainer.policy()).map_err(
        |error| match error {
            model::ModelError::Unwritable { path, source } => unwritable(&path, &source),
            other => LearnerError::Model(other),
        },
    )?;
    write_synced(
        &folder.join("optimizer.safetensors"),
        &trainer.optimizer_blob()?,
    )?;
    for (name, bytes) in trainer.extra_files()? {
        write_synced(&folder.join(name), &bytes)?;
    }
    write_synced(
        &folder.join("buffered.pairs"),
        &encode_pairs(&checkpoint.buffered),
    )?;
    let state = serde_json::to_vec_pretty(&checkpoint.snapshot)
        .map_err(|error| unwritable(&folder.join("state.json"), &error))?;
    write_synced(&folder.join("state.json"), &state)
}

fn rename(from: &Path, to: &Path) -> Result<(), LearnerError> {
    sync_folder(from)?;
    if to.exists() {
        fs::remove_dir_all(to).map_err(|error| unwritable(to, &error))?;
    }
    fs::rename(from, to).map_err(|error| unwritable(to, &error))?;
    to.parent().map_or(Ok(()), sync_folder)
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), LearnerError> {
    let write = || -> io::Result<()> {
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|error| unwritable(path, &error))
}

fn sync_folder(path: &Path) -> Result<(), LearnerError> {
    File::open(path)
        .and_then(|folder| folder.sync_all())
        .map_err(|error| unwritable(path, &error))
}

fn unwritable(path: &Path, reason: &dyn std::fmt::Display) -> LearnerError {
    LearnerError::Unwritable {
        path: path.to_owned(),
        reason: reason.to_string(),
    }
}

/// Reads a checkpoint without its tensors.
pub(crate) fn read(path: &Path) -> Result<Checkpoint, LearnerError> {
    let file = |name: &str| {
        let path = path.join(name);
        fs::read(&path).map_err(|source| LearnerError::Unreadable { path, source })
    };
    let broken = |reason: String| LearnerError::Checkpoint {
        path: path.to_owned(),
        reason,
    };
    let snapshot = serde_json::from_slice(&file("state.json")?)
        .map_err(|error| broken(format!("state.json: {error}")))?;
    let buffered = decode_pairs(&file("buffered.pairs")?)
        .map_err(|e| broken(format!("buffered.pairs: {e}")))?;
    Ok(Checkpoint { snapshot, buffered })
}

/// Newest complete checkpoint in a run's folder of checkpoints; `None` if there is none.
///
/// # Errors
/// If the folder cannot be read.
pub fn latest(checkpoints: &Path) -> Result<Option<PathBuf>, LearnerError> {
    Ok(all(checkpoints)?.pop().map(|(_, path)| path))
}

/// Learner step of a checkpoint.
///
/// # Errors
/// If it cannot be read.
pub fn step_of(path: &Path) -> Result<u64, LearnerError> {
    Ok(read(path)?.snapshot.totals.step)
}

/// Removes all but the newest `keep` checkpoints.
fn prune(checkpoints: &Path, keep: usize) -> Result<(), LearnerError> {
    let mut old = all(checkpoints)?;
    old.truncate(old.len().saturating_sub(keep));
    for (_, path) in old {
        fs::remove_dir_all(&path).map_err(|error| unwritable(&path, &error))?;
    }
    Ok(())
}

/// All complete checkpoints of a run, oldest first.
fn all(folder: &Path) -> Result<Vec<(u64, PathBuf)>, LearnerError> {
    let unreadable = |source| LearnerError::Unreadable {
        path: folder.to_owned(),
        source,
    };
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        if let Some(step) = name
            .strip_prefix("step_")
            .and_then(|step| step.parse().ok())
        {
            found.push((step, path));
        }
    }
    found.sort();
    Ok(found)
}

/// Encodes pairs one after the other, each preceded by its length as eight little-endian bytes.
pub(crate) fn encode_pairs(pairs: &[LabelledPair]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for pair in pairs {
        let message = wire::encode(pair);
        bytes.extend((message.len() as u64).to_le_bytes());
        bytes.extend(message);
    }
    bytes
}

fn decode_pairs(mut bytes: &[u8]) -> Result<Vec<LabelledPair>, String> {
    let mut pairs = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk::<8>() {
        let length = usize::try_from(u64::from_le_bytes(*length)).map_err(|e| e.to_string())?;
        let message = rest.get(..length).ok_or("the file is truncated")?;
        pairs.push(wire::decode(message).map_err(|error| error.to_string())?);
        bytes = &rest[length..];
    }
    if bytes.is_empty() {
        Ok(pairs)
    } else {
        Err("the file is truncated".into())
    }
}
