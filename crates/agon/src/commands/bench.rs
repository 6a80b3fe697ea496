//! `agon bench`: how fast the parts are on this machine.

mod learner;
mod preference;
mod rollout;
mod shape;
mod train;
mod transport;

use std::process::ExitCode;

use serde_json::Value;

/// Measure how fast a part is on this machine.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    part: Part,
    /// One line of JSON, for programs.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(clap::Subcommand)]
enum Part {
    Rollout(rollout::Arguments),
    Learner(learner::Arguments),
    Train(train::Arguments),
    Preference(preference::Arguments),
    Transport(transport::Arguments),
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let report = match &arguments.part {
        Part::Rollout(arguments) => rollout::run(arguments)?,
        Part::Learner(arguments) => learner::run(arguments)?,
        Part::Train(arguments) => train::run(arguments)?,
        Part::Preference(arguments) => preference::run(arguments)?,
        Part::Transport(arguments) => transport::run(arguments)?,
    };
    if arguments.json {
        out!("{report}")?;
    } else {
        tell(&report, "")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A line a number, those inside one another behind their names.
fn tell(report: &Value, name: &str) -> std::io::Result<()> {
    match report {
        Value::Object(entries) => {
            for (key, value) in entries {
                let inner = if name.is_empty() {
                    key.clone()
                } else {
                    format!("{name}.{key}")
                };
                tell(value, &inner)?;
            }
        }
        Value::Number(number) if number.is_f64() => {
            out!("{name:32} {:.4}", number.as_f64().unwrap_or(f64::NAN))?;
        }
        Value::String(text) => out!("{name:32} {text}")?,
        other => out!("{name:32} {other}")?,
    }
    Ok(())
}

/// The largest memory that this process has had, in GiB.
fn peak_gib() -> Option<f64> {
    telemetry::peak_memory_bytes().map(|bytes| bytes as f64 / f64::from(1 << 30))
}
