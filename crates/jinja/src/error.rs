//! Why a template does not compile or render.

use thiserror::Error;

/// What is wrong, and where when that is known.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{}{message}", line.map(|line| format!("line {line}: ")).unwrap_or_default())]
pub struct Error {
    /// As Python would say it, where it would.
    pub message: String,
    /// The line of the template, from 1.
    pub line: Option<usize>,
}

impl Error {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            line: None,
        }
    }

    /// The same, at `line` unless a place is known already.
    pub(crate) fn at(mut self, line: usize) -> Self {
        self.line.get_or_insert(line);
        self
    }

    /// What exists in jinja2 and not here.
    pub(crate) fn unsupported(what: &str) -> Self {
        Self::new(format!("{what} is not supported in chat templates here"))
    }
}
