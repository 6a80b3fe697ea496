//! Client of the Hugging Face Hub: finds models in the shared cache, or downloads them into it.
//!
//! The cache has the layout of Python's `huggingface_hub` and is shared with it. A revision is resolved to a commit once
//! per process; if the Hub cannot be reached, the cached snapshot of that revision is used and a warning is logged. All
//! files of a model are of one commit. Names that the Hub states (commits, ETags, files) are one plain path component
//! each, sizes are bounded, and the token goes to no other host than the endpoint's. What a model is used for, this crate
//! does not know.

mod blob;
mod cancel;
mod download_event;
mod error;
mod fetch;
mod files;
mod gguf;
mod http;
mod token;

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Read,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use messages::FileName;
use serde::Deserialize;
use settings::{HubModel, ModelSource};
use url::Url;

pub use cancel::CancelToken;
pub use error::HubError;
use http::{HttpClient, RequestFailure};
use token::Token;

/// Repository metadata received by this process, by endpoint and model: each is requested once, and a run downloads
/// the commit that was checked before it.
static REPOSITORIES: Mutex<BTreeMap<(String, String), Repository>> = Mutex::new(BTreeMap::new());

/// Timeout of a request for the metadata of a repository.
const METADATA_TIMEOUT: Duration = Duration::from_secs(30);
/// Largest metadata of a repository, in bytes.
const MAX_METADATA_BYTES: u64 = 1 << 25;

