//! What can go wrong with mistral.rs, by what the caller can do about it.

use std::{io, path::PathBuf, time::Duration};

use thiserror::Error;

/// Why a model cannot be had from mistral.rs, or does not answer.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MistralError {
    /// This build is without mistral.rs.
    #[error(
        "this build of agon is without mistral.rs: build it with `cargo build --release --features mistral`"
    )]
    NotBuilt,
    /// A file is missing or cannot be read.
    #[error("failed to read {path}: {source}; name a Hugging Face folder or a .gguf file")]
    Unreadable {
        /// The file or folder.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// What is asked for does not fit the model's files.
    #[error("{path} is not usable: {reason}")]
    Unusable {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// mistral.rs does not load the model.
    #[error("mistral.rs does not load {path}: {reason}; {remedy}")]
    Load {
        /// The file or folder.
        path: PathBuf,
        /// What it says.
        reason: String,
        /// What may help.
        remedy: &'static str,
    },
    /// A model that is to chat has no template for it.
    #[error(
        "{path} has no chat template: take a model that was trained to chat, or name a .jinja file with {setting}"
    )]
    NoTemplate {
        /// The file or folder.
        path: PathBuf,
        /// Where a file can be named.
        setting: &'static str,
    },
    /// A prompt that cannot be put into tokens.
    #[error("a prompt cannot be put into tokens: {reason}")]
    Prompt {
        /// Why.
        reason: String,
    },
    /// An answer did not come in time.
    #[error("mistral.rs did not answer within {} s", .0.as_secs_f64())]
    Late(Duration),
    /// It fails while it writes.
    #[error("mistral.rs failed: {0}")]
    Failed(String),
    /// Its thread is gone.
    #[error("the thread of mistral.rs ended unexpectedly (it panicked; see the log)")]
    Gone,
}
