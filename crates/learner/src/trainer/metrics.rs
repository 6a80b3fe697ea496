//! Metrics of a step, from sums over its passes.

use messages::{Completion, LabelledPair};
use model::Tensor;
use telemetry::Measurements;

use crate::{
    error::LearnerError,
    file_pairs::is_from_file,
    micro_batch::{MicroBatch, not_compared},
    trainer::off_policy::Correction,
};

/// Sums over the passes of a step, and values of its tokens and completions.
#[derive(Default)]
pub(crate) struct StepSums {
    /// Total loss, regulariser included.
    pub(crate) loss: f64,
    /// Loss of the objective alone.
    objective: f64,
    tokens: TokenValues,
    /// log π of every compared completion.
    logp: Vec<f64>,
    /// log ref of every completion.
    ref_logp: Vec<f64>,
    /// Whether each completion was sampled from the policy alone.
    is_of_policy: Vec<bool>,
    /// Token counts of the completions.
    lengths: Vec<usize>,
    labels: Vec<LabelRow>,
    /// First step of the weights that were published with the current reference.
    recorded_since: u64,
    /// log of the labels' importance weights, where there is one.
    log_weights: Vec<f64>,
}

/// Values of every response token; those of the log-probabilities only where the actors recorded theirs.
#[derive(Default)]
struct TokenValues {
    /// Token counts of the recorded completions.
    lengths: Vec<usize>,
    /// The learner's log π.
    logp: Vec<f32>,
    /// The learner's log ref.
    ref_logp: Vec<f32>,
    /// The actors' log π.
    recorded_logp: Vec<f32>,
    /// The actors' log ref; NaN where they recorded none, or under another reference than the learner's.
    recorded_ref_logp: Vec<f32>,
    /// The policy's entropy, in nats.
    entropy: Vec<f32>,
}

/// A label: indices of its two completions, and the probability that the first is preferred.
#[derive(Debug, Clone, Copy)]
struct LabelRow {
    first: usize,
    second: usize,
    p: f64,
}

/// Output of one pass.
pub(crate) struct PassOutput<'a> {
    pub(crate) micro: &'a MicroBatch<'a>,
    /// log π `[R]`.
    pub(crate) token_logp: &'a Tensor,
    /// log ref `[R]`.
    pub(crate) token_ref_logp: &'a Tensor,
    /// Entropy of the policy `[R]`, in nats.
    pub(crate) entropy: &'a Tensor,
    /// Contribution of the pass to the batch's mean loss.
    pub(crate) loss: &'a Tensor,
    /// log of the importance weight of every label.
    pub(crate) log_weights: &'a [Option<f64>],
}

/// Completions of a step that were sampled from the policy alone (`mixture_coef` 0).
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct PolicySamples {
    /// Number of completions.
    pub count: usize,
    /// Sum of their log π/ref, in nats.
    pub log_ratio: f64,
}

impl PolicySamples {
    /// Policy samples among `completions`, with log π/ref as their actors recorded it; without those that have no record.
    pub(crate) fn recorded<'a>(completions: impl Iterator<Item = &'a Completion>) -> Self {
        completions
            .filter(|completion| completion.mixture_coef == 0.0)
            .filter_map(Completion::log_ratio)
            .fold(Self::default(), |sum, log_ratio| {
                sum.and(Self {
                    count: 1,
                    log_ratio,
                })
            })
    }

    /// Both together.
    #[must_use]
    pub(crate) fn and(self, other: Self) -> Self {
        Self {
            count: self.count + other.count,
            log_ratio: self.log_ratio + other.log_ratio,
        }
    }
}

impl StepSums {
    /// Sums over nothing, for pairs whose log ref counts as recorded under the current reference if their weights are of
    /// step `step` or newer.
    pub(crate) fn recorded_since(step: u64) -> Self {
        Self {
            recorded_since: step,
            ..Self::default()
        }
    }

