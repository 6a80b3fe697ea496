//! `agon report`: a run as one file that can be mailed.

use std::{path::PathBuf, process::ExitCode};

use telemetry::{RunView, write_atomically};

mod markup;
mod page;
mod picture;

/// Write a run as one HTML file: curves, tables, samples before and after, settings, environment.
///
/// The file needs nothing beside it, runs no script and can be mailed. A run that goes on is written as
/// it is now. Prints where the file is.
///
/// Example: agon report runs/quickstart --output quickstart.html
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The run directory.
    run: PathBuf,
    /// Where to write; report.html in the run directory when not given.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let mut view = RunView::open(&arguments.run)?;
    view.refresh()?;
    let beside = || arguments.run.join("report.html");
    let path = arguments.output.clone().unwrap_or_else(beside);
    let html = page::html(&view)?;
    write_atomically(&path, html.as_bytes())?;
    out!("{}", path.display())?;
    Ok(ExitCode::SUCCESS)
}
