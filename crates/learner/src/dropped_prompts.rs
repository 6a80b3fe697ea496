//! Dropped prompts: counts since the last step, for the means over its pairs, and since the last progress, for the
//! error of a wait without any.

use std::{collections::BTreeMap, fmt};

use messages::{DropReason, Dropped, Pair};
use telemetry::printable_line;

use crate::trainer::PolicySamples;

/// Longest explanation of a drop that is shown, in characters: it comes from another process.
const MAX_DETAIL_CHARS: usize = 300;

/// Counts of dropped prompts.
#[derive(Debug)]
pub(crate) struct DroppedPrompts {
    since_step: StepDrops,
    since_progress: BTreeMap<DropReason, ReasonDrops>,
    /// Whether a pair without a label was logged; only the first is.
    has_warned: bool,
}

/// Prompts dropped since the last step.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct StepDrops {
    /// Number of prompts whose completions were identical.
    pub(crate) identical: u64,
    /// Sum of log π/ref of one completion of each of those, in nats.
    log_ratio: f64,
    /// Number of pairs without a label that is trained on.
    pub(crate) no_signal: u64,
    /// The policy's own samples among those, as recorded.
    no_signal_samples: PolicySamples,
    /// Number of prompts dropped for other reasons, whose log-ratios are unknown.
    unknown: u64,
}

/// Prompts dropped for one reason.
#[derive(Debug, Default)]
struct ReasonDrops {
    count: u64,
    /// Explanation of the last one.
    detail: String,
}

impl DroppedPrompts {
    pub(crate) fn new() -> Self {
        Self {
            since_step: StepDrops::default(),
            since_progress: BTreeMap::new(),
            has_warned: false,
        }
    }

    /// Forgets the counts since the last progress: a wait begins, or made progress.
    pub(crate) fn progressed(&mut self) {
        self.since_progress.clear();
    }

    /// Counts a prompt that another stage dropped.
    pub(crate) fn count_note(&mut self, note: &Dropped) {
        self.since_step.count_note(note);
        self.count(note.reason, &note.detail);
    }

    /// Counts a pair that the learner itself dropped.
    pub(crate) fn count_pair(&mut self, reason: DropReason, detail: &str) {
        if matches!(reason, DropReason::Stale | DropReason::Invalid) {
            self.since_step.unknown += 1;
        }
        self.count(reason, detail);
    }

    /// Keeps the policy samples of a pair that the learner is about to drop because none of its labels is trained on.
    pub(crate) fn keep_samples(&mut self, pair: &Pair) {
        let samples = PolicySamples::recorded(pair.completions.iter());
        self.since_step.no_signal += 1;
        self.since_step.no_signal_samples = self.since_step.no_signal_samples.and(samples);
    }

    fn count(&mut self, reason: DropReason, detail: &str) {
        let detail: String = detail.chars().take(MAX_DETAIL_CHARS).collect();
        let detail = printable_line(&detail);
        let drops = self.since_progress.entry(reason).or_default();
        drops.count += 1;
        drops.detail = detail.clone().into_owned();
        let is_unlabelled = matches!(reason, DropReason::Failed | DropReason::Abstained);
        if is_unlabelled && !self.has_warned {
            self.has_warned = true;
            tracing::warn!(
                detail = %detail,
                "a pair got no label and is left out; later ones are only counted"
            );
        }
    }

    /// The counts since the last step, which start again at zero.
    pub(crate) fn take_step(&mut self) -> StepDrops {
        std::mem::take(&mut self.since_step)
    }
}

/// The drops since the last progress, as the end of a sentence; empty if there were none.
impl fmt::Display for DroppedPrompts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (reason, ReasonDrops { count, detail })) in
            self.since_progress.iter().enumerate()
        {
            let separator = if index == 0 {
                "; dropped meanwhile: "
            } else {
                ", "
            };
            write!(f, "{separator}{count} {}", reason.name())?;
            if !detail.is_empty() {
                write!(f, " (the last: {detail})")?;
            }
        }
        Ok(())
    }
}

impl StepDrops {
    fn count_note(&mut self, note: &Dropped) {
        let log_ratio = note
            .log_ratio
            .filter(|_| note.reason == DropReason::Identical);
        match log_ratio {
            Some(log_ratio) => {
                self.identical += 1;
                self.log_ratio += f64::from(log_ratio);
            }
            None => self.unknown += 1,
        }
    }

    /// Mean log π/ref over a step's policy samples, those of pairs without signal, and the dropped identical ones,
    /// `completions` per prompt. `None`
    /// if the step has no policy samples, or if prompts were dropped for other reasons, which would bias the mean.
    pub(crate) fn mean_log_ratio(&self, samples: PolicySamples, completions: usize) -> Option<f64> {
        if samples.count == 0 || self.unknown > 0 {
            return None;
        }
        let samples = samples.and(self.no_signal_samples);
        let dropped = self.identical as f64 * completions as f64;
        let sum = samples.log_ratio + completions as f64 * self.log_ratio;
        Some(sum / (samples.count as f64 + dropped))
    }
}

