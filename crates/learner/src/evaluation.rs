//! Evaluation results: win rate of the policy against its reference on held-out prompts, and KL divergence.
//!
//! The reference of an evaluation is the one with which the run began, unless its name says otherwise.

use messages::{Finish, LabelledPair};
use serde::{Deserialize, Serialize};
use telemetry::{Interval, Measurements};

use crate::judge_evaluation::{IndependentUnit, JudgeEvaluation, judge_evaluations};
use crate::win_rates::{agreement, length_controlled, win};

/// A held-out prompt with both completions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvaluationExample {
    /// Prompt text.
    pub prompt: String,
    /// Completion of the policy.
    pub policy: String,
    /// Completion of the reference.
    pub reference: String,
    /// The judge's probability that the policy's is better.
    pub p: f64,
}

/// Conditions of an evaluation: what its results depend on besides weights, prompts and judge. Runs with different
/// conditions are not comparable: stop tokens alone can double a win rate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvaluationConditions {
    /// Stop token ids, ascending.
    pub stop_ids: Vec<u32>,
    /// Digest of the chat template; `None` if the model has none.
    pub chat_template: Option<String>,
    /// Maximum length of a completion, in tokens.
    pub max_new_tokens: usize,
    /// Sampling temperature.
    pub temperature: f64,
    /// Number of likeliest tokens to sample from; 0: off.
    pub top_k: usize,
    /// Cumulative probability of the likeliest tokens to sample from; 1: off.
    pub top_p: f64,
    /// Minimum probability of a token relative to the likeliest; 0: off.
    pub min_p: f64,
}

/// One evaluation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Learner step.
    pub step: u64,
    /// Number of judged prompts, the sample size of the intervals. Each is a distinct prompt or, with generated
    /// prompts, an independent draw.
    pub prompts: usize,
    /// Number of prompts without a verdict, mostly because the judge abstained.
    #[serde(default)]
    pub unjudged: usize,
    /// Stop tokens, chat template and sampling settings; absent in evaluations of older builds.
    #[serde(default)]
    pub conditions: Option<EvaluationConditions>,
    /// Share of prompts on which the run's judge prefers the policy's completion; ties count one half.
    pub win_rate: Interval,
    /// Mean of the judge's p.
    pub soft_win_rate: f64,
    /// `win_rate` under the gold preference, if there is one.
    pub gold_win_rate: Option<Interval>,
    /// Share of agreement between the run's judge and the gold preference, ties of either excluded.
    pub judge_accuracy: Option<f64>,
    /// Results under the other evaluation judges, by name.
    #[serde(default)]
    pub judges: Vec<JudgeEvaluation>,
    /// Length-controlled `win_rate`; absent in evaluations of older builds.
    #[serde(default)]
    pub win_rate_lc: Option<f64>,
    /// KL(policy ‖ reference) per completion, in nats: the mean of log π/ref, both as computed by the actor, over
    /// samples from the policy's full distribution at temperature 1.
    pub kl: f64,
    /// Mean length of the policy's completions, in tokens.
    pub response_length: f64,
    /// Mean length of the reference's completions, in tokens.
    pub reference_length: f64,
    /// The policy's entropy per token, in nats, from the same samples as `kl`.
    pub entropy: f64,
    /// Share of the policy's completions that ended with a stop token.
    pub ended: f64,
    /// Share of the policy's completions truncated at `max_new_tokens`; absent in evaluations of older builds.
    #[serde(default)]
    pub truncation_rate: Option<f64>,
    /// The same share of the reference's completions.
    #[serde(default)]
    pub reference_truncation_rate: Option<f64>,
    /// Some of the prompts with both completions.
    pub examples: Vec<EvaluationExample>,
    /// The moving average of the policy's weights against the same reference, on the same prompts with the same seeds;
    /// absent without `learner.ema_decay`.
    #[serde(default)]
    pub average: Option<FurtherComparison>,
    /// Step after which the reference of the last step's pairs had last changed; `None` if it is still the one of the
    /// start, against which everything above is. A reference that is copied at the evaluated step is not meant: it is the
    /// policy itself.
    #[serde(default)]
    pub reference_version: Option<u64>,
    /// The policy against that reference, if it has moved; its `kl` is from it.
    #[serde(default)]
    pub current_reference: Option<FurtherComparison>,
}

/// Result of another comparison of an evaluation, in the terms of [`Evaluation`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FurtherComparison {
    /// Number of judged prompts.
    pub prompts: usize,
    /// Share of prompts on which the run's judge prefers the first model's completion.
    pub win_rate: Interval,
    /// Mean of the judge's p.
    pub soft_win_rate: f64,
    /// `win_rate` under the gold preference, if there is one.
    pub gold_win_rate: Option<Interval>,
    /// Length-controlled `win_rate`.
    pub win_rate_lc: Option<f64>,
    /// KL of the first model from the second per completion, in nats.
    pub kl: f64,
    /// Mean length of the first model's completions, in tokens.
    pub response_length: f64,
}

