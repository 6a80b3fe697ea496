//! What was dropped between two steps, so that means over the pairs of a step know what they lack.

use messages::{DropReason, Dropped};

use crate::PolicySamples;

/// Prompts that were dropped since the last step.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Missing {
    /// Those whose completions were all the same.
    pub(crate) identical: u64,
    /// The sum of their log π/ref, one completion of each, in nats.
    log_ratio: f64,
    /// Those of which nothing else is known.
    unknown: u64,
}

impl Missing {
    /// Counts the note of a dropped prompt.
    pub(crate) fn note(&mut self, note: &Dropped) {
        match note
            .log_ratio
            .filter(|_| note.reason == DropReason::Identical)
        {
            Some(log_ratio) => {
                self.identical += 1;
                self.log_ratio += f64::from(log_ratio);
            }
            None => self.unknown += 1,
        }
    }

    /// Counts a pair that the learner itself dropped, of which the log-ratios are not known to be like others'.
    pub(crate) fn lost(&mut self) {
        self.unknown += 1;
    }

    /// The mean log π/ref of a step's samples of the policy and of the identical ones that were dropped, of
    /// which each prompt has `completions`. `None` where the step has no samples of the policy, or other
    /// prompts are missing: the mean would depend on which.
    pub(crate) fn mean_with(&self, samples: PolicySamples, completions: usize) -> Option<f64> {
        if samples.count == 0 || self.unknown > 0 {
            return None;
        }
        let dropped = self.identical as f64 * completions as f64;
        let sum = samples.log_ratio + completions as f64 * self.log_ratio;
        Some(sum / (samples.count as f64 + dropped))
    }
}

#[cfg(test)]
mod tests {
    use messages::{PromptId, Station};

    use super::*;

    fn note(reason: DropReason, log_ratio: Option<f32>) -> Dropped {
        Dropped {
            prompt: PromptId(0),
            session: 0,
            station: Station::Actor,
            reason,
            log_ratio,
            detail: String::new(),
        }
    }

    /// All pairs of arms of a bandit, as often as they are drawn of 100 × 100: π (.5, .3, .2) of which a
    /// learner sees the pairs of different arms, and identical ones leave a note.
    #[test]
    fn the_kl_of_a_bandit_is_exact_when_identical_pairs_are_counted() {
        let (policy, reference) = ([50u32, 30, 20], [0.2f64, 0.3, 0.5]);
        let log_ratio = |arm: usize| (f64::from(policy[arm]) / 100.0 / reference[arm]).ln();
        let (mut samples, mut missing) = (PolicySamples::default(), Missing::default());
        for (i, of_first) in policy.iter().enumerate() {
            for (j, of_second) in policy.iter().enumerate() {
                for _ in 0..of_first * of_second {
                    if i == j {
                        let log_ratio = Some(log_ratio(i) as f32);
                        missing.note(&note(DropReason::Identical, log_ratio));
                    } else {
                        samples.count += 2;
                        samples.log_ratio += log_ratio(i) + log_ratio(j);
                    }
                }
            }
        }
        // .5 ln 2.5 + .2 ln .4
        let exact = 0.3 * 2.5f64.ln();
        let found = missing
            .mean_with(samples, 2)
            .expect("samples of the policy");
        assert!((found - exact).abs() < 1e-6, "{found}");
        // Pairs of different arms alone say less.
        let of_pairs = Missing::default().mean_with(samples, 2).expect("samples");
        assert!((of_pairs - exact).abs() > 0.1, "{of_pairs}");
    }

    #[test]
    fn there_is_no_mean_without_samples_of_the_policy_or_beside_other_drops() {
        let samples = PolicySamples {
            count: 4,
            log_ratio: 2.0,
        };
        let none = Missing::default();
        assert_eq!(none.mean_with(samples, 2), Some(0.5));
        assert_eq!(none.mean_with(PolicySamples::default(), 2), None);
        let mut failed = none;
        failed.note(&note(DropReason::Abstained, None));
        assert_eq!(failed.mean_with(samples, 2), None);
    }
}
