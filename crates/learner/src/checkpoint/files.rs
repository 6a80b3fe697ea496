//! Writes checkpoints: to a temporary folder, synced, then renamed.
//!
//! Promises that a folder `step_N` is whole at every moment, also while the same step is saved again: the two folders
//! are exchanged in one operation of the file system. What a killed process leaves behind begins with a dot and is
//! removed by [`tidy`]. Does not know which checkpoints are kept.

use std::{
    fs::{self, File},
    io::{self, ErrorKind, Write},
    path::{Path, PathBuf},
};

use model::ModelError;
use telemetry::{create_private_directory, wait_for_descriptor};

use crate::{
    checkpoint::{Checkpoint, checksums},
    error::LearnerError,
    pair_file::encode_pairs,
    trainer::Trainer,
};

/// End of the name of a checkpoint that is being written.
const UNFINISHED: &str = ".unfinished";
/// End of the name of a checkpoint that is being removed.
const REMOVED: &str = ".removed";
/// End of the name of a checkpoint whose successor is being renamed, where folders cannot be exchanged.
const REPLACED: &str = ".replaced";

/// Writes a checkpoint to a temporary folder and renames it to `to`; on failure `to` is unchanged.
///
/// # Errors
/// If a file cannot be written.
pub(super) fn write(
    to: &Path,
    checkpoint: &Checkpoint,
    trainer: &Trainer,
) -> Result<(), LearnerError> {
    let unfinished = hidden(to, UNFINISHED);
    let written = write_files(&unfinished, checkpoint, trainer);
    let renamed = written.and_then(|()| put_in_place(&unfinished, to));
    // After an exchange it is the replaced checkpoint.
    if let Err(error) = remove_if_present(&unfinished) {
        tracing::warn!(path = %unfinished.display(), %error, "a leftover of a checkpoint could not be removed");
    }
    renamed
}

/// Removes a checkpoint. Its name disappears at once, so that no part of it looks like a damaged checkpoint.
///
/// # Errors
/// If the file system refuses.
pub(super) fn remove(path: &Path) -> Result<(), LearnerError> {
    let removed = hidden(path, REMOVED);
    let remove = || {
        remove_if_present(&removed)?;
        fs::rename(path, &removed)?;
        wait_for_descriptor(|| fs::remove_dir_all(&removed))
    };
    remove().map_err(|error| unwritable(path, &error))
}

/// Removes what a killed process left in a folder of checkpoints; a checkpoint whose replacement was interrupted gets
/// its name back.
///
/// # Errors
/// If the folder cannot be read or changed.
pub fn tidy(checkpoints: &Path) -> Result<(), LearnerError> {
    let tidy = || -> io::Result<()> {
        for entry in wait_for_descriptor(|| fs::read_dir(checkpoints))? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            let Some(name) = name.and_then(|name| name.strip_prefix(".step_")) else {
                continue;
            };
            let replaced = name.strip_suffix(REPLACED);
            let to = replaced.map(|step| checkpoints.join(format!("step_{step}")));
            match to.filter(|to| !to.exists()) {
                Some(to) => fs::rename(&path, to)?,
                None if is_leftover(name) => remove_if_present(&path)?,
                None => {}
            }
        }
        Ok(())
    };
    tidy().map_err(|error| unwritable(checkpoints, &error))
}

fn is_leftover(name: &str) -> bool {
    let ends = [UNFINISHED, REMOVED, REPLACED];
    ends.iter().any(|end| name.ends_with(end))
}

/// Path of a checkpoint in another state: a hidden name beside its own.
fn hidden(path: &Path, end: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}{end}"))
}

fn write_files(
    folder: &Path,
    checkpoint: &Checkpoint,
    trainer: &Trainer,
) -> Result<(), LearnerError> {
    remove_if_present(folder).map_err(|error| unwritable(folder, &error))?;
    let create = || create_private_directory(folder);
    wait_for_descriptor(create).map_err(|error| unwritable(folder, &error))?;
    let save = || model::save_policy(folder, trainer.folder(), trainer.policy());
    wait_for_descriptor(save).map_err(|error| match error {
        ModelError::Unwritable { path, source } => unwritable(&path, &source),
        other => LearnerError::Model(other),
    })?;
    let write = |name: &str, bytes: &[u8]| write_synced(&folder.join(name), bytes);
    write("optimizer.safetensors", &trainer.optimizer_blob()?)?;
    for (name, bytes) in trainer.extra_files()? {
        write(name, &bytes)?;
    }
    write("buffered.pairs", &encode_pairs(&checkpoint.buffered))?;
    let state = serde_json::to_vec_pretty(&checkpoint.snapshot)
        .map_err(|error| unwritable(&folder.join("state.json"), &error))?;
    write("state.json", &state)?;
    let sums = checksums::of_folder(folder).map_err(|error| unwritable(folder, &error))?;
    write(checksums::CHECKSUMS, &sums)?;
    sync_folder(folder)
}

