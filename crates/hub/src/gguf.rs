//! Models in GGUF files: each is unpacked into a folder of Agon's own cache, once.

use std::path::{Path, PathBuf};

use model::GgufModel;

use crate::{environment::caches, error::HubError, model_lookup::ModelLookup};

/// Folder of Agon's cache for unpacked files.
const FOLDER: &str = "agon/gguf";

/// The folder of the model in the file at `path`, unpacked first if it is not there.
pub(crate) fn folder(path: &Path) -> Result<PathBuf, HubError> {
    let model = GgufModel::open(path)?;
    let folder = place(&model)?;
    if !model.is_unpacked_in(&folder) {
        tracing::info!(file = %path.display(), folder = %folder.display(), "unpacking a GGUF file");
        model.unpack(&folder)?;
    }
    Ok(folder)
}

/// The folder of the model in the file at `path`, if it was unpacked.
pub(crate) fn cached(path: &Path) -> Option<PathBuf> {
    let model = GgufModel::open(path).ok()?;
    let folder = place(&model).ok()?;
    model.is_unpacked_in(&folder).then_some(folder)
}

/// Facts about the model in the file at `path` that are known without unpacking it.
pub(crate) fn locate(path: &Path) -> Result<ModelLookup, HubError> {
    let model = GgufModel::open(path)?;
    let folder = place(&model)?;
    let path = path.display();
    Ok(match model.is_unpacked_in(&folder) {
        true => ModelLookup {
            origin: format!("{path}, unpacked in {}", folder.display()),
            folder: Some(folder),
            gguf: None,
        },
        false => ModelLookup {
            origin: format!(
                "{path}: will be unpacked into {} on first use",
                folder.display()
            ),
            folder: None,
            gguf: Some(model),
        },
    })
}

fn place(model: &GgufModel) -> Result<PathBuf, HubError> {
    let cache = caches(|name| std::env::var(name).ok()).ok_or(HubError::NoGgufCache)?;
    Ok(cache.join(FOLDER).join(model.folder_name()))
}
