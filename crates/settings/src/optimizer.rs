//! Optimiser and learning-rate schedule, whose keys `[learner]`, `[preference.fit]` and `[sft]` share.
//!
//! The keys stand in each section rather than in one flattened struct: with `#[serde(flatten)]` serde reports an
//! unknown key without the valid ones, and a value of the wrong type without its key, so that neither "did you mean"
//! nor the key's path could be given.

use serde::{Deserialize, Serialize};

use crate::checks::Checks;

/// AdamW and the learning-rate schedule of a section.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OptimizerSettings {
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
    /// Maximum gradient norm, above which gradients are clipped.
    pub max_grad_norm: f64,
}

/// Decay of the learning rate after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LrSchedulerType {
    /// No decay.
    Constant,
    /// Linear decay.
    Linear,
    /// Half a cosine.
    Cosine,
}

impl OptimizerSettings {
    /// The epsilon of sections without the key.
    pub(crate) const DEFAULT_EPSILON: f64 = 1e-8;

    /// Checks the keys of `section`, except the weight decay and the gradient norm.
    pub(crate) fn check(&self, section: &str, checks: &mut Checks) {
        let path = |key: &str| format!("{section}.{key}");
        checks.positive(self.learning_rate, &path("learning_rate"));
        checks.ratio(self.warmup_ratio, &path("warmup_ratio"));
        checks.ratio(self.min_lr_ratio, &path("min_lr_ratio"));
        checks.ratio_below_one(self.adam_beta1, &path("adam_beta1"));
        checks.ratio_below_one(self.adam_beta2, &path("adam_beta2"));
        checks.positive(self.adam_epsilon, &path("adam_epsilon"));
    }
}

#[cfg(test)]
mod tests {
    use crate::checks::tests::problems;

    #[test]
    fn every_section_with_an_optimizer_is_checked() {
        for section in ["learner", "preference.fit", "sft"] {
            let text =
                format!("[{section}]\nlearning_rate = 0\nwarmup_ratio = 2\nadam_beta1 = 1.0");
            let expected = [
                format!("{section}.learning_rate: 0 must be greater than 0"),
                format!("{section}.warmup_ratio: 2 must be from 0 to 1"),
                format!("{section}.adam_beta1: 1 must be from 0 to below 1"),
            ];
            assert_eq!(problems(&text), expected);
        }
    }
}
