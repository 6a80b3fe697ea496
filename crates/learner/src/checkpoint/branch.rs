//! The checkpoints that a run continues from: its branch, their newest, and their pruning.
//!
//! A run that is resumed from an earlier checkpoint leaves the later ones behind; they are on no branch of it any more,
//! whatever their step. `lineage.json` beside the checkpoints names the current session and where earlier ones were
//! resumed, so that the branch is known before the session has saved anything. Does not know what is in a checkpoint.

use std::{
    fs,
    path::{Path, PathBuf},
};

use messages::WeightsVersion;
use serde::Deserialize;
use telemetry::{wait_for_descriptor, write_atomically};

use crate::{
    checkpoint::{
        checksums::{Defect, verify},
        files,
    },
    error::LearnerError,
    progress::SessionLineage,
};

/// File of the current session's lineage, in the folder of checkpoints.
const LINEAGE: &str = "lineage.json";

/// Checkpoints of a run, oldest first.
pub(super) struct Branch {
    /// Checkpoints that the run continues from.
    members: Vec<CheckpointFolder>,
    /// Checkpoints that it has left behind by resuming from an earlier one.
    abandoned: Vec<CheckpointFolder>,
}

/// A folder `step_N`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct CheckpointFolder {
    step: u64,
    path: PathBuf,
    /// Session and step that its state names; `None` if the state cannot be read.
    version: Option<WeightsVersion>,
}

/// The part of `state.json` that places a checkpoint.
#[derive(Deserialize)]
struct StateHeader {
    totals: StepHeader,
    lineage: SessionLineage,
}

#[derive(Deserialize)]
struct StepHeader {
    step: u64,
}

/// A checkpoint that was passed over because it cannot be resumed.
#[derive(Debug)]
pub struct SkippedCheckpoint {
    /// Folder of the checkpoint.
    pub path: PathBuf,
    /// The reason.
    pub reason: String,
}

/// Newest whole checkpoint of a run.
#[derive(Debug, Default)]
pub struct NewestCheckpoint {
    /// Folder of the checkpoint; `None` if there is none.
    pub path: Option<PathBuf>,
    /// Newer ones of the same branch that are not whole, newest first.
    pub skipped: Vec<SkippedCheckpoint>,
}

impl Branch {
    /// Reads the branch in a folder of checkpoints; empty if the folder is missing.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub(super) fn read(checkpoints: &Path) -> Result<Self, LearnerError> {
        let all = folders(checkpoints)?;
        let lineage = current_lineage(checkpoints).or_else(|| {
            // Written before there was such a file: the branch of the newest session.
            let newest = all.iter().max_by_key(|folder| folder.version)?;
            Some(header(&newest.path)?.lineage)
        });
        let is_member = |folder: &CheckpointFolder| match (&lineage, folder.version) {
            (Some(lineage), Some(version)) => lineage.descends_from(version),
            // Its state is damaged: it is named rather than passed over in silence.
            _ => true,
        };
        let (members, abandoned) = all.into_iter().partition(is_member);
        Ok(Self { members, abandoned })
    }

    /// Removes all but the newest `keep` checkpoints of the branch. Abandoned ones are kept, and those whose state
    /// cannot be read.
    ///
    /// # Errors
    /// If one cannot be removed.
    pub(super) fn prune(mut self, keep: usize) -> Result<(), LearnerError> {
        self.members.retain(|folder| folder.version.is_some());
        let old = self.members.len().saturating_sub(keep);
        let mut old = self.members.iter().take(old);
        old.try_for_each(|folder| files::remove(&folder.path))
    }

    /// Logs the checkpoints that a session from step `step` on leaves behind.
    pub(super) fn log_abandoned(&self) {
        if self.abandoned.is_empty() {
            return;
        }
        let steps: Vec<u64> = self.abandoned.iter().map(|folder| folder.step).collect();
        tracing::warn!(
            ?steps,
            "the run does not continue from these later checkpoints: they are kept until their step is saved again"
        );
    }
}

/// Newest checkpoint of the branch, whole or not; `None` if there is none.
///
/// # Errors
/// If the folder of checkpoints cannot be read.
pub fn latest(checkpoints: &Path) -> Result<Option<PathBuf>, LearnerError> {
    let newest = Branch::read(checkpoints)?.members.pop();
    Ok(newest.map(|folder| folder.path))
}

