//! Content-addressed cache of folders that are expensive to make.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context;
use messages::Digest;
use serde::Serialize;

/// The folder in `base_dir` named by the digest of `cache_key`: found, or made by `make` under a temporary name and
/// then renamed, so that a folder that is found is complete.
pub(super) fn cached(
    base_dir: &Path,
    cache_key: &impl Serialize,
    make: impl FnOnce(&Path) -> anyhow::Result<()>,
) -> anyhow::Result<PathBuf> {
    let cache_key = serde_json::to_string(cache_key)?;
    let name = Digest::of(cache_key.as_bytes()).to_string();
    let path = base_dir.join(&name[..16]);
    if path.exists() {
        tracing::info!(path = %path.display(), "using the cached folder");
        return Ok(path);
    }
    let tmp = base_dir.join(format!(".{}.{}", &name[..16], std::process::id()));
    fs::create_dir_all(&tmp).with_context(|| format!("failed to make {}", tmp.display()))?;
    let made = make(&tmp).and_then(|()| match fs::rename(&tmp, &path) {
        // Another process made the same folder meanwhile: use that one.
        Err(_) if path.exists() => Ok(()),
        renamed => renamed.with_context(|| format!("failed to make {}", path.display())),
    });
    if tmp.exists() {
        fs::remove_dir_all(&tmp).with_context(|| format!("failed to remove {}", tmp.display()))?;
    }
    made.map(|()| path)
}
