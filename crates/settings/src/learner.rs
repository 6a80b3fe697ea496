//! `[learner]`: training of the policy.

use std::fmt;

use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{Error, Visitor},
};

use crate::{
    checks::Checks,
    ganpo::GanpoSettings,
    model::DtypeSetting,
    objective::ObjectiveSettings,
    optimizer::{LrSchedulerType, OptimizerSettings},
    settings::Settings,
};

/// Training of the policy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LearnerSettings {
    /// Number of optimiser steps.
    pub steps: u64,
    /// Prompts per step.
    pub train_batch_size: usize,
    /// Precision of matrix products with f32 weights; accumulation and the optimiser use f32. bf16 weights
    /// (`model.dtype`) are multiplied in bf16 in any case.
    pub precision: DtypeSetting,
    /// Whether the backward pass recomputes the activations of the blocks.
    pub gradient_checkpointing: bool,
    /// Minimum number of passes that a step is split into.
    pub gradient_accumulation_steps: usize,
    /// Maximum number of tokens per pass, prompts and completions, unless a single prompt exceeds it; 0: no limit.
    pub max_tokens_per_micro_batch: usize,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Decay of the learning rate after warm-up.
    pub lr_scheduler_type: LrSchedulerType,
    /// Fraction of the steps spent on linear warm-up.
    pub warmup_ratio: f64,
    /// Final learning rate of linear and cosine decay, as a fraction of the peak.
    pub min_lr_ratio: f64,
    /// Decoupled weight decay of matrices; norms, biases and embeddings do not decay.
    pub weight_decay: f64,
    /// Decay rate of the first moment.
    pub adam_beta1: f64,
    /// Decay rate of the second moment.
    pub adam_beta2: f64,
    /// Added to the denominator.
    pub adam_epsilon: f64,
    /// Maximum gradient norm.
    pub max_grad_norm: MaxGradNorm,
    /// Steps between two publications of weights.
    pub weight_sync_steps: u64,
    /// Maximum staleness of a pair that is trained on, in learner steps, inclusive.
    #[serde(deserialize_with = "crate::staleness::number")]
    pub max_staleness: u64,
    /// Steps between two checkpoints; 0: only at the end.
    pub save_steps: u64,
    /// Number of checkpoints kept.
    pub save_total_limit: usize,
    /// Kind of training labels.
    pub label: LabelKind,
    /// Fraction of the labels that is flipped.
    pub label_flip: f64,
    /// Label smoothing: the fraction of the distance to ½ that labels are moved.
    pub label_smoothing: f64,
    /// Correction of pairs that the current policy did not sample.
    pub off_policy: OffPolicy,
    /// Bound c of the importance weights that `off_policy` uses.
    pub max_ratio: f64,
    /// Labels of a pair that are trained on.
    pub pair_selection: PairSelection,
    /// Least |p − ½| of a label that is trained on; 0: every label is.
    pub min_margin: f64,
    /// Reduction of token log-probabilities to a completion's.
    pub logp_reduction: LogpReduction,
    /// Consecutive rejected steps before the run rolls back to its last checkpoint.
    pub rollback_after: u64,
    /// Decay of the exponential moving average of the policy's weights; 0: no average.
    pub ema_decay: f64,
    /// Weight of the mean squared difference between the policy's and the reference's last hidden states; 0: off.
    pub hidden_l2: f64,
    /// Timeout of a step that waits for its pairs, in seconds.
    pub batch_timeout_seconds: u64,
    /// The loss.
    pub objective: ObjectiveSettings,
    /// Adversarial regulariser added to the loss.
    pub ganpo: GanpoSettings,
}

/// Maximum norm of the learner's gradient.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum MaxGradNorm {
    /// `"objective"`: [`ObjectiveSettings::max_grad_norm`], which is proportional to the scale of the loss.
    Objective,
    /// A fixed norm.
    Norm(f64),
}

impl MaxGradNorm {
    /// The string for [`Self::Objective`].
    const OBJECTIVE: &str = "objective";
}

impl Serialize for MaxGradNorm {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Objective => serializer.serialize_str(Self::OBJECTIVE),
            Self::Norm(norm) => serializer.serialize_f64(*norm),
        }
    }
}

impl<'de> Deserialize<'de> for MaxGradNorm {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NumberOrString;

        impl Visitor<'_> for NumberOrString {
            type Value = MaxGradNorm;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number, or \"objective\"")
            }

            fn visit_f64<E: Error>(self, norm: f64) -> Result<MaxGradNorm, E> {
                Ok(MaxGradNorm::Norm(norm))
            }

            fn visit_i64<E: Error>(self, norm: i64) -> Result<MaxGradNorm, E> {
                self.visit_f64(norm as f64)
            }

            fn visit_u64<E: Error>(self, norm: u64) -> Result<MaxGradNorm, E> {
                self.visit_f64(norm as f64)
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<MaxGradNorm, E> {
                match text {
                    MaxGradNorm::OBJECTIVE => Ok(MaxGradNorm::Objective),
                    _ => Err(E::invalid_value(serde::de::Unexpected::Str(text), &self)),
                }
            }
        }

        deserializer.deserialize_any(NumberOrString)
    }
}

