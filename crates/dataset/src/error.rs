//! What can be wrong with a file of rows.

use std::path::{Path, PathBuf};

use thiserror::Error;

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
    /// A row is not what it should be.
    #[error("{path}, line {line}: {reason}")]
    Row {
        /// The file.
        path: PathBuf,
        /// The line, from 1; in a list, the row's place in it.
        line: usize,
        /// What is wrong, and what would be right.
        reason: String,
    },
}

impl DatasetError {
    /// The file that it is about.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::Unreadable { path, .. } | Self::Row { path, .. } => path,
        }
    }
}