impl From<Evaluation> for FurtherComparison {
    fn from(evaluation: Evaluation) -> Self {
        Self {
            prompts: evaluation.prompts,
            win_rate: evaluation.win_rate,
            soft_win_rate: evaluation.soft_win_rate,
            gold_win_rate: evaluation.gold_win_rate,
            win_rate_lc: evaluation.win_rate_lc,
            kl: evaluation.kl,
            response_length: evaluation.response_length,
        }
    }
}

impl FurtherComparison {
    fn add_to(&self, m: &mut Measurements, name: &str) {
        m.set(format!("eval/{name}_win_rate"), self.win_rate.mean);
        if let Some(rate) = self.win_rate_lc {
            m.set(format!("eval/{name}_win_rate_lc"), rate);
        }
        if let Some(gold) = self.gold_win_rate {
            m.set(format!("eval/{name}_gold_win_rate"), gold.mean);
        }
        m.set(format!("eval/{name}_kl"), self.kl);
    }
}

/// Judged pairs of an evaluation in progress.
#[derive(Debug, Default)]
pub(crate) struct EvaluationTally {
    pairs: Vec<LabelledPair>,
}

/// Step, size and conditions of an evaluation.
pub(crate) struct EvaluationTarget {
    /// Learner step.
    pub(crate) step: u64,
    /// Number of prompts sent.
    pub(crate) prompts: usize,
    /// Sampling conditions.
    pub(crate) conditions: EvaluationConditions,
    /// Names of the evaluation judges.
    pub(crate) judges: Vec<String>,
}

impl EvaluationTally {
    /// Adds a judged pair: the policy's completion first, the reference's second.
    pub(crate) fn add(&mut self, labelled: LabelledPair) {
        self.pairs.push(labelled);
    }

    /// The evaluation of all pairs, with the first `show` prompts as examples. `None` without pairs.
    pub(crate) fn finish(mut self, target: EvaluationTarget, show: usize) -> Option<Evaluation> {
        // Sums and examples must not depend on the order of arrival.
        self.pairs.sort_by_key(|labelled| labelled.pair.id());
        let n = self.pairs.len();
        if n == 0 {
            return None;
        }
        let mean =
            |f: &dyn Fn(&LabelledPair) -> f64| self.pairs.iter().map(f).sum::<f64>() / n as f64;
        let p = |l: &LabelledPair| {
            l.labels
                .first()
                .map_or(0.5, |label| f64::from(label.p.get()))
        };
        fn policy(labelled: &LabelledPair) -> &messages::Completion {
            &labelled.pair.completions[0]
        }
        let exact_tokens = mean(&|l| exact(l).ids.len() as f64);
        let tokens = mean(&|l| policy(l).ids.len() as f64);
        let golds: Vec<f64> = self
            .pairs
            .iter()
            .filter_map(|l| Some(win(f64::from(l.gold()?.get()))))
            .collect();
        let gold =
            (golds.len() == n).then(|| Interval::wilson(golds.iter().sum::<f64>() / n as f64, n));
        let wins: Vec<f64> = self.pairs.iter().map(|l| win(p(l))).collect();
        let truncated = |i: usize| {
            mean(&|l| f64::from(u8::from(l.pair.completions[i].finish == Finish::Length)))
        };
        Some(Evaluation {
            step: target.step,
            prompts: n,
            unjudged: target.prompts.saturating_sub(n),
            conditions: Some(target.conditions),
            win_rate: Interval::wilson(mean(&|l| win(p(l))), n),
            soft_win_rate: mean(&p),
            gold_win_rate: gold,
            judge_accuracy: agreement(&self.pairs, &LabelledPair::gold),
            judges: judge_evaluations(&target.judges, &self.pairs, IndependentUnit::Pair),
            win_rate_lc: Some(length_controlled(&self.pairs, &wins)),
            kl: mean(&|l| exact(l).log_ratio().unwrap_or(f64::NAN)),
            response_length: tokens,
            reference_length: mean(&|l| l.pair.completions[1].ids.len() as f64),
            entropy: -mean(&|l| exact(l).sum_logp()) / exact_tokens.max(1.0),
            ended: mean(&|l| f64::from(u8::from(policy(l).finish == Finish::EndOfText))),
            truncation_rate: Some(truncated(0)),
            reference_truncation_rate: Some(truncated(1)),
            examples: self
                .pairs
                .iter()
                .take(show)
                .map(|l| example(l, p(l)))
                .collect(),
            average: None,
            reference_version: None,
            current_reference: None,
        })
    }
}