/// Conversion of the judge's p to a training label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LabelKind {
    /// p itself.
    Soft,
    /// 1 with probability p, else 0.
    Sampled,
    /// 1 above ½, 0 below.
    Hard,
}

/// Correction of pairs that the current policy did not sample, by the importance weight w = Π π_now(y)/μ(y) over both
/// completions of a label, with μ the distribution that they were sampled from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OffPolicy {
    /// Every label counts as 1.
    None,
    /// A label counts as min(w, `max_ratio`).
    Truncate,
    /// A label counts as 1 if w is from 1/`max_ratio` to `max_ratio`, else as 0.
    Mask,
}

impl OffPolicy {
    /// Whether labels are weighted in a run, some of whose pairs have a recorded μ. Pairs from files have none and count
    /// as 1, so that in a run on these alone nothing is corrected.
    #[must_use]
    pub fn corrects(self, has_recorded_pairs: bool) -> bool {
        self != Self::None && has_recorded_pairs
    }
}

/// Labels of a pair of more than two completions that are trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PairSelection {
    /// Labels of all pairs of its completions.
    All,
    /// The label of the completions with the highest and the lowest mean preference over the others.
    BestWorst,
    /// One, drawn from the run's seed and the prompt's id.
    Random,
}

/// Reduction of token log-probabilities to a completion's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogpReduction {
    /// Sum of the log-probabilities.
    Sum,
    /// Mean of the log-probabilities.
    Mean,
}

impl LearnerSettings {
    /// Number of prompts that may be outstanding or buffered: as many as are trained on before they are stale.
    #[must_use]
    pub fn prompt_window(&self) -> usize {
        let steps = usize::try_from(self.max_staleness).unwrap_or(usize::MAX);
        steps
            .saturating_add(1)
            .saturating_mul(self.train_batch_size)
    }

    /// Whether labels may be left out, so that the learner does not score the completions that only these compare.
    #[must_use]
    pub fn leaves_out_labels(&self) -> bool {
        self.min_margin > 0.0 || self.pair_selection != PairSelection::All
    }

    /// Optimiser and learning-rate schedule.
    #[must_use]
    pub fn optimizer(&self) -> OptimizerSettings {
        OptimizerSettings {
            learning_rate: self.learning_rate,
            lr_scheduler_type: self.lr_scheduler_type,
            warmup_ratio: self.warmup_ratio,
            min_lr_ratio: self.min_lr_ratio,
            weight_decay: self.weight_decay,
            adam_beta1: self.adam_beta1,
            adam_beta2: self.adam_beta2,
            adam_epsilon: self.adam_epsilon,
            max_grad_norm: match self.max_grad_norm {
                MaxGradNorm::Norm(norm) => norm,
                MaxGradNorm::Objective => self.objective.max_grad_norm(),
            },
        }
    }

    pub(crate) fn check(&self, settings: &Settings, checks: &mut Checks) {
        self.check_step(settings, checks);
        self.check_pairs(settings, checks);
        self.check_intervals(checks);
    }

    fn check_step(&self, settings: &Settings, checks: &mut Checks) {
        checks.at_least(self.train_batch_size as u64, 1, "learner.train_batch_size");
        checks.at_least(self.steps, 1, "learner.steps");
        let passes = self.gradient_accumulation_steps;
        checks.at_least(passes as u64, 1, "learner.gradient_accumulation_steps");
        checks.require(
            passes == 0 || self.train_batch_size.is_multiple_of(passes),
            "learner.gradient_accumulation_steps",
            format!(
                "{passes} does not divide learner.train_batch_size = {}",
                self.train_batch_size
            ),
        );
        self.optimizer().check("learner", checks);
        if let MaxGradNorm::Norm(norm) = self.max_grad_norm {
            checks.positive(norm, "learner.max_grad_norm");
        }
        checks.non_negative(self.weight_decay, "learner.weight_decay");
        checks.ratio(self.label_flip, "learner.label_flip");
        checks.require(
            !self.gradient_checkpointing
                || settings.model.device == "cpu" && settings.model.lora_rank == 0,
            "learner.gradient_checkpointing",
            "it supports full training on the CPU only: set model.device = \"cpu\" and model.lora_rank = 0",
        );
        checks.ratio(self.label_smoothing, "learner.label_smoothing");
        checks.ratio_below_one(self.ema_decay, "learner.ema_decay");
        checks.non_negative(self.hidden_l2, "learner.hidden_l2");
    }

