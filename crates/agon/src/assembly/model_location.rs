//! Location of a model's files, and for an adapter also of its base model's: a local folder or a model of the Hub.

use std::path::{Path, PathBuf};

use anyhow::Context;
use hub::{CancelToken, ModelLookup};
use model::{
    BaseModel, DType, Device, LanguageModel, ModelError, ModelFolder, RewardFolder, open_policy,
};
use settings::ModelSource;

/// The folder of a model and, for an adapter, the folder of its base model.
pub(crate) struct ModelLocation {
    /// The model's folder.
    pub(crate) path: PathBuf,
    /// Also `None` for an adapter whose base is neither a folder nor a model of the Hub; opening it fails.
    base: Option<PathBuf>,
}

impl ModelLocation {
    /// Location of `source`; the model and its base are downloaded first if they are on the Hub. Blocks; ends early
    /// once `cancel` is cancelled.
    pub(crate) fn resolve(source: &ModelSource, cancel: &CancelToken) -> anyhow::Result<Self> {
        Self::of_folder(hub::folder(source, cancel)?, cancel)
    }

    /// As [`Self::resolve`], for the folder `path`.
    pub(crate) fn of_folder(path: PathBuf, cancel: &CancelToken) -> anyhow::Result<Self> {
        let base = match base_source(&path)? {
            None => None,
            Some(source) => {
                let found = hub::folder(&source, cancel);
                Some(found.with_context(|| missing_base(&path))?)
            }
        };
        Ok(Self { path, base })
    }

    /// As [`Self::of_folder`], without a download. `None` if the base is on the Hub and not cached; then it must
    /// exist there: metadata is requested, nothing is written.
    pub(crate) fn if_cached(path: PathBuf) -> anyhow::Result<Option<Self>> {
        let Some(source) = base_source(&path)? else {
            return Ok(Some(Self { path, base: None }));
        };
        let found = hub::locate(&source);
        let ModelLookup { folder, .. } = found.with_context(|| missing_base(&path))?;
        Ok(folder.map(|base| Self::with_base(path, base)))
    }

    /// The adapter in the folder `path` on the model in the folder `base`, whatever base the adapter names.
    pub(crate) fn with_base(path: PathBuf, base: PathBuf) -> Self {
        Self {
            path,
            base: Some(base),
        }
    }

    /// Reads the model as a language model.
    pub(crate) fn policy(
        &self,
        chat_template: Option<&Path>,
        dtype: DType,
        device: &Device,
    ) -> Result<(ModelFolder, LanguageModel), ModelError> {
        match &self.base {
            Some(base) => open_policy(base, Some(&self.path), chat_template, dtype, device),
            None => open_policy(&self.path, None, chat_template, dtype, device),
        }
    }

    /// Opens the folder as a reward model; weights are not read.
    pub(crate) fn reward(&self) -> Result<RewardFolder, ModelError> {
        RewardFolder::open_with_base(&self.path, self.base.as_deref(), None)
    }
}

/// Source of the base model that the adapter in the folder `path` names. `None` if the folder holds no adapter, or the
/// name is neither a folder nor valid on the Hub.
fn base_source(path: &Path) -> Result<Option<ModelSource>, ModelError> {
    let Some(named) = BaseModel::of_adapter(path)? else {
        return Ok(None);
    };
    Ok(match named.folder(path) {
        Some(folder) => Some(ModelSource::Folder(folder)),
        None => hub_source(&named),
    })
}

fn hub_source(base: &BaseModel) -> Option<ModelSource> {
    let revision = base.revision.as_deref().unwrap_or("main");
    format!("hf:{}@{revision}", base.name).parse().ok()
}

fn missing_base(path: &Path) -> String {
    let path = path.display();
    format!("the base model of the adapter {path} is not a local folder")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn valid_repository_names_are_hub_sources() {
        let base = |name: &str, revision: Option<&str>| BaseModel {
            name: name.into(),
            revision: revision.map(str::to_owned),
        };
        for (named, source) in [
            (base("org/tiny", None), Some("hf:org/tiny@main")),
            (base("org/tiny", Some("v1")), Some("hf:org/tiny@v1")),
            (base("../random-llama3", None), None),
            (base("/models/base", None), None),
            (base("gpt2", None), None),
            (base("", None), None),
        ] {
            let found = hub_source(&named).map(|source| source.to_string());
            assert_eq!(found.as_deref(), source, "{named:?}");
        }
    }
}
