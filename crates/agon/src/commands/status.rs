//! `agon status`: who is in a run, where they are, and what they wait for.

use std::{path::PathBuf, process::ExitCode};

use messages::Station;
use settings::{Override, Settings, TransportSettings, resolve_file};
use transport::{Counts, Hub};

use crate::{
    failure::Misuse,
    presence::{self, RunRecord, Seen},
    roles::Streams,
};

/// Tell who takes part in a run over JetStream, how far each is, and what it waits for.
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
    let TransportSettings::Jetstream(jetstream) = &settings.transport else {
        return Err(Misuse(
            "the run's roles meet in memory: its own log and metrics tell how it is; \
             agon status is for transport.kind = \"jetstream\""
                .into(),
        )
        .into());
    };
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
        println!("{} is removed from {}", settings.run.name, jetstream.url);
        return Ok(ExitCode::SUCCESS);
    }
    let Some(register) = hub.register() else {
        return Ok(ExitCode::SUCCESS);
    };
    let record = RunRecord::read(register).await?.ok_or_else(absent)?;
    let everyone = presence::everyone(register).await?;
    let streams = Streams::open(&hub, settings).await?.counts().await?;
    if arguments.json {
        let people: Vec<_> = everyone
            .iter()
            .map(|seen| in_json(seen, register.lease()))
            .collect();
        let streams: serde_json::Map<_, _> = streams
            .iter()
            .map(|(name, counts)| ((*name).to_owned(), stream_in_json(counts)))
            .collect();
        let stations: serde_json::Map<_, _> = [Station::Actor, Station::Preference]
            .iter()
            .map(|station| {
                let books = presence::books(&everyone, *station);
                (station.name().to_owned(), serde_json::json!(books))
            })
            .collect();
        let document = serde_json::json!({
            "run": settings.run.name,
            "state": record.state,
            "session": record.session,
            "present": people,
            "streams": streams,
            "stations": stations,
        });
        println!("{document:#}");
        return Ok(ExitCode::SUCCESS);
    }
    println!(
        "{}: {:?}, session {}, led from {}\n",
        settings.run.name, record.state, record.session, record.home
    );
    println!(
        "| process | state | step | in hand | waits for | metrics |\n|---|---|---|---|---|---|"
    );
    for seen in &everyone {
        println!("{}", row(seen, register.lease()));
    }
    println!("\n| stream | sent | acknowledged | queued | in hand |\n|---|---|---|---|---|");
    for (name, counts) in &streams {
        println!(
            "| {name} | {} | {} | {} | {} |",
            counts.sent, counts.acknowledged, counts.queued, counts.in_hand
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// "present", "left", or "gone" for one that is silent for too long.
fn state(seen: &Seen, lease: std::time::Duration) -> &'static str {
    match () {
        () if seen.sign.left => "left",
        () if seen.ago > lease => "gone",
        () => "present",
    }
}

fn row(seen: &Seen, lease: std::time::Duration) -> String {
    let sign = &seen.sign;
    let state = match state(seen, lease) {
        "gone" => format!("gone: silent for {} s", seen.ago.as_secs()),
        other => other.to_owned(),
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

fn in_json(seen: &Seen, lease: std::time::Duration) -> serde_json::Value {
    let mut value = serde_json::json!(seen.sign);
    value["state"] = state(seen, lease).into();
    value["silent_seconds"] = seen.ago.as_secs_f64().into();
    value
}

fn stream_in_json(counts: &Counts) -> serde_json::Value {
    serde_json::json!({
        "sent": counts.sent,
        "acknowledged": counts.acknowledged,
        "queued": counts.queued,
        "in_hand": counts.in_hand,
        "redelivered": counts.redelivered,
        "given_up": counts.given_up,
    })
}
