//! Arguments that name a configuration and a run directory, and what `train` and `learner` do with them.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context;
use learner::{Ending, LearnerError, NewestCheckpoint, RunOrigin, SkippedCheckpoint};
use serde_json::Value;
use settings::{Override, Resolved, Settings, SettingsError, changed_settings, resolve_file};
use telemetry::{Journal, RunDirectory, RunFiles, write_atomically};

use crate::{
    assembly::{JudgeSource, RunInputs},
    exit_code::{Code, Resource, UsageError},
};

// The structs here have no doc comment: clap would show it in place of the command's own.
#[derive(clap::Args)]
pub(crate) struct Overrides {
    /// Override one setting; VALUE is TOML. May be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) set: Vec<Override>,
}

#[derive(clap::Args)]
pub(crate) struct Configuration {
    /// The configuration. `configs/default.toml` explains every key.
    #[arg(value_name = "CONFIG")]
    pub(crate) config: PathBuf,
    #[command(flatten)]
    pub(crate) overrides: Overrides,
}

impl Configuration {
    /// The resolved settings, see [`resolve_file`].
    pub(crate) fn resolve(&self) -> Result<Resolved, SettingsError> {
        resolve_file(&self.config, &self.overrides.set)
    }
}

#[derive(clap::Args)]
pub(crate) struct RunDirectoryArgument {
    /// The run directory; <run.output_dir>/<run.name> by default.
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
}

impl RunDirectoryArgument {
    /// The run directory, from the argument or else from the settings.
    pub(crate) fn path(&self, settings: &Settings) -> PathBuf {
        let default = || settings.run.output_dir.join(&settings.run.name);
        self.run_dir.clone().unwrap_or_else(default)
    }
}

#[derive(clap::Args)]
pub(crate) struct RunArguments {
    #[command(flatten)]
    pub(crate) configuration: Configuration,
    #[command(flatten)]
    pub(crate) directory: RunDirectoryArgument,
    /// Resume from a checkpoint: `latest` (when no value is given), `auto` (the newest that is whole; a new run if
    /// there has been none), or a checkpoint's folder.
    #[arg(long, value_name = "WHICH", num_args = 0..=1, default_missing_value = "latest")]
    pub(crate) resume: Option<String>,
    /// Resume although inputs of the run have changed: its model, prompts, pairs, seed, judge or objective.
    #[arg(long)]
    pub(crate) accept_changes: bool,
}

impl RunArguments {
    /// Whether the run is to be resumed and has nothing left to do: it has taken all steps and written its report,
    /// and its last checkpoint is whole.
    pub(crate) fn is_finished(&self, path: &Path, settings: &Settings) -> bool {
        let Some(which) = self.resume.as_deref() else {
            return false;
        };
        // Without its configuration it is not known what has finished.
        if !path.join("config.toml").exists() {
            return false;
        }
        let checkpoint = match which {
            "latest" | "auto" => learner::latest_checkpoint(&path.join("checkpoints")),
            folder => Ok(Some(PathBuf::from(folder))),
        };
        let Ok(Some(checkpoint)) = checkpoint else {
            return false;
        };
        let is_complete = learner::is_complete_checkpoint(&checkpoint, settings).unwrap_or(false);
        // A damaged last checkpoint is not left at that: `latest` refuses it, `auto` goes back to one that is whole.
        is_complete
            && is_reported(path, &checkpoint)
            && learner::check_checkpoint(&checkpoint).is_ok()
    }

    /// Creates the run directory `path`, or opens it and finds the checkpoint to resume from.
    pub(crate) fn open_directory(
        &self,
        path: &Path,
        resolved: &Resolved,
    ) -> anyhow::Result<OpenedDirectory> {
        let is_there = path.join("config.toml").exists();
        let which = self
            .resume
            .as_deref()
            .filter(|&which| which != "auto" || is_there);
        let Some(which) = which else {
            check_unused(path)?;
            let directory = RunDirectory::create(path, &resolved.toml)?;
            return Ok(OpenedDirectory {
                directory,
                checkpoint: None,
            });
        };
        let mut directory = RunDirectory::open(path)?;
        if let Err(error) = telemetry::restore_human_verdict_pairs(path) {
            // Only rounds of APO read the pairs, and refuse a damaged file themselves.
            tracing::warn!(%error, "people's verdicts were not written anew as pairs");
        }
        learner::tidy_checkpoints(&directory.checkpoints())?;
        let checkpoint = match which {
            "auto" => newest_whole(&directory)?,
            "latest" => Some(latest(&directory)?),
            folder => Some(PathBuf::from(folder)),
        };
        if let Some(checkpoint) = &checkpoint {
            learner::check_checkpoint(checkpoint)?;
            directory.skip_sessions(learner::checkpoint_version(checkpoint)?.session)?;
        }
        Ok(OpenedDirectory {
            directory,
            checkpoint,
        })
    }

    /// Start and inputs of the run. `judge` is the run's judge, if this process has it. Reads the
    /// files of the inputs, refuses those that have changed, and records the configuration.
    pub(crate) fn origin(
        &self,
        opened: &OpenedDirectory,
        resolved: &Resolved,
        inputs: &RunInputs,
        judge: Option<&JudgeSource>,
    ) -> anyhow::Result<RunOrigin> {
        let origin = RunOrigin {
            resume: opened.checkpoint.clone(),
            inputs: inputs.record(&resolved.settings, &resolved.toml, judge)?,
            accepts_changes: self.accept_changes,
        };
        origin.check()?;
        record_configuration(&opened.directory, resolved)?;
        Ok(origin)
    }
}

