//! `[learner]`.

use std::fmt;

use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{Error, Visitor},
};

/// How the policy learns.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LearnerSettings {
    /// Optimiser steps of the run.
    pub steps: u64,
    /// Prompts in a step.
    pub train_batch_size: usize,
    /// The numbers that products with f32 weights are taken of; sums and the optimiser are f32. Weights in bf16
    /// (`model.dtype`) are multiplied as they are, whatever this says.
    pub precision: crate::DtypeSetting,
    /// Whether a backward pass computes what lies inside the blocks again.
    pub gradient_checkpointing: bool,
    /// Passes that a step is split into, at least.
    pub gradient_accumulation_steps: usize,
    /// The tokens of a pass, prompts and completions, unless a single prompt's are more; 0: any number.
    pub max_tokens_per_pass: usize,
    /// The learning rate at its height.
    pub learning_rate: f64,
    /// How it falls.
    pub lr_scheduler_type: LrSchedulerType,
    /// Share of the steps over which it rises.
    pub warmup_ratio: f64,
    /// The share of it that linear and cosine leave at the end.
    pub min_lr_ratio: f64,
    /// Decoupled weight decay of matrices; norms, biases and embeddings do not decay.
    pub weight_decay: f64,
    /// Decay of the gradient's mean.
    pub adam_beta1: f64,
    /// Decay of the squared gradient's mean.
    pub adam_beta2: f64,
    /// Keeps the division finite.
    pub adam_epsilon: f64,
    /// Where the gradient's norm is clipped.
    pub max_grad_norm: MaxGradNorm,
    /// Steps between two publications of weights.
    pub weight_sync_steps: u64,
    /// The oldest pair that is trained on, in learner steps, inclusive.
    pub max_staleness: u64,
    /// Steps between two checkpoints; 0: only at the end.
    pub save_steps: u64,
    /// Checkpoints kept.
    pub save_total_limit: usize,
    /// What becomes of the judge's p.
    pub label: LabelKind,
    /// The share of the labels that is turned round.
    pub label_flip: f64,
    /// Labels move this share of the way to ½.
    pub label_smoothing: f64,
    /// How token log-probabilities become a completion's.
    pub logp_reduction: LogpReduction,
    /// Non-finite steps in a row before the run goes back to its last checkpoint.
    pub rollback_after: u64,
    /// How long a step waits for its pairs, in seconds.
    pub batch_timeout_seconds: u64,
    /// The loss.
    pub objective: ObjectiveSettings,
    /// What is added to it.
    pub ganpo: GanpoSettings,
}

/// The default clip as a multiple of the objective's slope. At π = ref and certain labels it is the norm of
/// the gradient of the batch's mean h that is clipped.
pub const CLIPPED_SLOPES: f64 = 20.0;

/// The norm to which the learner's gradient is clipped.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum MaxGradNorm {
    /// `"objective"`: [`ObjectiveSettings::max_grad_norm`], which follows the scale of the loss.
    Objective,
    /// A number.
    Norm(f64),
}

impl MaxGradNorm {
    /// How it is written in place of a number.
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
        struct NumberOrWord;

        impl Visitor<'_> for NumberOrWord {
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

            fn visit_str<E: Error>(self, word: &str) -> Result<MaxGradNorm, E> {
                match word {
                    MaxGradNorm::OBJECTIVE => Ok(MaxGradNorm::Objective),
                    _ => Err(E::invalid_value(serde::de::Unexpected::Str(word), &self)),
                }
            }
        }

        deserializer.deserialize_any(NumberOrWord)
    }
}

/// A latent-space regulariser beside the objective.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GanpoSettings {
    /// Its weight; 0: off.
    pub lambda: f64,
    /// The discriminators' width; 0: a quarter of the policy's, within bounds.
    pub hidden_size: usize,
    /// Encoder layers of a discriminator.
    pub layers: usize,
    /// Heads of a layer.
    pub heads: usize,
    /// Tokens of a response that a discriminator reads.
    pub max_length: usize,
    /// Of the running means of the discriminators' scores.
    pub momentum: f64,
    /// The discriminators' learning rate, as a share of the policy's.
    pub lr_ratio: f64,
    /// Steps in which only the discriminators learn.
    pub warmup_steps: u64,
    /// Steps after which the discriminators no longer learn; 0: never.
    pub freeze_after: u64,
}

