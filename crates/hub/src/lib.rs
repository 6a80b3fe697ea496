//! Client of the Hugging Face Hub: finds models in the shared cache, or downloads them into it.
//!
//! The cache has the layout of Python's `huggingface_hub` and is shared with it. A revision is resolved to a commit once
//! per process; if the Hub cannot be reached, the cached snapshot of that revision is used and a warning is logged. All
//! files of a model are of one commit. What a model is used for, this crate does not know.

mod cancel;
mod error;
mod fetch;
mod files;
mod token;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use hf_hub::{
    Cache, Repo, RepoType,
    api::{
        RepoInfo,
        sync::{Api, ApiBuilder, ApiError},
    },
};
use settings::{HubModel, ModelSource};

pub use cancel::CancelToken;
pub use error::HubError;
use token::Token;

/// Repository metadata received by this process, by endpoint and model: each is requested once, and a run downloads
/// the commit that was checked before it.
static REPOSITORIES: Mutex<BTreeMap<(String, String), RepoInfo>> = Mutex::new(BTreeMap::new());

/// Timeout of a request for the metadata of a repository.
const METADATA_TIMEOUT: Duration = Duration::from_secs(30);

/// Folder of a model, downloaded first if it is on the Hub. Blocks; ends early once `cancel` is cancelled.
///
/// # Errors
/// When the model cannot be found or downloaded, or the download was cancelled.
pub fn folder(source: &ModelSource, cancel: &CancelToken) -> Result<PathBuf, HubError> {
    match source {
        ModelSource::Folder(path) => Ok(path.clone()),
        ModelSource::Hub(model) => HubClient::from_environment()?.folder(model, cancel),
    }
}

/// Folder of a model if this machine has it; sends no request.
pub fn cached_folder(source: &ModelSource) -> Option<PathBuf> {
    match source {
        ModelSource::Folder(path) => Some(path.clone()),
        ModelSource::Hub(model) => HubClient::from_environment().ok()?.cached(model),
    }
}

/// What is known of a model without downloading it.
pub struct ModelLookup {
    /// Its folder; `None` if it is not downloaded yet.
    pub folder: Option<PathBuf>,
    /// Its path, or its commit and cache, as text for users.
    pub origin: String,
}