#[cfg(test)]
mod tests {
    use messages::{Completion, Finish, PromptId, Stage};

    use super::*;

    fn note(reason: DropReason, log_ratio: Option<f32>) -> Dropped {
        Dropped {
            prompt: PromptId(0),
            session: 0,
            stage: Stage::Actor,
            reason,
            log_ratio,
            detail: String::new(),
        }
    }

    /// All pairs of arms of a bandit with the policy (.5, .3, .2), in proportion to their probability: 100 × 100
    /// pairs. The learner receives the pairs of different arms, and a drop note for each identical pair.
    #[test]
    fn the_kl_of_a_bandit_is_exact_with_identical_pairs_counted() {
        let (policy, reference) = ([50u32, 30, 20], [0.2f64, 0.3, 0.5]);
        let log_ratio = |arm: usize| (f64::from(policy[arm]) / 100.0 / reference[arm]).ln();
        let (mut samples, mut drops) = (PolicySamples::default(), StepDrops::default());
        for (i, of_first) in policy.iter().enumerate() {
            for (j, of_second) in policy.iter().enumerate() {
                for _ in 0..of_first * of_second {
                    if i == j {
                        let log_ratio = Some(log_ratio(i) as f32);
                        drops.count_note(&note(DropReason::Identical, log_ratio));
                    } else {
                        samples.count += 2;
                        samples.log_ratio += log_ratio(i) + log_ratio(j);
                    }
                }
            }
        }
        // .5 ln 2.5 + .2 ln .4
        let exact = 0.3 * 2.5f64.ln();
        let found = drops.mean_log_ratio(samples, 2).expect("policy samples");
        assert!((found - exact).abs() < 1e-6, "{found}");
        // The pairs of different arms alone are biased.
        let biased = StepDrops::default().mean_log_ratio(samples, 2);
        let biased = biased.expect("policy samples");
        assert!((biased - exact).abs() > 0.1, "{biased}");
    }

    #[test]
    fn no_mean_without_policy_samples_or_with_other_drops() {
        let samples = PolicySamples {
            count: 4,
            log_ratio: 2.0,
        };
        let none = StepDrops::default();
        assert_eq!(none.mean_log_ratio(samples, 2), Some(0.5));
        assert_eq!(none.mean_log_ratio(PolicySamples::default(), 2), None);
        let mut dropped = DroppedPrompts::new();
        dropped.count_note(&note(DropReason::Abstained, None));
        assert_eq!(dropped.take_step().mean_log_ratio(samples, 2), None);
        for (reason, mean) in [
            (DropReason::Stale, None),
            (DropReason::Invalid, None),
            (DropReason::Duplicate, Some(0.5)),
            (DropReason::Superseded, Some(0.5)),
        ] {
            dropped.count_pair(reason, "");
            assert_eq!(dropped.take_step().mean_log_ratio(samples, 2), mean);
        }
    }

    /// Two samples of the policy with log π/ref .5 and −1, and one of the mixture.
    #[test]
    fn samples_of_pairs_without_signal_are_part_of_the_mean() {
        let completion = |mixture_coef, logp, ref_logp| Completion {
            ids: vec![1],
            finish: Finish::Length,
            mixture_coef,
            logp: vec![logp],
            ref_logp: vec![ref_logp],
            behaviour_logp: vec![logp],
            text: String::new(),
        };
        let completions = [(0.0, -1.0, -1.5), (0.0, -3.0, -2.0), (0.5, -9.0, -1.0)];
        let completions = completions.map(|(m, logp, ref_logp)| completion(m, logp, ref_logp));
        let labelled = crate::micro_batch::tests::labelled(completions.to_vec());
        let mut dropped = DroppedPrompts::new();
        dropped.keep_samples(&labelled.pair);
        dropped.count_pair(DropReason::NoSignal, "");
        let drops = dropped.take_step();
        let samples = PolicySamples {
            count: 4,
            log_ratio: 2.0,
        };
        assert_eq!(drops.mean_log_ratio(samples, 2), Some(1.5 / 6.0));
        assert_eq!(drops.no_signal, 1);
    }

    #[test]
    fn drops_are_listed_until_there_is_progress() {
        let mut dropped = DroppedPrompts::new();
        assert_eq!(dropped.to_string(), "");
        for reason in [
            DropReason::Identical,
            DropReason::Abstained,
            DropReason::Identical,
        ] {
            dropped.count(reason, "");
        }
        dropped.count(DropReason::Abstained, "too long");
        let listed = "; dropped meanwhile: 2 identical, 2 abstained (the last: too long)";
        assert_eq!(dropped.to_string(), listed);
        dropped.count(DropReason::Abstained, &"\u{1b}\n".repeat(9000));
        let shown = dropped.to_string();
        assert!(
            shown.contains("\\u{1b}\\n") && shown.len() < 3000,
            "{shown}"
        );
        dropped.progressed();
        assert_eq!(dropped.to_string(), "");
    }
}
