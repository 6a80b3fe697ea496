//! Selection of the labels that are trained on.
//!
//! Promises that the selection depends on the labels, the run's seed and the prompt's id alone, so that it is the same in
//! any order and on every delivery. The mean over the labels that remain is biased toward prompts that the judge finds
//! easy. Does not know what a step does with a label.

use messages::{Label, LabelledPair, Probability, Seed};
use settings::{LearnerSettings, PairSelection};

/// RNG stream id of [`PairSelection::Random`].
const SELECTION_STREAM: u64 = 0x5e1ec7;

/// Rounding error of a probability in f32 near ½, so that p and 1 − p are on the same side of the margin.
const ROUNDING: f64 = f32::EPSILON as f64 / 2.0;

/// Whether |p − ½| is `min_margin` or more.
pub(crate) fn has_margin(p: Probability, min_margin: f64) -> bool {
    (f64::from(p.get()) - 0.5).abs() + ROUNDING >= min_margin
}

/// Selection of a run's labels.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LabelSelection {
    pub(crate) kind: PairSelection,
    /// Least |p − ½| of a label that is trained on.
    pub(crate) min_margin: f64,
    pub(crate) seed: Seed,
}

impl LabelSelection {
    /// The selection of the settings, in a run with this seed.
    pub(crate) fn new(settings: &LearnerSettings, seed: Seed) -> Self {
        Self {
            kind: settings.pair_selection,
            min_margin: settings.min_margin,
            seed: seed.derive(SELECTION_STREAM),
        }
    }

    /// Removes the labels of a pair that are not trained on. Returns whether any remains.
    pub(crate) fn apply(&self, labelled: &mut LabelledPair) -> bool {
        let selected = match self.kind {
            PairSelection::All => None,
            PairSelection::BestWorst => best_worst(&labelled.labels),
            PairSelection::Random => self.random(labelled),
        };
        if let Some(selected) = selected {
            labelled.labels = vec![selected];
        }
        labelled.labels.retain(|label| self.has_signal(label));
        !labelled.labels.is_empty()
    }

    fn has_signal(&self, label: &Label) -> bool {
        has_margin(label.p, self.min_margin)
    }

    fn random(&self, labelled: &LabelledPair) -> Option<Label> {
        let draw = self.seed.derive(labelled.pair.id().0).0;
        let index = draw.checked_rem(labelled.labels.len() as u64)?;
        labelled.labels.get(index as usize).copied()
    }
}

/// Label of the completions with the highest and the lowest mean preference over the others; of equal ones the first.
/// `None` without labels.
fn best_worst(labels: &[Label]) -> Option<Label> {
    let count = labels.iter().map(|label| usize::from(label.second) + 1);
    let mut wins = vec![0.0; count.max()?];
    for label in labels {
        let p = f64::from(label.p.get());
        wins[usize::from(label.first)] += p;
        wins[usize::from(label.second)] += 1.0 - p;
    }
    // Every completion has as many comparisons, so that sums are in the order of means.
    let first_of = |without: Option<usize>, is_better: fn(f64, f64) -> bool| {
        let others = (0..wins.len()).filter(|&index| Some(index) != without);
        others.reduce(|first, index| match is_better(wins[index], wins[first]) {
            true => index,
            false => first,
        })
    };
    let best = first_of(None, |a, b| a > b)?;
    let worst = first_of(Some(best), |a, b| a < b)?;
    let (first, second) = (best.min(worst), best.max(worst));
    let is_theirs =
        |label: &&Label| usize::from(label.first) == first && usize::from(label.second) == second;
    labels.iter().find(is_theirs).copied()
}

#[cfg(test)]
mod tests {
    use messages::{Probability, PromptId};

    use super::*;
    use crate::micro_batch::tests::labelled;

    fn selection(kind: PairSelection, min_margin: f64) -> LabelSelection {
        LabelSelection {
            kind,
            min_margin,
            seed: Seed(7),
        }
    }

    /// A pair with these p, of all i < j in order.
    fn pair(id: u64, p: &[f32]) -> LabelledPair {
        let mut labelled = labelled(Vec::new());
        labelled.pair.prompt.id = PromptId(id);
        let rows = (0..).flat_map(|second: u16| (0..second).map(move |first| (first, second)));
        let mut rows: Vec<(u16, u16)> = rows.take(p.len()).collect();
        rows.sort_unstable();
        let labels = rows.into_iter().zip(p).map(|((first, second), &p)| Label {
            first,
            second,
            p: Probability::new(p).unwrap(),
            judged: None,
        });
        labelled.labels = labels.collect();
        labelled
    }

