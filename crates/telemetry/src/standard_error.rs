//! Standard error that never stops the program.
//!
//! A write neither fails nor blocks for long: with a full pipe, a full disk or a closed reader the line is dropped, and
//! the number of dropped lines is reported later. Does not know what is written.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;

/// Time that the first write waits for a reader; those after it do not wait until there is room again.
const WRITE_TIMEOUT: Duration = Duration::from_secs(2);

/// Size of a write that does not block a pipe that has room: `PIPE_BUF`.
const BLOCK_BYTES: usize = 4096;

/// Whether the last write found no room.
static IS_FULL: AtomicBool = AtomicBool::new(false);

/// Number of writes that were left out since.
static LOST: AtomicU64 = AtomicU64::new(0);

/// Writer to standard error; its writes never fail, and wait two seconds at most.
#[derive(Debug, Clone, Copy, Default)]
pub struct StandardError;

impl StandardError {
    /// Writes a line; without effect where nobody can read it.
    pub fn line(text: std::fmt::Arguments<'_>) {
        // One write, so that lines of several threads do not mix.
        write_all(format!("{text}\n").as_bytes());
    }
}

impl Write for StandardError {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        write_all(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn write_all(bytes: &[u8]) {
    let mut stderr = io::stderr().lock();
    if !has_room(&stderr) {
        LOST.fetch_add(1, Ordering::Relaxed);
        return;
    }
    let lost = LOST.swap(0, Ordering::Relaxed);
    if lost > 0 {
        // Errors mean a full disk or a closed pipe; nobody could be told.
        writeln!(
            stderr,
            "({lost} lines were left out: nobody read standard error)"
        )
        .ok();
    }
    for block in bytes.chunks(BLOCK_BYTES) {
        if !has_room(&stderr) || stderr.write_all(block).is_err() {
            return;
        }
    }
}

/// Whether a block can be written without blocking, now or soon.
fn has_room(stderr: &io::StderrLock<'_>) -> bool {
    let patience = match IS_FULL.load(Ordering::Relaxed) {
        true => Duration::ZERO,
        false => WRITE_TIMEOUT,
    };
    let has_room = is_writable(stderr, patience);
    IS_FULL.store(!has_room, Ordering::Relaxed);
    has_room
}

/// Whether a write does not block within `patience`; an error of the file counts, since it is reported at once.
fn is_writable(file: &impl std::os::fd::AsFd, patience: Duration) -> bool {
    let mut files = [PollFd::new(file, PollFlags::OUT)];
    let patience = Timespec::try_from(patience).ok();
    match poll(&mut files, patience.as_ref()) {
        Ok(ready) => ready > 0,
        // A signal came; the write is tried.
        Err(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_pipe_is_not_writable_until_it_is_read() {
        let (mut reader, mut writer) = io::pipe().unwrap();
        assert!(is_writable(&writer, Duration::ZERO));
        let block = [0; BLOCK_BYTES];
        let mut written = 0;
        while is_writable(&writer, Duration::ZERO) {
            writer.write_all(&block).unwrap();
            written += block.len();
        }
        assert!(written >= BLOCK_BYTES);
        let mut read = vec![0; written];
        io::Read::read_exact(&mut reader, &mut read).unwrap();
        assert!(is_writable(&writer, Duration::ZERO));
        // A write to it fails at once.
        drop(reader);
        assert!(is_writable(&writer, Duration::ZERO));
    }
}