/// How the learning rate falls after its warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LrSchedulerType {
    /// It does not.
    Constant,
    /// In a straight line.
    Linear,
    /// Along half a cosine.
    Cosine,
}

/// What becomes of the judge's p before it is trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LabelKind {
    /// Nothing.
    Soft,
    /// 1 with probability p, else 0.
    Sampled,
    /// 1 above ½, 0 below.
    Hard,
}

/// How token log-probabilities become a completion's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogpReduction {
    /// Their sum.
    Sum,
    /// Their mean.
    Mean,
}

/// The loss.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum ObjectiveSettings {
    /// Identity preference optimisation; with `actor.mixture_coef` above 0, IPO-MD.
    Ipo {
        /// KL temperature.
        tau: f64,
        /// Which of the two forms.
        scale: IpoScale,
    },
    /// Direct preference optimisation.
    Dpo {
        /// KL temperature.
        beta: f64,
    },
    /// Sequence likelihood calibration.
    Slic {
        /// KL temperature.
        beta: f64,
    },
    /// Regularised preference optimisation.
    Rpo {
        /// KL temperature.
        beta: f64,
        /// Weight of the golden answer, times `beta`.
        eta: f64,
        /// Which of the two forms.
        nll: RpoNll,
        /// The weight in the form `mean`.
        nll_coef: f64,
    },
    /// Nash-MD by policy gradient.
    NashMdPg {
        /// KL temperature.
        tau: f64,
    },
}

/// The scale of the IPO loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IpoScale {
    /// `(h − (p − ½)/τ)²`.
    Square,
    /// `τh² − (2p − 1)h`.
    Scaled,
}

/// The regulariser of RPO.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RpoNll {
    /// `η·β` times the summed negative log-probability.
    Sum,
    /// `nll_coef` times the token mean.
    Mean,
}

impl ObjectiveSettings {
    /// The largest |dL/dh| of a pair at h = 0, where the policy is its reference: the scale of the loss, and
    /// so of its gradient.
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
            Self::NashMdPg { .. } => 0.5,
        }
    }

    /// Where [`MaxGradNorm::Objective`] clips: [`CLIPPED_SLOPES`] times [`Self::slope`]. It is 1, the field's
    /// number, for DPO at its default of β = .1, and both scales of IPO are clipped at the same steps.
    #[must_use]
    pub fn max_grad_norm(&self) -> f64 {
        CLIPPED_SLOPES * self.slope()
    }

    /// The kind, as the settings name it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Ipo { .. } => "ipo",
            Self::Dpo { .. } => "dpo",
            Self::Slic { .. } => "slic",
            Self::Rpo { .. } => "rpo",
            Self::NashMdPg { .. } => "nash-md-pg",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize, Serialize, PartialEq)]
    struct Table {
        clip: MaxGradNorm,
    }

    #[test]
    fn a_clip_is_a_number_or_the_objectives() {
        let read = |text: &str| toml::from_str::<Table>(text).map(|table| table.clip);
        assert_eq!(read("clip = 1"), Ok(MaxGradNorm::Norm(1.0)));
        assert_eq!(read("clip = 0.5"), Ok(MaxGradNorm::Norm(0.5)));
        assert_eq!(read("clip = \"objective\""), Ok(MaxGradNorm::Objective));
        let error = read("clip = \"auto\"").unwrap_err().to_string();
        assert!(error.contains("a number, or \"objective\""), "{error}");
        for clip in [MaxGradNorm::Norm(0.25), MaxGradNorm::Objective] {
            let text = toml::to_string(&Table { clip }).unwrap();
            assert_eq!(toml::from_str(&text), Ok(Table { clip }), "{text}");
        }
    }

    /// IPO's square form is its scaled one divided by τ, so the clips are too.
    #[test]
    fn the_clip_follows_the_scale_of_the_loss() {
        let ipo = |tau, scale| ObjectiveSettings::Ipo { tau, scale }.max_grad_norm();
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} for {b}");
        close(ipo(0.1, IpoScale::Square), ipo(0.1, IpoScale::Scaled) / 0.1);
        close(ObjectiveSettings::Dpo { beta: 0.1 }.max_grad_norm(), 1.0);
    }
}
