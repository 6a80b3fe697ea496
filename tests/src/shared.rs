//! Real models and data, which lie beside the repository and not in it.

use std::{env, path::PathBuf};

use crate::workspace_root;

/// The file or folder `path` of the shared data, `$AGON_SHARED` or `../shared` beside the repository.
/// `None` when it is not there: the test named `test` is skipped, aloud.
///
/// # Panics
/// When it is not there and `CI=true`: there, a skip is a failure.
pub fn shared(test: &str, path: &str) -> Option<PathBuf> {
    let root = env::var_os("AGON_SHARED")
        .map_or_else(|| workspace_root().join("../shared"), PathBuf::from);
    let found = root.join(path);
    if found.exists() {
        return Some(found);
    }
    let skipped = format!(
        "SKIPPED {test}: {} is not there; see AGON_SHARED",
        found.display()
    );
    assert!(env::var("CI").as_deref() != Ok("true"), "{skipped}");
    eprintln!("{skipped}");
    None
}
