//! Errors of data-set files.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use thiserror::Error;

/// Position of a row in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowPosition {
    /// First line of the row, counted from 1.
    Line(usize),
    /// Index of the row, counted from 1, in a file without lines or in a list within an object.
    Row(usize),
}

impl RowPosition {
    /// The line or row number.
    pub(crate) fn number(self) -> usize {
        match self {
            Self::Line(number) | Self::Row(number) => number,
        }
    }
}

impl fmt::Display for RowPosition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line(line) => write!(f, "line {line}"),
            Self::Row(row) => write!(f, "row {row}"),
        }
    }
}

/// Error of a data-set file.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DatasetError {
    /// The file cannot be read.
    #[error("failed to read {path}: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The I/O error.
        source: std::io::Error,
    },
    /// The file as a whole cannot be used.
    #[error("{path}: {reason}")]
    File {
        /// The file, folder or glob.
        path: PathBuf,
        /// Reason and remedy.
        reason: String,
    },
    /// The file is not valid JSON.
    #[error("{path}, line {line}, column {column}: not JSON: {reason}")]
    Json {
        /// The file.
        path: PathBuf,
        /// Line, counted from 1.
        line: usize,
        /// Byte in the line, counted from 1.
        column: usize,
        /// Reason.
        reason: String,
    },
    /// A row is invalid.
    #[error("{path}, {position}: {reason}")]
    Row {
        /// The file.
        path: PathBuf,
        /// Position of the row.
        position: RowPosition,
        /// Reason and remedy.
        reason: String,
    },
}

impl DatasetError {
    /// The error of a file as a whole.
    pub(crate) fn file(path: &Path, reason: impl Into<String>) -> Self {
        Self::File {
            path: path.to_owned(),
            reason: reason.into(),
        }
    }

    /// The file with the error.
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

impl messages::Classified for DatasetError {
    fn class(&self) -> messages::ErrorClass {
        messages::ErrorClass::Resource
    }
}
