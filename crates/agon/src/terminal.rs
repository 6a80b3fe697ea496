//! Lines for people and pipes. `println!` and `eprintln!` panic when the other end is gone, which would take the
//! task that prints along: a run whose terminal was closed could then no longer be stopped.

use std::{fmt, io, io::Write};

/// Writes a line to standard output; a closed pipe is no error.
///
/// # Errors
/// When it cannot be written for another reason: what was asked for must not be lost in silence.
pub(crate) fn line(text: fmt::Arguments<'_>) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}

/// Writes to standard error what is good to know; where nobody listens, nothing happens.
pub(crate) fn note(text: fmt::Arguments<'_>) {
    drop(writeln!(io::stderr().lock(), "{text}"));
}

/// [`line()`](crate::terminal::line) of a format string: a `Result`.
macro_rules! out {
    ($($text:tt)*) => { $crate::terminal::line(format_args!($($text)*)) };
}

/// [`note()`](crate::terminal::note) of a format string.
macro_rules! note {
    ($($text:tt)*) => { $crate::terminal::note(format_args!($($text)*)) };
}
