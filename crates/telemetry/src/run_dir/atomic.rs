//! Atomic file replacement: write a temporary file, sync it, rename it.
//!
//! A reader never sees a partial file, and after a crash the path has either the old or the new contents. Files are
//! readable by their owner only, because they hold samples; a full table of file descriptors is waited for. This part
//! does not know what it writes.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::TelemetryError;
use crate::run_dir::{descriptors::wait_for_descriptor, private::private_file};

/// Atomically replaces the file at `path` with `contents`; on failure it is unchanged. Only the owner can read it.
///
/// # Errors
/// When the temporary file cannot be created, written, synced or renamed.
pub fn write_atomically(path: &Path, contents: &[u8]) -> Result<(), TelemetryError> {
    replace(path, |file| file.write_all(contents))
}

/// Atomically replaces the file at `path` with the output of `write`; on failure it is unchanged.
pub(crate) fn replace<T>(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> io::Result<T>,
) -> Result<T, TelemetryError> {
    let tmp_path = tmp_path(path);
    let result = write_and_sync(&tmp_path, write).and_then(|value| {
        fs::rename(&tmp_path, path)?;
        sync_directory(path)?;
        Ok(value)
    });
    result.map_err(|source| {
        // After the rename there is no temporary file; before it, the first error is the one to report.
        fs::remove_file(&tmp_path).ok();
        TelemetryError::file("write", path)(source)
    })
}

fn write_and_sync<T>(
    tmp_path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> io::Result<T>,
) -> io::Result<T> {
    // A file of this name is the leftover of a killed process with the same id, as every process in a container has.
    let create = || {
        let mut options = private_file();
        options
            .write(true)
            .create(true)
            .truncate(true)
            .open(tmp_path)
    };
    let mut file = BufWriter::new(wait_for_descriptor(create)?);
    let value = write(&mut file)?;
    file.flush()?;
    file.get_ref().sync_all()?;
    Ok(value)
}

/// A unique hidden name in the same directory, so that the rename stays within one file system.
fn tmp_path(path: &Path) -> PathBuf {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let count = COUNTER.fetch_add(1, Ordering::Relaxed);
    path.with_file_name(format!(".{name}.{}-{count}.tmp", process::id()))
}

/// Makes the rename durable; directories can be synced on Unix only.
fn sync_directory(path: &Path) -> io::Result<()> {
    if cfg!(unix) {
        let parent = path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty());
        let parent = parent.unwrap_or(Path::new("."));
        wait_for_descriptor(|| File::open(parent))?.sync_all()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        entries
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect()
    }

    #[test]
    fn contents_are_replaced_without_leftover_files() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("report.md");
        for contents in ["first, and longer", "second"] {
            write_atomically(&path, contents.as_bytes()).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), contents);
            assert_eq!(names(directory.path()), ["report.md"]);
            let mode = fs::metadata(&path).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        }
    }

    #[test]
    fn the_leftover_of_a_killed_process_is_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        let tmp_path = tmp_path(&directory.path().join("report.md"));
        fs::write(&tmp_path, "a longer text than the new one").unwrap();
        write_and_sync(&tmp_path, |file| file.write_all(b"new")).unwrap();
        assert_eq!(fs::read_to_string(&tmp_path).unwrap(), "new");
    }

    #[test]
    fn a_failed_write_leaves_the_old_contents() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("report.md");
        write_atomically(&path, b"old").unwrap();
        let failed = replace(&path, |file| {
            file.write_all(b"half of the n")?;
            Err::<(), _>(io::Error::other("the disk is full"))
        });
        assert!(
            failed
                .unwrap_err()
                .to_string()
                .starts_with("failed to write ")
        );
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        assert_eq!(names(directory.path()), ["report.md"]);
    }

    #[test]
    fn a_missing_directory_is_an_error_that_names_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("absent").join("report.md");
        let message = write_atomically(&path, b"x").unwrap_err().to_string();
        assert_eq!(message, format!("failed to write {}", path.display()));
    }
}
