//! A checkpoint is the whole run: written aside, synced, renamed.
//!
//! Its folder is also a Hugging Face folder of the policy, or PEFT's of its adapter. Beside the model lie the optimiser's state,
//! `state.json` with every counter and the feed's cursor, and `in_hand.pairs` with labelled pairs that
//! were not yet trained on.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use messages::{LabelledPair, WeightsVersion, wire};
use serde::{Deserialize, Serialize};
use telemetry::StationSnapshot;

use crate::{Evaluation, LearnerError, feed::FeedState, step::Trainer};

/// Everything of a run but its tensors.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct State {
    /// Steps taken.
    pub(crate) step: u64,
    /// The session that works on it, and the last version of each earlier one that it goes on from.
    pub(crate) session: u64,
    pub(crate) ancestors: Vec<WeightsVersion>,
    /// The version last published.
    pub(crate) version: WeightsVersion,
    /// Pairs trained on.
    pub(crate) pairs: u64,
    /// Response tokens trained on.
    pub(crate) tokens: u64,
    /// Seconds the run has worked.
    pub(crate) wall_seconds: f64,
    /// Non-finite steps in a row, and in all.
    pub(crate) consecutive_nonfinite: u64,
    pub(crate) nonfinite: u64,
    /// How often the run went back to a checkpoint.
    pub(crate) rollbacks: u64,
    /// The prompts' cursor and those on their way.
    pub(crate) feed: FeedState,
    /// The counters of every station.
    pub(crate) stations: BTreeMap<String, StationSnapshot>,
    /// The step of the last round of the adversarial game whose samples were all given; 0: none.
    pub(crate) played: u64,
    /// Evaluations so far.
    pub(crate) evaluations: Vec<Evaluation>,
}

impl State {
    /// What the next session takes up.
    pub(crate) fn resumed(mut self, session: u64) -> Self {
        self.ancestors.push(WeightsVersion {
            session: self.session,
            step: self.step,
        });
        self.session = session;
        self
    }

    /// Whether the run's weights were once those: published by this session, or by an earlier one before
    /// this one went on from it.
    pub(crate) fn descends_from(&self, version: WeightsVersion) -> bool {
        let before =
            |last: &WeightsVersion| last.session == version.session && version.step <= last.step;
        version.session == self.session || self.ancestors.iter().any(before)
    }
}

/// What is to be written.
pub(crate) struct Checkpoint {
    pub(crate) state: State,
    pub(crate) in_hand: Vec<LabelledPair>,
}

/// Writes a checkpoint to the folder `to`: complete under another name first.
pub(crate) fn write(
    to: &Path,
    checkpoint: &Checkpoint,
    trainer: &Trainer,
) -> Result<(), LearnerError> {
    let aside = aside(to);
    let written = write_aside(&aside, checkpoint, trainer);
    let placed = written.and_then(|()| place(&aside, to));
    if placed.is_err()
        && let Err(error) = fs::remove_dir_all(&aside)
    {
        tracing::warn!(path = %aside.display(), %error, "an unfinished checkpoint could not be removed");
    }
    placed
}

/// The name a checkpoint has until it is complete.
fn aside(to: &Path) -> PathBuf {
    let name = to
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    to.with_file_name(format!(".{name}.unfinished"))
}

fn write_aside(
    aside: &Path,
    checkpoint: &Checkpoint,
    trainer: &Trainer,
) -> Result<(), LearnerError> {
    if aside.exists() {
        fs::remove_dir_all(aside).map_err(|error| unwritable(aside, &error))?;
    }
    fs::create_dir_all(aside).map_err(|error| unwritable(aside, &error))?;
    model::save_policy(aside, trainer.folder(), trainer.policy()).map_err(|error| match error {
        model::ModelError::Unwritable { path, source } => unwritable(&path, &source),
        other => LearnerError::Model(other),
    })?;
    write_synced(
        &aside.join("optimizer.safetensors"),
        &trainer.optimizer_blob()?,
    )?;
    for (name, bytes) in trainer.more_files()? {
        write_synced(&aside.join(name), &bytes)?;
    }
    write_synced(
        &aside.join("in_hand.pairs"),
        &encode_pairs(&checkpoint.in_hand),
    )?;
    let state = serde_json::to_vec_pretty(&checkpoint.state)
        .map_err(|error| unwritable(&aside.join("state.json"), &error))?;
    write_synced(&aside.join("state.json"), &state)
}

fn place(aside: &Path, to: &Path) -> Result<(), LearnerError> {
    sync_folder(aside)?;
    if to.exists() {
        fs::remove_dir_all(to).map_err(|error| unwritable(to, &error))?;
    }
    fs::rename(aside, to).map_err(|error| unwritable(to, &error))?;
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

/// Reads everything of a checkpoint but its tensors.
pub(crate) fn read(path: &Path) -> Result<Checkpoint, LearnerError> {
    let file = |name: &str| {
        let path = path.join(name);
        fs::read(&path).map_err(|source| LearnerError::Unreadable { path, source })
    };
    let broken = |reason: String| LearnerError::Checkpoint {
        path: path.to_owned(),
        reason,
    };
    let state = serde_json::from_slice(&file("state.json")?)
        .map_err(|error| broken(format!("state.json: {error}")))?;
    let in_hand =
        decode_pairs(&file("in_hand.pairs")?).map_err(|e| broken(format!("in_hand.pairs: {e}")))?;
    Ok(Checkpoint { state, in_hand })
}

/// The newest complete checkpoint in a run's folder of checkpoints, if there is one.
///
/// # Errors
/// When the folder cannot be read.
pub fn latest(checkpoints: &Path) -> Result<Option<PathBuf>, LearnerError> {
    Ok(all(checkpoints)?.pop().map(|(_, path)| path))
}

/// The learner step of a checkpoint.
///
/// # Errors
/// When it cannot be read.
pub fn step_of(path: &Path) -> Result<u64, LearnerError> {
    Ok(read(path)?.state.step)
}

/// Removes all but the newest `keep` checkpoints.
pub(crate) fn prune(checkpoints: &Path, keep: usize) -> Result<(), LearnerError> {
    let mut old = all(checkpoints)?;
    old.truncate(old.len().saturating_sub(keep));
    for (_, path) in old {
        fs::remove_dir_all(&path).map_err(|error| unwritable(&path, &error))?;
    }
    Ok(())
}

/// The complete checkpoints of a run, oldest first.
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

/// Messages one after the other, each after its length as eight little-endian bytes.
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
        let message = rest.get(..length).ok_or("the file is torn")?;
        pairs.push(wire::decode(message).map_err(|error| error.to_string())?);
        bytes = &rest[length..];
    }
    if bytes.is_empty() {
        Ok(pairs)
    } else {
        Err("the file is torn".into())
    }
}
