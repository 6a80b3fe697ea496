//! Run directory: its layout, and the lock that gives one process exclusive access.
//!
//! A directory contains a run when it contains `config.toml`, which is written last. The file lock on `run.lock`
//! lasts as long as the value, and the operating system releases it however the process ends. New directories belong
//! to their owner alone. This part does not know the contents of the files.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::process;

use crate::error::TelemetryError;
use crate::run_dir::atomic::write_atomically;
use crate::run_dir::files::open_inside;
use crate::run_dir::private::{create_private_directory, private_file};

/// Files that a session reads or continues: a pipe in the place of one would be waited for without end.
const FILES: [&str; 6] = [
    "config.toml",
    "session",
    "run.lock",
    "metrics.jsonl",
    "samples.jsonl",
    "report.json",
];

/// A run's directory, locked by this process:
/// `{config.toml, metrics.jsonl, samples.jsonl, tensorboard/, checkpoints/, quarantine/, report.json,
/// report.md, logs/, session, run.lock}`.
#[derive(Debug)]
pub struct RunDirectory {
    root: PathBuf,
    session: u64,
    /// Never read: the lock lasts while the file is open.
    _lock: File,
}

impl RunDirectory {
    /// Creates the directory of a new run with these resolved settings.
    ///
    /// # Errors
    /// When `path` already contains a run, another process has locked it, or a file operation fails.
    pub fn create(path: impl Into<PathBuf>, resolved_toml: &str) -> Result<Self, TelemetryError> {
        let root = path.into();
        create_private_directory(&root)
            .map_err(TelemetryError::file("create the directory", &root))?;
        let run = Self {
            _lock: lock(&root)?,
            root,
            session: 0,
        };
        if run.config().exists() {
            return Err(TelemetryError::RunExists {
                directory: run.root,
            });
        }
        run.create_directories()?;
        run.write_session()?;
        write_atomically(&run.config(), resolved_toml.as_bytes())?;
        Ok(run)
    }

    /// Opens the directory of a run for its next session.
    ///
    /// # Errors
    /// When `path` contains no run, another process has locked it, or a file operation fails.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, TelemetryError> {
        let root = path.into();
        if !root.join("config.toml").exists() {
            return Err(TelemetryError::RunMissing { directory: root });
        }
        for name in FILES {
            match open_inside(&root, name) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(TelemetryError::file("open", &root.join(name))(error)),
            }
        }
        let mut run = Self {
            _lock: lock(&root)?,
            root,
            session: 0,
        };
        run.create_directories()?;
        let previous = fs::read_to_string(run.session_file())
            .map_err(TelemetryError::file("read", &run.session_file()))?;
        let previous: u64 = previous.trim().parse().map_err(|_| {
            let invalid = std::io::Error::other("it does not contain a number");
            TelemetryError::file("read", &run.session_file())(invalid)
        })?;
        run.session = previous + 1;
        run.write_session()?;
        Ok(run)
    }

    /// Session number: how often the run was resumed; 0 in the first session.
    #[must_use]
    pub fn session(&self) -> u64 {
        self.session
    }

    /// Skips the session numbers up to `last`, that of a checkpoint which another copy of this directory wrote, so that
    /// this session is newer.
    ///
    /// # Errors
    /// When the session number cannot be written.
    pub fn skip_sessions(&mut self, last: u64) -> Result<(), TelemetryError> {
        if self.session > last {
            return Ok(());
        }
        self.session = last + 1;
        self.write_session()
    }

    fn session_file(&self) -> PathBuf {
        self.root.join("session")
    }

    /// Persists the session number. It is written before anything is sent, so that no two sessions have the same
    /// number however they end.
    fn write_session(&self) -> Result<(), TelemetryError> {
        write_atomically(
            &self.session_file(),
            format!("{}\n", self.session).as_bytes(),
        )
    }

    /// The directory itself.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The file of the resolved settings.
    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.root.join("config.toml")
    }

    /// The file of the journal, [`crate::Journal`].
    #[must_use]
    pub fn metrics(&self) -> PathBuf {
        self.root.join("metrics.jsonl")
    }

    /// The file of the samples, [`crate::SampleLog`].
    #[must_use]
    pub fn samples(&self) -> PathBuf {
        self.root.join("samples.jsonl")
    }

    /// The directory of TensorBoard event files; it exists only if they are enabled.
    #[must_use]
    pub fn tensorboard(&self) -> PathBuf {
        self.root.join("tensorboard")
    }

    /// The directory of all checkpoints; it always exists.
    #[must_use]
    pub fn checkpoints(&self) -> PathBuf {
        self.root.join("checkpoints")
    }

    /// The directory of the checkpoint after `step`, `checkpoints/step_N`; created by its writer.
    #[must_use]
    pub fn checkpoint(&self, step: u64) -> PathBuf {
        self.checkpoints().join(format!("step_{step}"))
    }

    /// The directory of batches of rejected steps; it always exists.
    #[must_use]
    pub fn quarantine(&self) -> PathBuf {
        self.root.join("quarantine")
    }

    /// The machine-readable report.
    #[must_use]
    pub fn report_json(&self) -> PathBuf {
        self.root.join("report.json")
    }

    /// The report as Markdown.
    #[must_use]
    pub fn report_markdown(&self) -> PathBuf {
        self.root.join("report.md")
    }

    /// The directory of log files; it always exists.
    #[must_use]
    pub fn logs(&self) -> PathBuf {
        self.root.join("logs")
    }

    fn create_directories(&self) -> Result<(), TelemetryError> {
        for directory in [self.checkpoints(), self.quarantine(), self.logs()] {
            create_private_directory(&directory)
                .map_err(TelemetryError::file("create the directory", &directory))?;
        }
        Ok(())
    }
}

