//! Share of every batch that comes from files, and how many steps a number of passes takes.
//!
//! Counts are cumulative and in integers, so that the split of a step depends on its number alone and no pair is lost to
//! rounding.

use settings::{FilePairsSettings, LearnerSettings};

/// A share of one, in the unit of [`BatchShare`].
const WHOLE: u128 = 1_000_000;

/// Split of every batch into pairs from files and from actors: the first `s` steps have ⌊s · share · B⌋ pairs from files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchShare {
    batch_size: u64,
    /// The share in millionths.
    millionths: u64,
}

impl BatchShare {
    /// The split of these settings.
    #[must_use]
    pub fn new(learner: &LearnerSettings, pairs: &FilePairsSettings) -> Self {
        Self {
            batch_size: learner.train_batch_size as u64,
            millionths: match pairs.is_used() {
                true => (pairs.share * WHOLE as f64).round() as u64,
                false => 0,
            },
        }
    }

    /// Number of pairs from files in the first `steps` steps.
    fn files_before(self, steps: u64) -> u64 {
        let each = u128::from(self.batch_size) * u128::from(self.millionths);
        let total = u128::from(steps).saturating_mul(each) / WHOLE;
        u64::try_from(total).unwrap_or(u64::MAX)
    }

    /// The largest number of pairs from files in a step.
    #[must_use]
    pub fn most_per_step(self) -> u64 {
        let most = u128::from(self.batch_size) * u128::from(self.millionths);
        u64::try_from(most.div_ceil(WHOLE)).unwrap_or(u64::MAX)
    }

    /// Number of pairs from files in step `step`, counted from 0.
    pub(crate) fn of_step(self, step: u64) -> usize {
        (self.files_before(step + 1) - self.files_before(step)) as usize
    }

    /// Number of pairs from files in the steps from `step` on and before `end`.
    pub(crate) fn files_between(self, step: u64, end: u64) -> usize {
        (self.files_before(end) - self.files_before(step)) as usize
    }

    /// Number of pairs from actors in the steps from `step` on and before `end`.
    pub(crate) fn online_between(self, step: u64, end: u64) -> usize {
        let all = end.saturating_sub(step).saturating_mul(self.batch_size);
        (all as usize).saturating_sub(self.files_between(step, end))
    }

    /// The smallest number of steps with `pairs` pairs from files.
    fn steps_with(self, pairs: u64) -> u64 {
        let each = u128::from(self.batch_size) * u128::from(self.millionths);
        let steps = (u128::from(pairs) * WHOLE).div_ceil(each.max(1));
        u64::try_from(steps).unwrap_or(u64::MAX)
    }
}

/// Steps that a run takes, with `count` pairs in its files: `learner.steps`, and no more than `pairs.epochs` passes over
/// the pairs take. The last batch of these is filled up from the beginning of the next pass.
#[must_use]
pub fn planned_steps(learner: &LearnerSettings, pairs: &FilePairsSettings, count: u64) -> u64 {
    let share = BatchShare::new(learner, pairs);
    match pairs.epochs {
        0 => learner.steps,
        _ if share.millionths == 0 => learner.steps,
        epochs => learner
            .steps
            .min(share.steps_with(epochs.saturating_mul(count)).max(1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(batch_size: u64, share: f64) -> BatchShare {
        BatchShare {
            batch_size,
            millionths: (share * 1e6).round() as u64,
        }
    }

    #[test]
    fn the_split_is_exact_over_all_steps() {
        for (batch, of) in [
            (8, 1.0),
            (8, 0.0),
            (8, 0.5),
            (10, 0.29),
            (10, 0.7),
            (3, 0.1),
            (7, 1e-6),
            (32, 0.333_333),
        ] {
            let split = share(batch, of);
            let mut total = 0;
            for step in 0..1000 {
                total += split.of_step(step) as u64;
                let exact = (step + 1) as f64 * batch as f64 * of;
                assert!((total as f64 - exact).abs() < 1.0, "{batch} {of} {step}");
                let online = split.online_between(step, step + 1);
                assert_eq!(online + split.of_step(step), batch as usize);
            }
            assert_eq!(split.files_between(0, 1000) as u64, total);
            let online = split.online_between(0, 1000) as u64;
            assert_eq!(online + total, 1000 * batch);
        }
        assert_eq!((0..4).map(|s| share(3, 0.5).of_step(s)).sum::<usize>(), 6);
        let steps: Vec<usize> = (0..4).map(|s| share(3, 0.5).of_step(s)).collect();
        assert_eq!(steps, [1, 2, 1, 2]);
        // .29 of 100 is 28.999… in floating point.
        assert_eq!(share(100, 0.29).of_step(0), 29);
        let most =
            [(3, 0.5), (100, 0.29), (8, 0.0)].map(|(batch, of)| share(batch, of).most_per_step());
        assert_eq!(most, [2, 29, 0]);
    }

    #[test]
    fn passes_end_a_run() {
        let steps = |epochs: u64, of: &str, count| {
            let text = format!(
                "[pairs]\npath = \"x\"\nepochs = {epochs}\nshare = {of}\n[learner]\ntrain_batch_size = 8\nsteps = 50"
            );
            let settings = settings::resolve(&text, "test", &[]).unwrap().settings;
            planned_steps(&settings.learner, &settings.pairs, count)
        };
        assert_eq!(steps(0, "1.0", 20), 50);
        // 60 pairs in batches of 8: the last is filled up with four of the next pass.
        assert_eq!(steps(3, "1.0", 20), 8);
        assert_eq!(steps(2, "1.0", 16), 4);
        assert_eq!(steps(1, "0.25", 20), 10);
        assert_eq!(steps(9, "1.0", 1000), 50);
        assert_eq!(steps(1, "1.0", 1), 1);
    }
}
