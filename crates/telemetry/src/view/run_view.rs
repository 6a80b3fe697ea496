//! View of one run directory, refreshed repeatedly.
//!
//! The directory may be untrusted: only its own regular files are read, within bounds, and nothing in it causes a
//! request or a wait.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::Serialize;
use serde_json::Value;

use crate::error::TelemetryError;
use crate::run_dir::files::RunFiles;
use crate::view::comparability::EvaluationRecord;
use crate::view::curves::Curves;
use crate::view::sample_index::SampleIndex;
use crate::view::tail::Tail;

/// Maximum size of a document (settings, report, rounds) in bytes.
const MAX_DOCUMENT_BYTES: u64 = 64 << 20;

/// Maximum number of rounds that are read.
const MAX_ROUNDS: usize = 10_000;

/// View of a run. Nothing is read before [`Self::refresh`].
#[derive(Debug)]
pub struct RunView {
    root: PathBuf,
    files: RunFiles,
    metrics: Tail,
    curves: Curves,
    samples: SampleIndex,
}

/// State of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// A process of this machine has locked the directory.
    Running,
    /// All steps are done.
    Finished,
    /// The run was stopped and saved a checkpoint.
    Interrupted,
    /// No process of this machine has locked it and there is no report: it was killed, failed, or runs on another
    /// machine.
    Silent,
}

/// Summary of a run; an unchanged summary means that nothing has changed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RunStatus {
    /// Name of the directory.
    pub name: String,
    /// The directory.
    pub directory: String,
    /// State of the run.
    pub state: RunState,
    /// Last learner step.
    pub step: u64,
    /// Duration of the run up to that step, in seconds.
    pub wall_seconds: f64,
    /// Number of lines of `metrics.jsonl`.
    pub lines: u64,
    /// Number of lines of it that could not be parsed.
    pub unreadable: u64,
    /// Number of values of it without a curve, because there are too many names.
    pub ignored: u64,
    /// Number of rows of `samples.jsonl`.
    pub samples: usize,
    /// Modification time of `metrics.jsonl`, in seconds since 1970.
    pub written: Option<u64>,
}

impl RunView {
    /// A view of the directory `root`, which need not exist yet.
    #[must_use]
    pub fn new(root: impl Into<PathBuf>) -> Self {
        let root = root.into();
        Self {
            files: RunFiles::new(&root),
            metrics: Tail::new(&root, "metrics.jsonl"),
            curves: Curves::default(),
            samples: SampleIndex::new(&root),
            root,
        }
    }

