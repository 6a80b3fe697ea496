//! `agon status`: who is in a run, where they are, and what they wait for.

use std::{path::PathBuf, process::ExitCode};

use settings::{Override, Settings, TransportSettings, resolve_file};
use transport::Hub;

use crate::{
    failure::Misuse,
    overview::{Overview, Participant, Source, Standing},
    roles::Streams,
};

/// Tell who takes part in a run, how far each is, and what it waits for.
///
/// A process that is slow still gives signs of life: it is present, and says what it waits for and since
/// when. One that gives none for longer than transport.lease_seconds is gone, and what it held is with
/// others.
///
/// Example: agon status runs/quickstart
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// A run directory, or a configuration.
    run: PathBuf,
    /// Change one setting, VALUE being TOML; may be given again.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<Override>,
    /// One JSON document instead of a table.
    #[arg(long)]
    json: bool,
    /// Remove the run from its server: its messages, its weights and its register. Its directory stays.
    #[arg(long)]
    remove: bool,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let config = match arguments.run.is_dir() {
        true => arguments.run.join("config.toml"),
        false => arguments.run.clone(),
    };
    let settings = resolve_file(&config, &arguments.set)?.settings;
    crate::runtime()?.block_on(tell(arguments, &settings))
}

async fn tell(arguments: &Arguments, settings: &Settings) -> anyhow::Result<ExitCode> {
    let overview = match &settings.transport {
        TransportSettings::Memory {} => here(arguments, settings)?,
        TransportSettings::Jetstream(jetstream) => {
            let absent = || {
                Misuse(format!(
                    "there is no run {} at {}: it has not begun, or it is over and was cleared away",
                    settings.run.name, jetstream.url
                ))
            };
            let hub = Hub::find(jetstream, &settings.run.name).await?;
            let hub = hub.ok_or_else(absent)?;
            if arguments.remove {
                hub.remove().await?;
                out!("{} is removed from {}", settings.run.name, jetstream.url)?;
                return Ok(ExitCode::SUCCESS);
            }
            let register = hub.register().ok_or_else(absent)?.clone();
            let streams = Streams::open(&hub, settings).await?;
            Overview::now(&Source::Server(register), settings, &streams)
                .await?
                .ok_or_else(absent)?
        }
    };
    if arguments.json {
        out!("{}", serde_json::to_string_pretty(&overview)?)?;
    } else {
        show(&overview)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A run whose roles meet in memory: its process writes how it is.
fn here(arguments: &Arguments, settings: &Settings) -> anyhow::Result<Overview> {
    if arguments.remove {
        return Err(Misuse(
            "the run's roles meet in memory: there is nothing of it on a server to remove".into(),
        )
        .into());
    }
    let directory = match arguments.run.is_dir() {
        true => arguments.run.clone(),
        false => settings.run.output_dir.join(&settings.run.name),
    };
    let absent = || {
        Misuse(format!(
            "{} does not say how its run is: no learner has begun there",
            directory.display()
        ))
    };
    Ok(Overview::written(&directory)?.ok_or_else(absent)?)
}

fn show(overview: &Overview) -> std::io::Result<()> {
    out!(
        "{}: {:?}, session {}, led from {}\n",
        overview.run,
        overview.state,
        overview.session,
        overview.home
    )?;
    out!("| process | state | step | in hand | waits for | metrics |\n|---|---|---|---|---|---|")?;
    // Of those who came again, only this life is of interest.
    let again = |one: &Participant| {
        let same = |other: &&Participant| {
            (&other.sign.role, &other.sign.name) == (&one.sign.role, &one.sign.name)
        };
        one.state != Standing::Present
            && overview
                .present
                .iter()
                .filter(same)
                .any(|other| other.state == Standing::Present)
    };
    for one in overview.present.iter().filter(|one| !again(one)) {
        out!("{}", row(one))?;
    }
    out!(
        "\n| stream | sent | acknowledged | queued | in hand | room |\n|---|---|---|---|---|---|"
    )?;
    for stream in &overview.streams {
        out!(
            "| {} | {} | {} | {} | {} | {} |",
            stream.name,
            stream.sent,
            stream.acknowledged,
            stream.queued,
            stream.in_hand,
            stream.capacity
        )?;
    }
    Ok(())
}

fn row(one: &Participant) -> String {
    let sign = &one.sign;
    let state = match one.state {
        Standing::Present => "present".to_owned(),
        Standing::Left => "left".to_owned(),
        Standing::Gone => format!("gone: silent for {:.0} s", one.silent_seconds),
    };
    let waits: Vec<_> = sign
        .waits
        .iter()
        .map(|(reason, seconds)| format!("{reason} ({seconds:.0} s)"))
        .collect();
    let step = sign
        .step
        .map_or_else(|| "–".to_owned(), |step| step.to_string());
    format!(
        "| {} {} ({}, pid {}) | {state} | {step} | {} | {} | {} |",
        sign.role,
        sign.name,
        sign.host,
        sign.pid,
        sign.station.in_hand,
        if waits.is_empty() {
            "–".to_owned()
        } else {
            waits.join(", ")
        },
        sign.metrics
    )
}
