//! Files of a model folder, which may be untrusted.
//!
//! Promises that only regular files are read, at most a known number of bytes, and only files of the folder: a symbolic
//! link may not lead out of it, because files of a model are copied into checkpoints and uploaded to other processes. The
//! snapshots of the Hub's cache consist of links to the blobs beside them, and are the one exception. Does not know what
//! the files mean.

use std::{
    fs::{self, File, FileType},
    io::{self, Read},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use crate::{error::ModelError, shards::missing};

/// Largest JSON file other than `tokenizer.json`, chat template or licence, in bytes.
pub const MAX_TEXT_BYTES: u64 = 1 << 24;
/// Largest index of a sharded model in bytes.
pub const MAX_INDEX_BYTES: u64 = 1 << 26;
/// Largest `tokenizer.json` in bytes.
pub const MAX_TOKENIZER_BYTES: u64 = 1 << 27;

/// A regular file of a model folder, opened for reading.
#[derive(Debug)]
pub(crate) struct InputFile {
    /// Its path.
    pub(crate) path: PathBuf,
    file: File,
    /// Size in bytes.
    pub(crate) length: u64,
}

impl InputFile {
    /// Opens the file at `path`, which is directly in a model folder.
    ///
    /// # Errors
    /// When it does not exist, is not a regular file, or is a symbolic link that leads out of the folder.
    pub(crate) fn open(path: &Path) -> Result<Self, ModelError> {
        let target = resolved(path)?;
        // A pipe would block when it is opened.
        check_regular(path, fs::metadata(&target))?;
        let file = File::open(&target).map_err(|source| missing(path, source))?;
        Ok(Self {
            length: check_regular(path, file.metadata())?,
            path: path.to_owned(),
            file,
        })
    }

    /// The file, positioned at its start.
    pub(crate) fn into_file(self) -> File {
        self.file
    }

    /// The file, to be read on from where it was read to.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Fills `bytes` from this offset on.
    ///
    /// # Errors
    /// When the file ends before, or cannot be read.
    pub(crate) fn read_exact_at(&self, bytes: &mut [u8], offset: u64) -> Result<(), ModelError> {
        let read = self.file.read_exact_at(bytes, offset);
        read.map_err(|source| ModelError::Unreadable {
            path: self.path.clone(),
            source,
        })
    }

    /// Reads the whole file, which may have `max_bytes`.
    ///
    /// # Errors
    /// When it has more, or cannot be read.
    pub(crate) fn read(self, max_bytes: u64) -> Result<Vec<u8>, ModelError> {
        let Self { path, file, length } = self;
        let mut bytes = Vec::new();
        let too_large = |length: u64| {
            let reason = format!("it has {length} bytes, a file of its kind at most {max_bytes}");
            malformed(&path, reason)
        };
        if length > max_bytes {
            return Err(too_large(length));
        }
        let unreadable = |source| ModelError::Unreadable {
            path: path.clone(),
            source,
        };
        let expected = usize::try_from(length).unwrap_or(usize::MAX);
        bytes
            .try_reserve_exact(expected)
            .map_err(|_| unreadable(io::ErrorKind::OutOfMemory.into()))?;
        // Files of /proc have the size 0 and any content.
        let mut reader = file.take(max_bytes.saturating_add(1));
        reader.read_to_end(&mut bytes).map_err(unreadable)?;
        match bytes.len() as u64 > max_bytes {
            true => Err(too_large(bytes.len() as u64)),
            false => Ok(bytes),
        }
    }
}

/// Content of the file at `path`, which is directly in a model folder, of at most `max_bytes`.
///
/// # Errors
/// When it is not a regular file of the folder, is larger than `max_bytes`, or cannot be read.
pub fn read(path: &Path, max_bytes: u64) -> Result<Vec<u8>, ModelError> {
    InputFile::open(path)?.read(max_bytes)
}

/// As [`read`], as text.
///
/// # Errors
/// As [`read`], and when it is not UTF-8.
pub fn read_text(path: &Path, max_bytes: u64) -> Result<String, ModelError> {
    String::from_utf8(read(path, max_bytes)?)
        .map_err(|error| malformed(path, format!("it is not UTF-8 text ({error})")))
}

/// The file itself, behind symbolic links.
fn resolved(path: &Path) -> Result<PathBuf, ModelError> {
    let unreadable = |source| missing(path, source);
    let target = path.canonicalize().map_err(unreadable)?;
    let parent = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    let folder = parent.unwrap_or(Path::new(".")).canonicalize();
    let folder = folder.map_err(unreadable)?;
    let in_blobs = |blobs: PathBuf| target.parent() == Some(blobs.as_path());
    if target.starts_with(&folder) || blobs_beside(&folder).is_some_and(in_blobs) {
        return Ok(target);
    }
    let reason = format!(
        "it is a link to {}, which is outside of its folder: replace it by a copy, or name the folder that holds the \
         files themselves",
        target.display()
    );
    Err(malformed(path, reason))
}

/// Folder of the blobs of a snapshot in the Hub's cache: `models--ORG--NAME/blobs` for
/// `models--ORG--NAME/snapshots/COMMIT`.
fn blobs_beside(folder: &Path) -> Option<PathBuf> {
    let snapshots = folder.parent()?;
    let repository = snapshots.parent()?;
    let is_repository = repository.file_name()?.to_str()?.starts_with("models--");
    (is_repository && snapshots.file_name()? == "snapshots").then(|| repository.join("blobs"))
}

/// Size of a regular file with this metadata.
fn check_regular(path: &Path, metadata: io::Result<fs::Metadata>) -> Result<u64, ModelError> {
    let metadata = metadata.map_err(|source| missing(path, source))?;
    match metadata.is_file() {
        true => Ok(metadata.len()),
        false => {
            let kind = kind(metadata.file_type());
            Err(malformed(path, format!("it is {kind}, not a regular file")))
        }
    }
}

/// Kind of what is not a regular file.
fn kind(file_type: FileType) -> &'static str {
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        if file_type.is_fifo() {
            return "a named pipe";
        } else if file_type.is_socket() {
            return "a socket";
        } else if file_type.is_char_device() || file_type.is_block_device() {
            return "a device";
        }
    }
    match file_type.is_dir() {
        true => "a folder",
        false => "something else",
    }
}