/// Newest checkpoint of the branch that is whole.
///
/// # Errors
/// If the folder of checkpoints cannot be read.
pub fn newest_whole(checkpoints: &Path) -> Result<NewestCheckpoint, LearnerError> {
    newest_that(checkpoints, |defect| defect.is_none())
}

/// Newest checkpoint of the branch whose model can be read: a whole one, or one of another build.
///
/// # Errors
/// If the folder of checkpoints cannot be read, or every checkpoint is damaged.
pub fn newest_model(checkpoints: &Path) -> Result<Option<PathBuf>, LearnerError> {
    let readable = |defect: Option<&Defect>| !matches!(defect, Some(Defect::Damaged(_)));
    let NewestCheckpoint { path, mut skipped } = newest_that(checkpoints, readable)?;
    if path.is_none() && !skipped.is_empty() {
        let SkippedCheckpoint { path, reason } = skipped.swap_remove(0);
        return Err(LearnerError::DamagedCheckpoint { path, reason });
    }
    for SkippedCheckpoint { path, reason } in skipped {
        tracing::warn!(checkpoint = %path.display(), reason, "a checkpoint is incomplete or damaged and is skipped");
    }
    Ok(path)
}

fn newest_that(
    checkpoints: &Path,
    accepts: impl Fn(Option<&Defect>) -> bool,
) -> Result<NewestCheckpoint, LearnerError> {
    let mut newest = NewestCheckpoint::default();
    for CheckpointFolder { path, .. } in Branch::read(checkpoints)?.members.into_iter().rev() {
        let defect = verify(&path).err();
        if accepts(defect.as_ref()) {
            newest.path = Some(path);
            break;
        }
        newest
            .skipped
            .extend(defect.map(|defect| SkippedCheckpoint {
                path,
                reason: defect.to_string(),
            }));
    }
    Ok(newest)
}

/// Records the lineage of the session that begins.
///
/// # Errors
/// If the file cannot be written.
pub(super) fn write_lineage(
    checkpoints: &Path,
    lineage: &SessionLineage,
) -> Result<(), LearnerError> {
    let path = checkpoints.join(LINEAGE);
    let json = serde_json::to_vec(lineage).map_err(|error| files::unwritable(&path, &error))?;
    Ok(write_atomically(&path, &json)?)
}

/// Lineage of the newest session; `None` if it was not recorded.
fn current_lineage(checkpoints: &Path) -> Option<SessionLineage> {
    let json = files::read_regular(&checkpoints.join(LINEAGE)).ok()?;
    serde_json::from_slice(&json).ok()
}

/// Session and step of a checkpoint; `None` if its state cannot be read.
fn version(checkpoint: &Path) -> Option<WeightsVersion> {
    let StateHeader { totals, lineage } = header(checkpoint)?;
    Some(WeightsVersion {
        session: lineage.session,
        step: totals.step,
    })
}

fn header(checkpoint: &Path) -> Option<StateHeader> {
    let json = files::read_regular(&checkpoint.join("state.json")).ok()?;
    serde_json::from_slice(&json).ok()
}

/// Session and step at which a checkpoint was written.
///
/// # Errors
/// If it cannot be read.
pub fn version_of(checkpoint: &Path) -> Result<WeightsVersion, LearnerError> {
    version(checkpoint).ok_or_else(|| LearnerError::Checkpoint {
        path: checkpoint.to_owned(),
        reason: "its state.json cannot be read".into(),
    })
}

