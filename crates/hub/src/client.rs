//! Client of the Hub: its configuration, metadata of repositories, and places in the cache. Does not download.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Read,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use messages::FileName;
use serde::Deserialize;
use settings::HubModel;

use crate::{
    endpoint::HubEndpoint,
    environment::{caches, expand_tilde, is_true},
    error::HubError,
    files,
    http::{HttpClient, RequestFailure},
    model_lookup::ModelLookup,
    token::Token,
};

/// Repository metadata received by this process, by endpoint and model: each is requested once, and a run downloads
/// the commit that was checked before it.
static REPOSITORIES: Mutex<BTreeMap<(String, String), Repository>> = Mutex::new(BTreeMap::new());

/// Timeout of a request for the metadata of a repository.
const METADATA_TIMEOUT: Duration = Duration::from_secs(30);
/// Largest metadata of a repository, in bytes.
const MAX_METADATA_BYTES: u64 = 1 << 25;

/// Commit of a repository's revision, and the files directly in it.
#[derive(Debug, Clone)]
pub(crate) struct Repository {
    pub(crate) commit: FileName,
    pub(crate) files: BTreeSet<FileName>,
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
pub(crate) struct HubClient {
    /// URL of the Hub without a slash at its end.
    pub(crate) endpoint: HubEndpoint,
    pub(crate) cache: PathBuf,
    /// Sent to the endpoint only; never logged.
    pub(crate) token: Token,
    pub(crate) is_offline: bool,
}

impl HubClient {
    pub(crate) fn from_environment() -> Result<Self, HubError> {
        Self::from_variables(|name| std::env::var(name).ok())
    }

    /// Configuration from these variables; an empty one counts as unset.
    pub(crate) fn from_variables(
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, HubError> {
        let variable = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
        let folder = |name: &str| variable(name).map(|path| expand_tilde(&path, variable));
        let home = folder("HF_HOME").or_else(|| Some(caches(variable)?.join("huggingface")));
        let cache = folder("HF_HUB_CACHE").or_else(|| Some(home.as_ref()?.join("hub")));
        let cache = cache.ok_or(HubError::NoCache)?;
        let token = Token::find(variable, home.as_deref().unwrap_or(Path::new("")))?;
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        let endpoint = HubEndpoint::parse(&endpoint)?;
        let offline = variable("HF_HUB_OFFLINE").unwrap_or_default();
        Ok(Self {
            endpoint,
            // Symbolic links in the cache join absolute paths.
            cache: std::path::absolute(&cache).unwrap_or(cache),
            token,
            is_offline: is_true(&offline),
        })
    }

    pub(crate) fn locate(&self, model: &HubModel) -> Result<ModelLookup, HubError> {
        let cache = self.cache.display();
        if let Some(folder) = self.cached(model) {
            let commit = commit_of(&folder);
            return Ok(ModelLookup {
                gguf: None,
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
            gguf: None,
            origin: format!(
                "{model}, commit {} at {}: will be fetched into {cache} on first use",
                info.commit, self.endpoint
            ),
            folder: None,
        })
    }

    /// Cached snapshot of the model, if it is complete.
    pub(crate) fn cached(&self, model: &HubModel) -> Option<PathBuf> {
        let commit = std::fs::read_to_string(self.reference(model));
        let commit = commit.unwrap_or_else(|_| model.revision().to_owned());
        let folder = self.snapshot(model, &FileName::new(commit.trim()).ok()?);
        files::is_complete(&folder).then_some(folder)
    }

    /// File with the commit of the model's revision in the cache.
    pub(crate) fn reference(&self, model: &HubModel) -> PathBuf {
        self.repository(model).join("refs").join(model.revision())
    }

    /// Path of a commit's snapshot in the cache.
    pub(crate) fn snapshot(&self, model: &HubModel, commit: &FileName) -> PathBuf {
        self.repository(model).join("snapshots").join(commit)
    }

    /// Folder of the model's repository in the cache.
    pub(crate) fn repository(&self, model: &HubModel) -> PathBuf {
        let name = model.repository().replace('/', "--");
        self.cache.join(format!("models--{name}"))
    }

    pub(crate) fn http_client(&self, read_timeout: Duration) -> HttpClient {
        HttpClient::new(self.endpoint.url.clone(), self.token.secret(), read_timeout)
    }

    /// Commit and files of the repository at the revision, requested once per process.
    pub(crate) fn info(
        &self,
        client: &HttpClient,
        model: &HubModel,
    ) -> Result<Repository, HubError> {
        let key = (self.endpoint.to_string(), model.to_string());
        let mut repositories = REPOSITORIES.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(info) = repositories.get(&key) {
            return Ok(info.clone());
        }
        let info = self.request_info(client, model)?;
        repositories.insert(key, info.clone());
        Ok(info)
    }

    pub(crate) fn request_info(
        &self,
        client: &HttpClient,
        model: &HubModel,
    ) -> Result<Repository, HubError> {
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

    pub(crate) fn offline(&self, model: &HubModel) -> HubError {
        self.unreachable(model, "HF_HUB_OFFLINE is set".into())
    }

    pub(crate) fn unreachable(&self, model: &HubModel, reason: String) -> HubError {
        HubError::Unreachable {
            model: model.clone(),
            cache: self.cache.clone(),
            reason,
        }
    }

    /// Maps an error of the HTTP client to the cause that the user can act on.
    pub(crate) fn classify(&self, model: &HubModel, error: RequestFailure) -> HubError {
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

/// Commit of a cached snapshot: the name of its folder.
pub(crate) fn commit_of(folder: &Path) -> &str {
    let name = folder.file_name().and_then(|name| name.to_str());
    name.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use settings::ModelSource;

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
