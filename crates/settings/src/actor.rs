//! `[actor]`: sampling of completions.

use serde::{Deserialize, Serialize};

use crate::{checks::Checks, settings::Settings};

/// Sampling of completions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActorSettings {
    /// Number of actors in this process.
    pub count: usize,
    /// Maximum number of completions that one actor samples concurrently.
    pub slots: usize,
    /// Completions per prompt.
    pub num_generations: usize,
    /// Weight of the reference in the behaviour policy.
    pub mixture_coef: f64,
    /// Sampling temperature, applied to the mixed logits.
    pub temperature: f64,
    /// Top-k truncation; 0: off.
    pub top_k: usize,
    /// Top-p (nucleus) truncation; 1: off.
    pub top_p: f64,
    /// Minimum token probability relative to the most probable token; 0: off.
    pub min_p: f64,
    /// Weight precision used for sampling; below f32 key-value caches are in bf16.
    pub precision: PrecisionSetting,
    /// Maximum quantisation error against the learner's precision, in nats per token, before sampling falls back to that; 0:
    /// no check.
    pub max_quantization_error: f64,
    /// Maximum completion length in tokens.
    pub max_new_tokens: usize,
    /// Maximum prompt length in tokens.
    pub max_prompt_length: usize,
    /// Generation backend.
    pub engine: EngineSettings,
}

/// Generation backend.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum EngineSettings {
    /// Agon's sampler.
    Own {},
    /// mistral.rs for the policy; the reference uses Agon's sampler.
    Mistral {
        /// Timeout of one completion, in seconds.
        timeout_seconds: f64,
    },
}

/// Precision of the policy's and reference's weights during sampling on the CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PrecisionSetting {
    /// The dtype of training.
    F32,
    /// 16-bit brain floating point.
    Bf16,
    /// 8-bit integers with one scale per output channel (weights) and per token (activations).
    Int8,
}

impl ActorSettings {
    /// Whether completions are sampled at temperature 1 without truncation.
    fn samples_full_distribution(&self) -> bool {
        self.temperature == 1.0 && (self.top_k, self.top_p, self.min_p) == (0, 1.0, 0.0)
    }

    pub(crate) fn check(&self, settings: &Settings, checks: &mut Checks) {
        self.check_values(checks);
        // Elsewhere nothing is sampled, and a contradiction follows from nothing.
        if settings.needs_samples() {
            self.check_sampling(settings, checks);
        }
    }

    fn check_values(&self, checks: &mut Checks) {
        checks.at_least(self.count as u64, 1, "actor.count");
        checks.at_least(self.num_generations as u64, 2, "actor.num_generations");
        checks.at_least(self.max_new_tokens as u64, 1, "actor.max_new_tokens");
        checks.at_least(self.max_prompt_length as u64, 1, "actor.max_prompt_length");
        checks.ratio(self.mixture_coef, "actor.mixture_coef");
        checks.positive(self.temperature, "actor.temperature");
        checks.positive(self.top_p, "actor.top_p");
        checks.ratio(self.top_p, "actor.top_p");
        checks.ratio_below_one(self.min_p, "actor.min_p");
        checks.non_negative(self.max_quantization_error, "actor.max_quantization_error");
        if let EngineSettings::Mistral { timeout_seconds } = self.engine {
            checks.positive(timeout_seconds, "actor.engine.timeout_seconds");
        }
    }

    fn check_sampling(&self, settings: &Settings, checks: &mut Checks) {
        checks.require(
            self.slots >= self.num_generations,
            "actor.slots",
            format!(
                "{} slots are too few for the {} completions of one prompt (actor.num_generations)",
                self.slots, self.num_generations
            ),
        );
        checks.require(
            self.samples_full_distribution() || self.slots >= 3,
            "actor.slots",
            format!(
                "{} slots are too few for the three completions of a held-out prompt: with a temperature other than 1 or \
                 truncation the KL is estimated from a separate sample",
                self.slots
            ),
        );
        checks.require(
            self.top_k != 1 || settings.pairs.is_offline(),
            "actor.top_k",
            "at 1 all completions of a prompt are the same, and no pair is left to train on: 0 is off",
        );
        checks.require(
            !matches!(self.engine, EngineSettings::Mistral { .. })
                || settings.model.device == "cpu",
            "actor.engine.kind",
            "\"mistral\" runs on the CPU only: set model.device = \"cpu\"",
        );
    }
}

#[cfg(test)]
mod tests {
    use crate::checks::tests::assert_reported;

    #[test]
    fn contradictions_of_sampling_are_reported() {
        assert_reported(&[
            ("[actor]\nslots = 1", "actor.num_generations"),
            (
                "[actor]\nmixture_coef = 1.5",
                "actor.mixture_coef: 1.5 must be from 0 to 1",
            ),
            (
                "[actor]\ntop_k = 1",
                "actor.top_k: at 1 all completions of a prompt are the same",
            ),
            (
                "[actor]\nmax_quantization_error = -1",
                "actor.max_quantization_error: -1 must not be negative",
            ),
            ("[actor]\nslots = 2\ntemperature = 0.7", "three completions"),
        ]);
    }

    #[test]
    fn a_run_without_actors_has_no_contradictions_of_sampling() {
        let offline =
            "[pairs]\npath = \"x\"\n[actor]\nslots = 1\ntop_k = 1\n[evaluation]\nprompts = ";
        let problems = crate::checks::tests::problems;
        assert_eq!(problems(&format!("{offline}0")), Vec::<String>::new());
        assert_eq!(
            problems(&format!("{offline}8")).len(),
            2,
            "an evaluation samples"
        );
    }
}
