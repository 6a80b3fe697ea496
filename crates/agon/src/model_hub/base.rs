//! The model that an adapter was trained on, wherever the adapter says that it is: a folder of this machine, or a model
//! of the hub.

use std::path::{Path, PathBuf};

use anyhow::Context;
use model::{
    BaseModel, DType, Device, LanguageModel, ModelError, ModelFolder, RewardFolder, open_policy,
};
use settings::ModelSource;

use super::{Look, folder, look};

/// A model's folder and, where it is an adapter's, the folder of its base.
pub(crate) struct Located {
    pub(crate) path: PathBuf,
    /// `None` too where an adapter names neither a folder nor a model of the hub: it is refused when it is opened.
    base: Option<PathBuf>,
}

impl Located {
    /// The model of `source`; it and its base are fetched first where they are the hub's. That may take a while: it ends
    /// early when `stopped` turns true.
    pub(crate) fn find(source: &ModelSource, stopped: &dyn Fn() -> bool) -> anyhow::Result<Self> {
        Self::at(folder(source, stopped)?, stopped)
    }

    /// As [`Self::find`], of the folder `path`.
    pub(crate) fn at(path: PathBuf, stopped: &dyn Fn() -> bool) -> anyhow::Result<Self> {
        let base = match base_of(&path)? {
            None => None,
            Some(source) => {
                let found = folder(&source, stopped);
                Some(found.with_context(|| of_adapter(&path))?)
            }
        };
        Ok(Self { path, base })
    }

    /// The adapter in the folder `path` beside the model in the folder `base`, whatever base it names.
    pub(crate) fn beside(path: PathBuf, base: PathBuf) -> Self {
        Self {
            path,
            base: Some(base),
        }
    }

    /// Reads it as a language model.
    pub(crate) fn policy(
        &self,
        chat_template: Option<&Path>,
        numbers: (DType, &Device),
    ) -> Result<(ModelFolder, LanguageModel), ModelError> {
        match &self.base {
            Some(base) => open_policy(base, Some(&self.path), chat_template, numbers),
            None => open_policy(&self.path, None, chat_template, numbers),
        }
    }

    /// Opens it as a reward model.
    pub(crate) fn reward(&self) -> Result<RewardFolder, ModelError> {
        RewardFolder::open_on(&self.path, self.base.as_deref(), None)
    }
}

/// Looks for the base of the adapter in the folder `path`, if it is one. A base of the hub that is not in the cache must
/// be there: the hub is asked, and nothing written.
pub(crate) fn look_for_base(path: PathBuf) -> anyhow::Result<Option<Located>> {
    let Some(source) = base_of(&path)? else {
        return Ok(Some(Located { path, base: None }));
    };
    let Look { folder, .. } = look(&source).with_context(|| of_adapter(&path))?;
    Ok(folder.map(|base| Located {
        path,
        base: Some(base),
    }))
}

/// Where the adapter in the folder `path` says that its base is. `None` where the folder holds no adapter, or the name
/// can be neither that of a folder nor of a model of the hub.
fn base_of(path: &Path) -> Result<Option<ModelSource>, ModelError> {
    let Some(named) = BaseModel::of_adapter(path)? else {
        return Ok(None);
    };
    Ok(match named.folder(path) {
        Some(folder) => Some(ModelSource::Folder(folder)),
        None => of_hub(&named),
    })
}

fn of_hub(base: &BaseModel) -> Option<ModelSource> {
    let revision = base.revision.as_deref().unwrap_or("main");
    format!("hf:{}@{revision}", base.name).parse().ok()
}

fn of_adapter(path: &Path) -> String {
    let path = path.display();
    format!("the base model of the adapter {path} is no folder of this machine")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_is_a_model_of_the_hub_where_its_name_can_be_one() {
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
            let found = of_hub(&named).map(|source| source.to_string());
            assert_eq!(found.as_deref(), source, "{named:?}");
        }
    }
}
