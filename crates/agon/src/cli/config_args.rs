//! Arguments that name a configuration and a run directory, and what `train` and `learner` do with them.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context;
use learner::Ending;
use settings::{Override, Resolved, Settings, SettingsError, resolve_file};
use telemetry::{RunDirectory, write_atomically};

use crate::{
    assembly::RunInputs,
    exit_code::{Code, UsageError},
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
    /// Resume from a checkpoint: `latest` (when no value is given), `auto` (the latest if there is one,
    /// else start a new run), or a checkpoint's folder.
    #[arg(long, value_name = "WHICH", num_args = 0..=1, default_missing_value = "latest")]
    pub(crate) resume: Option<String>,
}

impl RunArguments {
    /// Creates the run directory `path`, or opens it and finds the checkpoint to resume from.
    pub(crate) fn open_directory(
        &self,
        path: &Path,
        resolved: &Resolved,
    ) -> anyhow::Result<(RunDirectory, Option<PathBuf>)> {
        let resume = match self.resume.as_deref() {
            None => return Ok((RunDirectory::create(path, &resolved.toml)?, None)),
            Some("auto") if !path.join("config.toml").exists() => {
                return Ok((RunDirectory::create(path, &resolved.toml)?, None));
            }
            Some(which) => which,
        };
        let directory = RunDirectory::open(path)?;
        let checkpoint = match resume {
            "latest" | "auto" => learner::latest_checkpoint(&directory.checkpoints())?,
            path => Some(PathBuf::from(path)),
        };
        if checkpoint.is_none() && resume == "latest" {
            return Err(UsageError(format!(
                "{} holds no checkpoint to resume from: start a new run in another directory, or use --resume auto",
                path.display()
            ))
            .into());
        }
        let previous = std::fs::read_to_string(directory.config())
            .context("failed to read the run's configuration")?;
        if previous != resolved.toml {
            tracing::warn!(
                "the configuration differs from the one that this run started with; the new one is used"
            );
            write_atomically(&directory.config(), resolved.toml.as_bytes())?;
        }
        Ok((directory, checkpoint))
    }
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
        actors = settings.actor.count,
        steps = settings.learner.steps,
        "aligning"
    );
}
