//! Files and folders of a tournament's directory, which may be another user's: no link out of it is followed, and no pipe
//! is waited for.

use std::{
    fs::{self, File, OpenOptions},
    io::ErrorKind,
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

use anyhow::Context;
use telemetry::RunFiles;

use crate::exit_code::Resource;

/// Largest file of a tournament that is read, in bytes.
const MAX_BYTES: u64 = 1 << 28;

/// Creates the folder `relative` below `root`, with its parents.
///
/// # Errors
/// When a part of it is a link or another file, or cannot be created.
pub(super) fn create_folder(root: &Path, relative: &Path) -> anyhow::Result<()> {
    let mut path = root.to_owned();
    for part in relative {
        path.push(part);
        let unusable = || format!("failed to create {}", path.display());
        match fs::create_dir(&path) {
            Ok(()) => continue,
            // Another run may have created it just now.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error).with_context(unusable),
        }
        if !fs::symlink_metadata(&path).with_context(unusable)?.is_dir() {
            return Err(Resource(format!(
                "{} is not a folder: remove it, or choose another directory for the tournament",
                path.display()
            ))
            .into());
        }
    }
    Ok(())
}

/// The text of the file `name` in `folder`; `None` if there is none.
///
/// # Errors
/// When it is not a regular file inside the folder, is too large, or is not text.
pub(super) fn read(folder: &Path, name: &str) -> anyhow::Result<Option<String>> {
    let Some(bytes) = RunFiles::new(folder).read(name, MAX_BYTES)? else {
        return Ok(None);
    };
    let text = String::from_utf8(bytes);
    let text = text.map_err(|_| Resource(format!("{} is not text", folder.join(name).display())));
    Ok(Some(text?))
}

/// Opens a file for writing at its end, after creating it if there is none.
///
/// # Errors
/// When it is a link or no regular file, or cannot be opened.
pub(super) fn append(path: &Path) -> anyhow::Result<File> {
    let mut options = OpenOptions::new();
    options.create(true).append(true);
    // Of a pipe without a reader, opening fails instead of waiting.
    options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let unusable = || format!("failed to write {}", path.display());
    let file = options.open(path).with_context(unusable)?;
    if !file.metadata().with_context(unusable)?.is_file() {
        return Err(Resource(format!("{} is not a regular file", path.display())).into());
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_and_pipes_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (root, outside) = (folder.path().join("root"), folder.path().join("outside"));
        fs::create_dir(&root).unwrap();
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("victim"), "precious").unwrap();
        symlink(&outside, root.join("runs")).unwrap();
        symlink(outside.join("victim"), root.join("log")).unwrap();
        symlink(outside.join("none"), root.join("dangling")).unwrap();
        let error = create_folder(&root, Path::new("runs/x")).unwrap_err();
        assert!(error.to_string().contains("is not a folder"), "{error}");
        for link in ["log", "dangling"] {
            assert!(append(&root.join(link)).is_err(), "{link}");
        }
        assert!(read(&root, "log").is_err());
        assert_eq!(
            fs::read_to_string(outside.join("victim")).unwrap(),
            "precious"
        );
        assert!(!outside.join("none").exists() && !outside.join("x").exists());
        let made = std::process::Command::new("mkfifo")
            .arg(root.join("pipe"))
            .status();
        assert!(made.unwrap().success());
        assert!(append(&root.join("pipe")).is_err());
        assert!(read(&root, "pipe").is_err());
        create_folder(&root, Path::new("a/b")).unwrap();
        create_folder(&root, Path::new("a/b")).unwrap();
        append(&root.join("a/b/log")).unwrap();
        assert_eq!(read(&root, "a/b/log").unwrap().as_deref(), Some(""));
        assert_eq!(read(&root, "a/none").unwrap(), None);
    }
}
