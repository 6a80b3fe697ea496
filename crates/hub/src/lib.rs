//! Client of the Hugging Face Hub: finds models in the shared cache, or downloads them into it.
//!
//! The cache has the layout of Python's `huggingface_hub` and is shared with it. A revision is resolved to a commit once
//! per process; if the Hub cannot be reached, the cached snapshot of that revision is used and a warning is logged. All
//! files of a model are of one commit. Names that the Hub states (commits, ETags, files) are one plain path component
//! each, sizes are bounded, and the token goes to no other host than the endpoint's. Does not know what a model is used
//! for.

mod blob;
mod cancel;
mod client;
mod download_event;
mod endpoint;
mod environment;
mod error;
mod fetch;
mod files;
mod gguf;
mod http;
mod model_lookup;
mod token;

use std::path::PathBuf;

use settings::ModelSource;

pub use cancel::CancelToken;
use client::HubClient;
pub use error::HubError;
pub use model_lookup::ModelLookup;

/// Folder of a model, downloaded first if it is on the Hub, unpacked if it is a GGUF file. Blocks; ends early once
/// `cancel` is cancelled.
///
/// # Errors
/// When the model cannot be found or downloaded, or the download was cancelled.
pub fn folder(source: &ModelSource, cancel: &CancelToken) -> Result<PathBuf, HubError> {
    match source {
        ModelSource::Folder(path) if model::is_gguf(path) => gguf::folder(path),
        ModelSource::Folder(path) => Ok(path.clone()),
        ModelSource::Hub(model) => fetch::folder(&HubClient::from_environment()?, model, cancel),
    }
}

/// Folder of a model if this machine has it; sends no request.
pub fn cached_folder(source: &ModelSource) -> Option<PathBuf> {
    match source {
        ModelSource::Folder(path) if model::is_gguf(path) => gguf::cached(path),
        ModelSource::Folder(path) => Some(path.clone()),
        ModelSource::Hub(model) => HubClient::from_environment().ok()?.cached(model),
    }
}

/// Looks a model up. If it is not in the cache, it must exist on the Hub: metadata is requested, nothing is written.
///
/// # Errors
/// When the model does not exist, or cannot be used.
pub fn locate(source: &ModelSource) -> Result<ModelLookup, HubError> {
    match source {
        ModelSource::Folder(path) if model::is_gguf(path) => gguf::locate(path),
        ModelSource::Folder(path) => Ok(ModelLookup {
            folder: Some(path.clone()),
            gguf: None,
            origin: path.display().to_string(),
        }),
        ModelSource::Hub(model) => HubClient::from_environment()?.locate(model),
    }
}

/// Endpoint, cache and token source in use, as text for users.
///
/// # Errors
/// When the environment names no cache, or a malformed token.
pub fn describe() -> Result<String, HubError> {
    Ok(HubClient::from_environment()?.to_string())
}
