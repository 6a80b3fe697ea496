//! `agon status`: the processes of a run, their progress, and what they wait for.

use std::{path::PathBuf, process::ExitCode};

use settings::{Settings, TransportSettings, resolve_file};
use transport::Transport;

use crate::{
    cli::config_args::Overrides,
    cluster::status::{ClusterStatus, Liveness, MemberSource, Participant},
    exit_code::UsageError,
    run::RunStreams,
};

/// Show the processes of a run, their progress, and what they wait for.
///
/// A process that sends heartbeats is present, however slow it is; its waits are shown with their durations. A
/// process without a heartbeat for longer than transport.lease_seconds is gone, and its messages in flight are
/// redelivered to others.
///
/// Example: agon status runs/quickstart
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// A run directory, or a configuration.
    run: PathBuf,
    #[command(flatten)]
    overrides: Overrides,
    /// Print one JSON document instead of tables.
    #[arg(long)]
    json: bool,
    /// Remove the run from its server: its messages, its weights and its registry. The run directory stays.
    #[arg(long)]
    remove: bool,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let config = match arguments.run.is_dir() {
        true => arguments.run.join("config.toml"),
        false => arguments.run.clone(),
    };
    let settings = resolve_file(&config, &arguments.overrides.set)?.settings;
    crate::runtime()?.block_on(report(arguments, &settings))
}

async fn report(arguments: &Arguments, settings: &Settings) -> anyhow::Result<ExitCode> {
    let status = match &settings.transport {
        TransportSettings::Memory {} => read_status(arguments, settings)?,
        TransportSettings::Jetstream(jetstream) => {
            let absent = || {
                UsageError(format!(
                    "there is no run {} at {}: it has not started, or it has finished and was removed",
                    settings.run.name, jetstream.url
                ))
            };
            let transport = Transport::find(jetstream, &settings.run.name).await?;
            let transport = transport.ok_or_else(absent)?;
            if arguments.remove {
                transport.remove().await?;
                out!("{} is removed from {}", settings.run.name, jetstream.url)?;
                return Ok(ExitCode::SUCCESS);
            }
            let registry = transport.registry().ok_or_else(absent)?.clone();
            let streams = RunStreams::open(&transport, settings).await?;
            ClusterStatus::now(&MemberSource::Registry(registry), settings, &streams)
                .await?
                .ok_or_else(absent)?
        }
    };
    if arguments.json {
        out!("{}", serde_json::to_string_pretty(&status)?)?;
    } else {
        print_tables(&status)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Status of a run in a single process, which writes it into the run directory.
fn read_status(arguments: &Arguments, settings: &Settings) -> anyhow::Result<ClusterStatus> {
    if arguments.remove {
        return Err(UsageError(
            "the run uses transport.kind = \"memory\": there is nothing on a server to remove"
                .into(),
        )
        .into());
    }
    let directory = match arguments.run.is_dir() {
        true => arguments.run.clone(),
        false => settings.run.output_dir.join(&settings.run.name),
    };
    let absent = || {
        UsageError(format!(
            "{} holds no status of a run: no learner has started there",
            directory.display()
        ))
    };
    Ok(ClusterStatus::read(&directory)?.ok_or_else(absent)?)
}

fn print_tables(status: &ClusterStatus) -> std::io::Result<()> {
    out!(
        "{}: {:?}, session {}, led from {}\n",
        status.run,
        status.state,
        status.session,
        status.home
    )?;
    out!(
        "| process | state | step | in flight | waits for | metrics |\n|---|---|---|---|---|---|"
    )?;
    // Earlier instances of a process that was restarted are left out.
    let is_replaced = |process: &Participant| {
        let same = |other: &&Participant| {
            (&other.heartbeat.role, &other.heartbeat.name)
                == (&process.heartbeat.role, &process.heartbeat.name)
        };
        process.state != Liveness::Present
            && status
                .present
                .iter()
                .filter(same)
                .any(|other| other.state == Liveness::Present)
    };
    for process in status
        .present
        .iter()
        .filter(|process| !is_replaced(process))
    {
        out!("{}", row(process))?;
    }
    out!(
        "\n| stream | sent | acknowledged | queued | in flight | room |\n|---|---|---|---|---|---|"
    )?;
    for stream in &status.streams {
        out!(
            "| {} | {} | {} | {} | {} | {} |",
            stream.name,
            stream.sent,
            stream.acknowledged,
            stream.queued,
            stream.in_flight,
            stream.capacity
        )?;
    }
    Ok(())
}

fn row(process: &Participant) -> String {
    let heartbeat = &process.heartbeat;
    let state = match process.state {
        Liveness::Present => "present".to_owned(),
        Liveness::Left => "left".to_owned(),
        Liveness::Gone => format!("gone: silent for {:.0} s", process.silent_seconds),
    };
    let waits: Vec<_> = heartbeat
        .waits
        .iter()
        .map(|(reason, seconds)| format!("{reason} ({seconds:.0} s)"))
        .collect();
    let step = heartbeat
        .step
        .map_or_else(|| "–".to_owned(), |step| step.to_string());
    format!(
        "| {} {} ({}, pid {}) | {state} | {step} | {} | {} | {} |",
        heartbeat.role,
        heartbeat.name,
        heartbeat.host,
        heartbeat.pid,
        heartbeat.stage.in_flight,
        if waits.is_empty() {
            "–".to_owned()
        } else {
            waits.join(", ")
        },
        heartbeat.metrics
    )
}
