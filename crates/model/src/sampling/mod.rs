//! Writing completions from the token-by-token mixture of a policy and its reference.

mod continuation;
mod distribution;
mod groups;
mod sampler;

use messages::{Completion, Seed};
use serde::{Deserialize, Serialize};

pub use crate::ops::Precision;
use crate::{LanguageModel, ModelError};

pub use continuation::Continuation;
#[cfg(test)]
#[cfg(test)]
pub(crate) use distribution::log_softmax_at;
pub use distribution::{Draw, Scratch, draw, mix};
pub use groups::Groups;
pub use sampler::Sampler;

/// Writes completions of prompts, many side by side, for a policy and its reference.
pub trait CompletionWriter: Send {
    /// Adds a prompt.
    ///
    /// # Errors
    /// When it asks for no completion, for more than can be written at once, or for too long ones.
    fn admit(&mut self, request: Request) -> Result<(), ModelError>;

    /// Goes on writing for a moment. Returns the prompts whose completions have all ended.
    ///
    /// # Errors
    /// When computing fails or a model gives no distribution (its weights hold a NaN).
    fn step(&mut self) -> Result<Vec<Finished>, ModelError>;

    /// Whether nothing is being written and nothing waits.
    fn is_idle(&self) -> bool;

    /// Replaces the policy; from now on it and its reference are kept in `precision`, as far as this writer keeps
    /// them. Only an idle writer may: no completion mixes versions.
    ///
    /// # Errors
    /// When completions are being written, or the policy cannot be had.
    fn set_policy(&mut self, policy: LanguageModel, precision: Precision)
    -> Result<(), ModelError>;
}

/// A prompt to be answered.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The caller's name for it.
    pub key: u64,
    /// The prompt's tokens.
    pub ids: Vec<u32>,
    /// The seed of its completions' streams.
    pub seed: Seed,
    /// One entry a completion: the weight on the reference.
    pub mixture_coefs: Vec<f32>,
    /// How many of them, the last, are drawn from the whole distribution at temperature 1 whatever the
    /// writer's settings say.
    pub exact: usize,
    /// The longest completion, in tokens.
    pub max_new_tokens: usize,
}

/// A prompt whose completions have all ended.
#[derive(Debug)]
pub struct Finished {
    /// The caller's name for it.
    pub key: u64,
    /// Its completions, in the order of the request's `mixture_coefs`, without text.
    pub completions: Vec<Completion>,
}

impl Request {
    /// That so many slots, of a model with so many positions, can hold it.
    ///
    /// # Errors
    /// Why they cannot.
    pub fn fits(&self, slots: usize, positions: usize) -> Result<(), ModelError> {
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

/// That both models mean the same by a token.
///
/// # Errors
/// When their vocabularies differ in size.
pub fn share_vocabulary(
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

/// That nothing is being written, so that the policy may change.
///
/// # Errors
/// When something is.
pub fn only_idle(writer: &dyn CompletionWriter) -> Result<(), ModelError> {
    if writer.is_idle() {
        return Ok(());
    }
    let reason = "the policy changes only between completions".into();
    Err(ModelError::Weights { reason })
}

/// How tokens are drawn from the mixed logits.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SamplingSettings {
    /// Divides the mixed logits; greater than 0.
    pub temperature: f64,
    /// Only so many of the likeliest tokens; 0: all.
    pub top_k: usize,
    /// Only the likeliest tokens that together reach this probability; 1: all.
    pub top_p: f64,
    /// Only tokens with at least this share of the likeliest one's probability; 0: all.
    pub min_p: f64,
    /// The longest completion, in tokens.
    pub max_new_tokens: usize,
    /// How the weights are kept while tokens are drawn.
    pub precision: Precision,
}

impl SamplingSettings {
    /// The whole distribution at temperature 1, for which the theory of self-play holds.
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

    /// Whether tokens are drawn from the whole distribution at temperature 1.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        self.temperature == 1.0 && !self.truncates()
    }

    /// The same with tokens drawn from the whole distribution at temperature 1.
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
