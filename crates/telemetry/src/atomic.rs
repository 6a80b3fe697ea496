//! Files that are whole or absent: written beside, synced, renamed.
//!
//! A reader never sees half a file, and after a crash the path holds the old contents or the new.
//! This part does not know what it writes.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::Error;

/// Replaces the file at `path` by `contents`, or leaves it as it was.
///
/// # Errors
/// When the file beside it cannot be created, written, synced or renamed.
pub fn write_atomically(path: &Path, contents: &[u8]) -> Result<(), Error> {
    replace(path, |file| file.write_all(contents))
}

/// Replaces the file at `path` by what `write` writes, or leaves it as it was when `write` fails.
pub(crate) fn replace<T>(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> io::Result<T>,
) -> Result<T, Error> {
    let beside = beside(path);
    let written = write_beside(&beside, write).and_then(|value| {
        fs::rename(&beside, path)?;
        sync_directory(path)?;
        Ok(value)
    });
    written.map_err(|source| {
        // After the rename there is nothing beside; before it, the first error is the one to tell.
        fs::remove_file(&beside).ok();
        Error::file("write", path)(source)
    })
}

fn write_beside<T>(
    beside: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> io::Result<T>,
) -> io::Result<T> {
    let mut file = BufWriter::new(File::create_new(beside)?);
    let value = write(&mut file)?;
    file.flush()?;
    file.get_ref().sync_all()?;
    Ok(value)
}

/// A hidden name in the same directory, so that the rename stays within one file system; no two
/// writers share it.
fn beside(path: &Path) -> PathBuf {
    static WRITES: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let write = WRITES.fetch_add(1, Ordering::Relaxed);
    path.with_file_name(format!(".{name}.{}-{write}.tmp", process::id()))
}

/// Makes the rename itself survive a power cut; only Unix lets a directory be synced.
fn sync_directory(path: &Path) -> io::Result<()> {
    if cfg!(unix) {
        let parent = path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty());
        File::open(parent.unwrap_or(Path::new(".")))?.sync_all()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        entries
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect()
    }

    #[test]
    fn the_new_contents_take_the_place_of_the_old_and_nothing_is_left_beside() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("report.md");
        for contents in ["first, and longer", "second"] {
            write_atomically(&path, contents.as_bytes()).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), contents);
            assert_eq!(names(directory.path()), ["report.md"]);
        }
    }

    #[test]
    fn a_write_that_fails_halfway_leaves_the_old_contents() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("report.md");
        write_atomically(&path, b"old").unwrap();
        let failed = replace(&path, |file| {
            file.write_all(b"half of the n")?;
            Err::<(), _>(io::Error::other("the disk is full"))
        });
        assert!(failed.unwrap_err().to_string().starts_with("write "));
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        assert_eq!(names(directory.path()), ["report.md"]);
    }

    #[test]
    fn a_directory_that_is_not_there_is_an_error_that_names_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("absent").join("report.md");
        let message = write_atomically(&path, b"x").unwrap_err().to_string();
        assert_eq!(message, format!("write {}", path.display()));
    }
}
