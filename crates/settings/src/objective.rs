//! `[learner.objective]`: the loss.

use serde::{Deserialize, Serialize};

use crate::{actor::ActorSettings, checks::Checks, learner::LabelKind, settings::Settings};

/// The default gradient clip as a multiple of [`ObjectiveSettings::slope`]. At π = ref and certain labels it is the
/// norm at which the gradient of the batch's mean h is clipped.
pub const CLIPPED_SLOPES: f64 = 20.0;

/// The loss.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum ObjectiveSettings {
    /// Identity preference optimisation; with `actor.mixture_coef` above 0, IPO-MD.
    Ipo {
        /// KL regularisation strength τ.
        tau: f64,
        /// Scale of the loss.
        scale: IpoScale,
    },
    /// Direct preference optimisation.
    Dpo {
        /// KL regularisation strength β.
        beta: f64,
    },
    /// Sequence likelihood calibration.
    Slic {
        /// KL regularisation strength β.
        beta: f64,
    },
    /// Regularised preference optimisation.
    Rpo {
        /// KL regularisation strength β.
        beta: f64,
        /// Weight η of the golden answer's negative log-likelihood, times `beta`.
        eta: f64,
        /// Form of the negative log-likelihood term.
        nll: RpoNll,
        /// Weight of the term in the form `mean`.
        nll_coef: f64,
    },
    /// Nash-MD by policy gradient.
    NashMdPg {
        /// KL regularisation strength τ.
        tau: f64,
    },
    /// RLOO: policy gradient on the log-odds of p, of a reward model the reward difference, with a leave-one-out
    /// baseline.
    Rloo {
        /// KL penalty β, in units of the reward.
        beta: f64,
    },
    /// Rejection sampling: the likelihood of the preferred completion.
    RejectionSampling {},
}

/// Scale of the IPO loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IpoScale {
    /// `(h − (p − ½)/τ)²`.
    Square,
    /// `τh² − (2p − 1)h`.
    Scaled,
}

/// Negative log-likelihood term of RPO.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RpoNll {
    /// `η·β` times the summed negative log-probability.
    Sum,
    /// `nll_coef` times the mean over tokens.
    Mean,
}

impl ObjectiveSettings {
    /// The largest |dL/dh| of a pair at h = 0, where the policy equals its reference: the scale of the loss and of
    /// its gradient. Of rejection sampling with the mean of both log-probabilities held.
    #[must_use]
    pub fn slope(&self) -> f64 {
        match *self {
            Self::Ipo {
                tau,
                scale: IpoScale::Square,
            } => 1.0 / tau,
            Self::Ipo {
                scale: IpoScale::Scaled,
                ..
            } => 1.0,
            Self::Dpo { beta } | Self::Rpo { beta, .. } => beta / 2.0,
            Self::Slic { beta } => beta,
            // Of RLOO at log-odds, that is a reward difference, of 1.
            Self::NashMdPg { .. } | Self::Rloo { .. } | Self::RejectionSampling {} => 0.5,
        }
    }

    /// τ or β: the factor from log-ratios to rewards; 1 for rejection sampling, which has none.
    #[must_use]
    pub fn temperature(&self) -> f64 {
        match *self {
            Self::Ipo { tau, .. } | Self::NashMdPg { tau } => tau,
            Self::Dpo { beta }
            | Self::Slic { beta }
            | Self::Rpo { beta, .. }
            | Self::Rloo { beta } => beta,
            Self::RejectionSampling {} => 1.0,
        }
    }

    /// The gradient norm of [`MaxGradNorm::Objective`](crate::MaxGradNorm::Objective): [`CLIPPED_SLOPES`] times
    /// [`Self::slope`]. It is the conventional 1 for DPO at its default β = 0.1, and clips both scales of IPO at the
    /// same steps.
    #[must_use]
    pub fn max_grad_norm(&self) -> f64 {
        CLIPPED_SLOPES * self.slope()
    }

