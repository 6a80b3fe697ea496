//! Results of a finished run, as a tournament reads them: its report, its curves, its policy.

use std::path::PathBuf;

use anyhow::Context;
use learner::Evaluation;
use preference::apo::RoundReport;
use serde::Deserialize;
use settings::TournamentJudge;
use telemetry::RunView;

use crate::{
    exit_code::Resource,
    tournament::plan::{Entrant, PlannedRun},
};

/// The result of a run that has finished.
pub(super) struct RunResult<'a> {
    pub(super) run: &'a PlannedRun,
    pub(super) report: RunReport,
    /// The run, for further curves.
    pub(super) view: RunView,
    /// Folder of the last checkpoint.
    pub(super) checkpoint: PathBuf,
}

/// The part of a run's `report.json` that a tournament reads.
#[derive(Deserialize)]
pub(super) struct RunReport {
    pub(super) evaluations: Vec<Evaluation>,
    #[serde(default)]
    pub(super) rounds: Vec<RoundReport>,
    pub(super) pairs: u64,
    pub(super) wall_seconds: f64,
    pub(super) peak_memory_bytes: Option<u64>,
    pub(super) weights_digest: String,
}

impl<'a> RunResult<'a> {
    /// The result of `run`; `None` if it diverged.
    ///
    /// # Errors
    /// When its files cannot be read, or it has not finished.
    pub(super) fn read(run: &'a PlannedRun) -> anyhow::Result<Option<Self>> {
        if run.diverged() {
            return Ok(None);
        }
        let mut view = RunView::open(&run.directory)?;
        view.refresh()?;
        let unfinished = || format!("{} has not finished", run.name);
        let report = view.report()?.with_context(unfinished)?;
        let report: RunReport = serde_json::from_value(report)
            .with_context(|| format!("the report of {} is of another version", run.name))?;
        if report.evaluations.is_empty() {
            return Err(Resource(format!(
                "the report of {} holds no evaluation: remove {} to repeat the run",
                run.name,
                run.directory.display()
            ))
            .into());
        }
        let checkpoints = run.directory.join("checkpoints");
        let checkpoint = learner::latest_checkpoint(&checkpoints)?.with_context(unfinished)?;
        // A damaged policy must not be replaced by an older one.
        learner::check_checkpoint(&checkpoint)?;
        Ok(Some(Self {
            run,
            report,
            view,
            checkpoint,
        }))
    }

    /// Whether the run is one of this entrant.
    pub(super) fn is_of(&self, entrant: &Entrant) -> bool {
        (self.run.method, self.run.variant) == (entrant.method, entrant.variant)
    }

    /// The win rate of the last evaluation under this judge.
    pub(super) fn last_win_rate(&self, judge: &TournamentJudge) -> Option<f64> {
        win_rate(self.report.evaluations.last()?, judge)
    }
}

/// Win rate against the reference of the start under a judge.
pub(super) fn win_rate(evaluation: &Evaluation, judge: &TournamentJudge) -> Option<f64> {
    let interval = match judge {
        TournamentJudge::Run => Some(evaluation.win_rate),
        TournamentJudge::Gold => evaluation.gold_win_rate,
        TournamentJudge::Named(name) => evaluation.under(name).and_then(|result| result.win_rate),
    };
    interval.map(|interval| interval.mean)
}
