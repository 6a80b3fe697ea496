//! Result of looking a model up.

use std::path::PathBuf;

/// Facts about a model that are known without downloading it.
pub struct ModelLookup {
    /// Its folder; `None` if it is not downloaded yet.
    pub folder: Option<PathBuf>,
    /// Its path, or its commit and cache, as text for users.
    pub origin: String,
}
