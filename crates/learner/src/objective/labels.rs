//! Training labels from the judge's preferences.
//!
//! Promises that a label depends on the seed, the pair and the row alone, so that it is reproducible in any order. Does
//! not know where preferences come from.

use messages::{Label, PromptId, Seed};
use settings::LabelKind;

/// Conversion of the judge's preference p to a training label.
///
/// A soft label is p itself: the expectation of a sampled one, without its noise. A sampled label is 1 with probability
/// p, as from a single annotator. A hard label is 1 above ½, 0 below and ½ for a tie.
///
/// Then labels are flipped: the noise of an annotator who mistakes one response for the other. Smoothing ε in `[0, 1]`
/// comes last: `label → label·(1 − ε) + ε/2`, a step of size ε towards even odds, so that 1 becomes 1 − ε/2 and 0
/// becomes ε/2. It is symmetric: smoothing 1 − p gives one minus the smoothing of p. Conservative DPO's ε, the
/// probability that a hard label is wrong, is half of this ε.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Labelling {
    /// Kind of label.
    pub kind: LabelKind,
    /// Fraction of rows whose label is flipped, from 0 to 1.
    pub flip: f64,
    /// Label smoothing ε, from 0 (none) to 1 (every label is ½).
    pub smoothing: f64,
    /// Seed of [`LabelKind::Sampled`] and of the flips.
    pub seed: Seed,
}

impl Labelling {
    /// Label in `[0, 1]` of one row of a pair: the probability that the first completion is preferred.
    #[must_use]
    pub fn label(&self, pair: PromptId, row: &Label) -> f64 {
        let p = f64::from(row.p.get());
        let label = match self.kind {
            LabelKind::Soft => p,
            LabelKind::Sampled => f64::from(u8::from(uniform(self.seed, pair, row) < p)),
            LabelKind::Hard if p > 0.5 => 1.0,
            LabelKind::Hard if p < 0.5 => 0.0,
            LabelKind::Hard => 0.5,
        };
        let flipped =
            self.flip > 0.0 && uniform(self.seed.derive(FLIP_STREAM), pair, row) < self.flip;
        let label = if flipped { 1.0 - label } else { label };
        label * (1.0 - self.smoothing) + self.smoothing / 2.0
    }
}

/// RNG stream id of flips.
const FLIP_STREAM: u64 = 0xf11b;

/// Uniform in [0, 1), a hash of seed, pair and row.
fn uniform(seed: Seed, pair: PromptId, row: &Label) -> f64 {
    let stream = u64::from(row.first) << 16 | u64::from(row.second);
    let bits = seed.derive(pair.0).derive(stream).0;
    // The upper 53 bits, the precision of f64.
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use messages::Probability;

    use super::*;

    fn row(first: u16, second: u16, p: f32) -> Label {
        Label {
            first,
            second,
            p: Probability::new(p).expect("the table holds probabilities"),
            judged: None,
        }
    }

    fn labelling(kind: LabelKind, smoothing: f64) -> Labelling {
        Labelling {
            kind,
            flip: 0.0,
            smoothing,
            seed: Seed(7),
        }
    }

    #[test]
    fn soft_and_hard_labels_by_hand() {
        for (kind, smoothing, p, expected) in [
            (LabelKind::Soft, 0.0, 0.25, 0.25),
            (LabelKind::Soft, 0.5, 0.25, 0.375),
            (LabelKind::Soft, 1.0, 0.25, 0.5),
            (LabelKind::Hard, 0.0, 0.51, 1.0),
            (LabelKind::Hard, 0.0, 0.49, 0.0),
            (LabelKind::Hard, 0.0, 0.5, 0.5),
            (LabelKind::Hard, 0.25, 0.9, 0.875),
            (LabelKind::Hard, 0.25, 0.1, 0.125),
            (LabelKind::Hard, 0.25, 0.5, 0.5),
            (LabelKind::Sampled, 0.25, 1.0, 0.875),
            (LabelKind::Sampled, 0.25, 0.0, 0.125),
        ] {
            let label = labelling(kind, smoothing).label(PromptId(3), &row(0, 1, p));
            assert_eq!(label, expected, "{kind:?} smoothing {smoothing} of {p}");
        }
    }

    #[test]
    fn smoothing_is_symmetric() {
        for kind in [LabelKind::Soft, LabelKind::Hard] {
            for p in [0.0, 0.125, 0.5, 0.75] {
                let of = |p| labelling(kind, 0.3).label(PromptId(3), &row(0, 1, p));
                assert!((of(p) + of(1.0 - p) - 1.0).abs() < 1e-15, "{kind:?} {p}");
            }
        }
    }

    #[test]
    fn a_sampled_label_does_not_depend_on_the_order() {
        let sampled = labelling(LabelKind::Sampled, 0.0);
        let label = |pair| sampled.label(PromptId(pair), &row(0, 1, 0.5));
        let forward: Vec<f64> = (0..256).map(label).collect();
        let mut backward: Vec<f64> = (0..256).rev().map(label).collect();
        backward.reverse();
        assert_eq!(forward, backward);
        let other = Labelling {
            seed: Seed(8),
            ..sampled
        };
        assert!((0..256).any(|pair| other.label(PromptId(pair), &row(0, 1, 0.5)) != label(pair)));
    }

    #[test]
    fn sampled_labels_follow_p_and_rows_are_independent() {
        let sampled = labelling(LabelKind::Sampled, 0.0);
        let count = 20_000u32;
        for p in [0.1, 0.5, 0.8] {
            let [mut ones, mut both] = [0.0; 2];
            for pair in 0..u64::from(count) {
                let label = sampled.label(PromptId(pair), &row(0, 1, p));
                ones += label;
                both += label * sampled.label(PromptId(pair), &row(0, 2, p));
            }
            // Four standard deviations of the mean of 20 000 coins are at most .0142.
            let (ones, both) = (ones / f64::from(count), both / f64::from(count));
            let p = f64::from(p);
            assert!((ones - p).abs() < 0.0142, "{ones} is not {p}");
            assert!((both - p * p).abs() < 0.0142, "{both} is not {}", p * p);
        }
    }

    #[test]
    fn flips_are_that_share_of_the_labels_and_reproducible() {
        let noisy = Labelling {
            flip: 0.2,
            ..labelling(LabelKind::Soft, 0.0)
        };
        let count = 20_000u64;
        let flipped = |id: u64| {
            let label = noisy.label(PromptId(id), &row(0, 1, 0.9));
            assert_eq!(label, noisy.label(PromptId(id), &row(0, 1, 0.9)));
            let was = f64::from(0.9f32);
            assert!(label == was || label == 1.0 - was, "{label}");
            label < 0.5
        };
        let share = (0..count).filter(|&id| flipped(id)).count() as f64 / count as f64;
        // Three deviations of the mean of 20,000 draws are .0085.
        assert!((share - 0.2).abs() < 0.0085, "{share}");
        let sampled = |flip| Labelling {
            flip,
            ..labelling(LabelKind::Sampled, 0.0)
        };
        let apart = (0..count).filter(|&id| {
            let of = |flip| sampled(flip).label(PromptId(id), &row(0, 1, 0.5));
            of(0.0) != of(0.2)
        });
        let share = apart.count() as f64 / count as f64;
        assert!(
            (share - 0.2).abs() < 0.0085,
            "draws and flips are not independent: {share}"
        );
    }
}