/// Folder of a model, downloaded first if it is on the Hub, unpacked if it is a GGUF file. Blocks; ends early once `cancel` is cancelled.
///
/// # Errors
/// When the model cannot be found or downloaded, or the download was cancelled.
pub fn folder(source: &ModelSource, cancel: &CancelToken) -> Result<PathBuf, HubError> {
    match source {
        ModelSource::Folder(path) if model::is_gguf(path) => gguf::folder(path),
        ModelSource::Folder(path) => Ok(path.clone()),
        ModelSource::Hub(model) => HubClient::from_environment()?.folder(model, cancel),
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
        ModelSource::Folder(path) if model::is_gguf(path) => gguf::locate(path),
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

/// Commit of a repository's revision, and the files directly in it.
#[derive(Debug, Clone)]
struct Repository {
    commit: FileName,
    files: BTreeSet<FileName>,
}

/// Metadata of a repository as the Hub sends it.
#[derive(Debug, Deserialize)]
struct RepositoryMetadata {
    sha: String,
    siblings: Vec<RepositoryFile>,
}

/// A file of a repository.
#[derive(Debug, Deserialize)]
struct RepositoryFile {
    /// Path in the repository.
    rfilename: String,
}

/// Client configured by the environment variables of `huggingface_hub`.
#[derive(Clone)]
struct HubClient {
    /// URL of the Hub without a slash at its end.
    endpoint: Endpoint,
    cache: PathBuf,
    /// Sent to the endpoint only; never logged.
    token: Token,
    is_offline: bool,
}

/// The user's folder of caches, by environment variables.
fn caches(variable: impl Fn(&str) -> Option<String>) -> Option<PathBuf> {
    let variable = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
    let named = variable("XDG_CACHE_HOME").map(|path| expand_tilde(&path, variable));
    named.or_else(|| Some(Path::new(&variable("HOME")?).join(".cache")))
}

impl HubClient {
    fn from_environment() -> Result<Self, HubError> {
        Self::from_variables(|name| std::env::var(name).ok())
    }

    /// Configuration from these variables; an empty one counts as unset.
    fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Self, HubError> {
        let variable = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
        let folder = |name: &str| variable(name).map(|path| expand_tilde(&path, variable));
        let home = folder("HF_HOME").or_else(|| Some(caches(variable)?.join("huggingface")));
        let cache = folder("HF_HUB_CACHE").or_else(|| Some(home.as_ref()?.join("hub")));
        let cache = cache.ok_or(HubError::NoCache)?;
        let token = Token::find(variable, home.as_deref().unwrap_or(Path::new("")))?;
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        let endpoint = Endpoint::parse(&endpoint)?;
        let offline = variable("HF_HUB_OFFLINE").unwrap_or_default();
        Ok(Self {
            endpoint,
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
        let info = self.info(&self.http_client(METADATA_TIMEOUT), model)?;
        files::required(model, &info.files, &self.snapshot(model, &info.commit))?;
        Ok(ModelLookup {
            origin: format!(
                "{model}, commit {} at {}: will be fetched into {cache} on first use",
                info.commit, self.endpoint
            ),
            folder: None,
        })
    }

    /// Cached snapshot of the model, if it is complete.
    fn cached(&self, model: &HubModel) -> Option<PathBuf> {
        let commit = std::fs::read_to_string(self.reference(model));
        let commit = commit.unwrap_or_else(|_| model.revision().to_owned());
        let folder = self.snapshot(model, &FileName::new(commit.trim()).ok()?);
        files::is_complete(&folder).then_some(folder)
    }

    /// File with the commit of the model's revision in the cache.
    fn reference(&self, model: &HubModel) -> PathBuf {
        self.repository(model).join("refs").join(model.revision())
    }

    /// Path of a commit's snapshot in the cache.
    fn snapshot(&self, model: &HubModel, commit: &FileName) -> PathBuf {
        self.repository(model).join("snapshots").join(commit)
    }

    /// Folder of the model's repository in the cache.
    fn repository(&self, model: &HubModel) -> PathBuf {
        let name = model.repository().replace('/', "--");
        self.cache.join(format!("models--{name}"))
    }

    fn http_client(&self, read_timeout: Duration) -> HttpClient {
        HttpClient::new(self.endpoint.url.clone(), self.token.secret(), read_timeout)
    }

    /// Commit and files of the repository at the revision, requested once per process.
    fn info(&self, client: &HttpClient, model: &HubModel) -> Result<Repository, HubError> {
        let key = (self.endpoint.to_string(), model.to_string());
        let mut repositories = REPOSITORIES.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(info) = repositories.get(&key) {
            return Ok(info.clone());
        }
        let info = self.request_info(client, model)?;
        repositories.insert(key, info.clone());
        Ok(info)
    }

    fn request_info(&self, client: &HttpClient, model: &HubModel) -> Result<Repository, HubError> {
        let path = ["api", "models"].into_iter();
        let path = path.chain(model.repository().split('/'));
        let path: Vec<&str> = path.chain(["revision", model.revision()]).collect();
        let found = client.get(&path, None);
        let found = found.map_err(|error| self.classify(model, error))?;
        let mut body = Vec::new();
        let reader = found.response.into_reader();
        let read = reader.take(MAX_METADATA_BYTES).read_to_end(&mut body);
        read.map_err(|error| self.unreachable(model, error.to_string()))?;
        let failed = |reason: String| HubError::Failed {
            model: model.clone(),
            reason: format!("the metadata from {}: {reason}", self.endpoint),
        };
        let metadata: RepositoryMetadata =
            serde_json::from_slice(&body).map_err(|error| failed(error.to_string()))?;
        let sha = metadata.sha;
        let is_commit = !sha.is_empty() && sha.chars().all(|c| c.is_ascii_hexdigit());
        let commit = FileName::new(sha.clone()).ok().filter(|_| is_commit);
        let paths = metadata.siblings.into_iter().map(|file| file.rfilename);
        Ok(Repository {
            commit: commit.ok_or_else(|| failed(format!("it names {sha:?} as its commit")))?,
            files: files::in_root(&paths.collect::<Vec<_>>()).map_err(failed)?,
        })
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
    fn classify(&self, model: &HubModel, error: RequestFailure) -> HubError {
        let response = match error {
            RequestFailure::Status(response) => response,
            RequestFailure::Transport(reason) => return self.unreachable(model, reason),
            RequestFailure::Redirect(reason) => {
                return HubError::Failed {
                    model: model.clone(),
                    reason,
                };
            }
        };
        let (model, endpoint) = (model.clone(), self.endpoint.to_string());
        match (response.status(), response.header("x-error-code")) {
            (_, Some("RevisionNotFound")) => HubError::NoRevision { model, endpoint },
            (_, Some("RepoNotFound")) | (404, _) => HubError::NoRepository { model, endpoint },
            (status @ (401 | 403), _) => HubError::Gated {
                model,
                endpoint,
                status,
                token: self.token.no_access_reason(),
            },
            (status, _) => self.unreachable(&model, format!("{endpoint} answered {status}")),
        }
    }
}

/// URL of the Hub, shown without a slash at its end.
#[derive(Debug, Clone)]
struct Endpoint {
    url: Url,
}

impl Endpoint {
    /// Parses the value of `HF_ENDPOINT`.
    ///
    /// # Errors
    /// When it is no HTTP URL, or has a user name or password, which messages would show.
    fn parse(text: &str) -> Result<Self, HubError> {
        let refused = |reason: &str| HubError::Endpoint(reason.to_owned());
        let url = Url::parse(text.trim()).map_err(|error| refused(&error.to_string()))?;
        if !["http", "https"].contains(&url.scheme()) || url.host().is_none() {
            Err(refused("it is no http:// or https:// URL"))
        } else if !url.username().is_empty() || url.password().is_some() {
            Err(refused(
                "it has a user name or password; set HF_TOKEN instead",
            ))
        } else if url.query().is_some() || url.fragment().is_some() {
            Err(refused("it has a query or a fragment"))
        } else {
            Ok(Self { url })
        }
    }
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.url.as_str().trim_end_matches('/'))
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
    fn an_endpoint_is_a_url_without_secrets() {
        let endpoint = |text: &str| {
            let found = hub(&[("HOME", "/h"), ("HF_ENDPOINT", text)]);
            found.map(|hub| hub.endpoint.to_string())
        };
        for (text, shown) in [
            ("https://hub.example/", "https://hub.example"),
            (" http://[::1]:8080/mirror/ ", "http://[::1]:8080/mirror"),
            ("", "https://huggingface.co"),
        ] {
            assert_eq!(endpoint(text).unwrap(), shown);
        }
        for text in [
            "https://user:hf_secret@hub.example",
            "https://hf_secret@hub.example",
            "https://hub.example?token=hf_secret",
            "ftp://hf_secret.example",
            "hf_secret",
        ] {
            let refused = endpoint(text).unwrap_err().to_string();
            assert!(refused.contains("HF_ENDPOINT"), "{refused}");
            assert!(!refused.contains("hf_secret"), "{refused}");
        }
    }

    #[test]
    fn a_reference_that_is_no_commit_is_not_followed() {
        let cache = tempfile::tempdir().unwrap();
        let path = cache.path().display().to_string();
        let hub = hub(&[("HF_HUB_CACHE", &path)]).unwrap();
        let Ok(ModelSource::Hub(model)) = "hf:org/name".parse() else {
            panic!("it is a model of the hub");
        };
        let complete = |folder: &Path| {
            std::fs::create_dir_all(folder).unwrap();
            for file in ["config.json", "tokenizer.json", "model.safetensors"] {
                std::fs::write(folder.join(file), "").unwrap();
            }
        };
        let commit = FileName::new("0123").unwrap();
        complete(&hub.snapshot(&model, &commit));
        complete(&hub.repository(&model).join("elsewhere"));
        let reference = hub.reference(&model);
        std::fs::create_dir_all(reference.parent().unwrap()).unwrap();
        for (text, is_found) in [("0123\n", true), ("../elsewhere", false), ("", false)] {
            std::fs::write(&reference, text).unwrap();
            assert_eq!(hub.cached(&model).is_some(), is_found, "{text:?}");
        }
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