/// Locks `run.lock` and writes this process's id into it, for the error message of later processes.
fn lock(root: &Path) -> Result<File, TelemetryError> {
    let path = root.join("run.lock");
    let mut file = private_file()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(&path)
        .map_err(TelemetryError::file("open", &path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            return Err(TelemetryError::RunInUse {
                directory: root.into(),
                holder: holder(&mut file),
            });
        }
        Err(TryLockError::Error(source)) => {
            return Err(TelemetryError::file("lock", &path)(source));
        }
    }
    file.set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| writeln!(file, "{}", process::id()))
        .map_err(TelemetryError::file("write", &path))?;
    Ok(file)
}

/// Description of the process that holds the lock.
fn holder(file: &mut File) -> String {
    let mut text = String::new();
    // On some systems a locked file cannot be read; the process id is then unknown.
    file.read_to_string(&mut text).ok();
    match text.trim().parse::<u32>() {
        Ok(pid) => format!("pid {pid}"),
        Err(_) => "its pid is not known".into(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_new_run_has_settings_and_directories() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("runs").join("first");
        let run = RunDirectory::create(&path, "seed = 1\n").unwrap();
        assert_eq!(fs::read_to_string(run.config()).unwrap(), "seed = 1\n");
        for directory in [
            run.checkpoints(),
            run.quarantine(),
            run.logs(),
            path.clone(),
        ] {
            let mode = fs::metadata(&directory).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o700, "{}", directory.display());
        }
        for file in [run.config(), path.join("run.lock"), path.join("session")] {
            let mode = fs::metadata(&file).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{}", file.display());
        }
        let paths = [
            (run.root().to_path_buf(), ""),
            (run.metrics(), "metrics.jsonl"),
            (run.samples(), "samples.jsonl"),
            (run.checkpoint(12), "checkpoints/step_12"),
            (run.report_json(), "report.json"),
            (run.report_markdown(), "report.md"),
        ];
        for (actual, expected) in paths {
            assert_eq!(actual.strip_prefix(&path).unwrap(), Path::new(expected));
        }
    }

    #[test]
    fn an_existing_run_is_resumed_and_never_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run");
        drop(RunDirectory::create(&path, "seed = 1\n").unwrap());
        let message = RunDirectory::create(&path, "seed = 2\n")
            .unwrap_err()
            .to_string();
        for part in [
            path.to_str().unwrap(),
            "`--resume`",
            "`run.name`",
            "`--run-dir`",
        ] {
            assert!(message.contains(part), "{message:?} does not say {part:?}");
        }
        fs::remove_dir(path.join("logs")).unwrap();
        let run = RunDirectory::open(&path).unwrap();
        assert_eq!(fs::read_to_string(run.config()).unwrap(), "seed = 1\n");
        assert!(run.logs().is_dir());
    }

    #[test]
    fn a_session_is_newer_than_the_checkpoint_that_it_resumes() {
        let directory = tempfile::tempdir().unwrap();
        drop(RunDirectory::create(directory.path(), "").unwrap());
        let mut run = RunDirectory::open(directory.path()).unwrap();
        run.skip_sessions(0).unwrap();
        assert_eq!(run.session(), 1);
        run.skip_sessions(7).unwrap();
        assert_eq!(run.session(), 8);
        drop(run);
        assert_eq!(RunDirectory::open(directory.path()).unwrap().session(), 9);
    }

    #[test]
    fn a_directory_without_a_run_is_not_resumed_or_changed() {
        let directory = tempfile::tempdir().unwrap();
        let error = RunDirectory::open(directory.path()).unwrap_err();
        assert!(
            matches!(error, TelemetryError::RunMissing { .. }),
            "{error}"
        );
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_locked_run_names_the_process_that_locked_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run");
        let locked = RunDirectory::create(&path, "").unwrap();
        for refused in [RunDirectory::open(&path), RunDirectory::create(&path, "")] {
            let message = refused.unwrap_err().to_string();
            let expected = format!("in use by another process (pid {})", process::id());
            assert!(
                message.contains(&expected),
                "{message:?} does not say {expected:?}"
            );
        }
        drop(locked);
        RunDirectory::open(&path).unwrap();
    }

    #[test]
    fn a_start_that_failed_before_writing_the_settings_can_be_repeated() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run");
        fs::create_dir_all(path.join("checkpoints")).unwrap();
        fs::write(path.join("run.lock"), "a torn or longer text\n").unwrap();
        let run = RunDirectory::create(&path, "seed = 3\n").unwrap();
        let pid = fs::read_to_string(run.root().join("run.lock")).unwrap();
        assert_eq!(pid, format!("{}\n", process::id()));
    }
}
