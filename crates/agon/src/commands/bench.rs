//! `agon bench`: how fast the parts are on this machine, as one line of JSON.

mod preference;
mod transport;

use std::process::ExitCode;

/// Measure how fast a part is on this machine.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    part: Part,
}

#[derive(clap::Subcommand)]
enum Part {
    Preference(preference::Arguments),
    Transport(transport::Arguments),
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    match &arguments.part {
        Part::Preference(arguments) => preference::run(arguments),
        Part::Transport(arguments) => transport::run(arguments),
    }
}