    /// The rows that remain.
    fn selected(selection: &LabelSelection, labelled: &LabelledPair) -> Vec<(u16, u16)> {
        let mut labelled = labelled.clone();
        let remains = selection.apply(&mut labelled);
        let rows = labelled.labels.iter().map(|l| (l.first, l.second));
        let rows: Vec<_> = rows.collect();
        assert_eq!(remains, !rows.is_empty());
        rows
    }

    #[test]
    fn best_and_worst_by_their_mean_preference() {
        let best_worst = selection(PairSelection::BestWorst, 0.0);
        // p of (0,1) (0,2) (0,3) (1,2) (1,3) (2,3).
        for (p, expected) in [
            // Means: 0 .3, 1 .7, 2 .633, 3 .367; sums .9, 2.1, 1.9, 1.1.
            (&[0.2, 0.3, 0.4, 0.6, 0.7, 0.8][..], (0, 1)),
            // Sums: 0 1.5, 1 1.5, 2 .3, 3 2.7.
            (&[0.5, 0.9, 0.1, 0.9, 0.1, 0.1], (2, 3)),
            // All equal: the first two.
            (&[0.5, 0.5, 0.5, 0.5, 0.5, 0.5], (0, 1)),
            // 1 and 2 are best alike, 0 and 3 worst alike.
            (&[0.25, 0.25, 0.5, 0.5, 0.75, 0.75], (0, 1)),
            // A cycle of three: all means are ½.
            (&[0.75, 0.25, 0.75], (0, 1)),
            (&[0.125], (0, 1)),
        ] {
            assert_eq!(selected(&best_worst, &pair(3, p)), [expected], "{p:?}");
        }
        let mut labelled = pair(3, &[0.5, 0.9, 0.1, 0.9, 0.1, 0.1]);
        assert!(best_worst.apply(&mut labelled));
        assert_eq!(labelled.labels[0].p.get(), 0.1, "the label itself is kept");
    }

    #[test]
    fn a_random_row_depends_on_seed_and_prompt_alone_and_is_uniform() {
        let random = selection(PairSelection::Random, 0.0);
        let mut counts = [0; 6];
        for id in 0..6000 {
            let rows = selected(&random, &pair(id, &[0.9; 6]));
            assert_eq!(rows, selected(&random, &pair(id, &[0.1; 6])), "{id}");
            let all = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)];
            counts[all.iter().position(|row| [*row] == rows[..]).unwrap()] += 1;
        }
        // Four deviations of a count are 115.
        assert!(
            counts.iter().all(|count| (885..1115).contains(count)),
            "{counts:?}"
        );
        let other = LabelSelection {
            seed: Seed(8),
            ..random
        };
        let differs =
            |id| selected(&other, &pair(id, &[0.9; 6])) != selected(&random, &pair(id, &[0.9; 6]));
        assert!((0..100).any(differs));
    }

    #[test]
    fn labels_below_the_margin_are_left_out() {
        for (kind, margin, p, expected) in [
            (
                PairSelection::All,
                0.0,
                &[0.5, 0.5, 0.5][..],
                &[(0, 1), (0, 2), (1, 2)][..],
            ),
            (
                PairSelection::All,
                0.1,
                &[0.6, 0.59, 0.4],
                &[(0, 1), (1, 2)],
            ),
            (
                PairSelection::All,
                0.01,
                &[0.51, 0.49, 0.5],
                &[(0, 1), (0, 2)],
            ),
            (PairSelection::All, 1e-6, &[0.5, 0.5, 0.5001], &[(1, 2)]),
            (PairSelection::All, 0.2, &[0.6, 0.59, 0.4], &[]),
            (
                PairSelection::All,
                0.5,
                &[1.0, 0.0, 0.99],
                &[(0, 1), (0, 2)],
            ),
            // The best and the worst are 0 and 2.
            (PairSelection::BestWorst, 0.2, &[0.6, 0.8, 0.6], &[(0, 2)]),
            (PairSelection::BestWorst, 0.4, &[0.6, 0.8, 0.6], &[]),
            (PairSelection::Random, 0.2, &[0.6], &[]),
        ] {
            let found = selected(&selection(kind, margin), &pair(3, p));
            assert_eq!(found, expected, "{kind:?} {margin} {p:?}");
        }
        let off = selection(PairSelection::All, 0.0);
        let labelled = pair(3, &[0.5, 0.1, 0.9]);
        let mut unchanged = labelled.clone();
        assert!(off.apply(&mut unchanged));
        assert_eq!(unchanged, labelled);
        assert!(!selection(PairSelection::Random, 0.0).apply(&mut pair(3, &[])));
    }
}
