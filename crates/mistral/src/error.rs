//! Errors of the crate.

use std::{io, path::PathBuf, time::Duration};

use thiserror::Error;

/// Errors of loading a model with mistral.rs and of generating with it.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MistralError {
    /// The build does not include mistral.rs.
    #[error(
        "this build of agon is without mistral.rs: build it with `cargo build --release --features mistral`"
    )]
    NotBuilt,
    /// A file is missing or cannot be read.
    #[error("failed to read {path}: {source}; name a Hugging Face folder or a .gguf file")]
    Unreadable {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
    /// The settings do not match the model's files.
    #[error("{path} is not usable: {reason}")]
    Unusable {
        /// The file or folder.
        path: PathBuf,
        /// Reason and requirement.
        reason: String,
    },
    /// mistral.rs cannot load the model.
    #[error("mistral.rs cannot load {path}: {reason}; {remedy}")]
    Load {
        /// The file or folder.
        path: PathBuf,
        /// The error of mistral.rs.
        reason: String,
        /// Suggested remedy.
        remedy: &'static str,
    },
    /// The model has no chat template.
    #[error("{path} has no chat template: use a chat model, or name a .jinja file with {setting}")]
    NoTemplate {
        /// The file or folder.
        path: PathBuf,
        /// Setting or option that names a template file.
        setting: &'static str,
    },
    /// A prompt cannot be tokenized.
    #[error("failed to tokenize a prompt: {reason}")]
    Prompt {
        /// Why.
        reason: String,
    },
    /// The engine exceeded a timeout.
    #[error("mistral.rs did not answer within {} s", .0.as_secs_f64())]
    Timeout(Duration),
    /// Generation failed.
    #[error("mistral.rs failed: {0}")]
    Failed(String),
    /// The engine thread has ended.
    #[error("the thread of mistral.rs ended unexpectedly (it panicked; see the log)")]
    ThreadEnded,
}

impl messages::Classified for MistralError {
    fn class(&self) -> messages::ErrorClass {
        use messages::ErrorClass;
        match self {
            Self::NotBuilt => ErrorClass::Usage,
            Self::Unreadable { .. }
            | Self::Unusable { .. }
            | Self::Load { .. }
            | Self::NoTemplate { .. } => ErrorClass::Resource,
            _ => ErrorClass::Failed,
        }
    }
}
