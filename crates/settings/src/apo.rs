//! `[preference.apo]`: adversarial preference optimisation, the repeated training of the reward model on the
//! policy's samples.

use serde::{Deserialize, Serialize};

use crate::{checks::Checks, judge::JudgeSettings, settings::Settings};

/// Adversarial preference optimisation: the reward model is trained again on golden answers against the policy's
/// samples.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ApoSettings {
    /// Learner steps between two rounds; 0: no rounds.
    pub refresh_steps: u64,
    /// Maximum number of rounds; 0: no limit.
    pub max_rounds: u64,
    /// Golden prompts per round.
    pub prompts: usize,
    /// Policy samples per golden prompt, k.
    pub samples: usize,
    /// Weight c of the adversarial loss relative to the loss on annotated pairs.
    pub coef: f64,
    /// Form of the adversarial loss.
    pub form: ApoForm,
    /// Whether labelling waits for the round's model, which makes the step of each round deterministic; otherwise the
    /// previous model judges until the new one is trained.
    pub wait: bool,
    /// Whether the annotated pairs are part of the loss; without them it has no finite optimum.
    pub annotated: bool,
    /// Whether a round trains the current judge further, instead of a fresh model on the backbone.
    pub warm_start: bool,
    /// Minimum accuracy on held-out annotated pairs; a less accurate model is rejected.
    pub min_accuracy: f64,
    /// Maximum calibration error on held-out annotated pairs; a worse calibrated model is rejected.
    pub max_ece: f64,
}

/// Form of the adversarial loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ApoForm {
    /// `−log σ(r_gold − r_sample)`.
    Ranking,
    /// `r_sample − r_gold`.
    Linear,
}

impl ApoSettings {
    pub(crate) fn check(&self, settings: &Settings, checks: &mut Checks) {
        let path = |key: &str| format!("preference.apo.{key}");
        let is_trainable = matches!(
            settings.preference.judge,
            JudgeSettings::BradleyTerry { .. } | JudgeSettings::Pairwise { .. }
        );
        checks.require(
            is_trainable,
            &path("refresh_steps"),
            "only a reward model can be trained again: set preference.judge.kind to \"bradley-terry\" or \"pairwise\"",
        );
        checks.require(
            settings.prompts.has_golden(),
            &path("refresh_steps"),
            "adversarial preference optimisation needs golden answers: name prompts.golden_column",
        );
        checks.at_least(self.prompts as u64, 1, &path("prompts"));
        checks.at_least(self.samples as u64, 1, &path("samples"));
        checks.require(
            self.samples <= settings.actor.slots,
            &path("samples"),
            format!(
                "{} samples of a prompt exceed actor.slots = {}",
                self.samples, settings.actor.slots
            ),
        );
        checks.non_negative(self.coef, &path("coef"));
        checks.ratio(self.min_accuracy, &path("min_accuracy"));
        checks.ratio(self.max_ece, &path("max_ece"));
    }
}
