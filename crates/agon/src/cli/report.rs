//! `agon report`: a run as a single HTML file.

use std::{path::PathBuf, process::ExitCode};

use telemetry::{RunView, write_atomically};

/// Write a run as one HTML file: curves, tables, samples before and after, settings, environment.
///
/// The file is self-contained and runs no script. A run in progress is written in its current state. Prints the
/// path of the file.
///
/// Example: agon report runs/quickstart --output quickstart.html
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The run directory.
    run: PathBuf,
    /// The file to write; report.html in the run directory by default.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let mut view = RunView::open(&arguments.run)?;
    view.refresh()?;
    let default = || arguments.run.join("report.html");
    let path = arguments.output.clone().unwrap_or_else(default);
    let html = crate::report::html::page(&view)?;
    write_atomically(&path, html.as_bytes())?;
    out!("{}", path.display())?;
    Ok(ExitCode::SUCCESS)
}
