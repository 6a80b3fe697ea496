//! Third-party programs that some tests need: a browser, Prometheus.

use std::{env, path::PathBuf};

/// The first of `names` found on the `PATH`. If there is none, logs that the test named `test` is skipped and returns
/// `None`.
///
/// # Panics
/// If there is none and `CI=true`: a skip is a failure in CI.
pub fn tool(test: &str, names: &[&str]) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&path).find_map(|folder| {
        let mut files = names.iter().map(|name| folder.join(name));
        files.find(|file| file.is_file())
    });
    if found.is_some() {
        return found;
    }
    let message = format!("SKIPPED {test}: none of {names:?} is installed");
    assert!(env::var("CI").as_deref() != Ok("true"), "{message}");
    eprintln!("{message}");
    None
}
