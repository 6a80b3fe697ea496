//! `agon status`: the processes of a run, their progress, and what they wait for.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context;
use settings::{JetStreamSettings, Settings, TransportSettings, resolve, resolve_file};
use telemetry::{RunFiles, RunView, printable_json, printable_line};
use transport::Transport;

use crate::{
    cli::config_args::Overrides,
    cluster::{
        membership::RunRecord,
        server_users::ServerRole,
        status::{ClusterStatus, Liveness, MemberSource, Participant},
    },
    exit_code::UsageError,
    report::markup::number,
    run::{RunStreams, STREAM_NAMES},
};

/// Maximum size of a run's config.toml in bytes.
const MAX_CONFIG_BYTES: u64 = 4 << 20;

/// Maximum number of processes and of streams that are shown.
const MAX_SHOWN: usize = 1000;

/// Show the processes of a run, their progress, and what they wait for.
///
/// A process that sends heartbeats is present, however slow it is; its waits are shown with their durations. A
/// process without a heartbeat for longer than transport.lease_seconds is gone, and its messages in flight are
/// redelivered to others.
///
/// A run directory holds the status that its learner last wrote there. The NATS server that the directory names is
/// asked only while a process of this user runs there, or with --connect, --set or --remove: the directory may be
/// somebody else's.
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
    /// Ask the server that the run directory names, with the credentials that it names.
    #[arg(long)]
    connect: bool,
    /// Remove the run from its server: its messages, its weights and its registry. The run directory stays.
    #[arg(long)]
    remove: bool,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    if arguments.run.is_dir() && !asks_server(arguments) {
        return print(arguments, &read_status(&arguments.run)?);
    }
    let settings = settings(arguments)?;
    match &settings.transport {
        TransportSettings::Memory {} => {
            if arguments.remove {
                let nothing = "the run uses transport.kind = \"memory\": there is nothing on a server to remove";
                return Err(UsageError(nothing.into()).into());
            }
            print(arguments, &read_status(&directory(arguments, &settings))?)
        }
        TransportSettings::Jetstream(jetstream) => {
            crate::runtime()?.block_on(ask(arguments, &settings, jetstream))
        }
    }
}

/// Whether the server that a run directory names may be asked.
fn asks_server(arguments: &Arguments) -> bool {
    let is_asked = arguments.connect || arguments.remove || !arguments.overrides.set.is_empty();
    is_asked || RunView::new(&arguments.run).is_own()
}

fn settings(arguments: &Arguments) -> anyhow::Result<Settings> {
    let overrides = &arguments.overrides.set;
    if !arguments.run.is_dir() {
        return Ok(resolve_file(&arguments.run, overrides)?.settings);
    }
    let path = arguments.run.join("config.toml");
    let text = RunFiles::new(&arguments.run).read("config.toml", MAX_CONFIG_BYTES)?;
    let absent = || {
        UsageError(format!(
            "{} contains no config.toml: name a run directory or a configuration",
            arguments.run.display()
        ))
    };
    let text = String::from_utf8(text.ok_or_else(absent)?)
        .with_context(|| format!("failed to read {}", path.display()))?;
    Ok(resolve(&text, &path.display().to_string(), overrides)?.settings)
}

/// Asks the server of the run for its status, or to remove the run.
async fn ask(
    arguments: &Arguments,
    settings: &Settings,
    jetstream: &JetStreamSettings,
) -> anyhow::Result<ExitCode> {
    let absent = || {
        UsageError(format!(
            "there is no run {} at {}: it has not started, or it has finished and was removed",
            settings.run.name, jetstream.url
        ))
    };
    let transport = Transport::find(jetstream, &settings.run.name, ServerRole::View.name()).await?;
    let transport = transport.ok_or_else(absent)?;
    if arguments.remove {
        transport.remove(&STREAM_NAMES).await?;
        out!("{} is removed from {}", settings.run.name, jetstream.url)?;
        return Ok(ExitCode::SUCCESS);
    }
    let registry = transport.registry().ok_or_else(absent)?.clone();
    // The learner writes the record when the streams are there.
    RunRecord::read(&registry).await?.ok_or_else(absent)?;
    let streams = RunStreams::open(&transport, settings).await?;
    let source = MemberSource::Registry(registry);
    let status = ClusterStatus::now(&source, settings, &streams).await?;
    print(arguments, &status.ok_or_else(absent)?)
}

/// The run directory of a run in a single process.
fn directory(arguments: &Arguments, settings: &Settings) -> PathBuf {
    match arguments.run.is_dir() {
        true => arguments.run.clone(),
        false => settings.run.output_dir.join(&settings.run.name),
    }
}

/// The status that a run has written to its directory.
fn read_status(directory: &Path) -> anyhow::Result<ClusterStatus> {
    let absent = || {
        UsageError(format!(
            "{} holds no status of a run: no learner has started there",
            directory.display()
        ))
    };
    Ok(ClusterStatus::read(directory)?.ok_or_else(absent)?)
}

fn print(arguments: &Arguments, status: &ClusterStatus) -> anyhow::Result<ExitCode> {
    match arguments.json {
        true => out!("{}", printable_json(&serde_json::to_string_pretty(status)?))?,
        false => print_tables(status)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn print_tables(status: &ClusterStatus) -> std::io::Result<()> {
    let line = |text: String| out!("{}", printable_line(&text));
    line(format!(
        "{}: {:?}, session {}, led from {}",
        status.run, status.state, status.session, status.home
    ))?;
    out!(
        "\n| process | state | step | in flight | waits for | metrics |\n|---|---|---|---|---|---|"
    )?;
    let key = |process: &Participant| {
        let heartbeat = &process.heartbeat;
        (heartbeat.role.clone(), heartbeat.name.clone())
    };
    let is_present = |process: &&Participant| process.state == Liveness::Present;
    let present: HashSet<_> = status
        .processes
        .iter()
        .filter(is_present)
        .map(key)
        .collect();
    // Earlier instances of a process that was restarted are left out.
    let is_shown = |process: &&Participant| is_present(process) || !present.contains(&key(process));
    for process in status.processes.iter().filter(is_shown).take(MAX_SHOWN) {
        line(row(process))?;
    }
    out!(
        "\n| stream | sent | acknowledged | queued | in flight | room | dead letters |\n|---|---|---|---|---|---|---|"
    )?;
    for stream in status.streams.iter().take(MAX_SHOWN) {
        line(format!(
            "| {} | {} | {} | {} | {} | {} | {} |",
            stream.name,
            stream.sent,
            stream.acknowledged,
            stream.queued,
            stream.in_flight,
            stream.capacity,
            stream.dead_lettered
        ))?;
    }
    let shown = status.processes.len().max(status.streams.len());
    if shown > MAX_SHOWN {
        out!("\nThe first {MAX_SHOWN} of {shown} are shown; --json prints all.")?;
    }
    Ok(())
}

fn row(process: &Participant) -> String {
    let heartbeat = &process.heartbeat;
    let state = match process.state {
        Liveness::Present => "present".to_owned(),
        Liveness::Left => "left".to_owned(),
        Liveness::Gone => format!("gone: silent for {} s", number(process.silent_seconds, 0)),
    };
    let waits: Vec<_> = heartbeat
        .waits
        .iter()
        .take(MAX_SHOWN)
        .map(|(reason, seconds)| format!("{reason} ({} s)", number(*seconds, 0)))
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
