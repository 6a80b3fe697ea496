//! Models of the Hugging Face hub: found in the hub's cache, or fetched into it.
//!
//! The cache is the one that all programs share, laid out as Python's `huggingface_hub` does. The hub is asked once
//! a process which commit a revision is; where it cannot be reached, what the cache has under that name is taken as it is,
//! which is said. All files of a model are of one commit. What a model is good for, this part does not know.

mod base;
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

pub(crate) use base::{Located, look_for_base};
pub(crate) use error::HubError;
use token::Token;

/// What hubs answered this process, by endpoint and model: what was checked before a run is what the run fetches,
/// and a hub is asked once.
static ANSWERS: Mutex<BTreeMap<(String, String), RepoInfo>> = Mutex::new(BTreeMap::new());

/// How long the hub may take to say what a repository holds.
const TO_ANSWER: Duration = Duration::from_secs(30);

/// The folder of a model, fetched first where it is the hub's. That may take a while: it ends early when `stopped`
/// turns true.
pub(crate) fn folder(
    source: &ModelSource,
    stopped: &dyn Fn() -> bool,
) -> Result<PathBuf, HubError> {
    match source {
        ModelSource::Folder(path) => Ok(path.clone()),
        ModelSource::Hub(model) => Hub::from_environment()?.folder(model, stopped),
    }
}

/// The folder of a model as far as this machine has it: nobody is asked.
pub(crate) fn folder_here(source: &ModelSource) -> Option<PathBuf> {
    match source {
        ModelSource::Folder(path) => Some(path.clone()),
        ModelSource::Hub(model) => Hub::from_environment().ok()?.cached(model),
    }
}

/// What can be known of a model without fetching it.
pub(crate) struct Look {
    /// Its folder, where it is here.
    pub(crate) folder: Option<PathBuf>,
    /// Where it comes from, in words.
    pub(crate) origin: String,
}

/// Looks for a model. One of the hub that is not in the cache must be there: the hub is asked, and nothing written.
pub(crate) fn look(source: &ModelSource) -> Result<Look, HubError> {
    match source {
        ModelSource::Folder(path) => Ok(Look {
            folder: Some(path.clone()),
            origin: path.display().to_string(),
        }),
        ModelSource::Hub(model) => Hub::from_environment()?.look(model),
    }
}

/// Which hub models come from, and where they are kept, in words.
pub(crate) fn describe() -> Result<String, HubError> {
    Ok(Hub::from_environment()?.to_string())
}

/// The hub, as the environment names it.
#[derive(Clone)]
struct Hub {
    endpoint: String,
    cache: PathBuf,
    /// Shown to the hub and to nobody else.
    token: Token,
    is_offline: bool,
}

impl Hub {
    fn from_environment() -> Result<Self, HubError> {
        Self::from_variables(|name| std::env::var(name).ok())
    }

