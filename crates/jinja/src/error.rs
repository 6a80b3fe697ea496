//! Errors of compiling and rendering.

use thiserror::Error;

/// Length at which a message is cut: templates and dialogues write parts of it.
const MAX_MESSAGE_CHARS: usize = 1000;

/// An error of a template, with its line if known.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{}{message}", line.map(|line| format!("line {line}: ")).unwrap_or_default())]
pub struct TemplateError {
    /// Message, worded as in Python where Python raises.
    pub message: String,
    /// Line of the template, from 1.
    pub line: Option<usize>,
}

impl TemplateError {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        let mut message = message.into();
        if let Some((end, _)) = message.char_indices().nth(MAX_MESSAGE_CHARS) {
            message.truncate(end);
            message.push('…');
        }
        Self {
            message,
            line: None,
        }
    }

    /// Adds the line unless one is set already.
    pub(crate) fn at(mut self, line: usize) -> Self {
        self.line.get_or_insert(line);
        self
    }

    /// A feature of jinja2 that is not supported here.
    pub(crate) fn unsupported(what: &str) -> Self {
        Self::new(format!("{what} is not supported in chat templates here"))
    }
}
