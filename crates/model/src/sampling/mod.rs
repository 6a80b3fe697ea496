//! Sampling of completions from the token-level mixture of a policy and its reference.

mod active_requests;
mod completion_sampler;
mod distribution;
mod sampler;

use messages::{Completion, Seed};
use serde::{Deserialize, Serialize};

use crate::{error::ModelError, transformer::LanguageModel};
pub use kernels::Precision;

pub use active_requests::ActiveRequests;
pub use completion_sampler::{CompletionSampler, TokenLogits};
#[cfg(test)]
pub(crate) use distribution::log_softmax_at;
pub use distribution::{Draw, Scratch, draw, mix};
pub use sampler::MixtureSampler;

/// Samples completions of many prompts concurrently, from a policy and its reference.
pub trait Sampler: Send {
    /// Enqueues a request.
    ///
    /// # Errors
    /// When it requests no completion, more than there are slots, or too long ones.
    fn admit(&mut self, request: Request) -> Result<(), ModelError>;

    /// Advances sampling by one step. Returns the requests whose completions have all ended.
    ///
    /// # Errors
    /// When a forward pass fails or logits are NaN.
    fn step(&mut self) -> Result<Vec<Finished>, ModelError>;

    /// Whether no request is active or waiting.
    fn is_idle(&self) -> bool;

    /// Replaces the policy and stores it and the reference in `precision`, as far as this sampler stores them. Requires
    /// an idle sampler, so that no completion mixes versions.
    ///
    /// # Errors
    /// When the sampler is not idle, or the policy cannot be loaded.
    fn set_policy(&mut self, policy: LanguageModel, precision: Precision)
    -> Result<(), ModelError>;

    /// Replaces the reference, stored in `precision`. Requires an idle sampler. The reference of other samplers than
    /// Agon's own is fixed.
    ///
    /// # Errors
    /// When the sampler is not idle, its reference is fixed, or the reference cannot be loaded.
    fn set_reference(
        &mut self,
        _reference: LanguageModel,
        _precision: Precision,
    ) -> Result<(), ModelError> {
        let reason = "replace the reference of this engine: set actor.engine.kind = \"own\"";
        Err(ModelError::Engine(reason.into()))
    }
}

/// A prompt with the completions to sample for it.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Identifier chosen by the caller.
    pub key: u64,
    /// Token ids of the prompt.
    pub ids: Vec<u32>,
    /// Seed from which the completions' random streams are derived.
    pub seed: Seed,
    /// Mixture coefficient of each completion: the weight on the reference.
    pub mixture_coefs: Vec<f32>,
    /// Number of completions, the last ones, that are sampled from the full distribution at temperature 1 regardless of
    /// the sampling settings.
    pub exact: usize,
    /// Maximum completion length in tokens.
    pub max_new_tokens: usize,
    /// Whether log ref of the tokens is recorded also where no completion is sampled from the reference. Where one is, it
    /// is recorded of all.
    pub records_reference: bool,
}

/// A finished request.
#[derive(Debug)]
pub struct Finished {
    /// Identifier chosen by the caller.
    pub key: u64,
    /// Token ids of the prompt.
    pub prompt: Vec<u32>,
    /// Completions in the order of the request's `mixture_coefs`, without text.
    pub completions: Vec<Completion>,
}

impl Request {
    /// Whether the reference computes the tokens of this request.
    #[must_use]
    pub fn needs_reference(&self) -> bool {
        self.records_reference || self.mixture_coefs.iter().any(|&coef| coef > 0.0)
    }

    /// Checks that the request fits a sampler with `slots` slots and a model with `positions` positions.
    ///
    /// # Errors
    /// When it does not, with the reason.
    pub fn check_capacity(&self, slots: usize, positions: usize) -> Result<(), ModelError> {
        let count = self.mixture_coefs.len();
        let length = self.ids.len() + self.max_new_tokens;
        let reason = if count == 0 || count > slots {
            format!("{count} completions of one prompt do not fit {slots} slots")
        } else if self.ids.is_empty() || self.max_new_tokens == 0 {
            "a prompt and its completions need at least one token each".to_owned()
        } else if length > positions {
            format!(
                "{length} tokens of prompt and completion are more than the model's {positions} positions"
            )
        } else {
            return Ok(());
        };
        Err(ModelError::Tokens { reason })
    }
}

/// Checks that both models share a vocabulary.
///
/// # Errors
/// When their vocabularies differ in size.
pub fn ensure_shared_vocabulary(
    policy: &LanguageModel,
    reference: &LanguageModel,
) -> Result<(), ModelError> {
    let (a, b) = (policy.config().vocab_size, reference.config().vocab_size);
    if a == b {
        return Ok(());
    }
    let reason =
        format!("the policy has {a} tokens, the reference {b}: they must share a vocabulary");
    Err(ModelError::Weights { reason })
}

/// Checks that the sampler is idle, so that its policy may be replaced.
///
/// # Errors
/// When it is not.
pub fn ensure_idle(sampler: &dyn Sampler) -> Result<(), ModelError> {
    if sampler.is_idle() {
        return Ok(());
    }
    let reason = "the policy changes only between completions".into();
    Err(ModelError::Weights { reason })
}

/// Settings for sampling from the mixed logits.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SamplingSettings {
    /// Divisor of the mixed logits; greater than 0.
    pub temperature: f64,
    /// Number of most likely tokens to keep; 0 keeps all.
    pub top_k: usize,
    /// Nucleus sampling: keeps the most likely tokens that together reach this probability; 1 keeps all.
    pub top_p: f64,
    /// Minimum probability relative to the most likely token; 0 keeps all.
    pub min_p: f64,
    /// Maximum completion length in tokens.
    pub max_new_tokens: usize,
    /// Precision of the weights during sampling.
    pub precision: Precision,
}

impl SamplingSettings {
    /// The full distribution at temperature 1, which the theory of self-play assumes.
    #[must_use]
    pub fn plain(max_new_tokens: usize) -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            max_new_tokens,
            precision: Precision::F32,
        }
    }

    /// Whether tokens are sampled from the full distribution at temperature 1.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        self.temperature == 1.0 && !self.truncates()
    }

    /// The same settings with the full distribution at temperature 1.
    pub(crate) fn exact(&self) -> Self {
        Self {
            precision: self.precision,
            ..Self::plain(self.max_new_tokens)
        }
    }

    fn truncates(&self) -> bool {
        self.top_k > 0 || self.top_p < 1.0 || self.min_p > 0.0
    }
}
