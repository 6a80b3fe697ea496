//! Files of a directory that may be untrusted, such as a run that somebody sent.
//!
//! Only regular files inside the directory are opened: no link that leads out of it, no pipe, no device. Opening never
//! blocks, and what is read is bounded. This part does not know the contents of the files.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use crate::error::TelemetryError;
use crate::regular_file::{invalid, open_regular, read_at_most};

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
    pub fn open(&self, name: &str) -> Result<Option<File>, TelemetryError> {
        match open_inside(&self.root, name) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(TelemetryError::file("open", &self.root.join(name))(source)),
        }
    }

    /// Reads the file at this path below the directory, of at most `max_bytes`; `None` if there is none.
    ///
    /// # Errors
    /// As [`Self::open`], and when the file is larger or cannot be read.
    pub fn read(&self, name: &str, max_bytes: u64) -> Result<Option<Vec<u8>>, TelemetryError> {
        let Some(file) = self.open(name)? else {
            return Ok(None);
        };
        let bytes = read_at_most(file, max_bytes);
        bytes
            .map(Some)
            .map_err(TelemetryError::file("read", &self.root.join(name)))
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