    /// A view of a directory that contains a run.
    ///
    /// # Errors
    /// When it contains none.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self, TelemetryError> {
        let root = root.into();
        let view = Self::new(root);
        match view.files.contains("config.toml") || view.files.contains("metrics.jsonl") {
            true => Ok(view),
            false => Err(TelemetryError::NoRun {
                directory: view.root,
            }),
        }
    }

    /// Reads the lines appended since the last refresh.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn refresh(&mut self) -> Result<(), TelemetryError> {
        let read = self.metrics.follow(&mut self.curves);
        read.map_err(TelemetryError::file("read", self.metrics.path()))?;
        self.samples.refresh()
    }

    /// The directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Curves of `metrics.jsonl`.
    #[must_use]
    pub fn curves(&self) -> &Curves {
        &self.curves
    }

    /// Index of `samples.jsonl`.
    #[must_use]
    pub fn samples(&self) -> &SampleIndex {
        &self.samples
    }

    /// Summary of the run as of the last [`Self::refresh`].
    #[must_use]
    pub fn status(&self) -> RunStatus {
        let modified = fs::metadata(self.metrics.path()).and_then(|file| file.modified());
        let since_1970 = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).ok();
        RunStatus {
            name: self.name(),
            directory: self.root.to_string_lossy().into_owned(),
            state: self.state(),
            step: self.curves.step(),
            wall_seconds: self.curves.wall_seconds(),
            lines: self.curves.lines(),
            unreadable: self.curves.unreadable(),
            ignored: self.curves.ignored(),
            samples: self.samples.len(),
            written: modified
                .ok()
                .and_then(since_1970)
                .map(|time| time.as_secs()),
        }
    }

    /// Conditions of the last evaluation as of the last [`Self::refresh`]; `None` before the first evaluation.
    #[must_use]
    pub fn evaluation(&self) -> Option<EvaluationRecord> {
        self.curves.get("eval/win_rate")?;
        let truncation_rate = self.curves.get("eval/truncation_rate");
        Some(EvaluationRecord {
            name: self.name(),
            conditions: self.curves.conditions().cloned(),
            truncation_rate: truncation_rate.and_then(|curve| curve.last),
        })
    }

    /// The resolved settings as a JSON tree; `None` before they are written.
    ///
    /// # Errors
    /// When the file cannot be read or is not TOML.
    pub fn config(&self) -> Result<Option<Value>, TelemetryError> {
        let Some(text) = self.text("config.toml")? else {
            return Ok(None);
        };
        let tree = toml::from_str(&text).map_err(|source| TelemetryError::Settings {
            path: self.root.join("config.toml"),
            source: Box::new(source),
        })?;
        Ok(Some(tree))
    }

    /// Content of `report.json`; `None` before the end of the run.
    ///
    /// # Errors
    /// When the file cannot be read or is not JSON.
    pub fn report(&self) -> Result<Option<Value>, TelemetryError> {
        let Some(text) = self.text("report.json")? else {
            return Ok(None);
        };
        let document = |source| TelemetryError::Document {
            path: self.root.join("report.json"),
            source,
        };
        Ok(Some(serde_json::from_str(&text).map_err(document)?))
    }

    /// The rounds of adversarial preference optimisation, oldest first; incomplete lines are skipped.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn rounds(&self) -> Result<Vec<Value>, TelemetryError> {
        let text = self.text("preference/rounds.jsonl")?.unwrap_or_default();
        Ok(text
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .take(MAX_ROUNDS)
            .collect())
    }

    /// Whether a process of this user has locked the directory: the addresses that it lists are then those of that
    /// process, not untrusted.
    #[must_use]
    pub fn is_own(&self) -> bool {
        self.is_held().unwrap_or(false)
    }

    fn is_held(&self) -> Option<bool> {
        let lock = self.files.open("run.lock").ok()??.metadata().ok()?;
        let process = Path::new("/proc").join(self.lock_holder()?);
        let owner = rustix::process::geteuid().as_raw();
        if fs::metadata(&process).ok()?.uid() != owner {
            return Some(false);
        }
        let identity = |file: &fs::Metadata| (file.dev(), file.ino());
        let mut open_files = fs::read_dir(process.join("fd")).ok()?;
        Some(open_files.any(|entry| {
            // The metadata of the open file itself, without opening it.
            let open = entry.and_then(|entry| fs::metadata(entry.path()));
            open.is_ok_and(|open| identity(&open) == identity(&lock))
        }))
    }

    /// The process id in the lock file.
    fn lock_holder(&self) -> Option<String> {
        let holder = self.text("run.lock").ok()??;
        let pid = holder.trim();
        let is_number = !pid.is_empty() && pid.bytes().all(|b| b.is_ascii_digit());
        is_number.then(|| pid.to_owned())
    }

    fn text(&self, file: &str) -> Result<Option<String>, TelemetryError> {
        let bytes = self.files.read(file, MAX_DOCUMENT_BYTES)?;
        Ok(bytes.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
    }

    fn name(&self) -> String {
        let absolute = fs::canonicalize(&self.root).unwrap_or_else(|_| self.root.clone());
        let name = absolute.file_name().unwrap_or(absolute.as_os_str());
        name.to_string_lossy().into_owned()
    }

    fn state(&self) -> RunState {
        if self.is_locked() {
            return RunState::Running;
        }
        let finished = |report: &Value| report["finished"].as_bool();
        // A report that is being replaced is read on the next call.
        match self.report().ok().flatten().as_ref().and_then(finished) {
            Some(true) => RunState::Finished,
            Some(false) => RunState::Interrupted,
            None => RunState::Silent,
        }
    }

    /// Whether the process named in the lock file is alive. The lock itself is not tried: that could make a run fail
    /// that starts at this moment.
    fn is_locked(&self) -> bool {
        let process = self.lock_holder().map(|pid| Path::new("/proc").join(pid));
        process.is_some_and(|process| process.exists())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run_dir::{directory::RunDirectory, journal::Journal};

    #[test]
    fn a_run_is_viewed_from_its_first_file_to_its_report() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("first");
        assert!(matches!(
            RunView::open(&path),
            Err(TelemetryError::NoRun { .. })
        ));
        let mut view = RunView::new(&path);
        view.refresh().unwrap();
        assert_eq!(
            (view.status().state, view.config().unwrap()),
            (RunState::Silent, None)
        );

        let run = RunDirectory::create(&path, "[learner]\nsteps = 3\n").unwrap();
        let mut journal = Journal::open(&run.metrics()).unwrap();
        journal
            .append(2, 1.5, &[("loss", 0.5)].into_iter().collect())
            .unwrap();
        view.refresh().unwrap();
        let status = view.status();
        assert_eq!(
            (status.name.as_str(), status.step, status.lines),
            ("first", 2, 1)
        );
        assert_eq!((status.wall_seconds, status.samples), (1.5, 0));
        assert_eq!(status.state, RunState::Running);
        assert!(view.is_own(), "this process has locked it");
        assert_eq!(view.config().unwrap().unwrap()["learner"]["steps"], 3);
        assert_eq!(
            (view.report().unwrap(), view.rounds().unwrap().len()),
            (None, 0)
        );

        let at = run.root().to_owned();
        drop((run, journal));
        assert!(!view.is_own(), "it is unlocked");
        fs::write(at.join("run.lock"), "4194305\n").unwrap();
        for (report, state) in [
            (r#"{"finished":true}"#, RunState::Finished),
            (r#"{"finished":false}"#, RunState::Interrupted),
        ] {
            fs::write(at.join("report.json"), report).unwrap();
            assert_eq!(view.status().state, state);
        }
        fs::create_dir(at.join("preference")).unwrap();
        fs::write(at.join("preference/rounds.jsonl"), "{\"round\":1}\n{\"rou").unwrap();
        assert_eq!(view.rounds().unwrap()[0]["round"], 1);
    }

    #[test]
    fn malformed_files_are_named() {
        let directory = tempfile::tempdir().unwrap();
        for (file, expected) in [
            ("config.toml", "config.toml"),
            ("report.json", "report.json"),
        ] {
            fs::write(directory.path().join(file), "= {").unwrap();
            let view = RunView::open(directory.path()).unwrap();
            let message = match file {
                "config.toml" => view.config().unwrap_err().to_string(),
                _ => view.report().unwrap_err().to_string(),
            };
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn a_directory_whose_name_is_not_text_has_a_status() {
        let directory = tempfile::tempdir().unwrap();
        let name = <std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(b"\xff");
        let status = RunView::new(directory.path().join(name)).status();
        assert!(serde_json::to_string(&status).is_ok(), "{status:?}");
    }

    #[test]
    fn a_lock_file_that_names_a_process_is_not_its_lock() {
        let directory = tempfile::tempdir().unwrap();
        for pid in [
            std::process::id().to_string(),
            "1".into(),
            "../proc/1".into(),
        ] {
            fs::write(directory.path().join("run.lock"), &pid).unwrap();
            assert!(!RunView::new(directory.path()).is_own(), "{pid}");
        }
    }

    #[test]
    fn files_of_other_kinds_are_errors_and_are_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("config.toml"), "").unwrap();
        let link = |name: &str, target: &str| {
            std::os::unix::fs::symlink(target, path.join(name)).unwrap();
        };
        link("metrics.jsonl", "/dev/zero");
        let error = RunView::open(&path).unwrap().refresh().unwrap_err();
        assert!(error.to_string().ends_with("run/metrics.jsonl"), "{error}");
        fs::remove_file(path.join("metrics.jsonl")).unwrap();
        link("samples.jsonl", "/dev/zero");
        let error = RunView::open(&path).unwrap().refresh().unwrap_err();
        assert!(error.to_string().ends_with("run/samples.jsonl"), "{error}");
        link("report.json", "/dev/zero");
        link("run.lock", "/dev/zero");
        let view = RunView::open(&path).unwrap();
        assert!(view.report().is_err());
        assert_eq!(view.status().state, RunState::Silent);
    }
}
