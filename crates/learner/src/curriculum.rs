//! Curriculum by measured signal: prompts whose labels were decided are drawn more often than those with even odds.
//!
//! The first pass takes every prompt once, in order. From then on a prompt is drawn in proportion to a floor plus its last
//! measured signal, the mean |2p − 1| of its labels; a prompt that was not measured counts as 1. Promises that draws
//! depend on the seed, the prompt's id and the signals measured before alone, and that a restored state continues to the
//! bit. Does not know what a prompt is.

use std::collections::BTreeMap;

use messages::{LabelledPair, PromptId, Seed};
use serde::{Deserialize, Serialize};

/// RNG stream id of draws.
const CURRICULUM_STREAM: u64 = 0xc0_55e5;

/// A signal of 1. Signals are integers, so that sums do not depend on their order.
const UNIT: f64 = 65_535.0;

/// Curriculum over the rows of a prompt set.
pub(crate) struct Curriculum {
    seed: Seed,
    /// Weight of a row without signal, above 0.
    floor: u64,
    /// Weight of every row.
    weights: Vec<u64>,
    total: u64,
    state: CurriculumState,
}

/// Measured signals and numbers of draws; part of every checkpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CurriculumState {
    /// Last signal of every measured row, in 65 535ths.
    signals: BTreeMap<u64, u16>,
    /// Row of every drawn prompt that may come back or be sent again.
    rows: BTreeMap<PromptId, u64>,
}

impl Curriculum {
    /// A curriculum over `count` rows before its first draw, with this weight of a row without signal, relative to that
    /// of a row with certain labels.
    pub(crate) fn new(count: u64, floor: f64, seed: Seed) -> Self {
        let floor = ((floor * UNIT).round() as u64).max(1);
        let weight = floor + UNIT as u64;
        Self {
            seed: seed.derive(CURRICULUM_STREAM),
            floor,
            weights: vec![weight; count as usize],
            total: weight * count,
            state: CurriculumState::default(),
        }
    }

    /// Row of a prompt: of one that was drawn before the same.
    pub(crate) fn row(&mut self, id: PromptId) -> u64 {
        if let Some(row) = self.known(id) {
            return row;
        }
        let row = self.draw(id);
        self.state.rows.insert(id, row);
        row
    }

    fn known(&self, id: PromptId) -> Option<u64> {
        let is_of_first_pass = id.0 < self.weights.len() as u64;
        let drawn = self.state.rows.get(&id).copied();
        is_of_first_pass.then_some(id.0).or(drawn)
    }

    fn draw(&self, id: PromptId) -> u64 {
        let uniform = u128::from(self.seed.derive(id.0).0);
        let mut rest = ((uniform * u128::from(self.total)) >> 64) as u64;
        let row = self.weights.iter().position(|&weight| {
            let is_here = rest < weight;
            rest = rest.saturating_sub(weight);
            is_here
        });
        row.unwrap_or_default() as u64
    }

    /// Records the signal of a labelled pair.
    pub(crate) fn measure(&mut self, labelled: &LabelledPair) {
        let labels = &labelled.labels;
        let certainty = |p: f32| (2.0 * f64::from(p) - 1.0).abs();
        let sum: f64 = labels.iter().map(|label| certainty(label.p.get())).sum();
        self.record(labelled.pair.id(), sum / labels.len().max(1) as f64);
    }

    /// Records a prompt's signal, from 0 to 1.
    pub(crate) fn record(&mut self, id: PromptId, signal: f64) {
        if let Some(row) = self.known(id) {
            self.set(row, (signal * UNIT).round() as u16);
        }
    }

    fn set(&mut self, row: u64, signal: u16) {
        let Some(weight) = self.weights.get_mut(row as usize) else {
            return;
        };
        self.total -= *weight;
        *weight = self.floor + u64::from(signal);
        self.total += *weight;
        self.state.signals.insert(row, signal);
    }

    /// Forgets the rows of the prompts before `first`, which do not come back.
    pub(crate) fn forget_before(&mut self, first: PromptId) {
        self.state.rows = self.state.rows.split_off(&first);
    }

    /// State for a checkpoint.
    pub(crate) fn state(&self) -> CurriculumState {
        self.state.clone()
    }

    /// Restores the state of a checkpoint.
    pub(crate) fn restore(&mut self, state: CurriculumState) {
        for (&row, &signal) in &state.signals {
            self.set(row, signal);
        }
        self.state = state;
    }
}

#[cfg(test)]
mod tests {
    use messages::{Label, Probability};

    use super::*;
    use crate::micro_batch::tests::labelled;

    /// Rows of these prompts.
    fn rows(curriculum: &mut Curriculum, ids: std::ops::Range<u64>) -> Vec<u64> {
        ids.map(|id| curriculum.row(PromptId(id))).collect()
    }

    /// Four rows with signals 0, .25, .5 and 1, and a floor of .25.
    fn measured() -> Curriculum {
        let mut curriculum = Curriculum::new(4, 0.25, Seed(5));
        for (id, signal) in [(0, 0.0), (1, 0.25), (2, 0.5), (3, 1.0)] {
            curriculum.record(PromptId(id), signal);
        }
        curriculum
    }

    #[test]
    fn the_first_pass_is_in_order_and_then_draws_follow_the_signal() {
        let mut curriculum = measured();
        assert_eq!(rows(&mut curriculum, 0..4), [0, 1, 2, 3]);
        let count = 20_000;
        let drawn = rows(&mut curriculum, 4..4 + count);
        // Weights .25, .5, .75 and 1.25 of 2.75.
        for (row, weight) in [(0, 0.25), (1, 0.5), (2, 0.75), (3, 1.25)] {
            let found = drawn.iter().filter(|&&drawn| drawn == row).count() as f64 / count as f64;
            // Four deviations of a share are at most .0142.
            assert!((found - weight / 2.75).abs() < 0.0142, "row {row}: {found}");
        }
        assert_eq!(rows(&mut measured(), 4..4 + count), drawn, "another order");
    }

    #[test]
    fn the_signal_of_a_pair_is_the_mean_certainty_of_its_labels() {
        let mut pair = labelled(Vec::new());
        let label = |p| Label {
            first: 0,
            second: 1,
            p: Probability::new(p).unwrap(),
            judged: None,
        };
        pair.labels = vec![label(1.0), label(0.5), label(0.25)];
        let mut curriculum = Curriculum::new(4, 0.25, Seed(5));
        curriculum.measure(&pair);
        assert_eq!(curriculum.state().signals, BTreeMap::from([(0, 32_768)]));
        // A later measurement replaces it.
        curriculum.record(PromptId(0), 0.0);
        assert_eq!(curriculum.state().signals, BTreeMap::from([(0, 0)]));
    }

    #[test]
    fn a_restored_curriculum_draws_the_same_rows_and_knows_those_it_drew() {
        let mut curriculum = measured();
        let before = rows(&mut curriculum, 4..40);
        curriculum.record(PromptId(7), 1.0);
        let state = curriculum.state();
        let mut restored = Curriculum::new(4, 0.25, Seed(5));
        restored.restore(state);
        // Drawn before the last measurement, which would draw others.
        assert_eq!(rows(&mut restored, 4..40), before);
        assert_eq!(rows(&mut restored, 40..400), rows(&mut curriculum, 40..400));
        restored.forget_before(PromptId(390));
        assert_eq!(restored.state().rows.len(), 10);
        // The record of a prompt that does not come back is ignored.
        let signals = restored.state().signals;
        restored.record(PromptId(50), 0.125);
        assert_eq!(restored.state().signals, signals);
    }
}