    pub(crate) fn add(&mut self, pass: &PassOutput<'_>) -> Result<(), LearnerError> {
        let micro = pass.micro;
        let tokens: Vec<f32> = pass.token_logp.to_vec1()?;
        let reference: Vec<f32> = pass.token_ref_logp.to_vec1()?;
        let base = self.logp.len();
        self.logp.extend(sums(&tokens, &micro.lengths));
        self.ref_logp.extend(sums(&reference, &micro.lengths));
        let labels = micro.first.iter().zip(&micro.second).zip(&micro.p);
        self.labels
            .extend(labels.map(|((&first, &second), &p)| LabelRow {
                first: base + first as usize,
                second: base + second as usize,
                p: f64::from(p),
            }));
        self.lengths.extend(&micro.lengths);
        let recorded: Vec<bool> = micro.is_recorded().collect();
        let both = micro.lengths.iter().zip(&recorded);
        let lengths = both.filter(|(_, recorded)| **recorded);
        self.tokens
            .lengths
            .extend(lengths.map(|(length, _)| length));
        self.is_of_policy.extend(micro.is_of_policy());
        self.tokens.recorded_logp.extend(micro.recorded_logp());
        self.tokens
            .recorded_ref_logp
            .extend(micro.recorded_ref_logp(self.recorded_since));
        self.tokens.entropy.extend(pass.entropy.to_vec1::<f32>()?);
        for (all, kept) in [
            (&tokens, &mut self.tokens.logp),
            (&reference, &mut self.tokens.ref_logp),
        ] {
            let parts = split_by_lengths(all, &micro.lengths).zip(&recorded);
            parts
                .filter(|(_, recorded)| **recorded)
                .for_each(|(part, _)| kept.extend(part));
        }
        self.log_weights.extend(pass.log_weights.iter().flatten());
        self.objective += f64::from(pass.loss.to_scalar::<f32>()?);
        Ok(())
    }

    /// Loss of the objective alone.
    pub(crate) fn objective(&self) -> f64 {
        self.objective
    }

    /// Implicit rewards, temperature · log π/ref, of the chosen and the rejected completions.
    pub(crate) fn rewards(&self, temperature: f64, m: &mut Measurements) {
        let reward = |c: usize| temperature * (self.logp[c] - self.ref_logp[c]);
        let decided: Vec<(usize, usize)> = self
            .labels
            .iter()
            .filter(|label| label.p != 0.5)
            .map(|label| match label.p > 0.5 {
                true => (label.first, label.second),
                false => (label.second, label.first),
            })
            .collect();
        let labels = self.labels.len().max(1) as f64;
        let certainty: f64 = self.labels.iter().map(|l| (2.0 * l.p - 1.0).abs()).sum();
        m.set("objective/label_margin", certainty / labels);
        if decided.is_empty() {
            // The mean of nothing is undefined.
            return;
        }
        let mean = |f: &dyn Fn(&(usize, usize)) -> f64| {
            decided.iter().map(f).sum::<f64>() / decided.len() as f64
        };
        m.set("rewards/chosen", mean(&|&(chosen, _)| reward(chosen)));
        m.set("rewards/rejected", mean(&|&(_, rejected)| reward(rejected)));
        m.set(
            "rewards/margins",
            mean(&|&(chosen, rejected)| reward(chosen) - reward(rejected)),
        );
        let is_right = |&(chosen, rejected): &(usize, usize)| {
            f64::from(u8::from(reward(chosen) > reward(rejected)))
        };
        m.set("rewards/accuracies", mean(&is_right));
        m.set("logps/chosen", mean(&|&(chosen, _)| self.logp[chosen]));
        m.set(
            "logps/rejected",
            mean(&|&(_, rejected)| self.logp[rejected]),
        );
    }

