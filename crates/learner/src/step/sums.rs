//! What the passes of a step add up to, and the metrics that come of it.

use messages::LabelledPair;
use model::Tensor;
use telemetry::Measurements;

use crate::{LearnerError, batch::MicroBatch};

/// Sums over the passes of a step.
#[derive(Default)]
pub(super) struct Sums {
    /// Of everything that is minimised.
    pub(super) loss: f64,
    /// Of the objective alone.
    pub(super) objective: f64,
    /// The learner's log π of every response token.
    tokens: Vec<f32>,
    /// The learner's log ref of every response token.
    ref_tokens: Vec<f32>,
    /// The actors' log π of every response token.
    recorded: Vec<f32>,
    /// The actors' log ref of every response token.
    recorded_ref: Vec<f32>,
    entropy: Vec<f32>,
    /// Of every completion.
    logp: Vec<f64>,
    ref_logp: Vec<f64>,
    is_of_policy: Vec<bool>,
    /// Of every label: its two completions and p.
    rows: Vec<(usize, usize, f64)>,
    lengths: Vec<usize>,
}

/// One pass, scored.
pub(super) struct Pass<'a> {
    pub(super) micro: &'a MicroBatch<'a>,
    /// log π `[R]`.
    pub(super) token_logp: &'a Tensor,
    /// log ref `[R]`.
    pub(super) token_ref_logp: &'a Tensor,
    /// `[R]`, in nats.
    pub(super) entropy: &'a Tensor,
    /// The objective's share of the batch's mean loss.
    pub(super) loss: &'a Tensor,
}

/// The completions of a step that were drawn from the policy alone (`mixture_coef` 0).
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct PolicySamples {
    /// How many they are.
    pub count: usize,
    /// The sum of their log π/ref, in nats.
    pub log_ratio: f64,
}

impl Sums {
    pub(super) fn add(&mut self, pass: &Pass<'_>) -> Result<(), LearnerError> {
        let micro = pass.micro;
        let tokens: Vec<f32> = pass.token_logp.to_vec1()?;
        let reference: Vec<f32> = pass.token_ref_logp.to_vec1()?;
        let base = self.logp.len();
        self.logp.extend(sums(&tokens, &micro.lengths));
        self.ref_logp.extend(sums(&reference, &micro.lengths));
        let rows = micro.first.iter().zip(&micro.second).zip(&micro.p);
        self.rows.extend(
            rows.map(|((&a, &b), &p)| (base + a as usize, base + b as usize, f64::from(p))),
        );
        self.lengths.extend(&micro.lengths);
        self.is_of_policy.extend(micro.is_of_policy());
        self.recorded.extend(micro.recorded_logp());
        self.recorded_ref.extend(micro.recorded_ref_logp());
        self.entropy.extend(pass.entropy.to_vec1::<f32>()?);
        self.tokens.extend(tokens);
        self.ref_tokens.extend(reference);
        self.objective += f64::from(pass.loss.to_scalar::<f32>()?);
        Ok(())
    }

