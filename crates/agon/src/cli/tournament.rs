//! `agon tournament`: methods against each other.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context;
use settings::Tournament;

use crate::{
    exit_code::{Code, Resource, UsageError},
    signals,
    tournament::{self, TournamentEnding},
};

/// Compare methods: train each on several seeds with one budget, then let the policies meet.
///
/// CONFIG names the methods, each with settings of a run and a grid of settings to choose from (docs/tournaments.md;
/// configs/claims has one for each claim of the papers). Every run is a process of agon train. The settings of a method
/// are chosen by its win rate on seeds of their own; then the policies of every other seed answer the same held-out
/// prompts, and every two are compared. Writes report.html, report.json and report.md to
/// <tournament.output_dir>/<tournament.name> and prints the last. After an interruption the same command continues.
///
/// Example: agon tournament configs/claims/ipo-md.toml
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Tournament file (TOML); docs/tournaments.md explains the keys.
    #[arg(value_name = "CONFIG")]
    config: PathBuf,
    /// All stages with tiny runs, in a directory of its own whose name ends with -smoke: two seeds, two points of
    /// every grid, and the file's smoke settings.
    #[arg(long)]
    smoke: bool,
    /// Read the file and print the number of runs, without running any.
    #[arg(long)]
    dry_run: bool,
    /// Number of runs at the same time; tournament.jobs by default.
    #[arg(long, value_name = "N")]
    jobs: Option<usize>,
    /// The tournament's directory; <tournament.output_dir>/<tournament.name> by default.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let mut tournament = Tournament::read(&arguments.config, arguments.smoke)?;
    if let Some(jobs) = arguments.jobs {
        if jobs == 0 {
            return Err(UsageError("--jobs 0 would run nothing: at least 1".into()).into());
        }
        tournament.jobs = jobs;
    }
    let default = || tournament.output_dir.join(&tournament.name);
    let root = arguments.dir.clone().unwrap_or_else(default);
    let (selection, finals) = tournament.run_counts();
    if arguments.dry_run {
        out!(
            "{selection} runs to choose settings and {finals} final runs in {}",
            root.display()
        )?;
        return Ok(ExitCode::SUCCESS);
    }
    let unusable = || format!("failed to create {}", root.display());
    std::fs::create_dir_all(&root).with_context(unusable)?;
    let lock = tournament::lock_file(&root)?;
    lock.try_lock().map_err(|_| {
        Resource(format!(
            "{} is in use by another agon tournament",
            root.display()
        ))
    })?;
    let ending = crate::runtime()?.block_on(async {
        let shutdown = signals::on_signal()?;
        tournament::run(&tournament, &root, &shutdown).await
    })?;
    match ending {
        TournamentEnding::Finished(report) => {
            out!("{report}\nReport: {}", root.join("report.html").display())?;
            Ok(ExitCode::SUCCESS)
        }
        TournamentEnding::Interrupted => {
            note!("interrupted: the same command continues this tournament");
            Ok(Code::Interrupted.into())
        }
    }
}
