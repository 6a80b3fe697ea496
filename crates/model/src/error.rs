//! What can go wrong with a language model, by what the caller can do about it.

use std::path::PathBuf;

use thiserror::Error;

/// Why a model cannot be loaded, used or saved.
#[derive(Debug, Error)]
pub enum ModelError {
    /// A file cannot be read.
    #[error("failed to read {path}: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A file cannot be written.
    #[error("failed to write {path}: {source}")]
    Unwritable {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A file is there but is not what it should be.
    #[error("{path} is not usable: {reason}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// A model of a kind that is not supported.
    #[error("the architecture {found} of {path} is not supported; supported are {}", supported.join(", "))]
    Architecture {
        /// The configuration file.
        path: PathBuf,
        /// What it names.
        found: String,
        /// What would do in its place.
        supported: Vec<&'static str>,
    },
    /// Weights that do not belong to the configuration.
    #[error("the weights do not fit the model: {reason}")]
    Weights {
        /// Which tensor, what is expected, what was found.
        reason: String,
    },
    /// An adapter that does not belong to the model.
    #[error("the adapter does not fit the model: {reason}")]
    Adapter {
        /// Which module or tensor, what is expected, what was found.
        reason: String,
    },
    /// A tokenizer that does not belong to the model.
    #[error("the tokenizer of {path} does not fit the model: {reason}")]
    Tokenizer {
        /// The model's folder.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },
    /// A chat template that cannot be rendered.
    #[error("failed to render the chat template: {reason}")]
    ChatTemplate {
        /// What the template engine says.
        reason: String,
    },
    /// An engine beside this crate that computes for it fails.
    #[error("failed to {0}")]
    Engine(String),
    /// Tokens that the model cannot take.
    #[error("{reason}")]
    Tokens {
        /// Which tokens, which limit.
        reason: String,
    },
    /// A device that cannot be had.
    #[error("the device {name} is not available: {reason}")]
    Device {
        /// As given.
        name: String,
        /// What is missing.
        reason: String,
    },
    /// A tensor operation failed.
    #[error("a tensor operation failed: {0}")]
    Compute(#[from] candle_core::Error),
}
