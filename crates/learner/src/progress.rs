//! Progress of a run: steps taken, data consumed and time spent, and the sessions that it consists of.

use std::time::Instant;

use messages::{LabelledPair, Purpose, WeightsVersion};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// Totals of a run; part of every checkpoint.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct RunTotals {
    /// Steps taken. A rollback takes a step too.
    pub(crate) step: u64,
    /// Pairs trained on.
    pub(crate) pairs: u64,
    /// Pairs among them that came from files.
    pub(crate) file_pairs: u64,
    /// Response tokens trained on.
    pub(crate) tokens: u64,
    /// Working time in seconds, earlier sessions included.
    pub(crate) wall_seconds: f64,
}

/// Totals of a run in progress.
pub(crate) struct RunProgress {
    /// As of now, except `wall_seconds`, which is as of the session's start.
    totals: RunTotals,
    started: Instant,
    steps: watch::Sender<u64>,
}

impl RunProgress {
    /// Continues from these totals.
    pub(crate) fn new(totals: RunTotals) -> Self {
        Self {
            started: Instant::now(),
            steps: watch::Sender::new(totals.step),
            totals,
        }
    }

    pub(crate) fn step(&self) -> u64 {
        self.totals.step
    }

    /// Totals as of now.
    pub(crate) fn totals(&self) -> RunTotals {
        RunTotals {
            wall_seconds: self.totals.wall_seconds + self.started.elapsed().as_secs_f64(),
            ..self.totals.clone()
        }
    }

    /// Watches the number of optimiser steps.
    pub(crate) fn watch_steps(&self) -> watch::Receiver<u64> {
        self.steps.subscribe()
    }

    /// Counts an optimiser step on these pairs.
    pub(crate) fn advance(&mut self, pairs: &[LabelledPair]) {
        self.totals.step += 1;
        self.steps.send_replace(self.totals.step);
        self.totals.pairs += label_count(pairs) as u64;
        self.totals.file_pairs += count_from_files(pairs) as u64;
        let completions = pairs.iter().flat_map(|l| &l.pair.completions);
        self.totals.tokens += completions.map(|c| c.ids.len() as u64).sum::<u64>();
    }

    /// Counts the step that a rollback takes.
    pub(crate) fn skip_step(&mut self) {
        self.totals.step += 1;
    }
}

/// Number of compared pairs of completions: one per label, so three for a prompt with three completions.
pub(crate) fn label_count(pairs: &[LabelledPair]) -> usize {
    pairs.iter().map(|labelled| labelled.labels.len()).sum()
}

/// Number of pairs that came from files.
pub(crate) fn count_from_files(pairs: &[LabelledPair]) -> usize {
    let is_from_file = |labelled: &&LabelledPair| labelled.pair.prompt.purpose == Purpose::File;
    pairs.iter().filter(is_from_file).count()
}

/// Sessions of a run: the current one, and the points at which earlier ones were resumed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct SessionLineage {
    /// Current session.
    pub(crate) session: u64,
    /// Last version of each earlier session that the run continues from.
    ancestors: Vec<WeightsVersion>,
}

impl SessionLineage {
    /// The lineage of a run without earlier sessions to continue from.
    pub(crate) fn new(session: u64) -> Self {
        Self {
            session,
            ancestors: Vec::new(),
        }
    }

    /// The lineage of `session`, which resumes this one's checkpoint of step `step`.
    pub(crate) fn resumed_at(mut self, step: u64, session: u64) -> Self {
        self.ancestors.push(WeightsVersion {
            session: self.session,
            step,
        });
        self.session = session;
        self
    }

    /// Whether the run once had these weights: published by the current session, or by an earlier one before it was
    /// resumed.
    pub(crate) fn descends_from(&self, version: WeightsVersion) -> bool {
        let includes =
            |last: &WeightsVersion| last.session == version.session && version.step <= last.step;
        version.session == self.session || self.ancestors.iter().any(includes)
    }
}
