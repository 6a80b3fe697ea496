//! `agon metrics`: every metric that the program publishes.

use std::process::ExitCode;

/// Print every metric that a run publishes, with its names, kind, labels and meaning, as Markdown.
///
/// METRICS.md is what this prints.
#[derive(clap::Args)]
pub(crate) struct Arguments {}

pub(crate) fn run(_: &Arguments) -> anyhow::Result<ExitCode> {
    out!("{}", telemetry::metrics_markdown().trim_end())?;
    Ok(ExitCode::SUCCESS)
}
