//! What can go wrong in the playground, by what the caller can do about it.

use std::path::PathBuf;

use crate::Tag;

/// Failures of the playground. Messages are fragments that read after "failed to …: ".
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A token id that no word of the vocabulary has: the prompt was made with another tokenizer.
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
    /// A sentence that should name a slot of the post does not name it.
    #[error("prompt names no {slot:?}; build it from a generated post")]
    MissingFact {
        /// The slot without a value.
        slot: Tag,
    },
    /// The arms of a bandit are not a probability distribution.
    #[error("model.reference_probabilities {reason}")]
    Probabilities {
        /// What is wrong and what is wanted.
        reason: String,
    },
    /// The matrix, reference, temperature or mixture of a matrix game is unusable.
    #[error("preference game {reason}")]
    Game {
        /// What is wrong and what is wanted.
        reason: String,
    },
    /// The fixed point was not reached within the iteration limit.
    #[error(
        "fixed point not reached in {iterations} iterations (residual {residual:e}); raise tau"
    )]
    NotConverged {
        /// Iterations done.
        iterations: u64,
        /// Largest remaining change of a probability.
        residual: f64,
    },
    /// A file could not be written.
    #[error("cannot write {path}: {source}; check that the folder exists and has room", path = path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Weights could not be put into the safetensors format.
    #[error("cannot encode the weights: {0}")]
    Encode(#[from] safetensors::SafeTensorError),
}