    /// Log-ratios and entropy of the compared completions, lengths of all.
    pub(crate) fn completions(&self, pairs: &[LabelledPair], m: &mut Measurements) {
        let count = self.lengths.len().max(1) as f64;
        let log_ratio: f64 = self.log_ratios().sum();
        m.set("objective/log_ratio", log_ratio / count);
        let entropy: f64 = self.tokens.entropy.iter().map(|&e| f64::from(e)).sum();
        m.set(
            "objective/entropy",
            entropy / self.tokens.entropy.len().max(1) as f64,
        );
        let sampled = sampled(pairs);
        let described = if sampled.is_empty() {
            pairs.iter().collect()
        } else {
            sampled.clone()
        };
        let completions = || {
            described
                .iter()
                .flat_map(|labelled| &labelled.pair.completions)
        };
        let lengths = || completions().map(|c| c.ids.len());
        let count = completions().count().max(1) as f64;
        m.set(
            "completions/mean_length",
            lengths().sum::<usize>() as f64 / count,
        );
        m.set(
            "completions/min_length",
            lengths().min().map_or(0.0, |l| l as f64),
        );
        m.set(
            "completions/max_length",
            lengths().max().map_or(0.0, |l| l as f64),
        );
        if sampled.is_empty() && !pairs.is_empty() {
            // Answers of files were not truncated by a sampler.
            return;
        }
        let clipped = completions()
            .filter(|c| c.finish == messages::Finish::Length)
            .count() as f64;
        m.set("completions/clipped_ratio", clipped / count);
        m.set("val/contain_eos_token", 1.0 - clipped / count);
    }

    /// log π/ref of every completion.
    fn log_ratios(&self) -> impl Iterator<Item = f64> {
        let both = self.logp.iter().zip(&self.ref_logp);
        both.map(|(logp, ref_logp)| logp - ref_logp)
    }

    /// Completions that were sampled from the policy alone: those that were scored, and as recorded those of `pairs`
    /// that no label compares. Which completions are compared depends on their labels, and so may their log-ratios.
    pub(crate) fn policy_samples(&self, pairs: &[LabelledPair]) -> PolicySamples {
        let all = self.log_ratios().zip(&self.is_of_policy);
        let of_policy = all.filter(|(_, of_policy)| **of_policy);
        let scored = of_policy.fold(PolicySamples::default(), |sum, (log_ratio, _)| {
            sum.and(PolicySamples {
                count: 1,
                log_ratio,
            })
        });
        scored.and(PolicySamples::recorded(pairs.iter().flat_map(not_compared)))
    }

    /// The learner's log ref of every token of the compared completions that actors recorded, in order.
    pub(crate) fn into_ref_logp(self) -> Vec<f32> {
        self.tokens.ref_logp
    }

    /// Metrics of the labels' importance weights, whether or not they enter the loss.
    pub(crate) fn off_policy(&self, correction: &Correction, m: &mut Measurements) {
        correction.metrics(&self.log_weights, m);
    }

    /// Mismatch between the learner's policy and the one that sampled the completions, as its actor recorded it: what
    /// importance weights would correct. It is due to staleness and to arithmetic; `mismatch/ref_logp_abs_diff`, of the
    /// reference, is due to arithmetic alone.
    pub(crate) fn mismatch(&self, m: &mut Measurements) {
        if self.tokens.lengths.is_empty() {
            // Nothing was recorded of pairs from files.
            return;
        }
        let gaps = differences(&self.tokens.logp, &self.tokens.recorded_logp);
        let mean = |f: &dyn Fn(f64) -> f64| {
            gaps.iter().map(|&gap| f(gap)).sum::<f64>() / gaps.len().max(1) as f64
        };
        m.set("mismatch/logp_abs_diff", mean(&f64::abs));
        m.set("mismatch/kl", mean(&|gap| -gap));
        m.set("mismatch/k3_kl", mean(&|gap| gap.exp() - 1.0 - gap));
        let of_completions: Vec<f64> = split_by_lengths(&gaps, &self.tokens.lengths)
            .map(|gaps| gaps.iter().sum())
            .collect();
        m.set("mismatch/ess", effective_share(&of_completions));
        let mut of_reference = differences(&self.tokens.ref_logp, &self.tokens.recorded_ref_logp);
        of_reference.retain(|gap| !gap.is_nan());
        if of_reference.is_empty() {
            // None was recorded, or all under another reference.
            return;
        }
        let total: f64 = of_reference.iter().map(|gap| gap.abs()).sum();
        m.set(
            "mismatch/ref_logp_abs_diff",
            total / of_reference.len() as f64,
        );
    }
}

