//! Result of looking a model up.

use std::path::PathBuf;

/// Facts about a model that are known without downloading it.
pub struct ModelLookup {
    /// Folder of the model; `None` if it is not downloaded yet.
    pub folder: Option<PathBuf>,
    /// Path of the model, or its commit and cache, as text for users.
    pub origin: String,
}
