//! `agon train`: a whole run, in one process or in several.

use std::{path::Path, process::ExitCode, sync::Arc};

use settings::{Resolved, TransportSettings};
use telemetry::RunDirectory;

use crate::cli::{
    config_args::{self, RunArguments},
    join_args::StdinArgument,
    monitoring::Monitoring,
};
use crate::{
    assembly::{CompletionOrigin, JudgeSource, Preflight, PreflightScope, RunInputs},
    cluster::launch::{self, ResumeRequest},
    report::Report,
    run::{RunContext, run_single_process},
    signals,
};

/// Align a model by online self-play.
///
/// Runs actors, preference service and learner side by side and writes a run directory: the resolved
/// configuration, metrics.jsonl, samples.jsonl, checkpoints (each a Hugging Face folder) and, at the end,
/// report.json and report.md. Logs the address of a web page that shows the run while it lasts. On SIGTERM or
/// Ctrl-C it saves a checkpoint and exits with code 5; --resume continues from there. With
/// transport.kind = "jetstream" every role is a process, started and supervised by this one.
///
/// Example: agon train configs/quickstart.toml --set learner.steps=100
#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    run: RunArguments,
    #[command(flatten)]
    stdin: StdinArgument,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let (arguments, stdin) = (&arguments.run, &arguments.stdin);
    let resolved = arguments.configuration.resolve()?;
    let path = arguments.directory.path(&resolved.settings);
    if arguments.is_finished(&path, &resolved.settings) {
        return config_args::nothing_left(&path, &resolved.settings);
    }
    let runtime = crate::runtime()?;
    match resolved.settings.transport {
        TransportSettings::Memory {} => runtime.block_on(align(arguments, stdin, &path, &resolved)),
        TransportSettings::Jetstream(_) => {
            let resume = ResumeRequest {
                which: arguments.resume.as_deref(),
                accepts_changes: arguments.accept_changes,
            };
            runtime.block_on(launch::run(&path, &resolved, resume))
        }
    }
}

/// Builds all inputs before the run directory is created, so that a mistake in them leaves none behind.
async fn align(
    arguments: &RunArguments,
    stdin: &StdinArgument,
    path: &Path,
    resolved: &Resolved,
) -> anyhow::Result<ExitCode> {
    let settings = &resolved.settings;
    if arguments.resume.is_none() && path.join("config.toml").exists() {
        // Fails: the directory holds another run.
        RunDirectory::create(path, &resolved.toml)?;
    }
    // Before anything is printed: a signal that is not handled yet would lose what follows.
    let shutdown = stdin.shutdown()?;
    let preflight = || Preflight::of(settings, path, PreflightScope::AllRoles).into_result();
    let read = tokio::task::block_in_place(preflight)?;
    let monitoring = Monitoring::start(&settings.telemetry, path)?;
    let cancel = signals::cancel_token(&shutdown);
    let inputs = tokio::task::block_in_place(|| RunInputs::build(settings, read, &cancel))?;
    let judge = tokio::task::block_in_place(|| {
        let origin = CompletionOrigin::Policy(&inputs.model);
        let open = || JudgeSource::open(settings, origin, &cancel).map(Arc::new);
        settings.needs_judge().then(open).transpose()
    })?;
    let opened = arguments.open_directory(path, resolved)?;
    let origin = || arguments.origin(&opened, resolved, &inputs, judge.as_deref());
    let origin = tokio::task::block_in_place(origin)?;
    let directory = Arc::new(opened.directory);
    config_args::log_start(settings, &inputs);
    let context = RunContext {
        settings,
        config: &resolved.toml,
        inputs: &inputs,
        directory: &directory,
        origin,
    };
    let outcome =
        run_single_process(context, judge.as_ref(), &monitoring.metrics, &shutdown).await?;
    Report::new(settings, &inputs, &outcome)?.write(&directory)?;
    Ok(config_args::exit_code(outcome.summary.ending))
}
