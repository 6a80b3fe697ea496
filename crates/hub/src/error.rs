//! Reasons why a model of the Hugging Face Hub is not available, by what can be done about them.

use std::path::PathBuf;

use settings::HubModel;
use thiserror::Error;

/// Failure to find or download a model of the Hub.
#[derive(Debug, Error)]
pub enum HubError {
    /// The Hub cannot be reached, and the cache lacks files of the model.
    #[error(
        "{model} is not in the cache at {} and the hub could not be reached: {reason}; \
         download it elsewhere and name its folder, or set HF_HOME to where a cache has it",
        cache.display()
    )]
    Unreachable {
        /// The model that was requested.
        model: HubModel,
        /// The cache that was searched.
        cache: PathBuf,
        /// The network error, or the setting that forbids requests.
        reason: String,
    },
    /// The Hub does not know the repository, or hides it.
    #[error(
        "{endpoint} has no model {}: check its spelling there, and log in with `hf auth login` or set HF_TOKEN if it is private",
        model.repository()
    )]
    NoRepository {
        /// The model that was requested.
        model: HubModel,
        /// URL of the Hub.
        endpoint: String,
    },
    /// The repository has no such branch, tag or commit.
    #[error(
        "{} has no branch, tag or commit {} at {endpoint}",
        model.repository(),
        model.revision()
    )]
    NoRevision {
        /// The model that was requested.
        model: HubModel,
        /// URL of the Hub.
        endpoint: String,
    },
    /// The repository is gated or private, and the token gives no access.
    #[error(
        "{} is gated or private (status {status}) and {token}: ask for access at {endpoint}/{0} and set \
         HF_TOKEN to a token that has it, or log in with `hf auth login`",
        model.repository()
    )]
    Gated {
        /// The model that was requested.
        model: HubModel,
        /// URL of the Hub.
        endpoint: String,
        /// HTTP status of the response: 401 or 403.
        status: u16,
        /// Source of the token, without the token itself.
        token: String,
    },
    /// The repository holds weights in unsupported formats only.
    #[error(
        "{model} has no safetensors{found}: convert it, or name a repository or a folder that has them"
    )]
    NoSafetensors {
        /// The model that was requested.
        model: HubModel,
        /// A file with weights in another format, in parentheses; empty if there is none.
        found: String,
    },
    /// The download received no data until the timeout.
    #[error(
        "{model} could not be fetched: no data came from the hub for {seconds} s; \
         what was downloaded is kept, and the next start resumes there"
    )]
    TimedOut {
        /// The model that was requested.
        model: HubModel,
        /// The timeout.
        seconds: u64,
    },
    /// The download was cancelled.
    #[error("interrupted while {model} was fetched; the next start resumes there")]
    Cancelled {
        /// The model that was requested.
        model: HubModel,
    },
    /// Any other failure.
    #[error("failed to fetch {model}: {reason}")]
    Failed {
        /// The model that was requested.
        model: HubModel,
        /// The cause.
        reason: String,
    },
    /// The environment names no directory for the cache.
    #[error("there is no directory for the cache of the hub: set HF_HOME, or HOME")]
    NoCache,
    /// The environment names no directory for unpacked GGUF files.
    #[error("there is no directory to unpack GGUF files into: set XDG_CACHE_HOME, or HOME")]
    NoGgufCache,
    /// A GGUF file cannot be used.
    #[error(transparent)]
    Gguf(#[from] model::ModelError),
    /// The configured endpoint is not usable.
    #[error("HF_ENDPOINT is not usable as the URL of a hub: {0}")]
    Endpoint(String),
    /// The configured token is malformed.
    #[error("{0} is not a token: it holds white space or other characters that no token has")]
    Token(String),
    /// The token's file cannot be read.
    #[error(
        "failed to read the token in {}: {reason}; correct its permissions, or set HF_TOKEN_PATH or HF_TOKEN",
        path.display()
    )]
    TokenFile {
        /// The token's file.
        path: PathBuf,
        /// The I/O error.
        reason: String,
    },
}

impl messages::Classified for HubError {
    fn class(&self) -> messages::ErrorClass {
        match self {
            Self::Cancelled { .. } => messages::ErrorClass::Interrupted,
            Self::Gguf(error) => error.class(),
            _ => messages::ErrorClass::Resource,
        }
    }
}
