//! Errors of the playground.

use std::path::PathBuf;

use crate::vocabulary::WordCategory;

/// Errors of the playground. Messages are fragments that read after "failed to …: ".
#[derive(Debug, thiserror::Error)]
pub enum PlaygroundError {
    /// A token id outside the vocabulary: the prompt was encoded with another tokenizer.
    #[error(
        "token id {id} is not a playground word; encode the prompt with the playground's tokenizer"
    )]
    UnknownToken {
        /// The offending id.
        id: u32,
    },
    /// The prompt is not framed as `<bos> post <sep>`.
    #[error("prompt is not framed as <bos> post <sep>; build it with Post::prompt_ids")]
    PromptFrame,
    /// The post has no value for a required slot.
    #[error("prompt names no {slot:?}; build it from a generated post")]
    MissingFact {
        /// The category without a value.
        slot: WordCategory,
    },
    /// The reference probabilities of a bandit are not a probability distribution.
    #[error("model.reference_probabilities {reason}")]
    Probabilities {
        /// Reason and requirement.
        reason: String,
    },
    /// The matrix, reference, temperature or mixture of a matrix game is invalid.
    #[error("preference game {reason}")]
    Game {
        /// Reason and requirement.
        reason: String,
    },
    /// The fixed-point iteration did not converge within the iteration limit.
    #[error(
        "fixed point not reached in {iterations} iterations (residual {residual:e}); raise tau"
    )]
    NotConverged {
        /// Number of iterations.
        iterations: u64,
        /// Largest change of a probability in the last iteration.
        residual: f64,
    },
    /// A file could not be written.
    #[error("cannot write {path}: {source}; check that the folder exists and has room", path = path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The operating system's error.
        source: std::io::Error,
    },
    /// The weights could not be serialised as safetensors.
    #[error("cannot encode the weights: {0}")]
    Encode(#[from] safetensors::SafeTensorError),
}
