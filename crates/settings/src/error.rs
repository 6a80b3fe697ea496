//! What can be wrong with a configuration.

use std::{fmt, path::PathBuf};

use thiserror::Error;

/// Why a configuration cannot be used.
#[derive(Debug, Error)]
pub enum SettingsError {
    /// The file cannot be read.
    #[error("failed to read the configuration {path}: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The file is not TOML.
    #[error("{origin} is not TOML: {reason}")]
    NotToml {
        /// The file, or the override.
        origin: String,
        /// What the parser says, with line and column.
        reason: String,
    },
    /// An override that is not `key=value`.
    #[error("the override {text:?} is not KEY=VALUE, as in learner.learning_rate=1e-5")]
    NotAnOverride {
        /// What was given.
        text: String,
    },
    /// Mistakes, all of them.
    #[error(
        "{origin} has {} that must be mended:\n{}",
        count(problems),
        list(problems)
    )]
    Problems {
        /// The file.
        origin: String,
        /// One a mistake.
        problems: Vec<Problem>,
    },
}

/// One mistake: where it is, what is wrong and what would be right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The dotted key.
    pub path: String,
    /// A sentence.
    pub message: String,
}

impl Problem {
    pub(crate) fn new(path: &str, message: impl Into<String>) -> Self {
        Self {
            path: path.into(),
            message: message.into(),
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
