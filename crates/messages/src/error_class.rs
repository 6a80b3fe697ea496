//! Classes of errors, by what the user can do about them; `agon` maps each to a documented exit code.

use std::error::Error;

/// The class of an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorClass {
    /// The configuration or the command line holds a mistake.
    Usage,
    /// A file, folder, device, port or server is missing, or is not what it should be.
    Resource,
    /// Training diverged.
    Diverged,
    /// The work was interrupted by request.
    Interrupted,
    /// None of the others; a cause of the error may have a class.
    Failed,
}

/// An error that knows its class.
pub trait Classified: Error {
    /// The class of this error, wrapped errors included where they are not its [`source`](Error::source).
    fn class(&self) -> ErrorClass;
}