    /// Implicit rewards, temperature · log π/ref, of the likelier and the less likely completion.
    pub(super) fn rewards(&self, temperature: f64, m: &mut Measurements) {
        let reward = |c: usize| temperature * (self.logp[c] - self.ref_logp[c]);
        let decided: Vec<(usize, usize)> = self
            .rows
            .iter()
            .filter(|(_, _, p)| *p != 0.5)
            .map(|&(a, b, p)| if p > 0.5 { (a, b) } else { (b, a) })
            .collect();
        let rows = self.rows.len().max(1) as f64;
        let certainty: f64 = self.rows.iter().map(|r| (2.0 * r.2 - 1.0).abs()).sum();
        m.set("objective/label_margin", certainty / rows);
        if decided.is_empty() {
            // There is no mean over nothing.
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
        let right = |&(chosen, rejected): &(usize, usize)| {
            f64::from(u8::from(reward(chosen) > reward(rejected)))
        };
        m.set("rewards/accuracies", mean(&right));
        m.set("logps/chosen", mean(&|&(chosen, _)| self.logp[chosen]));
        m.set(
            "logps/rejected",
            mean(&|&(_, rejected)| self.logp[rejected]),
        );
    }

    /// The judge's scores, where every pair of the step has them.
    pub(super) fn scores(pairs: &[LabelledPair], m: &mut Measurements) {
        let scored: Option<Vec<(&LabelledPair, &Vec<f32>)>> = pairs
            .iter()
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

    pub(super) fn completions(&self, pairs: &[LabelledPair], m: &mut Measurements) {
        let count = self.lengths.len().max(1) as f64;
        let log_ratio: f64 = self.log_ratios().sum();
        m.set("objective/log_ratio", log_ratio / count);
        let entropy: f64 = self.entropy.iter().map(|&e| f64::from(e)).sum();
        m.set(
            "objective/entropy",
            entropy / self.entropy.len().max(1) as f64,
        );
        m.set(
            "completions/mean_length",
            self.lengths.iter().sum::<usize>() as f64 / count,
        );
        m.set(
            "completions/min_length",
            self.lengths.iter().min().map_or(0.0, |&l| l as f64),
        );
        m.set(
            "completions/max_length",
            self.lengths.iter().max().map_or(0.0, |&l| l as f64),
        );
        let completions = pairs.iter().flat_map(|labelled| &labelled.pair.completions);
        let clipped = completions
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

    /// Those that were drawn from the policy alone.
    pub(super) fn policy_samples(&self) -> PolicySamples {
        let all = self.log_ratios().zip(&self.is_of_policy);
        let of_policy = all.filter(|(_, of_policy)| **of_policy);
        of_policy.fold(PolicySamples::default(), |sum, (log_ratio, _)| {
            PolicySamples {
                count: sum.count + 1,
                log_ratio: sum.log_ratio + log_ratio,
            }
        })
    }

    /// The learner's policy as it is now against the policy that wrote the completions, as its actor recorded
    /// it: what an importance weight would have to make up for. It is staleness and arithmetic together;
    /// `mismatch/ref_logp_abs_diff`, of the reference, is arithmetic alone.
    pub(super) fn mismatch(&self, m: &mut Measurements) {
        let gaps = differences(&self.tokens, &self.recorded);
        let mean = |f: &dyn Fn(f64) -> f64| {
            gaps.iter().map(|&gap| f(gap)).sum::<f64>() / gaps.len().max(1) as f64
        };
        m.set("mismatch/logp_abs_diff", mean(&f64::abs));
        m.set("mismatch/kl", mean(&|gap| -gap));
        m.set("mismatch/k3_kl", mean(&|gap| gap.exp() - 1.0 - gap));
        let of_completions: Vec<f64> = parts(&gaps, &self.lengths)
            .map(|gaps| gaps.iter().sum())
            .collect();
        m.set("mismatch/ess", effective_share(&of_completions));
        let of_reference = differences(&self.ref_tokens, &self.recorded_ref);
        let apart: f64 = of_reference.iter().map(|gap| gap.abs()).sum();
        m.set(
            "mismatch/ref_logp_abs_diff",
            apart / of_reference.len().max(1) as f64,
        );
    }
}

/// The parts of a list, one after the other, that have these lengths.
fn parts<'a, T>(all: &'a [T], lengths: &'a [usize]) -> impl Iterator<Item = &'a [T]> {
    let mut rest = all;
    lengths.iter().map(move |&length| {
        let (part, after) = rest.split_at(length);
        rest = after;
        part
    })
}

/// The sum over each completion's tokens.
fn sums<'a>(tokens: &'a [f32], lengths: &'a [usize]) -> impl Iterator<Item = f64> {
    parts(tokens, lengths).map(|part| part.iter().map(|&x| f64::from(x)).sum())
}

fn mean(numbers: impl Iterator<Item = f64>) -> f64 {
    let (mut sum, mut count) = (0.0, 0u32);
    for number in numbers {
        sum += number;
        count += 1;
    }
    sum / f64::from(count.max(1))
}

/// a − b, place by place.
fn differences(a: &[f32], b: &[f32]) -> Vec<f64> {
    let both = a.iter().zip(b);
    both.map(|(&a, &b)| f64::from(a) - f64::from(b)).collect()
}

/// (Σw)² / (n·Σw²), the effective sample size of importance weights w as a share of their number n (Kong
/// 1992), from their logarithms.
fn effective_share(log_weights: &[f64]) -> f64 {
    // A common factor changes nothing; the largest keeps the weights finite.
    let most = log_weights.iter().copied().fold(f64::MIN, f64::max);
    let weights: Vec<f64> = log_weights.iter().map(|w| (w - most).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let squares: f64 = weights.iter().map(|w| w * w).sum();
    sum * sum / (squares * weights.len().max(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The completions of a bandit with three arms, of one token each: 50, 30 and 20 of 100.
    fn drawn(now: [f64; 3], reference: [f64; 3]) -> Sums {
        let (policy, counts) = ([0.5f64, 0.3, 0.2], [50, 30, 20]);
        let of = |law: [f64; 3]| -> Vec<f32> {
            let arms = law.iter().zip(counts);
            arms.flat_map(|(p, count)| vec![p.ln() as f32; count])
                .collect()
        };
        let wide = |tokens: &[f32]| tokens.iter().map(|&x| f64::from(x)).collect();
        Sums {
            tokens: of(now),
            ref_tokens: of(reference),
            recorded: of(policy),
            recorded_ref: of(reference),
            logp: wide(&of(now)),
            ref_logp: wide(&of(reference)),
            is_of_policy: vec![true; 100],
            lengths: vec![1; 100],
            entropy: vec![1.0; 100],
            ..Sums::default()
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

    /// Stale pairs, all of them: KL(π_then ‖ π_now) of (.5, .3, .2) and (.4, .4, .2), and Σ π_now²/π_then.
    #[test]
    fn mismatch_of_stale_samples_is_that_of_the_two_policies() {
        let mut m = Measurements::new();
        drawn([0.4, 0.4, 0.2], [0.2, 0.3, 0.5]).mismatch(&mut m);
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
    fn coarse_arithmetic_shows_in_the_reference_however_old_the_pairs() {
        let mut sums = drawn([0.4, 0.4, 0.2], [0.2, 0.3, 0.5]);
        for recorded in &mut sums.recorded_ref[..25] {
            *recorded += 0.5;
        }
        let mut m = Measurements::new();
        sums.mismatch(&mut m);
        close(&m, "mismatch/ref_logp_abs_diff", 0.125);
    }

    #[test]
    fn weights_of_any_size_have_a_share() {
        assert_eq!(effective_share(&[900.0, 900.0]), 1.0);
        assert_eq!(effective_share(&[-900.0, -900.0]), 1.0);
        assert_eq!(effective_share(&[900.0, 0.0]), 0.5);
    }

    /// KL((.5, .3, .2) ‖ (.2, .3, .5)) = .3 ln 2.5.
    #[test]
    fn samples_of_the_policy_alone_are_told_from_those_of_the_mixture() {
        let mut sums = drawn([0.5, 0.3, 0.2], [0.2, 0.3, 0.5]);
        let kl = 0.3 * 2.5f64.ln();
        let samples = sums.policy_samples();
        assert_eq!(samples.count, 100);
        assert!((samples.log_ratio / 100.0 - kl).abs() < 1e-6);
        let mut m = Measurements::new();
        sums.completions(&[], &mut m);
        close(&m, "objective/log_ratio", kl);
        // Every other one is the mixture's.
        sums.is_of_policy = (0..100).map(|i| i % 2 == 0).collect();
        let samples = sums.policy_samples();
        assert_eq!(samples.count, 50);
        assert!((samples.log_ratio / 50.0 - kl).abs() < 1e-6);
    }
}
