//! From errors to exit codes that scripts can rely on.

use std::{io::ErrorKind, process::ExitCode};

use dataset::DatasetError;
use learner::LearnerError;
use mistral::MistralError;
use model::ModelError;
use preference::PreferenceError;
use settings::SettingsError;
use telemetry::printable;
use transport::TransportError;

use crate::model_hub::HubError;

/// The documented exit codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Code {
    /// None of the others.
    Failed = 1,
    /// The configuration or the command line holds mistakes.
    Configuration = 2,
    /// A file, a folder, a device or a port is missing, or is not what it should be.
    MissingResource = 3,
    /// The run diverged.
    Diverged = 4,
    /// The run was interrupted and has saved.
    Interrupted = 5,
}

impl From<Code> for ExitCode {
    fn from(code: Code) -> Self {
        Self::from(code as u8)
    }
}

/// A command that was given what it cannot use: the configuration's kind of mistake.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Misuse(pub(crate) String);

/// A file, a folder or a program that is missing or is not what it should be.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Resource(pub(crate) String);

/// Everything that a run cannot start with. It is shown as one error a line.
#[derive(Debug)]
pub(crate) struct Refused(pub(crate) Vec<anyhow::Error>);

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let each: Vec<String> = self.0.iter().map(sentence).collect();
        f.write_str(&each.join("\nerror: "))
    }
}

impl std::error::Error for Refused {}

impl Refused {
    /// The exit code: that of a bad configuration where any of them is one.
    pub(crate) fn code(&self) -> Code {
        let codes: Vec<Code> = self.0.iter().map(code).collect();
        let first = codes.first().copied().unwrap_or(Code::Failed);
        let worst = [Code::Configuration, Code::MissingResource];
        worst
            .into_iter()
            .find(|code| codes.contains(code))
            .unwrap_or(first)
    }
}

/// Says what went wrong, with all its causes, and gives the exit code.
pub(crate) fn report(error: &anyhow::Error) -> ExitCode {
    if error.chain().any(is_broken_pipe) {
        // Whoever read our output has read enough.
        return ExitCode::SUCCESS;
    }
    note!("error: {}", printable(&sentence(error)));
    code(error).into()
}

fn is_broken_pipe(cause: &(dyn std::error::Error + 'static)) -> bool {
    let io = cause.downcast_ref::<std::io::Error>();
    io.is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
}

/// The error and its causes in one line, without saying anything twice.
pub(crate) fn sentence(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

fn code(error: &anyhow::Error) -> Code {
    error.chain().find_map(code_of).unwrap_or(Code::Failed)
}

fn code_of(cause: &(dyn std::error::Error + 'static)) -> Option<Code> {
    if let Some(error) = cause.downcast_ref::<SettingsError>() {
        return Some(match error {
            SettingsError::Unreadable { .. } => Code::MissingResource,
            _ => Code::Configuration,
        });
    }
    if cause.is::<Misuse>() {
        return Some(Code::Configuration);
    }
    if cause.is::<Resource>() {
        return Some(Code::MissingResource);
    }
    if let Some(refused) = cause.downcast_ref::<Refused>() {
        return Some(refused.code());
    }
    if let Some(error) = cause.downcast_ref::<LearnerError>() {
        return match error {
            LearnerError::Diverged { .. } => Some(Code::Diverged),
            LearnerError::Interrupted { .. } => Some(Code::Interrupted),
            LearnerError::Unreadable { .. }
            | LearnerError::Dataset(_)
            | LearnerError::Checkpoint { .. }
            | LearnerError::NoGolden { .. } => Some(Code::MissingResource),
            LearnerError::Model(error) => code_of_model(error),
            LearnerError::Telemetry(_) => Some(Code::MissingResource),
            _ => None,
        };
    }
    if let Some(error) = cause.downcast_ref::<TransportError>() {
        return match error {
            TransportError::Unreachable { .. } | TransportError::Unreadable { .. } => {
                Some(Code::MissingResource)
            }
            TransportError::Claimed { .. } | TransportError::Foreign { .. } => {
                Some(Code::Configuration)
            }
            _ => None,
        };
    }
    if let Some(error) = cause.downcast_ref::<HubError>() {
        return Some(match error {
            HubError::Stopped { .. } => Code::Interrupted,
            _ => Code::MissingResource,
        });
    }
    if cause.is::<DatasetError>() {
        return Some(Code::MissingResource);
    }
    if let Some(error) = cause.downcast_ref::<ModelError>() {
        return code_of_model(error);
    }
    if let Some(error) = cause.downcast_ref::<PreferenceError>() {
        return match error {
            PreferenceError::Pattern { .. }
            | PreferenceError::Weight { .. }
            | PreferenceError::Temperature(_)
            | PreferenceError::Matrix { .. } => Some(Code::Configuration),
            PreferenceError::Key { .. } | PreferenceError::Listen { .. } => {
                Some(Code::MissingResource)
            }
            PreferenceError::FitStopped => Some(Code::Interrupted),
            _ => None,
        };
    }
    if let Some(error) = cause.downcast_ref::<MistralError>() {
        return match error {
            MistralError::NotBuilt => Some(Code::Configuration),
            MistralError::Unreadable { .. }
            | MistralError::Unusable { .. }
            | MistralError::Load { .. }
            | MistralError::NoTemplate { .. } => Some(Code::MissingResource),
            _ => None,
        };
    }
    if cause.is::<telemetry::Error>() {
        return Some(Code::MissingResource);
    }
    let io = cause.downcast_ref::<std::io::Error>()?;
    (io.kind() == ErrorKind::NotFound).then_some(Code::MissingResource)
}

fn code_of_model(error: &ModelError) -> Option<Code> {
    match error {
        ModelError::Compute(_) | ModelError::Unwritable { .. } | ModelError::Engine(_) => None,
        _ => Some(Code::MissingResource),
    }
}
