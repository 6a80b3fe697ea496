//! Output to the terminal or a pipe, without panics. `println!` and `eprintln!` panic when the reader has closed,
//! which would end the printing task: a run whose terminal was closed could then no longer be stopped. What is written
//! to standard error never waits for a reader that does not read.

use std::{fmt, io, io::Write};

use telemetry::StandardError;

/// Writes a line to standard output; a closed pipe is not an error.
///
/// # Errors
/// When writing fails for any other reason.
pub(crate) fn line(text: fmt::Arguments<'_>) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}

/// Writes a line to standard error; failures are ignored.
pub(crate) fn note(text: fmt::Arguments<'_>) {
    StandardError::line(text);
}

/// [`line()`](crate::terminal::line) of a format string; evaluates to its `io::Result`.
macro_rules! out {
    ($($text:tt)*) => { $crate::terminal::line(format_args!($($text)*)) };
}

/// [`note()`](crate::terminal::note) of a format string.
macro_rules! note {
    ($($text:tt)*) => { $crate::terminal::note(format_args!($($text)*)) };
}