    /// The name of the kind in the settings.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Ipo { .. } => "ipo",
            Self::Dpo { .. } => "dpo",
            Self::Slic { .. } => "slic",
            Self::Rpo { .. } => "rpo",
            Self::NashMdPg { .. } => "nash-md-pg",
            Self::Rloo { .. } => "rloo",
            Self::RejectionSampling {} => "rejection-sampling",
        }
    }

    pub(crate) fn check(&self, settings: &Settings, checks: &mut Checks) {
        let path = |key: &str| format!("learner.objective.{key}");
        match *self {
            Self::Ipo { tau, .. } => checks.positive(tau, &path("tau")),
            Self::Dpo { beta } | Self::Slic { beta } => checks.positive(beta, &path("beta")),
            Self::Rpo {
                beta,
                eta,
                nll_coef,
                ..
            } => {
                checks.positive(beta, &path("beta"));
                checks.require(
                    eta >= 0.0,
                    &path("eta"),
                    format!("{eta} must not be negative"),
                );
                checks.require(
                    nll_coef >= 0.0,
                    &path("nll_coef"),
                    format!("{nll_coef} must not be negative"),
                );
                checks.require(
                    settings.prompts.has_golden() || settings.pairs.is_offline(),
                    &path("kind"),
                    "\"rpo\" needs a golden answer for every prompt: name prompts.golden_column",
                );
            }
            Self::NashMdPg { tau } => {
                checks.positive(tau, &path("tau"));
                self.check_policy_gradient(&settings.actor, checks);
                checks.require(
                    settings.actor.num_generations == 2,
                    "actor.num_generations",
                    "\"nash-md-pg\" compares one completion of the policy with one of the mixture: set it to 2",
                );
            }
            Self::Rloo { beta } => self.check_rloo(beta, settings, checks),
            Self::RejectionSampling {} => {}
        }
    }

    fn check_rloo(&self, beta: f64, settings: &Settings, checks: &mut Checks) {
        checks.positive(beta, "learner.objective.beta");
        self.check_policy_gradient(&settings.actor, checks);
        checks.require(
            settings.actor.mixture_coef == 0.0,
            "actor.mixture_coef",
            "\"rloo\" is a policy gradient, which is biased unless all completions are the policy's own: set \
             it to 0.0, or choose another learner.objective.kind",
        );
        checks.require(
            settings.learner.label == LabelKind::Soft,
            "learner.label",
            "\"rloo\" reads the reward difference from the log-odds of p: set it to \"soft\"",
        );
    }

    /// Requires samples from the policy's full distribution at temperature 1, over which a policy gradient is an
    /// expectation.
    fn check_policy_gradient(&self, actor: &ActorSettings, checks: &mut Checks) {
        let requirements = [
            ("temperature", actor.temperature == 1.0, "1.0"),
            ("top_k", actor.top_k == 0, "0"),
            ("top_p", actor.top_p == 1.0, "1.0"),
            ("min_p", actor.min_p == 0.0, "0.0"),
        ];
        for (key, holds, required) in requirements {
            checks.require(
                holds,
                &format!("actor.{key}"),
                format!(
                    "\"{}\" is a policy gradient, which is biased unless completions are drawn from the \
                     policy's full distribution: set it to {required}, or choose another learner.objective.kind",
                    self.name()
                ),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checks::tests::assert_reported;

    /// IPO's square form is its scaled form divided by τ, and so is its clip.
    #[test]
    fn the_clip_is_proportional_to_the_scale_of_the_loss() {
        let ipo = |tau, scale| ObjectiveSettings::Ipo { tau, scale }.max_grad_norm();
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} for {b}");
        close(ipo(0.1, IpoScale::Square), ipo(0.1, IpoScale::Scaled) / 0.1);
        close(ObjectiveSettings::Dpo { beta: 0.1 }.max_grad_norm(), 1.0);
    }

    #[test]
    fn contradictions_of_the_objective_are_reported() {
        assert_reported(&[
            (
                "[learner.objective]\nkind = \"nash-md-pg\"\n[actor]\nnum_generations = 4",
                "set it to 2",
            ),
            (
                "[learner.objective]\nkind = \"nash-md-pg\"\n[actor]\ntemperature = 0.7",
                "actor.temperature: \"nash-md-pg\" is a policy gradient",
            ),
            (
                "[learner.objective]\nkind = \"nash-md-pg\"\n[actor]\ntop_k = 40",
                "actor.top_k: \"nash-md-pg\" is a policy gradient",
            ),
            (
                "[learner.objective]\nkind = \"nash-md-pg\"\n[actor]\ntop_p = 0.9",
                "actor.top_p: \"nash-md-pg\" is a policy gradient",
            ),
            (
                "[learner.objective]\nkind = \"nash-md-pg\"\n[actor]\nmin_p = 0.05",
                "actor.min_p: \"nash-md-pg\" is a policy gradient",
            ),
            (
                "[learner.objective]\nkind = \"rloo\"\n[actor]\ntemperature = 0.7",
                "actor.temperature: \"rloo\" is a policy gradient",
            ),
            (
                "[learner.objective]\nkind = \"rloo\"\n[actor]\nmixture_coef = 0.125",
                "actor.mixture_coef: \"rloo\" is a policy gradient",
            ),
            (
                "[learner]\nlabel = \"hard\"\n[learner.objective]\nkind = \"rloo\"",
                "learner.label: \"rloo\" reads the reward difference",
            ),
            (
                "[learner.objective]\nkind = \"rloo\"\nbeta = 0",
                "learner.objective.beta",
            ),
            (
                "[learner.objective]\nkind = \"dpo\"\nbeta = 0",
                "learner.objective.beta",
            ),
            (
                "[model]\npath = \"m\"\n[prompts]\nkind = \"dataset\"\npath = \"p\"\n\
                 [preference.judge]\nkind = \"rule\"\nrules = [{ kind = \"ended\", weight = 1 }]\n\
                 [learner.objective]\nkind = \"rpo\"",
                "prompts.golden_column",
            ),
        ]);
    }
}