    /// The hub of these variables, an empty one being none.
    fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Self, HubError> {
        let variable = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
        let folder = |name: &str| variable(name).map(|path| without_tilde(&path, variable));
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
            // Links in the cache lead from one absolute path to another.
            cache: std::path::absolute(&cache).unwrap_or(cache),
            token,
            is_offline: is_true(&offline),
        })
    }

    fn folder(&self, model: &HubModel, stopped: &dyn Fn() -> bool) -> Result<PathBuf, HubError> {
        let fetched = match self.is_offline {
            true => Err(self.offline(model)),
            false => fetch::fetch(self, model, stopped),
        };
        let folder = match (fetched, self.cached(model)) {
            (Err(HubError::Unreachable { .. }), Some(folder)) if self.is_offline => folder,
            (Err(HubError::Unreachable { reason, .. }), Some(folder)) => {
                tracing::warn!(%model, reason, "the hub cannot be reached: the model is taken from its cache");
                folder
            }
            (fetched, _) => fetched?,
        };
        tracing::info!(%model, commit = commit_of(&folder), "the model is in the hub's cache");
        Ok(folder)
    }

    fn look(&self, model: &HubModel) -> Result<Look, HubError> {
        let cache = self.cache.display();
        if let Some(folder) = self.cached(model) {
            let commit = commit_of(&folder);
            return Ok(Look {
                origin: format!("{model}, commit {commit} in the cache {cache}"),
                folder: Some(folder),
            });
        }
        if self.is_offline {
            return Err(self.offline(model));
        }
        let info = self.info(&self.api(model)?, model)?;
        files::wanted(
            model,
            &files::names(&info),
            &self.snapshot(model, &info.sha),
        )?;
        Ok(Look {
            origin: format!(
                "{model}, commit {} at {}: fetched into {cache} when it is first needed",
                info.sha, self.endpoint
            ),
            folder: None,
        })
    }

    /// The model's folder in the cache, if all its files are there.
    fn cached(&self, model: &HubModel) -> Option<PathBuf> {
        let named = self.repository(model).join("refs").join(model.revision());
        let commit = std::fs::read_to_string(named);
        let commit = commit.unwrap_or_else(|_| model.revision().to_owned());
        let folder = self.snapshot(model, commit.trim());
        files::is_whole(&folder).then_some(folder)
    }

    /// Where a commit of the model lies in the cache.
    fn snapshot(&self, model: &HubModel, commit: &str) -> PathBuf {
        self.repository(model).join("snapshots").join(commit)
    }

    fn repository(&self, model: &HubModel) -> PathBuf {
        self.cache.join(at(model, model.revision()).folder_name())
    }

    fn api(&self, model: &HubModel) -> Result<Api, HubError> {
        ApiBuilder::from_cache(Cache::new(self.cache.clone()))
            .with_endpoint(self.endpoint.clone())
            .with_token(self.token.secret())
            .with_retries(3)
            .with_user_agent("agon", env!("CARGO_PKG_VERSION"))
            .build()
            .map_err(|error| self.refused(model, error))
    }

    /// What the repository holds at the revision, as it was when this process first asked.
    fn info(&self, api: &Api, model: &HubModel) -> Result<RepoInfo, HubError> {
        let key = (self.endpoint.clone(), model.to_string());
        let mut answers = ANSWERS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(info) = answers.get(&key) {
            return Ok(info.clone());
        }
        let info = self.ask(api, model)?;
        answers.insert(key, info.clone());
        Ok(info)
    }

    fn ask(&self, api: &Api, model: &HubModel) -> Result<RepoInfo, HubError> {
        let asked = api.repo(at(model, model.revision())).info_request();
        let answer = asked.timeout(TO_ANSWER).call();
        let answer = answer.map_err(|error| self.refused(model, Box::new(error).into()))?;
        let info = answer.into_json::<RepoInfo>();
        let info = info.map_err(|error| self.refused(model, error.into()))?;
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

    /// What an error of the client means.
    fn refused(&self, model: &HubModel, error: ApiError) -> HubError {
        let error = match error {
            ApiError::TooManyRetries(error) => return self.refused(model, *error),
            ApiError::RequestError(error) => error,
            other => {
                return HubError::Failed {
                    model: model.clone(),
                    reason: other.to_string(),
                };
            }
        };
        let said = error.to_string();
        let Some(answer) = error.into_response() else {
            return self.unreachable(model, said);
        };
        let (model, endpoint) = (model.clone(), self.endpoint.clone());
        match (answer.status(), answer.header("x-error-code")) {
            (_, Some("RevisionNotFound")) => HubError::NoRevision { model, endpoint },
            (_, Some("RepoNotFound")) | (404, _) => HubError::NoRepository { model, endpoint },
            (status @ (401 | 403), _) => HubError::Gated {
                model,
                endpoint,
                status,
                token: self.token.lacks_access(),
            },
            _ => self.unreachable(&model, said),
        }
    }
}

impl std::fmt::Display for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (endpoint, cache, token) = (&self.endpoint, self.cache.display(), &self.token);
        write!(f, "{endpoint}, cache {cache}, {token}")?;
        match self.is_offline {
            true => write!(f, "; not asked: HF_HUB_OFFLINE is set"),
            false => Ok(()),
        }
    }
}

/// Whether a variable of Hugging Face is on.
fn is_true(value: &str) -> bool {
    ["1", "ON", "YES", "TRUE"].contains(&value.to_uppercase().as_str())
}

/// The path that a variable names, `~` at its beginning being `HOME`.
fn without_tilde(path: &str, variable: impl Fn(&str) -> Option<String>) -> PathBuf {
    let below = path
        .strip_prefix('~')
        .filter(|rest| rest.is_empty() || rest.starts_with('/'));
    match below.zip(variable("HOME")) {
        Some((rest, home)) => PathBuf::from(home + rest),
        None => PathBuf::from(path),
    }
}

/// The model's repository at this revision, as the client calls it.
fn at(model: &HubModel, revision: &str) -> Repo {
    let repository = model.repository().to_owned();
    Repo::with_revision(repository, RepoType::Model, revision.to_owned())
}

/// The commit of a folder of the cache: its name.
fn commit_of(folder: &Path) -> &str {
    let name = folder.file_name().and_then(|name| name.to_str());
    name.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(variables: &[(&str, &str)]) -> Result<Hub, HubError> {
        Hub::from_variables(|name| {
            let found = variables.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn the_cache_is_where_the_variables_say() {
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
    fn nothing_that_is_told_holds_the_token() {
        let base = [
            ("HOME", "/h"),
            ("HF_ENDPOINT", "http://hub/"),
            ("HF_HUB_OFFLINE", "1"),
        ];
        let told = |token: &str| {
            let variables = [&base[..], &[("HF_TOKEN", token)]].concat();
            match hub(&variables) {
                Ok(hub) => hub.to_string(),
                Err(error) => error.to_string(),
            }
        };
        let offline = "; not asked: HF_HUB_OFFLINE is set";
        let home = "/h/.cache/huggingface";
        let of = |token: &str| format!("http://hub, cache {home}/hub, {token}{offline}");
        assert_eq!(told("hf_secret\n"), of("the token is that of HF_TOKEN"));
        let none = format!("HF_TOKEN is not set and {home}/token does not exist or is empty");
        assert_eq!(told(""), of(&none));
        let broken = told("hf_sec\nret");
        assert!(
            broken.contains("HF_TOKEN") && !broken.contains("sec"),
            "{broken}"
        );
    }
}
