//! Permissions of what a run leaves on the disk: readable by its owner only, because it holds samples.

use std::fs::{DirBuilder, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

/// Creates a directory and its parents, as [`std::fs::create_dir_all`]; only the owner can enter a new one.
/// Directories that exist are unchanged.
///
/// # Errors
/// When a directory cannot be created.
pub fn create_private_directory(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Options for files that only their owner can read, if they are created.
pub(crate) fn private_file() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.mode(0o600);
    options
}
