//! Name of the model that an adapter was trained on: a model of the Hugging Face hub with its revision, or a path.
//!
//! PEFT keeps both in `adapter_config.json`. A folder of the hub's cache is named after its repository and commit, so
//! that an adapter means the same model on every machine. Nothing is fetched here.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::folder::CONFIG;
use crate::{ModelError, config::read_json};

/// PEFT's key of the name.
pub(super) const NAME: &str = "base_model_name_or_path";
/// PEFT's key of the hub's revision.
const REVISION: &str = "revision";
/// Hexadecimal digits of a commit.
const COMMIT_DIGITS: usize = 40;

/// Name of the model that an adapter was trained on.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct BaseModel {
    /// Path of a folder, or `ORG/NAME` of the hub; empty when it is unknown.
    pub name: String,
    /// Branch, tag or commit on the hub.
    pub revision: Option<String>,
}

impl BaseModel {
    /// Name of the model in the folder `path`: repository and commit where it lies in a cache of the hub
    /// (`models--ORG--NAME/snapshots/COMMIT`), else the absolute path.
    #[must_use]
    pub fn of_folder(path: &Path) -> Self {
        let whole = path.canonicalize();
        let whole = whole.as_deref().unwrap_or(path);
        of_snapshot(whole).unwrap_or_else(|| Self {
            name: whole.display().to_string(),
            revision: None,
        })
    }

    /// Name that the adapter in the folder `path` gives, whatever kind of adapter it is; `None` where the folder
    /// holds no adapter.
    ///
    /// # Errors
    /// When `adapter_config.json` is there and cannot be read.
    pub fn of_adapter(path: &Path) -> Result<Option<Self>, ModelError> {
        let file = path.join(CONFIG);
        match file.exists() {
            true => Ok(Some(Self::read(&read_json(&file)?))),
            false => Ok(None),
        }
    }

    /// Folder on this machine that the adapter in the folder `adapter` names: a path as it is, or one relative to the
    /// adapter.
    #[must_use]
    pub fn folder(&self, adapter: &Path) -> Option<PathBuf> {
        let named = Path::new(&self.name);
        let candidates = [named.to_owned(), adapter.join(named)];
        let is_model = |path: &PathBuf| path.join("config.json").exists();
        candidates
            .into_iter()
            .find(|path| !self.name.is_empty() && is_model(path))
    }

    pub(super) fn read(raw: &Value) -> Self {
        let text = |key: &str| raw.get(key).and_then(Value::as_str);
        Self {
            name: text(NAME).unwrap_or_default().to_owned(),
            revision: text(REVISION).map(str::to_owned),
        }
    }

    /// PEFT's keys with their values.
    pub(super) fn keys(&self) -> [(&'static str, Value); 2] {
        [(NAME, json!(self.name)), (REVISION, json!(self.revision))]
    }
}

/// Repository and commit of a folder that is laid out as the hub's cache.
fn of_snapshot(path: &Path) -> Option<BaseModel> {
    let name = |path: &Path| path.file_name()?.to_str().map(str::to_owned);
    let commit = name(path)?;
    let snapshots = path.parent()?;
    let repository = name(snapshots.parent()?)?;
    let repository = repository.strip_prefix("models--")?.replacen("--", "/", 1);
    let is_commit =
        commit.len() == COMMIT_DIGITS && commit.bytes().all(|byte| byte.is_ascii_hexdigit());
    (name(snapshots)? == "snapshots" && is_commit).then_some(BaseModel {
        name: repository,
        revision: Some(commit),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_of_the_hubs_cache_is_named_after_repository_and_commit() {
        let place = tempfile::tempdir().unwrap();
        let commit = "0123456789abcdef0123456789abcdef01234567";
        let folder = |path: &str| {
            let folder = place.path().join(path);
            std::fs::create_dir_all(&folder).unwrap();
            folder.canonicalize().unwrap()
        };
        for (repository, name) in [
            ("models--org--tiny-2", "org/tiny-2"),
            ("models--tiny", "tiny"),
        ] {
            let snapshot = folder(&format!("hub/{repository}/snapshots/{commit}"));
            let expected = BaseModel {
                name: name.into(),
                revision: Some(commit.into()),
            };
            assert_eq!(BaseModel::of_folder(&snapshot), expected);
        }
        let others = [
            "models/base".to_owned(),
            format!("hub/datasets--org--tiny/snapshots/{commit}"),
            format!("hub/models--org--tiny/refs/{commit}"),
            "hub/models--org--tiny/snapshots/main".to_owned(),
        ];
        for path in others.map(|path| folder(&path)) {
            let name = path.display().to_string();
            let expected = BaseModel {
                name,
                revision: None,
            };
            assert_eq!(BaseModel::of_folder(&path), expected);
        }
        // However the folder is reached.
        #[cfg(unix)]
        {
            let link = place.path().join("link");
            let snapshot = folder(&format!("hub/models--org--tiny/snapshots/{commit}"));
            std::os::unix::fs::symlink(snapshot, &link).unwrap();
            assert_eq!(BaseModel::of_folder(&link).name, "org/tiny");
        }
    }

    #[test]
    fn the_name_in_an_adapter_is_read_whatever_else_stands_there() {
        let place = tempfile::tempdir().unwrap();
        assert_eq!(BaseModel::of_adapter(place.path()).unwrap(), None);
        let named = |raw: Value| {
            std::fs::write(place.path().join(CONFIG), raw.to_string()).unwrap();
            BaseModel::of_adapter(place.path()).unwrap().unwrap()
        };
        let unknown = named(json!({"peft_type": "IA3", NAME: null, REVISION: null}));
        assert_eq!(unknown, BaseModel::default());
        assert_eq!(unknown.folder(place.path()), None);
        let hub = named(json!({NAME: "org/tiny", REVISION: "v1"}));
        assert_eq!(
            (&*hub.name, hub.revision.as_deref()),
            ("org/tiny", Some("v1"))
        );
        assert_eq!(hub.folder(place.path()), None);
        // A folder beside the adapter goes first.
        let beside = place.path().join("org/tiny");
        std::fs::create_dir_all(&beside).unwrap();
        std::fs::write(beside.join("config.json"), "{}").unwrap();
        assert_eq!(hub.folder(place.path()), Some(beside));
    }
}
