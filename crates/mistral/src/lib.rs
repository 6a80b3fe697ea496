//! mistral.rs as a chat model and as a writer of completions.
//!
//! [`Engine`] loads a model from files and gives, token by token, the logits of a completion to a
//! [`TokenWriter`], which says what the next token is: so nothing is drawn by mistral.rs itself, and what is
//! recorded of a token is computed here. [`Chat`] answers prompts with it, with the log-probabilities of
//! every token. [`Rollouts`] writes completions of a policy and its reference as `model`'s own sampler does.
//!
//! mistral.rs brings tensors of its own: what passes between it and the rest are ids, text and files. It is
//! compiled with the feature `engine` only; without it an [`Engine`] cannot be had, and says so. What
//! answers and completions are for, this crate does not know.

#[cfg(not(feature = "engine"))]
mod absent;
mod chat;
#[cfg(feature = "engine")]
mod engine;
mod error;
mod rollouts;
mod source;

use std::time::Duration;

#[cfg(not(feature = "engine"))]
pub use absent::Engine;
pub use chat::{Alternative, Answer, Chat, SaidToken};
#[cfg(feature = "engine")]
pub use engine::Engine;
pub use error::MistralError;
pub use rollouts::{Rollouts, RolloutsParts};
pub use source::Source;

/// Decides the tokens of one completion.
pub trait TokenWriter: Send + 'static {
    /// The token that follows `context`, the prompt and what was written since; `logits` has one number a
    /// token. None: it cannot go on, and the completion ends.
    fn next(&mut self, logits: &[f32], context: &[u32]) -> Option<u32>;
}

/// A completion that is asked of an [`Engine`].
#[derive(Debug, Clone)]
pub struct Asked {
    /// The prompt's tokens.
    pub ids: Vec<u32>,
    /// The longest completion, in tokens.
    pub max_new_tokens: usize,
    /// How long it may take.
    pub patience: Duration,
}

/// The number format of weights and activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Numbers {
    /// 32-bit floating point.
    F32,
    /// What the processor computes best, of those that the model is made for.
    Fitting,
}

/// Whether this build has mistral.rs.
///
/// # Errors
/// When it has not.
pub fn is_built() -> Result<(), MistralError> {
    if cfg!(feature = "engine") {
        Ok(())
    } else {
        Err(MistralError::NotBuilt)
    }
}
