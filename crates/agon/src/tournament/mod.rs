//! Tournaments: methods train with the same budget, the best settings of each are chosen on seeds of their own, and the
//! policies of the other seeds meet on the same prompts.
//!
//! Every run is a process of `agon train` with a directory of its own, so that a tournament which was interrupted
//! continues where it was. Does not know how a run trains.

mod files;
mod meetings;
mod page;
mod plan;
mod results;
mod run_process;
mod run_result;
mod selection;
mod statistics;
mod tables;

use std::path::Path;

use anyhow::Context;
use settings::Tournament;
use telemetry::{printable, printable_json, write_atomically};
use tokio::sync::watch;

use crate::tournament::{
    meetings::SeedFinals,
    plan::{Plan, SelectedVariant},
    results::TournamentResults,
    run_process::RunQueue,
    run_result::RunResult,
};

/// Ending of a tournament.
pub(crate) enum TournamentEnding {
    /// All runs and meetings are done; the text is the report.
    Finished(String),
    /// Interrupted; the same command continues it.
    Interrupted,
}

/// The file of the tournament in `root` that its process locks.
///
/// # Errors
/// When it cannot be opened, or is no regular file.
pub(crate) fn lock_file(root: &Path) -> anyhow::Result<std::fs::File> {
    files::append(&root.join("tournament.lock"))
}

/// Runs what is missing of the tournament in the folder `root`, and writes `report.html`, `report.json` and `report.md`
/// there.
///
/// # Errors
/// When a run fails for another reason than divergence, a directory belongs to other settings, or a policy cannot be
/// read or judged.
pub(crate) async fn run(
    tournament: &Tournament,
    root: &Path,
    shutdown: &watch::Sender<bool>,
) -> anyhow::Result<TournamentEnding> {
    let plan = Plan::new(tournament, root);
    plan.write_configurations()?;
    let queue = RunQueue::new(tournament.jobs, shutdown);
    let selection = plan.selection_runs()?;
    if !queue.run_all("selection", &selection).await? {
        return Ok(TournamentEnding::Interrupted);
    }
    let selected = selection::select(tournament, &selection)?;
    for choice in &selected {
        choice.log();
    }
    let finals = plan.final_runs(&selected)?;
    if !queue.run_all("finals", &finals).await? {
        return Ok(TournamentEnding::Interrupted);
    }
    let entrants = plan.entrants(&selected)?;
    let read = || {
        let results = finals.iter().map(RunResult::read);
        results.filter_map(Result::transpose).collect()
    };
    let results: Vec<RunResult> = tokio::task::block_in_place::<_, anyhow::Result<_>>(read)?;
    let mut met = Vec::new();
    for &seed in &tournament.seeds {
        let of_seed = results.iter().filter(|result| result.run.seed == seed);
        let first = finals.iter().find(|run| run.seed == seed);
        let finals = SeedFinals {
            first: first.context("a seed has runs")?,
            results: of_seed.collect(),
        };
        let meetings = || meetings::meet(tournament, root, &entrants, &finals, shutdown);
        match tokio::task::block_in_place(meetings)? {
            Some(of_seed) => met.extend(of_seed),
            None => return Ok(TournamentEnding::Interrupted),
        }
    }
    let results = TournamentResults::new(tournament, &selected, &entrants, &results, &met);
    let text = write_report(root, &results)?;
    Ok(TournamentEnding::Finished(text))
}

/// Writes the three reports; the Markdown is also returned.
fn write_report(root: &Path, results: &TournamentResults) -> anyhow::Result<String> {
    let json = serde_json::to_string_pretty(results).context("failed to encode the results")?;
    let json = format!("{}\n", printable_json(&json));
    write_atomically(&root.join("report.json"), json.as_bytes())?;
    write_atomically(&root.join("report.html"), page::page(results)?.as_bytes())?;
    let markdown = printable(&tables::markdown(results)?).into_owned();
    write_atomically(&root.join("report.md"), markdown.as_bytes())?;
    Ok(markdown)
}

impl SelectedVariant {
    fn log(&self) {
        if let Some(score) = self.score {
            tracing::info!(
                method = self.method,
                settings = self.label,
                win_rate = score,
                "settings chosen"
            );
        }
    }
}
