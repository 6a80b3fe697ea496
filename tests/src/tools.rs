//! Programs of others that some tests need: a browser, Prometheus.

use std::{env, path::PathBuf};

/// The first of `names` that is an executable on the path. `None` when none is: the test named `test` is
/// skipped, aloud.
///
/// # Panics
/// When there is none and `CI=true`: there, a skip is a failure.
pub fn tool(test: &str, names: &[&str]) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&path).find_map(|folder| {
        let mut files = names.iter().map(|name| folder.join(name));
        files.find(|file| file.is_file())
    });
    if found.is_some() {
        return found;
    }
    let skipped = format!("SKIPPED {test}: none of {names:?} is installed");
    assert!(env::var("CI").as_deref() != Ok("true"), "{skipped}");
    eprintln!("{skipped}");
    None
}