fn malformed(path: &Path, reason: String) -> ModelError {
    ModelError::Malformed {
        path: path.to_owned(),
        reason,
    }
}

#[cfg(unix)]
#[cfg(test)]
mod tests {
    use std::os::unix::{fs::symlink, net::UnixListener};

    use super::*;

    fn refused(path: &Path) -> String {
        let error = read(path, 100).unwrap_err().to_string();
        assert!(error.contains(&path.display().to_string()), "{error}");
        error
    }

    #[test]
    fn only_regular_files_of_a_bounded_size_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| folder.path().join(name);
        fs::write(file("small"), [b'x'; 100]).unwrap();
        assert_eq!(read(&file("small"), 100).unwrap().len(), 100);
        fs::write(file("large"), [b'x'; 101]).unwrap();
        assert!(refused(&file("large")).contains("it has 101 bytes"));
        fs::create_dir(file("folder")).unwrap();
        assert!(refused(&file("folder")).contains("it is a folder"));
        let _socket = UnixListener::bind(file("socket")).unwrap();
        assert!(refused(&file("socket")).contains("it is a socket"));
        let made = std::process::Command::new("mkfifo")
            .arg(file("pipe"))
            .status();
        assert!(made.unwrap().success());
        assert!(refused(&file("pipe")).contains("it is a named pipe"));
        assert!(refused(&file("nowhere")).contains("failed to read"));
        assert!(refused(Path::new("/dev/zero")).contains("it is a device"));
        fs::write(file("binary"), [0xff]).unwrap();
        let error = read_text(&file("binary"), 100).unwrap_err().to_string();
        assert!(error.contains("not UTF-8"), "{error}");
    }

    #[test]
    fn a_link_may_not_lead_out_of_the_folder() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("model");
        fs::create_dir_all(folder.join("inside")).unwrap();
        fs::write(folder.join("inside/config.json"), "inside").unwrap();
        fs::write(root.path().join("secret"), "outside").unwrap();
        let link = folder.join("config.json");
        let linked = |target: &Path| {
            fs::remove_file(&link).ok();
            symlink(target, &link).unwrap();
        };
        linked(Path::new("inside/config.json"));
        assert_eq!(read_text(&link, 100).unwrap(), "inside");
        for target in [
            Path::new("../secret"),
            &root.path().join("secret"),
            Path::new("/dev/zero"),
            Path::new("inside/../../secret"),
        ] {
            linked(target);
            assert!(refused(&link).contains("outside of its folder"));
        }
        // The folder itself may be reached by a link.
        linked(Path::new("inside/config.json"));
        let other = root.path().join("other");
        symlink(&folder, &other).unwrap();
        assert_eq!(
            read_text(&other.join("config.json"), 100).unwrap(),
            "inside"
        );
    }

    #[test]
    fn a_snapshot_of_the_hub_cache_links_to_its_own_blobs_only() {
        let root = tempfile::tempdir().unwrap();
        let snapshot = root.path().join("models--org--name/snapshots/0123");
        let blobs = root.path().join("models--org--name/blobs");
        let others = root.path().join("models--org--other/blobs");
        for folder in [&snapshot, &blobs, &others] {
            fs::create_dir_all(folder).unwrap();
        }
        for folder in [&blobs, &others] {
            fs::write(folder.join("abc"), "content").unwrap();
        }
        let own = snapshot.join("config.json");
        symlink("../../blobs/abc", &own).unwrap();
        assert_eq!(read_text(&own, 100).unwrap(), "content");
        let foreign = snapshot.join("tokenizer.json");
        symlink(others.join("abc"), &foreign).unwrap();
        assert!(refused(&foreign).contains("outside of its folder"));
        // Blobs that are elsewhere are not the repository's.
        fs::rename(&blobs, root.path().join("moved")).unwrap();
        symlink(root.path().join("moved"), &blobs).unwrap();
        assert!(refused(&own).contains("outside of its folder"));
    }
}
