//! Why a model of the hub cannot be had, by what can be done about it.

use std::path::PathBuf;

use settings::HubModel;
use thiserror::Error;

#[derive(Debug, Error)]
pub(crate) enum HubError {
    /// Nobody can be asked, and the cache does not have all of it.
    #[error(
        "{model} is not in the cache at {} and the hub could not be reached: {reason}; \
         download it elsewhere and name its folder, or set HF_HOME to where a cache has it",
        cache.display()
    )]
    Unreachable {
        model: HubModel,
        cache: PathBuf,
        reason: String,
    },
    /// The hub does not know the model, or does not show it.
    #[error(
        "{endpoint} has no model {}: see how it is written there, and log in with `hf auth login` or set HF_TOKEN if it is private",
        model.repository()
    )]
    NoRepository { model: HubModel, endpoint: String },
    /// The model has no such revision.
    #[error(
        "{} has no branch, tag or commit {} at {endpoint}",
        model.repository(),
        model.revision()
    )]
    NoRevision { model: HubModel, endpoint: String },
    /// The model is not for everyone.
    #[error(
        "{} is gated or private (status {status}) and {token}: ask for access at {endpoint}/{0} and set \
         HF_TOKEN to a token that has it, or log in with `hf auth login`",
        model.repository()
    )]
    Gated {
        model: HubModel,
        endpoint: String,
        status: u16,
        token: String,
    },
    /// The model is there in a format that is not read.
    #[error(
        "{model} has no safetensors{found}: convert it, or name a repository or a folder that has them"
    )]
    NoSafetensors { model: HubModel, found: String },
    /// The hub has gone silent.
    #[error(
        "{model} could not be fetched: nothing came from the hub for {seconds} s; \
         what came before is kept, and the next start goes on from there"
    )]
    Silent { model: HubModel, seconds: u64 },
    /// Told to stop while it was fetched.
    #[error("interrupted while {model} was fetched; the next start goes on from there")]
    Stopped { model: HubModel },
    /// Something else.
    #[error("failed to fetch {model}: {reason}")]
    Failed { model: HubModel, reason: String },
    /// There is no place for a cache.
    #[error("there is no place for models of the hub: set HF_HOME, or HOME")]
    NoCache,
    /// The token that was found here cannot be one.
    #[error("{0} is not a token: it holds white space or other characters that no token has")]
    Token(String),
    /// The token's file cannot be read.
    #[error(
        "failed to read the token in {}: {reason}; mend its permissions, or set HF_TOKEN_PATH or HF_TOKEN",
        path.display()
    )]
    TokenFile { path: PathBuf, reason: String },
}
