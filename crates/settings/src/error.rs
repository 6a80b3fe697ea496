//! Errors of a configuration.

use std::{fmt, path::PathBuf};

use thiserror::Error;

use crate::redaction::without_secrets;

/// An error of a configuration.
#[derive(Debug, Error)]
pub enum SettingsError {
    /// The file cannot be read.
    #[error("failed to read the configuration {path}: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The I/O error.
        source: std::io::Error,
    },
    /// The file or an override is not valid TOML.
    #[error("{origin} is not TOML: {reason}")]
    NotToml {
        /// The file, or the override.
        origin: String,
        /// The parser's message, with line and column.
        reason: String,
    },
    /// An override that is not `key=value`.
    #[error("the override {text:?} is not KEY=VALUE, as in learner.learning_rate=1e-5")]
    NotAnOverride {
        /// The override.
        text: String,
    },
    /// All mistakes of the configuration.
    #[error("{origin} has {}:\n{}", count(problems), list(problems))]
    Problems {
        /// The file.
        origin: String,
        /// One problem per mistake.
        problems: Vec<Problem>,
    },
}

/// One mistake: its key, and a message that names the remedy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The dotted key.
    pub path: String,
    /// Reason and remedy.
    pub message: String,
}

impl Problem {
    pub(crate) fn new(path: &str, message: impl Into<String>) -> Self {
        Self {
            path: path.into(),
            message: without_secrets(&message.into()),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.message)
    }
}

fn count(problems: &[Problem]) -> String {
    match problems.len() {
        1 => "a mistake".into(),
        n => format!("{n} mistakes"),
    }
}

fn list(problems: &[Problem]) -> String {
    problems
        .iter()
        .map(|p| format!("  {p}"))
        .collect::<Vec<_>>()
        .join("\n")
}

impl messages::Classified for SettingsError {
    fn class(&self) -> messages::ErrorClass {
        use messages::ErrorClass;
        match self {
            Self::Unreadable { .. } => ErrorClass::Resource,
            _ => ErrorClass::Usage,
        }
    }
}
