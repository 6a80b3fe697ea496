//! Files of a directory that may be a stranger's, such as a run that somebody sent.
//!
//! Only regular files inside the directory are opened: no link that leads out of it, no pipe, no device. Opening never
//! blocks, and what is read is bounded. This part does not know the contents of the files.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use crate::error::Error;

/// Regular files inside one directory.
#[derive(Debug, Clone)]
pub struct RunFiles {
    root: PathBuf,
}

impl RunFiles {
    /// The files of the directory `root`, which need not exist.
    #[must_use]
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Opens the file at this path below the directory for reading; `None` if there is none.
    ///
    /// # Errors
    /// When it is not a regular file inside the directory, or cannot be opened.
    pub fn open(&self, name: &str) -> Result<Option<File>, Error> {
        match open_inside(&self.root, name) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(Error::file("open", &self.root.join(name))(source)),
        }
    }

    /// Reads the file at this path below the directory, of at most `max_bytes`; `None` if there is none.
    ///
    /// # Errors
    /// As [`Self::open`], and when the file is larger or cannot be read.
    pub fn read(&self, name: &str, max_bytes: u64) -> Result<Option<Vec<u8>>, Error> {
        let Some(file) = self.open(name)? else {
            return Ok(None);
        };
        let bytes = read_at_most(file, max_bytes);
        bytes
            .map(Some)
            .map_err(Error::file("read", &self.root.join(name)))
    }

    /// Whether there is a regular file at this path below the directory.
    #[must_use]
    pub fn contains(&self, name: &str) -> bool {
        open_inside(&self.root, name).is_ok()
    }
}

/// Opens the file `name` below `root`, if it is a regular file there.
pub(crate) fn open_inside(root: &Path, name: &str) -> io::Result<File> {
    let path = root.join(name);
    // Without links: the file itself may be one that stays inside.
    let target = fs::canonicalize(&path)?;
    if !target.starts_with(fs::canonicalize(root)?) {
        return Err(invalid("it is a link out of the directory"));
    }
    open_regular(&target)
}

/// Opens a regular file; anything else is an error, and is not waited for.
pub(crate) fn open_regular(path: &Path) -> io::Result<File> {
    if !fs::metadata(path)?.is_file() {
        return Err(invalid("it is not a regular file"));
    }
    // The file may have been replaced since.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(invalid("it is not a regular file")),
    }
}

/// Reads a regular file of at most `max_bytes`.
pub(crate) fn read_bounded(path: &Path, max_bytes: u64) -> io::Result<Vec<u8>> {
    read_at_most(open_regular(path)?, max_bytes)
}

fn read_at_most(file: File, max_bytes: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(max_bytes.saturating_add(1))
        .read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max_bytes {
        return Err(invalid(&format!("it has more than {max_bytes} bytes")));
    }
    Ok(bytes)
}

fn invalid(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn only_regular_files_inside_the_directory_are_read() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("run");
        fs::create_dir_all(root.join("inside")).unwrap();
        fs::write(root.join("inside/file"), "12345").unwrap();
        fs::write(directory.path().join("outside"), "secret").unwrap();
        symlink("inside/file", root.join("link")).unwrap();
        symlink("../outside", root.join("out")).unwrap();
        symlink("/dev/zero", root.join("zero")).unwrap();
        symlink(directory.path(), root.join("parent")).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            root.join("pipe"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
            0,
        )
        .unwrap();
        let files = RunFiles::new(&root);
        for name in ["inside/file", "link"] {
            assert_eq!(files.read(name, 5).unwrap().unwrap(), b"12345", "{name}");
            assert!(files.contains(name));
        }
        assert_eq!(files.read("none", 5).unwrap(), None);
        for (name, reason) in [
            ("out", "a link out of the directory"),
            ("zero", "a link out of the directory"),
            ("parent/outside", "a link out of the directory"),
            ("../outside", "a link out of the directory"),
            ("pipe", "not a regular file"),
            ("inside", "not a regular file"),
        ] {
            let error = files.read(name, 5).unwrap_err();
            let cause = std::error::Error::source(&error).unwrap().to_string();
            assert!(cause.contains(reason), "{name}: {cause}");
            assert!(error.to_string().contains(name), "{error}");
            assert!(!files.contains(name));
        }
        let error = files.read("link", 4).unwrap_err();
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert_eq!(cause, "it has more than 4 bytes");
    }
}