    fn check_pairs(&self, settings: &Settings, checks: &mut Checks) {
        let ratio = self.max_ratio;
        checks.require(
            ratio > 1.0 && ratio.is_finite(),
            "learner.max_ratio",
            format!("{ratio} must be greater than 1, the importance weight of an on-policy pair"),
        );
        let has_samples = !settings.pairs.is_offline();
        checks.require(
            self.off_policy == OffPolicy::None || self.off_policy.corrects(has_samples),
            "learner.off_policy",
            "pairs from files have no recorded sampling distribution, so that an offline run has nothing to correct: set \
             it to \"none\", or pairs.share below 1",
        );
        checks.require(
            self.pair_selection == PairSelection::All || settings.actor.num_generations > 2,
            "learner.pair_selection",
            "a pair of two completions has one label, and nothing is selected: raise actor.num_generations, or set it to \
             \"all\"",
        );
        let margin = self.min_margin;
        checks.require(
            (0.0..=0.5).contains(&margin),
            "learner.min_margin",
            format!("{margin} must be from 0 to 0.5, the |p - 1/2| of a certain label: no label has more"),
        );
    }

    fn check_intervals(&self, checks: &mut Checks) {
        checks.at_least(self.weight_sync_steps, 1, "learner.weight_sync_steps");
        checks.at_least(self.rollback_after, 1, "learner.rollback_after");
        checks.at_least(self.save_total_limit as u64, 1, "learner.save_total_limit");
        checks.at_least(
            self.batch_timeout_seconds,
            1,
            "learner.batch_timeout_seconds",
        );
        checks.require(
            self.weight_sync_steps <= self.max_staleness.saturating_add(1),
            "learner.max_staleness",
            format!(
                "{} is impossible when weights are published only every {} steps \
                 (learner.weight_sync_steps): raise it to {} or publish more often",
                self.max_staleness,
                self.weight_sync_steps,
                self.weight_sync_steps.saturating_sub(1)
            ),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checks::tests::assert_reported;

    #[derive(Debug, Deserialize, Serialize, PartialEq)]
    struct Clip {
        clip: MaxGradNorm,
    }

    #[test]
    fn a_clip_is_a_number_or_objective() {
        let read = |text: &str| toml::from_str::<Clip>(text).map(|table| table.clip);
        assert_eq!(read("clip = 1"), Ok(MaxGradNorm::Norm(1.0)));
        assert_eq!(read("clip = 0.5"), Ok(MaxGradNorm::Norm(0.5)));
        assert_eq!(read("clip = \"objective\""), Ok(MaxGradNorm::Objective));
        let error = read("clip = \"auto\"").unwrap_err().to_string();
        assert!(error.contains("a number, or \"objective\""), "{error}");
        for clip in [MaxGradNorm::Norm(0.25), MaxGradNorm::Objective] {
            let text = toml::to_string(&Clip { clip }).unwrap();
            assert_eq!(toml::from_str(&text), Ok(Clip { clip }), "{text}");
        }
    }

    #[test]
    fn only_recorded_pairs_are_corrected() {
        for kind in [OffPolicy::Truncate, OffPolicy::Mask] {
            assert!(kind.corrects(true) && !kind.corrects(false), "{kind:?}");
        }
        assert!(!OffPolicy::None.corrects(true));
    }

    #[test]
    fn contradictions_of_the_learner_are_reported() {
        assert_reported(&[
            (
                "[learner]\nweight_sync_steps = 4\nmax_staleness = 1",
                "raise it to 3",
            ),
            (
                "[learner]\ntrain_batch_size = 10\ngradient_accumulation_steps = 4",
                "does not divide",
            ),
            (
                "[learner]\ngradient_checkpointing = true\n[model]\nlora_rank = 4",
                "model.lora_rank = 0",
            ),
            (
                "[learner]\nmax_ratio = 1",
                "learner.max_ratio: 1 must be greater than 1",
            ),
            (
                "[learner]\nmax_ratio = inf",
                "learner.max_ratio: inf must be",
            ),
            (
                "[learner]\noff_policy = \"mask\"\n[pairs]\nplayground_pairs = 100\nshare = 1.0",
                "learner.off_policy: pairs from files have no recorded sampling distribution",
            ),
            (
                "[learner]\npair_selection = \"random\"",
                "learner.pair_selection: a pair of two completions has one label",
            ),
            (
                "[learner]\nmin_margin = 0.6",
                "learner.min_margin: 0.6 must be from 0 to 0.5",
            ),
            (
                "[learner]\nmin_margin = nan",
                "learner.min_margin: NaN must be",
            ),
            (
                "[learner]\noff_policy = \"clip\"\npair_selection = \"best_worst\"",
                "learner.pair_selection: ",
            ),
        ]);
    }
}
