//! File descriptors for files that must be written.
//!
//! The process keeps a few descriptors in reserve. When its table is full, an operation that saves something gets
//! them, and waits if that is not enough: a flood of connections or a lowered limit delays a checkpoint and does not
//! end a run.

use std::error::Error;
use std::fs::File;
use std::io;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;

/// Number of descriptors in reserve: a directory, a file and what the libraries below them open.
const RESERVE: usize = 8;

/// Pause between two attempts.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// Maximum duration of all attempts.
const MAX_WAIT: Duration = Duration::from_secs(600);

/// Descriptors held in reserve.
static RESERVED: Mutex<Vec<File>> = Mutex::new(Vec::new());

/// Runs `operation`, which opens files, again while it fails because the table of file descriptors is full, up to ten
/// minutes. It starts from the beginning every time.
///
/// # Errors
/// The operation's error.
pub fn wait_for_descriptor<T, E: Error + 'static>(
    operation: impl FnMut() -> Result<T, E>,
) -> Result<T, E> {
    repeat_while_full(operation, RETRY_INTERVAL, MAX_WAIT)
}

fn repeat_while_full<T, E: Error + 'static>(
    mut operation: impl FnMut() -> Result<T, E>,
    interval: Duration,
    max_wait: Duration,
) -> Result<T, E> {
    refill();
    let started = Instant::now();
    let mut waits = false;
    loop {
        match operation() {
            Err(error) if is_full(&error) && started.elapsed() < max_wait => {
                let released = std::mem::take(&mut *reserved());
                if released.is_empty() {
                    if !waits {
                        tracing::warn!(%error, "no file descriptor is free: saving waits for one");
                    }
                    waits = true;
                    thread::sleep(interval);
                }
            }
            result => return result,
        }
    }
}

fn reserved() -> std::sync::MutexGuard<'static, Vec<File>> {
    RESERVED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Opens descriptors until the reserve is complete or the table is full.
fn refill() {
    let mut reserved = reserved();
    while reserved.len() < RESERVE {
        let Ok(file) = File::open("/dev/null") else {
            return;
        };
        reserved.push(file);
    }
}

/// Whether the error, or one that it was caused by, says that the table of the process or of the system is full.
fn is_full(error: &(dyn Error + 'static)) -> bool {
    let causes = std::iter::successors(Some(error), |&error| error.source());
    let mut codes = causes.filter_map(|error| error.downcast_ref::<io::Error>()?.raw_os_error());
    let full = [Errno::MFILE, Errno::NFILE].map(Errno::raw_os_error);
    codes.any(|code| full.contains(&code))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Error of a crate that reads files: names one, and the operating system's error as its cause.
    #[derive(Debug, thiserror::Error)]
    #[error("failed to read {file}")]
    struct NamedFileError {
        file: &'static str,
        source: io::Error,
    }

    fn full() -> io::Error {
        io::Error::from_raw_os_error(Errno::MFILE.raw_os_error())
    }

    #[test]
    fn a_full_table_is_recognised_as_the_cause_of_another_error() {
        let mut causes = vec![io::Error::from(io::ErrorKind::NotFound), full(), full()];
        let open = || match causes.pop() {
            Some(source) => Err(NamedFileError {
                file: "LICENSE",
                source,
            }),
            None => Ok(()),
        };
        let error = repeat_while_full(open, Duration::ZERO, MAX_WAIT).unwrap_err();
        assert_eq!(error.source.kind(), io::ErrorKind::NotFound);
        assert!(causes.is_empty(), "both full tables were waited for");
    }

    #[test]
    fn a_full_table_is_waited_for_and_other_errors_are_returned() {
        let pause = Duration::ZERO;
        let mut left = 5;
        let opened = repeat_while_full(
            || match left {
                0 => Ok("opened"),
                _ => {
                    left -= 1;
                    Err(full())
                }
            },
            pause,
            MAX_WAIT,
        );
        assert_eq!(opened.unwrap(), "opened");
        let mut calls = 0;
        let other = repeat_while_full(
            || {
                calls += 1;
                Err::<(), _>(io::Error::from(io::ErrorKind::NotFound))
            },
            pause,
            MAX_WAIT,
        );
        assert_eq!(
            (calls, other.unwrap_err().kind()),
            (1, io::ErrorKind::NotFound)
        );
        let never = repeat_while_full(|| Err::<(), _>(full()), pause, Duration::ZERO);
        assert!(is_full(&never.unwrap_err()));
    }
}
