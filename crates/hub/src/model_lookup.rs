//! Result of looking a model up.

use std::path::PathBuf;

use model::GgufModel;

/// Facts about a model that are known without downloading it.
pub struct ModelLookup {
    /// Folder of the model; `None` if it is not downloaded or unpacked yet.
    pub folder: Option<PathBuf>,
    /// The GGUF file, if the model is in one that is not unpacked yet.
    pub gguf: Option<GgufModel>,
    /// Path of the model, or its commit and cache, as text for users.
    pub origin: String,
}