/// The pairs that actors sampled, without those of files.
fn sampled(pairs: &[LabelledPair]) -> Vec<&LabelledPair> {
    let is_sampled = |labelled: &&LabelledPair| !is_from_file(labelled.pair.prompt.id);
    pairs.iter().filter(is_sampled).collect()
}

/// Scores of the judge, if every sampled pair of the step has them; without samples those of the files' pairs.
pub(crate) fn judge_scores(pairs: &[LabelledPair], m: &mut Measurements) {
    let sampled = sampled(pairs);
    let described = if sampled.is_empty() {
        pairs.iter().collect()
    } else {
        sampled
    };
    let scored: Option<Vec<(&LabelledPair, &Vec<f32>)>> = described
        .into_iter()
        .map(|labelled| Some((labelled, labelled.scores.as_ref()?)))
        .collect();
    let Some(scored) = scored.filter(|scored| !scored.is_empty()) else {
        return;
    };
    let scores = scored.iter().flat_map(|(_, scores)| scores.iter());
    m.set("objective/scores", mean(scores.map(|&s| f64::from(s))));
    let margins = scored.iter().flat_map(|(labelled, scores)| {
        let of = |index: u16| f64::from(scores[usize::from(index)]);
        let labels = labelled.labels.iter();
        labels.map(move |label| (of(label.first) - of(label.second)).abs())
    });
    m.set("objective/scores_margin", mean(margins));
}

/// Consecutive parts of a list with these lengths.
pub(super) fn split_by_lengths<'a, T>(
    all: &'a [T],
    lengths: &'a [usize],
) -> impl Iterator<Item = &'a [T]> {
    let mut rest = all;
    lengths.iter().map(move |&length| {
        let (part, after) = rest.split_at(length);
        rest = after;
        part
    })
}

/// Sum over the tokens of each completion.
fn sums<'a>(tokens: &'a [f32], lengths: &'a [usize]) -> impl Iterator<Item = f64> {
    split_by_lengths(tokens, lengths).map(|part| part.iter().map(|&x| f64::from(x)).sum())
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (mut sum, mut count) = (0.0, 0u32);
    for value in values {
        sum += value;
        count += 1;
    }
    sum / f64::from(count.max(1))
}

/// Elementwise a − b.
fn differences(a: &[f32], b: &[f32]) -> Vec<f64> {
    let both = a.iter().zip(b);
    both.map(|(&a, &b)| f64::from(a) - f64::from(b)).collect()
}

