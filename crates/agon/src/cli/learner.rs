//! `agon learner`: the learner of a run over JetStream.

use std::{process::ExitCode, sync::Arc};

use settings::Resolved;
use transport::LeaderLease;

use crate::cli::{
    config_args::{self, RunArguments},
    join_args::StdinArgument,
    monitoring::Monitoring,
};
use crate::{
    assembly::{Preflight, PreflightScope, RunInputs},
    cluster::{self, ClusterSession, membership::host},
    report::Report,
    run::RunContext,
    signals,
};

/// Lead a run over JetStream: train on labelled pairs, publish weights, write the run directory.
///
/// A run has one learner at a time; another one is rejected until its lease expires. Actors and preference
/// services join with `agon actor CONFIG` and `agon preference CONFIG`, from any machine, before or after.
/// `agon train` starts all of them on one machine.
///
/// Example: agon learner configs/cluster.toml --set transport.url=nats://10.0.0.1:4222
#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    run: RunArguments,
    #[command(flatten)]
    stdin: StdinArgument,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    crate::runtime()?.block_on(lead(&arguments.run, &arguments.stdin))
}

/// Connects to the run's server, and waits until this process leads the run.
async fn lead_session(
    arguments: &RunArguments,
    resolved: &Resolved,
    monitoring: &Monitoring,
) -> anyhow::Result<(ClusterSession, LeaderLease)> {
    let settings = &resolved.settings;
    let path = arguments.directory.path(settings);
    let is_resumed = arguments.resume.is_some() && path.join("config.toml").exists();
    loop {
        let session = ClusterSession::connect(settings, host(), monitoring.metrics.clone()).await?;
        if let Some(lease) = session.lease(settings, &path, is_resumed).await? {
            return Ok((session, lease));
        }
    }
}

async fn lead(arguments: &RunArguments, stdin: &StdinArgument) -> anyhow::Result<ExitCode> {
    let resolved = arguments.configuration.resolve()?;
    let settings = &resolved.settings;
    let path = arguments.directory.path(settings);
    if arguments.is_finished(&path, settings) {
        return config_args::nothing_left(&path, settings);
    }
    // Before anything is printed: a signal that is not handled yet would lose what follows.
    let shutdown = stdin.shutdown()?;
    let preflight = || Preflight::of(settings, &path, PreflightScope::Learner).into_result();
    let read = tokio::task::block_in_place(preflight)?;
    let monitoring = Monitoring::start(&settings.telemetry, &path)?;
    let (session, lease) = lead_session(arguments, &resolved, &monitoring).await?;
    let cancel = signals::cancel_token(&shutdown);
    let inputs = tokio::task::block_in_place(|| RunInputs::build(settings, read, &cancel))?;
    let opened = arguments.open_directory(&path, &resolved)?;
    let origin = || arguments.origin(&opened, &resolved, &inputs, None);
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
    let run = cluster::lead(&session, context, &shutdown);
    let outcome = tokio::select! {
        outcome = run => outcome?,
        () = lease.lost() => anyhow::bail!(
            "another learner leads the run now: this one sent no heartbeat for longer than \
             transport.lease_seconds; its work since the last checkpoint is lost"
        ),
    };
    Report::new(settings, &inputs, &outcome)?.write(&directory)?;
    lease.release().await;
    if outcome.summary.ending == learner::Ending::Finished {
        session.clear().await?;
    }
    Ok(config_args::exit_code(outcome.summary.ending))
}
