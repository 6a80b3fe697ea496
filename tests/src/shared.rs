//! Shared models and data, which are kept outside the repository.

use std::{env, path::PathBuf};

use crate::workspace_root;

/// A file or folder of the shared data, in `$AGON_SHARED` or `../shared`. If it does not exist, logs that the test
/// named `test` is skipped and returns `None`.
///
/// # Panics
/// If it does not exist and `CI=true`: a skip is a failure in CI.
pub fn shared(test: &str, path: &str) -> Option<PathBuf> {
    let root = env::var_os("AGON_SHARED")
        .map_or_else(|| workspace_root().join("../shared"), PathBuf::from);
    let found = root.join(path);
    if found.exists() {
        return Some(found);
    }
    let message = format!(
        "SKIPPED {test}: {} does not exist; see AGON_SHARED",
        found.display()
    );
    assert!(env::var("CI").as_deref() != Ok("true"), "{message}");
    eprintln!("{message}");
    None
}
