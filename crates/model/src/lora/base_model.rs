//! Name of an adapter's base model: a Hugging Face Hub repository with its revision, or a path.
//!
//! PEFT stores both in `adapter_config.json`. A folder of the Hub's cache is named by its repository and commit, so
//! that the name refers to the same model on every machine. An adapter in the Hub's cache can name a repository only: a
//! path in it would be one of its author's machine. Nothing is downloaded here.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::lora::folder::CONFIG;
use crate::{
    config::read_json,
    error::ModelError,
    gguf::{is_gguf, origin_of},
};

/// PEFT's key of the name.
pub(super) const NAME: &str = "base_model_name_or_path";
/// PEFT's key of the Hub revision.
const REVISION: &str = "revision";
/// Number of hexadecimal digits of a commit.
const COMMIT_DIGITS: usize = 40;

/// Name of the model that an adapter was trained on.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct BaseModel {
    /// Path of a folder, or `ORG/NAME` on the Hub; empty when unknown.
    pub name: String,
    /// Branch, tag or commit on the Hub.
    pub revision: Option<String>,
}

impl BaseModel {
    /// Name of the model in the folder `path`: repository and commit for a folder in the Hub's cache
    /// (`models--ORG--NAME/snapshots/COMMIT`), the GGUF file for a folder that was unpacked from one, otherwise the
    /// absolute path.
    #[must_use]
    pub fn of_folder(path: &Path) -> Self {
        let absolute = path.canonicalize();
        let absolute = absolute.as_deref().unwrap_or(path);
        of_snapshot(absolute).unwrap_or_else(|| Self {
            name: origin_of(absolute)
                .as_deref()
                .unwrap_or(absolute)
                .display()
                .to_string(),
            revision: None,
        })
    }

    /// Base model named by the adapter in the folder `path`, of any kind of adapter; `None` when the folder holds no
    /// adapter.
    ///
    /// # Errors
    /// When `adapter_config.json` exists and cannot be read.
    pub fn of_adapter(path: &Path) -> Result<Option<Self>, ModelError> {
        let file = path.join(CONFIG);
        match file.exists() {
            true => Ok(Some(Self::read(&read_json(&file)?))),
            false => Ok(None),
        }
    }

    /// Local folder, or GGUF file, of the base model: the name as a path, or as a path relative to the folder `adapter`. `None` when
    /// there is none, or the adapter is in the Hub's cache.
    #[must_use]
    pub fn folder(&self, adapter: &Path) -> Option<PathBuf> {
        if Self::of_folder(adapter).revision.is_some() {
            return None;
        }
        let named = Path::new(&self.name);
        let candidates = [named.to_owned(), adapter.join(named)];
        let is_model =
            |path: &PathBuf| path.join("config.json").exists() || is_gguf(path) && path.exists();
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

/// Repository and commit of a folder in the layout of the Hub's cache.
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
    fn a_folder_of_the_hub_cache_is_named_by_repository_and_commit() {
        let directory = tempfile::tempdir().unwrap();
        let commit = "0123456789abcdef0123456789abcdef01234567";
        let folder = |path: &str| {
            let folder = directory.path().join(path);
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
        // Symbolic links are resolved.
        #[cfg(unix)]
        {
            let link = directory.path().join("link");
            let snapshot = folder(&format!("hub/models--org--tiny/snapshots/{commit}"));
            std::os::unix::fs::symlink(snapshot, &link).unwrap();
            assert_eq!(BaseModel::of_folder(&link).name, "org/tiny");
        }
    }

    #[test]
    fn the_base_name_is_read_from_any_kind_of_adapter() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(BaseModel::of_adapter(directory.path()).unwrap(), None);
        let named = |raw: Value| {
            std::fs::write(directory.path().join(CONFIG), raw.to_string()).unwrap();
            BaseModel::of_adapter(directory.path()).unwrap().unwrap()
        };
        let unknown = named(json!({"peft_type": "IA3", NAME: null, REVISION: null}));
        assert_eq!(unknown, BaseModel::default());
        assert_eq!(unknown.folder(directory.path()), None);
        let hub = named(json!({NAME: "org/tiny", REVISION: "v1"}));
        assert_eq!(
            (&*hub.name, hub.revision.as_deref()),
            ("org/tiny", Some("v1"))
        );
        assert_eq!(hub.folder(directory.path()), None);
        // What came from the Hub names no folder of this machine.
        let commit = "0123456789abcdef0123456789abcdef01234567";
        let snapshot = directory
            .path()
            .join("models--org--adapter/snapshots")
            .join(commit);
        std::fs::create_dir_all(&snapshot).unwrap();
        let absolute = directory.path().display().to_string();
        std::fs::write(directory.path().join("config.json"), "{}").unwrap();
        let path = named(json!({NAME: absolute}));
        assert_eq!(path.folder(&snapshot), None);
        assert!(path.folder(directory.path()).is_some());
        // A folder relative to the adapter takes precedence over the Hub.
        let beside = directory.path().join("org/tiny");
        std::fs::create_dir_all(&beside).unwrap();
        std::fs::write(beside.join("config.json"), "{}").unwrap();
        assert_eq!(hub.folder(directory.path()), Some(beside));
    }
}
