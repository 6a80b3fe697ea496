//! `[learner.ganpo]`: the adversarial regulariser on hidden states.

use serde::{Deserialize, Serialize};

use crate::checks::Checks;

/// The adversarial regulariser on hidden states, added to the objective.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GanpoSettings {
    /// Weight of the generator loss; 0: off.
    pub lambda: f64,
    /// Hidden size of the discriminators; 0: a quarter of the policy's, from 32 to 512.
    pub hidden_size: usize,
    /// Encoder layers of a discriminator.
    pub layers: usize,
    /// Attention heads of a layer.
    pub heads: usize,
    /// Maximum number of response tokens that a discriminator reads.
    pub max_length: usize,
    /// Momentum of the moving averages of the discriminators' scores.
    pub momentum: f64,
    /// Learning rate of the discriminators, as a fraction of the policy's.
    pub lr_ratio: f64,
    /// Steps between two updates of the discriminators; 1: every step.
    pub train_every: u64,
    /// Initial steps in which only the discriminators are trained.
    pub warmup_steps: u64,
    /// Steps after which the discriminators are frozen; 0: never.
    pub freeze_after: u64,
}

impl GanpoSettings {
    pub(crate) fn check(&self, checks: &mut Checks) {
        let path = |key: &str| format!("learner.ganpo.{key}");
        checks.non_negative(self.lambda, &path("lambda"));
        checks.at_least(self.heads as u64, 1, &path("heads"));
        checks.at_least(self.layers as u64, 1, &path("layers"));
        checks.at_least(self.max_length as u64, 1, &path("max_length"));
        checks.require(
            self.hidden_size.is_multiple_of(self.heads.max(1)),
            &path("hidden_size"),
            format!(
                "{} must be a multiple of learner.ganpo.heads = {}",
                self.hidden_size, self.heads
            ),
        );
        checks.ratio_below_one(self.momentum, &path("momentum"));
        checks.positive(self.lr_ratio, &path("lr_ratio"));
        checks.at_least(self.train_every, 1, &path("train_every"));
        checks.require(
            self.freeze_after == 0 || self.freeze_after > self.warmup_steps,
            &path("freeze_after"),
            format!(
                "{} must be greater than learner.ganpo.warmup_steps = {}",
                self.freeze_after, self.warmup_steps
            ),
        );
    }
}

#[cfg(test)]
mod tests {
    use crate::checks::tests::assert_reported;

    #[test]
    fn contradictions_of_ganpo_are_reported() {
        assert_reported(&[
            (
                "[learner.ganpo]\nhidden_size = 20",
                "20 must be a multiple of learner.ganpo.heads = 8",
            ),
            (
                "[learner.ganpo]\nwarmup_steps = 9\nfreeze_after = 9",
                "9 must be greater than learner.ganpo.warmup_steps = 9",
            ),
            (
                "[learner.ganpo]\nlambda = -1",
                "learner.ganpo.lambda: -1 must not be negative",
            ),
        ]);
    }
}
