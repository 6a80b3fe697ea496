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
#[cfg_attr(not(feature = "engine"), path = "stub.rs")]
mod engine;
mod error;
mod model_files;
mod request;
mod rollouts;

pub use chat::{CandidateToken, Chat, GeneratedText, GeneratedToken};
pub use engine::Engine;
pub use error::MistralError;
pub use model_files::ModelFiles;
pub use request::{EngineRequest, LoadDtype, TokenSelector};
pub use rollouts::{Rollouts, RolloutsParts};

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