/// All folders `step_N`, by step.
fn folders(checkpoints: &Path) -> Result<Vec<CheckpointFolder>, LearnerError> {
    let unreadable = |source| LearnerError::Unreadable {
        path: checkpoints.to_owned(),
        source,
    };
    if !checkpoints.exists() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    let entries = wait_for_descriptor(|| fs::read_dir(checkpoints)).map_err(unreadable)?;
    for entry in entries {
        let path = entry.map_err(unreadable)?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let step = name.and_then(|name| name.strip_prefix("step_")?.parse::<u64>().ok());
        if let Some(step) = step.filter(|step| path.ends_with(format!("step_{step}"))) {
            let version = version(&path);
            found.push(CheckpointFolder {
                step,
                path,
                version,
            });
        }
    }
    found.sort_by_key(|folder| folder.step);
    Ok(found)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::checkpoint::checksums;

    /// Writes the state of a checkpoint of this session and step, whose earlier sessions ended at `ancestors`.
    fn save(checkpoints: &Path, lineage: &SessionLineage, step: u64) -> PathBuf {
        let path = checkpoints.join(format!("step_{step}"));
        fs::create_dir_all(&path).unwrap();
        let state = json!({"totals": {"step": step}, "lineage": lineage});
        fs::write(path.join("state.json"), state.to_string()).unwrap();
        let sums = checksums::of_folder(&path).unwrap();
        fs::write(path.join(checksums::CHECKSUMS), sums).unwrap();
        path
    }

    fn steps(folders: &[CheckpointFolder]) -> Vec<u64> {
        folders.iter().map(|folder| folder.step).collect()
    }

    /// A session that saved the steps 2, 4 and 6.
    fn first_session() -> (tempfile::TempDir, SessionLineage) {
        let directory = tempfile::tempdir().unwrap();
        let lineage = SessionLineage::new(0);
        write_lineage(directory.path(), &lineage).unwrap();
        for step in [2, 4, 6] {
            save(directory.path(), &lineage, step);
        }
        (directory, lineage)
    }

    #[test]
    fn the_branch_is_that_of_the_session_and_not_of_the_largest_step() {
        let (directory, first) = first_session();
        let folder = directory.path();
        assert_eq!(latest(folder).unwrap(), Some(folder.join("step_6")));
        // Resumed from step 2, and killed before the first save.
        let second = first.resumed_at(2, 1);
        write_lineage(folder, &second).unwrap();
        let branch = Branch::read(folder).unwrap();
        assert_eq!(
            (steps(&branch.members), steps(&branch.abandoned)),
            (vec![2], vec![4, 6])
        );
        assert_eq!(latest(folder).unwrap(), Some(folder.join("step_2")));
        // The branch reaches the step of an abandoned checkpoint.
        save(folder, &second, 3);
        save(folder, &second, 4);
        let branch = Branch::read(folder).unwrap();
        assert_eq!(
            (steps(&branch.members), steps(&branch.abandoned)),
            (vec![2, 3, 4], vec![6])
        );
        branch.prune(2).unwrap();
        assert_eq!(steps(&folders(folder).unwrap()), [3, 4, 6]);
        assert_eq!(
            newest_whole(folder).unwrap().path,
            Some(folder.join("step_4"))
        );
    }

    #[test]
    fn without_a_recorded_lineage_the_newest_session_has_the_branch() {
        let (directory, first) = first_session();
        save(directory.path(), &first.resumed_at(2, 1), 3);
        fs::remove_file(directory.path().join(LINEAGE)).unwrap();
        let branch = Branch::read(directory.path()).unwrap();
        assert_eq!(
            (steps(&branch.members), steps(&branch.abandoned)),
            (vec![2, 3], vec![4, 6])
        );
    }

    #[test]
    fn damaged_checkpoints_are_skipped_with_their_reason() {
        let (directory, lineage) = first_session();
        let folder = directory.path();
        fs::write(folder.join("step_6/state.json"), "{").unwrap();
        fs::create_dir(folder.join("step_8")).unwrap();
        Branch::read(folder).unwrap().prune(2).unwrap();
        assert_eq!(steps(&folders(folder).unwrap()), [2, 4, 6, 8]);
        for name in ["step_07", "step_+9", "step_x", ".step_9.unfinished"] {
            fs::create_dir(folder.join(name)).unwrap();
        }
        assert_eq!(latest(folder).unwrap(), Some(folder.join("step_8")));
        let newest = newest_whole(folder).unwrap();
        assert_eq!(newest.path, Some(folder.join("step_4")));
        let skipped: Vec<_> = newest.skipped.iter().map(|skipped| &skipped.path).collect();
        assert_eq!(skipped, [&folder.join("step_8"), &folder.join("step_6")]);
        assert!(
            newest.skipped[1].reason.contains("state.json"),
            "{:?}",
            newest.skipped
        );
        // A checkpoint of an earlier build has a model, and is not resumed.
        let old = save(folder, &lineage, 10);
        fs::remove_file(old.join(checksums::CHECKSUMS)).unwrap();
        assert_eq!(newest_model(folder).unwrap(), Some(old));
        assert_eq!(
            newest_whole(folder).unwrap().path,
            Some(folder.join("step_4"))
        );
        assert_eq!(newest_model(&folder.join("missing")).unwrap(), None);
    }
}
