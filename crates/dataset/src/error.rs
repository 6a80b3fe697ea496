//! What can be wrong with a file of rows.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use thiserror::Error;

/// Where a row is in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The line, from 1, on which it begins.
    Line(usize),
    /// Its number, from 1, in a file without lines, or in a list within an object.
    Row(usize),
}

impl Place {
    /// Its line or row.
    pub(crate) fn number(self) -> usize {
        match self {
            Self::Line(number) | Self::Row(number) => number,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line(line) => write!(f, "line {line}"),
            Self::Row(row) => write!(f, "row {row}"),
        }
    }
}

/// What can be wrong with a file of rows.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DatasetError {
    /// It cannot be read.
    #[error("failed to read {path}: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The file as a whole cannot be used.
    #[error("{path}: {reason}")]
    File {
        /// The file, folder or glob.
        path: PathBuf,
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// It is not JSON.
    #[error("{path}, line {line}, column {column}: not JSON: {reason}")]
    Json {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The byte in it, from 1.
        column: usize,
        /// What is wrong.
        reason: String,
    },
    /// A row is not what it should be.
    #[error("{path}, {place}: {reason}")]
    Row {
        /// The file.
        path: PathBuf,
        /// Where in it.
        place: Place,
        /// What is wrong, and what would be right.
        reason: String,
    },
}

impl DatasetError {
    /// The file that it is about.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::Unreadable { path, .. }
            | Self::File { path, .. }
            | Self::Json { path, .. }
            | Self::Row { path, .. } => path,
        }
    }
}
