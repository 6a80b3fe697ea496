//! Errors of loading, running and saving models, by what the caller can do about them.

use std::path::PathBuf;

use thiserror::Error;

/// Reason why a model cannot be loaded, used or saved.
#[derive(Debug, Error)]
pub enum ModelError {
    /// A file cannot be read.
    #[error("failed to read {path}: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The I/O error.
        source: std::io::Error,
    },
    /// A file cannot be written.
    #[error("failed to write {path}: {source}")]
    Unwritable {
        /// The file.
        path: PathBuf,
        /// The I/O error.
        source: std::io::Error,
    },
    /// A file with malformed or contradictory content.
    #[error("{path} is not usable: {reason}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Reason and remedy.
        reason: String,
    },
    /// A model that was unpacked from a GGUF file.
    #[error("{source}; the folder was unpacked from {file}")]
    Unpacked {
        /// The GGUF file.
        file: PathBuf,
        /// What is wrong with the folder.
        source: Box<ModelError>,
    },
    /// An unsupported model architecture.
    #[error("the architecture {found} of {path} is not supported; supported are {}", supported.join(", "))]
    Architecture {
        /// The configuration file.
        path: PathBuf,
        /// The architecture that it names.
        found: String,
        /// The supported architectures.
        supported: Vec<&'static str>,
    },
    /// Weights that do not match the configuration.
    #[error("the weights do not fit the model: {reason}")]
    Weights {
        /// Tensor, with what is expected and found.
        reason: String,
    },
    /// An adapter that does not match its base model.
    #[error("the adapter does not fit the model: {reason}")]
    Adapter {
        /// Module or tensor, with what is expected and found.
        reason: String,
    },
    /// A tokenizer that does not match the model.
    #[error("the tokenizer of {path} does not fit the model: {reason}")]
    Tokenizer {
        /// The model's folder.
        path: PathBuf,
        /// The mismatch.
        reason: String,
    },
    /// A chat template that cannot be rendered.
    #[error("failed to render the chat template: {reason}")]
    ChatTemplate {
        /// The template engine's error.
        reason: String,
    },
    /// A failure of an external inference engine.
    #[error("failed to {0}")]
    Engine(String),
    /// Tokens that the model cannot process.
    #[error("{reason}")]
    Tokens {
        /// Tokens and limit.
        reason: String,
    },
    /// An unavailable device.
    #[error("the device {name} is not available: {reason}")]
    Device {
        /// The requested name.
        name: String,
        /// Reason why it is unavailable.
        reason: String,
    },
    /// A tensor operation failed.
    #[error("a tensor operation failed: {0}")]
    Compute(#[from] candle_core::Error),
}

impl messages::Classified for ModelError {
    fn class(&self) -> messages::ErrorClass {
        use messages::ErrorClass;
        match self {
            Self::Compute(_) | Self::Unwritable { .. } | Self::Engine(_) => ErrorClass::Failed,
            _ => ErrorClass::Resource,
        }
    }
}
