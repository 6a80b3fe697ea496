//! Maps errors to documented exit codes, which scripts can rely on.

use std::{
    error::Error,
    io::{self, ErrorKind},
    process::ExitCode,
};

use dataset::DatasetError;
use hub::HubError;
use learner::LearnerError;
use messages::{Classified, ErrorClass};
use mistral::MistralError;
use model::ModelError;
use preference::PreferenceError;
use settings::SettingsError;
use telemetry::{TelemetryError, printable, shortened};
use transport::TransportError;

/// The documented exit codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Code {
    /// Any other error.
    Failed = 1,
    /// The configuration or the command line holds mistakes.
    Configuration = 2,
    /// A file, folder, device or port is missing or unusable.
    MissingResource = 3,
    /// Training diverged.
    Diverged = 4,
    /// Interrupted by a signal; the state is saved.
    Interrupted = 5,
}

impl From<Code> for ExitCode {
    fn from(code: Code) -> Self {
        Self::from(code as u8)
    }
}

/// An invalid argument or combination of arguments; exits like an invalid configuration.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct UsageError(pub(crate) String);

impl Classified for UsageError {
    fn class(&self) -> ErrorClass {
        ErrorClass::Usage
    }
}

/// Reason why the record of a run on a server cannot be used: it is not signed by the run's learner, or of another build.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct RefusedRecord(pub(crate) String);

impl Classified for RefusedRecord {
    fn class(&self) -> ErrorClass {
        ErrorClass::Usage
    }
}

/// A missing or unusable file, folder or program.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Resource(pub(crate) String);

impl Classified for Resource {
    fn class(&self) -> ErrorClass {
        ErrorClass::Resource
    }
}

/// All errors that keep a run from starting, displayed one a line.
#[derive(Debug)]
pub(crate) struct Refused(pub(crate) Vec<anyhow::Error>);

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let each: Vec<String> = self.0.iter().map(sentence).collect();
        f.write_str(&each.join("\nerror: "))
    }
}

impl Error for Refused {}

impl Refused {
    /// The exit code: `Configuration` if any error has it, else `MissingResource` if any has it, else the first's.
    pub(crate) fn code(&self) -> Code {
        let codes: Vec<Code> = self.0.iter().map(code).collect();
        let first = codes.first().copied().unwrap_or(Code::Failed);
        [Code::Configuration, Code::MissingResource]
            .into_iter()
            .find(|code| codes.contains(code))
            .unwrap_or(first)
    }
}

/// Prints the error with its causes to standard error and returns the exit code.
pub(crate) fn report(error: &anyhow::Error) -> ExitCode {
    if error.chain().any(is_broken_pipe) {
        // The reader closed the pipe: not a failure.
        return ExitCode::SUCCESS;
    }
    note!("error: {}", printable(&sentence(error)));
    code(error).into()
}

fn is_broken_pipe(cause: &(dyn Error + 'static)) -> bool {
    let io = cause.downcast_ref::<io::Error>();
    io.is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
}

/// The error and its causes in one line; a cause whose text is already contained is left out, and so is the middle of a
/// long text.
pub(crate) fn sentence(error: &anyhow::Error) -> String {
    let mut text = shortened(&error.to_string()).into_owned();
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        let cause = shortened(&cause);
        if !text.contains(&*cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

fn code(error: &anyhow::Error) -> Code {
    error.chain().find_map(code_of).unwrap_or(Code::Failed)
}

/// The code of one error in a chain; `None` where it has no class of its own.
fn code_of(cause: &(dyn Error + 'static)) -> Option<Code> {
    if let Some(refused) = cause.downcast_ref::<Refused>() {
        return Some(refused.code());
    }
    match CLASSES.iter().find_map(|class| class(cause)) {
        Some(ErrorClass::Usage) => Some(Code::Configuration),
        Some(ErrorClass::Resource) => Some(Code::MissingResource),
        Some(ErrorClass::Diverged) => Some(Code::Diverged),
        Some(ErrorClass::Interrupted) => Some(Code::Interrupted),
        Some(ErrorClass::Failed) | None => None,
    }
}

/// One downcast for each classified error type.
const CLASSES: [fn(&(dyn Error + 'static)) -> Option<ErrorClass>; 13] = [
    class_of::<SettingsError>,
    class_of::<UsageError>,
    class_of::<RefusedRecord>,
    class_of::<Resource>,
    class_of::<LearnerError>,
    class_of::<TransportError>,
    class_of::<HubError>,
    class_of::<DatasetError>,
    class_of::<ModelError>,
    class_of::<PreferenceError>,
    class_of::<MistralError>,
    class_of::<TelemetryError>,
    class_of_io,
];

fn class_of<E: Classified + 'static>(cause: &(dyn Error + 'static)) -> Option<ErrorClass> {
    cause.downcast_ref::<E>().map(Classified::class)
}

fn class_of_io(cause: &(dyn Error + 'static)) -> Option<ErrorClass> {
    let io = cause.downcast_ref::<io::Error>()?;
    (io.kind() == ErrorKind::NotFound).then_some(ErrorClass::Resource)
}
