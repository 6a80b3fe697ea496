//! `agon train`: the whole system, in one process or in many.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use anyhow::Context;
use learner::Ending;
use settings::{Resolved, Settings, TransportSettings};
use telemetry::{RunDirectory, write_atomically};

use super::{configuration::Configuration, view};
use crate::{
    failure::{Code, Misuse},
    interrupt, launch,
    report::Report,
    roles,
    world::{self, JudgeSource, Part, Preflight, World},
};

/// Align a model by self-play, from a configuration file.
///
/// Runs actors, preference service and learner side by side and writes a run directory: the resolved
/// configuration, metrics.jsonl, samples.jsonl, checkpoints (each a Hugging Face folder) and, at the end,
/// report.json and report.md. Prints the address of a page that shows the run while it lasts. SIGTERM or
/// Ctrl-C saves and leaves with exit code 5; --resume goes on. With transport.kind = "jetstream" the roles
/// are processes, started and watched by this one.
///
/// Example: agon train configs/quickstart.toml --set learner.steps=100
#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(super) configuration: Configuration,
    /// The run directory, in place of <run.output_dir>/<run.name>.
    #[arg(long, value_name = "DIR")]
    pub(super) run_dir: Option<PathBuf>,
    /// Go on from a checkpoint: `latest` (when no value is given), `auto` (the latest if there is one,
    /// else begin), or a checkpoint's folder.
    #[arg(long, value_name = "WHICH", num_args = 0..=1, default_missing_value = "latest")]
    pub(super) resume: Option<String>,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let resolved = arguments.configuration.resolve()?;
    let path = arguments.path(&resolved.settings);
    let resume = arguments.resume.as_deref();
    let runtime = crate::runtime()?;
    match resolved.settings.transport {
        TransportSettings::Memory {} => runtime.block_on(align(&path, &resolved, resume)),
        TransportSettings::Jetstream(_) => runtime.block_on(launch::run(&path, &resolved, resume)),
    }
}

impl Arguments {
    /// The run directory.
    pub(super) fn path(&self, settings: &Settings) -> PathBuf {
        let named = || settings.run.output_dir.join(&settings.run.name);
        self.run_dir.clone().unwrap_or_else(named)
    }
}

/// Makes the run directory, or opens it and finds the checkpoint to go on from.
pub(super) fn open(
    path: &Path,
    resolved: &Resolved,
    resume: Option<&str>,
) -> anyhow::Result<(RunDirectory, Option<PathBuf>)> {
    let resume = match resume {
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
        return Err(Misuse(format!(
            "{} holds no checkpoint to resume; begin again in another directory, or use --resume auto",
            path.display()
        ))
        .into());
    }
    let before = std::fs::read_to_string(directory.config())
        .context("failed to read the run's configuration")?;
    if before != resolved.toml {
        tracing::warn!(
            "the configuration differs from the one this run began with; going on with the one given"
        );
        write_atomically(&directory.config(), resolved.toml.as_bytes())?;
    }
    Ok((directory, checkpoint))
}

/// Opens what the settings name and makes the world first: a mistake in it must not claim a run directory.
async fn align(path: &Path, resolved: &Resolved, resume: Option<&str>) -> anyhow::Result<ExitCode> {
    let settings = &resolved.settings;
    if resume.is_none() && path.join("config.toml").exists() {
        RunDirectory::create(path, &resolved.toml)?;
    }
    let read = tokio::task::block_in_place(|| Preflight::of(settings, path, Part::Whole).passed())?;
    let shown = view::beside(&settings.telemetry, path)?;
    let stop = interrupt::on_signal()?;
    let world = tokio::task::block_in_place(|| world::build(settings, read, &|| *stop.borrow()))?;
    let judge = tokio::task::block_in_place(|| {
        JudgeSource::open(settings, world.judged(), &|| *stop.borrow())
    })?;
    let (directory, resume) = open(path, resolved, resume)?;
    let directory = Arc::new(directory);
    announce(settings, &world);
    let outcome = roles::run(
        (settings, &resolved.toml, &shown.metrics),
        (&world, &Arc::new(judge)),
        &directory,
        resume,
        &stop,
    )
    .await?;
    Report::new(settings, &world, &outcome)?.tell(&directory)?;
    Ok(code_of(outcome.summary.ending))
}

pub(super) fn code_of(ending: Ending) -> ExitCode {
    match ending {
        Ending::Finished => ExitCode::SUCCESS,
        Ending::Interrupted => Code::Interrupted.into(),
    }
}

/// Says that a run begins.
pub(super) fn announce(settings: &Settings, world: &World) {
    tracing::info!(
        model = %world.folder.path.display(),
        parameters = world.folder.config.parameter_count(),
        objective = settings.learner.objective.name(),
        actors = settings.actor.count,
        steps = settings.learner.steps,
        "aligning"
    );
}
