//! Environment variables of `huggingface_hub`.

use std::path::{Path, PathBuf};

/// The user's folder of caches, by environment variables.
pub(crate) fn caches(variable: impl Fn(&str) -> Option<String>) -> Option<PathBuf> {
    let variable = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
    let named = variable("XDG_CACHE_HOME").map(|path| expand_tilde(&path, variable));
    named.or_else(|| Some(Path::new(&variable("HOME")?).join(".cache")))
}
/// Whether the value of a boolean variable of `huggingface_hub` is true.
pub(crate) fn is_true(value: &str) -> bool {
    ["1", "ON", "YES", "TRUE"].contains(&value.to_uppercase().as_str())
}

/// Path in a variable, with a leading `~` expanded to `HOME`.
pub(crate) fn expand_tilde(path: &str, variable: impl Fn(&str) -> Option<String>) -> PathBuf {
    let relative = path
        .strip_prefix('~')
        .filter(|rest| rest.is_empty() || rest.starts_with('/'));
    match relative.zip(variable("HOME")) {
        Some((rest, home)) => PathBuf::from(home + rest),
        None => PathBuf::from(path),
    }
}