/// A run's directory, locked by this process.
pub(crate) struct OpenedDirectory {
    pub(crate) directory: RunDirectory,
    /// Checkpoint to resume; `None` for a run that begins.
    pub(crate) checkpoint: Option<PathBuf>,
}

/// Largest report that is read, in bytes.
const MAX_REPORT_BYTES: u64 = 1 << 28;

/// Whether the report says that the run has finished with the step of this checkpoint.
fn is_reported(run: &Path, checkpoint: &Path) -> bool {
    let report = RunFiles::new(run).read("report.json", MAX_REPORT_BYTES);
    let report = report.ok().flatten().unwrap_or_default();
    let report: Value = serde_json::from_slice(&report).unwrap_or_default();
    let Ok(version) = learner::checkpoint_version(checkpoint) else {
        return false;
    };
    report["finished"] == true && report["steps"] == version.step
}

/// Checks that a directory without a configuration holds no remains of a run, which a new one would overwrite.
fn check_unused(path: &Path) -> anyhow::Result<()> {
    let checkpoints = path.join("checkpoints");
    match learner::latest_checkpoint(&checkpoints)? {
        Some(newest) if !path.join("config.toml").exists() => Err(Resource(format!(
            "{} holds checkpoints of a run, the newest of them {}, but no config.toml: put it back to resume the run, or \
             start a new run in another directory",
            path.display(),
            newest.display()
        ))
        .into()),
        None if path.join("metrics.jsonl").exists() => Err(Resource(format!(
            "{} holds the metrics of a run, but neither config.toml nor a checkpoint: start a new run in another directory, \
             or remove this one",
            path.display()
        ))
        .into()),
        _ => Ok(()),
    }
}

/// The newest checkpoint of a run, which must be whole.
fn latest(directory: &RunDirectory) -> anyhow::Result<PathBuf> {
    if let Some(newest) = learner::latest_checkpoint(&directory.checkpoints())? {
        return Ok(newest);
    }
    let remedy = match last_step(directory) {
        0 => ", or use --resume auto",
        _ => "",
    };
    let path = directory.root().display();
    let advice = format!("start a new run in another directory{remedy}");
    Err(UsageError(format!(
        "{path} holds no checkpoint to resume from: {advice}"
    ))
    .into())
}

/// The newest whole checkpoint of a run; `None` if the run has not saved anything yet.
///
/// # Errors
/// If there is none although the run has taken steps.
fn newest_whole(directory: &RunDirectory) -> anyhow::Result<Option<PathBuf>> {
    let newest = learner::newest_whole_checkpoint(&directory.checkpoints())?;
    let NewestCheckpoint { path, skipped } = newest;
    for SkippedCheckpoint { path, reason } in &skipped {
        tracing::warn!(checkpoint = %path.display(), reason, "a checkpoint is incomplete or damaged and is skipped");
    }
    let last = last_step(directory);
    if path.is_some() || skipped.is_empty() && last == 0 {
        return Ok(path);
    }
    let none = || format!("it holds no checkpoint, and metrics.jsonl has steps up to {last}");
    let each = |skipped: &SkippedCheckpoint| {
        let name = skipped.path.file_name().unwrap_or_default();
        format!("{}: {}", name.display(), skipped.reason)
    };
    let reason = match skipped.is_empty() {
        true => none(),
        false => skipped.iter().map(each).collect::<Vec<_>>().join("; "),
    };
    Err(LearnerError::NoWholeCheckpoint {
        directory: directory.root().to_owned(),
        reason,
    }
    .into())
}

/// Last step in the journal of a run; 0 if there is none.
fn last_step(directory: &RunDirectory) -> u64 {
    let lines = Journal::read(&directory.metrics()).unwrap_or_default();
    lines.iter().map(|line| line.step).max().unwrap_or(0)
}

/// Replaces the run's configuration by the one that it is resumed with, and names what has changed.
fn record_configuration(directory: &RunDirectory, resolved: &Resolved) -> anyhow::Result<()> {
    let previous = std::fs::read_to_string(directory.config())
        .context("failed to read the run's configuration")?;
    if previous == resolved.toml {
        return Ok(());
    }
    let changes = changed_settings(&previous, &resolved.toml).join("; ");
    tracing::warn!(
        changes,
        "the configuration differs from the one that this run started with"
    );
    write_atomically(&directory.config(), resolved.toml.as_bytes())?;
    Ok(())
}

/// Reports that a finished run has nothing left to do.
pub(crate) fn nothing_left(path: &Path, settings: &Settings) -> anyhow::Result<ExitCode> {
    tracing::info!(
        run = %path.display(),
        steps = settings.learner.steps,
        "nothing is left to do: the run has taken its steps; raise learner.steps to continue it"
    );
    out!("Report: {}", path.join("report.md").display())?;
    Ok(ExitCode::SUCCESS)
}

/// Exit code of a run that ended.
pub(crate) fn exit_code(ending: Ending) -> ExitCode {
    match ending {
        Ending::Finished => ExitCode::SUCCESS,
        Ending::Interrupted => Code::Interrupted.into(),
    }
}

/// Logs the main properties of a run that starts.
pub(crate) fn log_start(settings: &Settings, inputs: &RunInputs) {
    let folder = &inputs.model.folder;
    tracing::info!(
        model = %folder.path.display(),
        parameters = folder.config.parameter_count(),
        objective = settings.learner.objective.name(),
        actors = settings.actor_count(),
        steps = settings.learner.steps,
        "aligning"
    );
}
