//! mistral.rs as a chat model and as a rollout sampler.
//!
//! [`Engine`] loads a model from files and passes the logits of every position to a [`TokenSelector`], which returns
//! the next token: mistral.rs itself samples nothing, and log-probabilities are computed here. [`Chat`] answers prompts
//! with the log-probability of every token. [`Rollouts`] samples completions from a mixture of policy and reference,
//! like the sampler of `model`.
//!
//! mistral.rs has its own tensor type, so only token ids, text and files cross this boundary. It is compiled with the
//! feature `engine` only; without it [`Engine::load`] fails with [`MistralError::NotBuilt`]. The crate does not know
//! what completions are used for.

mod chat;
#[cfg(feature = "engine")]
mod engine;
mod error;
mod model_files;
mod rollouts;
#[cfg(not(feature = "engine"))]
mod stub;

use std::time::Duration;

pub use chat::{CandidateToken, Chat, GeneratedText, GeneratedToken};
#[cfg(feature = "engine")]
pub use engine::Engine;
pub use error::MistralError;
pub use model_files::ModelFiles;
pub use rollouts::{Rollouts, RolloutsParts};
#[cfg(not(feature = "engine"))]
pub use stub::Engine;

/// Selects the tokens of one completion from its logits.
pub trait TokenSelector: Send + 'static {
    /// Selects the token that follows `context` (the prompt and the tokens generated so far) from `logits`, one value
    /// per vocabulary token. `None` ends the completion.
    fn select(&mut self, logits: &[f32], context: &[u32]) -> Option<u32>;
}

/// A completion request to an [`Engine`].
#[derive(Debug, Clone)]
pub struct EngineRequest {
    /// Token ids of the prompt.
    pub ids: Vec<u32>,
    /// Maximum length of the completion, in tokens.
    pub max_new_tokens: usize,
    /// Timeout, queueing included.
    pub timeout: Duration,
}

/// Dtype in which weights are loaded and computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoadDtype {
    /// 32-bit floating point.
    F32,
    /// Chosen by mistral.rs from the model's dtype and the processor.
    Auto,
}

/// Checks that this build includes mistral.rs.
///
/// # Errors
/// [`MistralError::NotBuilt`] if it does not.
pub fn is_built() -> Result<(), MistralError> {
    if cfg!(feature = "engine") {
        Ok(())
    } else {
        Err(MistralError::NotBuilt)
    }
}