/// (Σw)² / (n·Σw²): effective sample size of importance weights w as a share of their number n (Kong 1992), from their
/// logarithms.
pub(super) fn effective_share(log_weights: &[f64]) -> f64 {
    // A common factor cancels; dividing by the largest keeps the weights finite.
    let most = log_weights.iter().copied().fold(f64::MIN, f64::max);
    let weights: Vec<f64> = log_weights.iter().map(|w| (w - most).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let squares: f64 = weights.iter().map(|w| w * w).sum();
    sum * sum / (squares * weights.len().max(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Completions of one token from a bandit with the policy (.5, .3, .2), sampled 50, 30 and 20 times; `now` is the
    /// learner's policy.
    fn sampled(now: [f64; 3], reference: [f64; 3]) -> StepSums {
        let (policy, counts) = ([0.5f64, 0.3, 0.2], [50, 30, 20]);
        let of = |probabilities: [f64; 3]| -> Vec<f32> {
            let arms = probabilities.iter().zip(counts);
            arms.flat_map(|(p, count)| vec![p.ln() as f32; count])
                .collect()
        };
        let wide = |tokens: &[f32]| tokens.iter().map(|&x| f64::from(x)).collect();
        StepSums {
            tokens: TokenValues {
                lengths: vec![1; 100],
                logp: of(now),
                ref_logp: of(reference),
                recorded_logp: of(policy),
                recorded_ref_logp: of(reference),
                entropy: vec![1.0; 100],
            },
            logp: wide(&of(now)),
            ref_logp: wide(&of(reference)),
            is_of_policy: vec![true; 100],
            lengths: vec![1; 100],
            ..StepSums::default()
        }
    }

    #[track_caller]
    fn close(m: &Measurements, name: &str, expected: f64) {
        let found = m.get(name).unwrap_or(f64::NAN);
        assert!(
            (found - expected).abs() < 1e-6,
            "{name} {found} for {expected}"
        );
    }

    /// All pairs are stale: KL(π_then ‖ π_now) of (.5, .3, .2) and (.4, .4, .2), and Σ π_now²/π_then.
    #[test]
    fn mismatch_of_stale_samples_is_that_of_the_two_policies() {
        let mut m = Measurements::new();
        sampled([0.4, 0.4, 0.2], [0.2, 0.3, 0.5]).mismatch(&mut m);
        let (up, down) = ((0.5f64 / 0.4).ln(), (0.4f64 / 0.3).ln());
        let kl = 0.5 * up - 0.3 * down;
        close(&m, "mismatch/kl", kl);
        close(&m, "mismatch/kl", 0.025_267_154);
        // E[w] is 1, so both estimates have one expectation.
        close(&m, "mismatch/k3_kl", kl);
        close(&m, "mismatch/logp_abs_diff", 0.5 * up + 0.3 * down);
        close(&m, "mismatch/ess", 1.0 / (0.16 / 0.5 + 0.16 / 0.3 + 0.2));
        close(&m, "mismatch/ref_logp_abs_diff", 0.0);
    }

    #[test]
    fn reduced_precision_shows_in_the_reference_of_stale_pairs() {
        let mut sums = sampled([0.4, 0.4, 0.2], [0.2, 0.3, 0.5]);
        for recorded in &mut sums.tokens.recorded_ref_logp[..25] {
            *recorded += 0.5;
        }
        let mut m = Measurements::new();
        sums.mismatch(&mut m);
        close(&m, "mismatch/ref_logp_abs_diff", 0.125);
    }

    #[test]
    fn the_effective_share_is_finite_for_extreme_weights() {
        assert_eq!(effective_share(&[900.0, 900.0]), 1.0);
        assert_eq!(effective_share(&[-900.0, -900.0]), 1.0);
        assert_eq!(effective_share(&[900.0, 0.0]), 0.5);
    }

    /// KL((.5, .3, .2) ‖ (.2, .3, .5)) = .3 ln 2.5.
    #[test]
    fn policy_samples_exclude_those_of_the_mixture() {
        let mut sums = sampled([0.5, 0.3, 0.2], [0.2, 0.3, 0.5]);
        let kl = 0.3 * 2.5f64.ln();
        let samples = sums.policy_samples(&[]);
        assert_eq!(samples.count, 100);
        assert!((samples.log_ratio / 100.0 - kl).abs() < 1e-6);
        let mut m = Measurements::new();
        sums.completions(&[], &mut m);
        close(&m, "objective/log_ratio", kl);
        // Every other one is from the mixture.
        sums.is_of_policy = (0..100).map(|i| i % 2 == 0).collect();
        let samples = sums.policy_samples(&[]);
        assert_eq!(samples.count, 50);
        assert!((samples.log_ratio / 50.0 - kl).abs() < 1e-6);
    }
}