/// The policy's sample from its full distribution at temperature 1: an extra one if the settings temper or truncate,
/// else the judged one.
fn exact(labelled: &LabelledPair) -> &messages::Completion {
    let completions = &labelled.pair.completions;
    completions.get(2).unwrap_or(&completions[0])
}

fn example(labelled: &LabelledPair, p: f64) -> EvaluationExample {
    let [policy, reference] = [0, 1].map(|i| labelled.pair.completions[i].text.clone());
    EvaluationExample {
        prompt: labelled.pair.prompt.transcript().into_owned(),
        policy,
        reference,
        p,
    }
}

impl Evaluation {
    /// The result under this evaluation judge.
    #[must_use]
    pub fn under(&self, judge: &str) -> Option<&JudgeEvaluation> {
        self.judges.iter().find(|result| result.judge == judge)
    }

    /// Metrics of the evaluation.
    #[must_use]
    pub fn measurements(&self) -> Measurements {
        let mut measurements = Measurements::new();
        measurements.set("eval/win_rate", self.win_rate.mean);
        measurements.set("eval/win_rate_ci_low", self.win_rate.low);
        measurements.set("eval/win_rate_ci_high", self.win_rate.high);
        if let Some(rate) = self.win_rate_lc {
            measurements.set("eval/win_rate_lc", rate);
        }
        measurements.set("eval/kl", self.kl);
        measurements.set("eval/response_length", self.response_length);
        #[expect(clippy::cast_precision_loss, reason = "no evaluation has 2^53 prompts")]
        measurements.set("eval/prompts", self.prompts as f64);
        if let Some(rate) = self.truncation_rate {
            measurements.set("eval/truncation_rate", rate);
        }
        if let Some(rate) = self.reference_truncation_rate {
            measurements.set("eval/reference_truncation_rate", rate);
        }
        if let Some(gold) = self.gold_win_rate {
            measurements.set("eval/gold_win_rate", gold.mean);
        }
        let further = [
            ("average", &self.average),
            ("current_reference", &self.current_reference),
        ];
        for (name, comparison) in further {
            if let Some(comparison) = comparison {
                comparison.add_to(&mut measurements, name);
            }
        }
        for judge in &self.judges {
            judge.measure(&mut measurements);
        }
        measurements
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A completion of one token with these log-probabilities.
    fn arm(logp: f64, ref_logp: f64) -> messages::Completion {
        messages::Completion {
            ids: vec![0],
            finish: Finish::EndOfText,
            mixture_coef: 0.0,
            logp: vec![logp as f32],
            ref_logp: vec![ref_logp as f32],
            behaviour_logp: vec![0.0],
            text: String::new(),
        }
    }

    fn conditions() -> EvaluationConditions {
        EvaluationConditions {
            stop_ids: vec![0],
            chat_template: None,
            max_new_tokens: 1,
            temperature: 0.5,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
        }
    }

    /// A bandit with the policy (.5, .3, .2) and the reference (.2, .3, .5), sampled at temperature ½, where arms are
    /// sampled in the ratio 25 : 9 : 4. The third completion is sampled at temperature 1.
    #[test]
    fn kl_and_entropy_come_from_the_sample_at_temperature_1() {
        let (policy, reference) = ([0.5f64, 0.3, 0.2], [0.2f64, 0.3, 0.5]);
        let of = |arm: usize| self::arm(policy[arm].ln(), reference[arm].ln());
        let mut tally = EvaluationTally::default();
        let mut untempered = EvaluationTally::default();
        // 380 samples at either temperature.
        let arms = |counts: [usize; 3]| -> Vec<usize> {
            let each = counts.into_iter().enumerate();
            each.flat_map(|(arm, count)| vec![arm; count]).collect()
        };
        let tempered = arms([250, 90, 40]);
        for (&judged, &exact) in tempered.iter().zip(&arms([190, 114, 76])) {
            let with = |completions| crate::micro_batch::tests::labelled(completions);
            tally.add(with(vec![of(judged), of(0), of(exact)]));
            untempered.add(with(vec![of(exact), of(0)]));
        }
        let kl = 0.3 * 2.5f64.ln();
        let entropy: f64 = policy.iter().map(|p| -p * p.ln()).sum();
        for tally in [tally, untempered] {
            let target = EvaluationTarget {
                step: 0,
                prompts: 380,
                conditions: conditions(),
                judges: Vec::new(),
            };
            let evaluation = tally.finish(target, 0).expect("pairs");
            assert!((evaluation.kl - kl).abs() < 1e-6, "{}", evaluation.kl);
            assert!((evaluation.entropy - entropy).abs() < 1e-6);
            assert_eq!(evaluation.prompts, 380);
        }
    }
}