/// Gives the finished folder `from` the name `to`, also if there is a checkpoint of that name, which then has the name
/// `from` or is gone.
fn put_in_place(from: &Path, to: &Path) -> Result<(), LearnerError> {
    let renamed = match to.exists() {
        true => exchange(from, to).or_else(|error| match is_unsupported(&error) {
            true => replace(from, to),
            false => Err(error),
        }),
        false => fs::rename(from, to),
    };
    renamed.map_err(|error| unwritable(to, &error))?;
    to.parent().map_or(Ok(()), sync_folder)
}

/// Exchanges two folders atomically.
#[cfg(target_os = "linux")]
fn exchange(one: &Path, other: &Path) -> io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE)?;
    Ok(())
}

#[cfg(not(target_os = "linux"))]
fn exchange(_: &Path, _: &Path) -> io::Result<()> {
    Err(ErrorKind::Unsupported.into())
}

/// Whether the file system cannot exchange folders.
fn is_unsupported(error: &io::Error) -> bool {
    [ErrorKind::Unsupported, ErrorKind::InvalidInput].contains(&error.kind())
}

/// Replaces `to` by `from` in two renames; [`tidy`] undoes the first if the second does not follow.
fn replace(from: &Path, to: &Path) -> io::Result<()> {
    let replaced = hidden(to, REPLACED);
    remove_if_present(&replaced)?;
    fs::rename(to, &replaced)?;
    fs::rename(from, to)?;
    wait_for_descriptor(|| fs::remove_dir_all(&replaced))
}

fn remove_if_present(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => wait_for_descriptor(|| fs::remove_dir_all(path)),
        Ok(_) => fs::remove_file(path),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), LearnerError> {
    let write = || -> io::Result<()> {
        let mut file = wait_for_descriptor(|| File::create(path))?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|error| unwritable(path, &error))
}

/// Reads a regular file: a pipe or a device in a checkpoint is an error, and is not waited for.
pub(super) fn read_regular(path: &Path) -> io::Result<Vec<u8>> {
    if !fs::metadata(path)?.is_file() {
        let reason = "it is not a regular file";
        return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
    }
    wait_for_descriptor(|| fs::read(path))
}

/// Makes the names in a folder durable.
pub(super) fn sync_folder(path: &Path) -> Result<(), LearnerError> {
    wait_for_descriptor(|| File::open(path))
        .and_then(|folder| folder.sync_all())
        .map_err(|error| unwritable(path, &error))
}

pub(super) fn unwritable(path: &Path, reason: &dyn std::fmt::Display) -> LearnerError {
    LearnerError::Unwritable {
        path: path.to_owned(),
        reason: reason.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder_with(path: &Path, content: &str) {
        fs::create_dir_all(path).unwrap();
        fs::write(path.join("state.json"), content).unwrap();
    }

    fn content(path: &Path) -> String {
        fs::read_to_string(path.join("state.json")).unwrap()
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// A reader that looks all the time finds either the old checkpoint or the new one, never none.
    #[test]
    fn a_step_that_is_saved_again_is_there_at_every_moment() {
        let directory = tempfile::tempdir().unwrap();
        let to = directory.path().join("step_4");
        let from = hidden(&to, UNFINISHED);
        folder_with(&to, "0");
        let finished = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut looks = 0;
                while !finished.load(std::sync::atomic::Ordering::Relaxed) {
                    assert!(to.is_dir(), "missing after {looks} looks");
                    looks += 1;
                }
            });
            for version in 1..200 {
                folder_with(&from, &version.to_string());
                put_in_place(&from, &to).unwrap();
                assert_eq!(content(&to), version.to_string());
                remove_if_present(&from).unwrap();
            }
            finished.store(true, std::sync::atomic::Ordering::Relaxed);
            reader.join().unwrap();
        });
    }

    #[test]
    fn two_renames_replace_where_folders_cannot_be_exchanged() {
        let directory = tempfile::tempdir().unwrap();
        let to = directory.path().join("step_4");
        let from = hidden(&to, UNFINISHED);
        folder_with(&to, "old");
        folder_with(&from, "new");
        replace(&from, &to).unwrap();
        assert_eq!(
            (content(&to).as_str(), names(directory.path())),
            ("new", vec!["step_4".to_owned()])
        );
    }

    #[test]
    fn leftovers_of_a_killed_process_are_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        for name in [
            "step_2",
            ".step_2.replaced",
            ".step_3.replaced",
            ".step_4.unfinished",
            ".step_1.removed",
            ".notes",
        ] {
            folder_with(&path(name), name);
        }
        fs::write(path(".step_5.unfinished"), "not a folder").unwrap();
        tidy(directory.path()).unwrap();
        assert_eq!(names(directory.path()), [".notes", "step_2", "step_3"]);
        assert_eq!(content(&path("step_3")), ".step_3.replaced");
        assert_eq!(content(&path("step_2")), "step_2");
    }

    #[test]
    fn a_removed_checkpoint_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("step_1");
        folder_with(&path, "");
        folder_with(&hidden(&path, REMOVED), "left by a killed process");
        remove(&path).unwrap();
        assert_eq!(names(directory.path()), Vec::<String>::new());
    }
}