/// Looks a model up. If it is not in the cache, it must exist on the Hub: metadata is requested, nothing is written.
///
/// # Errors
/// When the model does not exist, or cannot be used.
pub fn locate(source: &ModelSource) -> Result<ModelLookup, HubError> {
    match source {
        ModelSource::Folder(path) => Ok(ModelLookup {
            folder: Some(path.clone()),
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

/// Client configured by the environment variables of `huggingface_hub`.
#[derive(Clone)]
struct HubClient {
    endpoint: String,
    cache: PathBuf,
    /// Sent to the endpoint only; never logged.
    token: Token,
    is_offline: bool,
}

impl HubClient {
    fn from_environment() -> Result<Self, HubError> {
        Self::from_variables(|name| std::env::var(name).ok())
    }

    /// Configuration from these variables; an empty one counts as unset.
    fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Self, HubError> {
        let variable = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
        let folder = |name: &str| variable(name).map(|path| expand_tilde(&path, variable));
        let caches = || {
            folder("XDG_CACHE_HOME")
                .or(variable("HOME").map(|home| Path::new(&home).join(".cache")))
        };
        let home = folder("HF_HOME").or_else(|| Some(caches()?.join("huggingface")));
        let cache = folder("HF_HUB_CACHE").or_else(|| Some(home.as_ref()?.join("hub")));
        let cache = cache.ok_or(HubError::NoCache)?;
        let token = Token::find(variable, home.as_deref().unwrap_or(Path::new("")))?;
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        let offline = variable("HF_HUB_OFFLINE").unwrap_or_default();
        Ok(Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            // Symbolic links in the cache join absolute paths.
            cache: std::path::absolute(&cache).unwrap_or(cache),
            token,
            is_offline: is_true(&offline),
        })
    }

    fn folder(&self, model: &HubModel, cancel: &CancelToken) -> Result<PathBuf, HubError> {
        let fetched = match self.is_offline {
            true => Err(self.offline(model)),
            false => fetch::fetch(self, model, cancel),
        };
        let folder = match (fetched, self.cached(model)) {
            (Err(HubError::Unreachable { .. }), Some(folder)) if self.is_offline => folder,
            (Err(HubError::Unreachable { reason, .. }), Some(folder)) => {
                tracing::warn!(%model, reason, "the hub cannot be reached: using the cached model");
                folder
            }
            (fetched, _) => fetched?,
        };
        tracing::info!(%model, commit = commit_of(&folder), "the model is in the hub's cache");
        Ok(folder)
    }

    fn locate(&self, model: &HubModel) -> Result<ModelLookup, HubError> {
        let cache = self.cache.display();
        if let Some(folder) = self.cached(model) {
            let commit = commit_of(&folder);
            return Ok(ModelLookup {
                origin: format!("{model}, commit {commit} in the cache {cache}"),
                folder: Some(folder),
            });
        }
        if self.is_offline {
            return Err(self.offline(model));
        }
        let info = self.info(&self.api(model)?, model)?;
        files::required(
            model,
            &files::names(&info),
            &self.snapshot(model, &info.sha),
        )?;
        Ok(ModelLookup {
            origin: format!(
                "{model}, commit {} at {}: will be fetched into {cache} on first use",
                info.sha, self.endpoint
            ),
            folder: None,
        })
    }

    /// Cached snapshot of the model, if it is complete.
    fn cached(&self, model: &HubModel) -> Option<PathBuf> {
        let reference = self.repository(model).join("refs").join(model.revision());
        let commit = std::fs::read_to_string(reference);
        let commit = commit.unwrap_or_else(|_| model.revision().to_owned());
        let folder = self.snapshot(model, commit.trim());
        files::is_complete(&folder).then_some(folder)
    }

    /// Path of a commit's snapshot in the cache.
    fn snapshot(&self, model: &HubModel, commit: &str) -> PathBuf {
        self.repository(model).join("snapshots").join(commit)
    }

    fn repository(&self, model: &HubModel) -> PathBuf {
        self.cache
            .join(repo_at(model, model.revision()).folder_name())
    }

    fn api(&self, model: &HubModel) -> Result<Api, HubError> {
        ApiBuilder::from_cache(Cache::new(self.cache.clone()))
            .with_endpoint(self.endpoint.clone())
            .with_token(self.token.secret())
            .with_retries(3)
            .with_user_agent("agon", env!("CARGO_PKG_VERSION"))
            .build()
            .map_err(|error| self.classify(model, error))
    }

    /// Commit and files of the repository at the revision, requested once per process.
    fn info(&self, api: &Api, model: &HubModel) -> Result<RepoInfo, HubError> {
        let key = (self.endpoint.clone(), model.to_string());
        let mut repositories = REPOSITORIES.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(info) = repositories.get(&key) {
            return Ok(info.clone());
        }
        let info = self.request_info(api, model)?;
        repositories.insert(key, info.clone());
        Ok(info)
    }

    fn request_info(&self, api: &Api, model: &HubModel) -> Result<RepoInfo, HubError> {
        let request = api.repo(repo_at(model, model.revision())).info_request();
        let response = request.timeout(METADATA_TIMEOUT).call();
        let response = response.map_err(|error| self.classify(model, Box::new(error).into()))?;
        let info = response.into_json::<RepoInfo>();
        let info = info.map_err(|error| self.classify(model, error.into()))?;
        let is_commit = !info.sha.is_empty() && info.sha.chars().all(|c| c.is_ascii_hexdigit());
        match is_commit {
            true => Ok(info),
            false => Err(HubError::Failed {
                model: model.clone(),
                reason: format!("{} names {:?} as its commit", self.endpoint, info.sha),
            }),
        }
    }

    fn offline(&self, model: &HubModel) -> HubError {
        self.unreachable(model, "HF_HUB_OFFLINE is set".into())
    }

    fn unreachable(&self, model: &HubModel, reason: String) -> HubError {
        HubError::Unreachable {
            model: model.clone(),
            cache: self.cache.clone(),
            reason,
        }
    }

    /// Maps an error of the HTTP client to the cause that the user can act on.
    fn classify(&self, model: &HubModel, error: ApiError) -> HubError {
        let error = match error {
            ApiError::TooManyRetries(error) => return self.classify(model, *error),
            ApiError::RequestError(error) => error,
            other => {
                return HubError::Failed {
                    model: model.clone(),
                    reason: other.to_string(),
                };
            }
        };
        let reason = error.to_string();
        let Some(response) = error.into_response() else {
            return self.unreachable(model, reason);
        };
        let (model, endpoint) = (model.clone(), self.endpoint.clone());
        match (response.status(), response.header("x-error-code")) {
            (_, Some("RevisionNotFound")) => HubError::NoRevision { model, endpoint },
            (_, Some("RepoNotFound")) | (404, _) => HubError::NoRepository { model, endpoint },
            (status @ (401 | 403), _) => HubError::Gated {
                model,
                endpoint,
                status,
                token: self.token.no_access_reason(),
            },
            _ => self.unreachable(&model, reason),
        }
    }
}

impl std::fmt::Display for HubClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (endpoint, cache, token) = (&self.endpoint, self.cache.display(), &self.token);
        write!(f, "{endpoint}, cache {cache}, {token}")?;
        match self.is_offline {
            true => write!(f, "; offline: HF_HUB_OFFLINE is set"),
            false => Ok(()),
        }
    }
}

/// Whether the value of a boolean variable of `huggingface_hub` is true.
fn is_true(value: &str) -> bool {
    ["1", "ON", "YES", "TRUE"].contains(&value.to_uppercase().as_str())
}

/// Path in a variable, with a leading `~` expanded to `HOME`.
fn expand_tilde(path: &str, variable: impl Fn(&str) -> Option<String>) -> PathBuf {
    let relative = path
        .strip_prefix('~')
        .filter(|rest| rest.is_empty() || rest.starts_with('/'));
    match relative.zip(variable("HOME")) {
        Some((rest, home)) => PathBuf::from(home + rest),
        None => PathBuf::from(path),
    }
}

/// Repository of the model at this revision, in the client's type.
fn repo_at(model: &HubModel, revision: &str) -> Repo {
    let repository = model.repository().to_owned();
    Repo::with_revision(repository, RepoType::Model, revision.to_owned())
}

/// Commit of a cached snapshot: the name of its folder.
fn commit_of(folder: &Path) -> &str {
    let name = folder.file_name().and_then(|name| name.to_str());
    name.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(variables: &[(&str, &str)]) -> Result<HubClient, HubError> {
        HubClient::from_variables(|name| {
            let found = variables.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn environment_variables_set_the_cache() {
        let cases = [
            (&[("HOME", "/h")][..], "/h/.cache/huggingface/hub"),
            (
                &[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")],
                "/x/huggingface/hub",
            ),
            (&[("HOME", "/h"), ("HF_HOME", "/f")], "/f/hub"),
            (&[("HF_HOME", "/f"), ("HF_HUB_CACHE", "/c")], "/c"),
            (&[("HOME", "/h"), ("HF_HOME", "~/f")], "/h/f/hub"),
            (
                &[("HOME", "/h"), ("HF_HOME", " ")],
                "/h/.cache/huggingface/hub",
            ),
        ];
        for (variables, cache) in cases {
            let hub = hub(variables).map_err(|error| error.to_string()).unwrap();
            assert_eq!(hub.cache, Path::new(cache), "{variables:?}");
        }
        assert!(matches!(hub(&[]), Err(HubError::NoCache)));
    }

    #[test]
    fn descriptions_and_errors_never_hold_the_token() {
        let base = [
            ("HOME", "/h"),
            ("HF_ENDPOINT", "http://hub/"),
            ("HF_HUB_OFFLINE", "1"),
        ];
        let message = |token: &str| {
            let variables = [&base[..], &[("HF_TOKEN", token)]].concat();
            match hub(&variables) {
                Ok(hub) => hub.to_string(),
                Err(error) => error.to_string(),
            }
        };
        let offline = "; offline: HF_HUB_OFFLINE is set";
        let home = "/h/.cache/huggingface";
        let expected = |token: &str| format!("http://hub, cache {home}/hub, {token}{offline}");
        assert_eq!(message("hf_secret\n"), expected("token from HF_TOKEN"));
        let none = format!("HF_TOKEN is not set and {home}/token does not exist or is empty");
        assert_eq!(message(""), expected(&none));
        let broken = message("hf_sec\nret");
        assert!(
            broken.contains("HF_TOKEN") && !broken.contains("sec"),
            "{broken}"
        );
    }
}
