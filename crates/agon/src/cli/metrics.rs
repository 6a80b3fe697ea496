//! `agon metrics`: a list of all metrics.

use std::process::ExitCode;

/// Print all metrics of a run with names, kinds, labels and meanings, as Markdown.
///
/// METRICS.md is the output of this command.
#[derive(clap::Args)]
pub(crate) struct Arguments {}

pub(crate) fn run(_: &Arguments) -> anyhow::Result<ExitCode> {
    out!("{}", telemetry::metrics_markdown().trim_end())?;
    Ok(ExitCode::SUCCESS)
}
