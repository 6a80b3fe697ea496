//! `verdicts.jsonl`: verdicts and withdrawals, one a line, each synced before it counts.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags, flock};
use serde::{Deserialize, Serialize};

use crate::error::TelemetryError;
use crate::printable::printable_json;
use crate::run_dir::{descriptors::wait_for_descriptor, files::RunFiles, private::private_file};
use crate::verdicts::VerdictRow;

/// Name in the run directory.
const FILE: &str = "verdicts.jsonl";

/// Maximum size in bytes: far more than a person can judge.
pub(super) const MAX_BYTES: u64 = 256 << 20;

/// A line of the journal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "line", rename_all = "kebab-case")]
pub(super) enum Line {
    /// A verdict.
    Verdict(Box<VerdictRow>),
    /// The verdict of this number does not stand.
    Withdrawn {
        /// Number of the verdict.
        id: u64,
    },
}

impl Line {
    /// Number of its verdict.
    pub(super) fn id(&self) -> u64 {
        match self {
            Self::Verdict(row) => row.id,
            Self::Withdrawn { id } => *id,
        }
    }
}

/// The journal, locked for writing until it is dropped.
#[derive(Debug)]
pub(super) struct VerdictJournal {
    path: PathBuf,
    file: File,
}

impl VerdictJournal {
    /// Opens and locks the journal of the run directory `root`, waiting for other writers; creates it if absent.
    pub(super) fn lock(root: &Path) -> Result<Self, TelemetryError> {
        let path = root.join(FILE);
        let file = open_locked(&path).map_err(TelemetryError::file("open", &path))?;
        Ok(Self { path, file })
    }

    /// All lines. An incomplete last line, which a crash left and nobody was answered for, is removed.
    pub(super) fn lines(&mut self) -> Result<Vec<Line>, TelemetryError> {
        let bytes = self
            .read()
            .map_err(TelemetryError::file("read", &self.path))?;
        let end = complete(&bytes).len();
        if end < bytes.len() {
            let repaired = self.file.set_len(end as u64);
            repaired.map_err(TelemetryError::file("repair", &self.path))?;
        }
        parse(&bytes, &self.path)
    }

    fn read(&self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        (&self.file).take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
        match bytes.len() as u64 > MAX_BYTES {
            true => Err(io::Error::other(format!(
                "it has more than {MAX_BYTES} bytes"
            ))),
            false => Ok(bytes),
        }
    }

    /// Appends a line and syncs it; when that fails, the file is unchanged.
    pub(super) fn append(&mut self, line: &Line) -> Result<(), TelemetryError> {
        let before = self.file.metadata().map(|file| file.len());
        let before = before.map_err(TelemetryError::file("inspect", &self.path))?;
        let text = serde_json::to_string(line).expect("lines have string keys");
        let text = printable_json(&text).into_owned() + "\n";
        let written = self.file.write_all(text.as_bytes());
        written
            .and_then(|()| self.file.sync_all())
            .map_err(|source| {
                self.file.set_len(before).ok();
                TelemetryError::file("append to", &self.path)(source)
            })
    }
}

/// All lines of the journal of the run directory `root`; none if there is no journal.
pub(super) fn read(root: &Path) -> Result<Vec<Line>, TelemetryError> {
    let bytes = RunFiles::new(root).read(FILE, MAX_BYTES)?;
    parse(&bytes.unwrap_or_default(), &root.join(FILE))
}

/// A regular file, and not a link, since the directory may be untrusted.
fn open_locked(path: &Path) -> io::Result<File> {
    let open = || {
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
        private_file()
            .create(true)
            .read(true)
            .append(true)
            .custom_flags(flags.bits().cast_signed())
            .open(path)
    };
    if fs::symlink_metadata(path).is_ok_and(|file| !file.is_file()) {
        return Err(io::Error::other("it is not a regular file"));
    }
    let file = wait_for_descriptor(open)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    flock(&file, FlockOperation::LockExclusive)?;
    Ok(file)
}

/// The bytes up to the end of the last complete line.
fn complete(bytes: &[u8]) -> &[u8] {
    let end = bytes.iter().rposition(|&byte| byte == b'\n');
    bytes.split_at(end.map_or(0, |end| end + 1)).0
}

fn parse(bytes: &[u8], path: &Path) -> Result<Vec<Line>, TelemetryError> {
    let lines = complete(bytes).split(|&byte| byte == b'\n');
    let lines = lines.enumerate().filter(|(_, line)| !line.is_empty());
    let parsed = lines.map(|(index, line)| {
        serde_json::from_slice(line).map_err(|source| TelemetryError::Line {
            path: path.to_owned(),
            line: index + 1,
            source,
        })
    });
    parsed.collect()
}
