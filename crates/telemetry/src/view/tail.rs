//! Follower of a line-based file that another process appends to.
//!
//! An incomplete last line is left for the next call. A file that was truncated or replaced is read again from its
//! start. This part does not know the contents of the lines.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Read position of a followed file.
#[derive(Debug)]
pub(crate) struct Tail {
    path: PathBuf,
    /// Start of the next line, in bytes.
    offset: u64,
    /// Device and inode of the file that was read.
    file: Option<(u64, u64)>,
}

/// Consumer of lines.
pub(crate) trait LineSink {
    /// Discards all lines: the file is read again from its start.
    fn reset(&mut self);

    /// Handles a complete line, without its line feed, that starts at byte `offset` of the file.
    fn line(&mut self, offset: u64, line: &[u8]);
}

impl Tail {
    /// A follower at the start of `path`, which need not exist.
    pub(crate) fn new(path: PathBuf) -> Self {
        Self {
            path,
            offset: 0,
            file: None,
        }
    }

    /// Path of the followed file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Passes all new complete lines to `sink`.
    pub(crate) fn follow(&mut self, sink: &mut impl LineSink) -> io::Result<()> {
        let mut file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if self.file.take().is_some() {
                    self.offset = 0;
                    sink.reset();
                }
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let metadata = file.metadata()?;
        let identity = (metadata.dev(), metadata.ino());
        let is_replaced = self.file.is_some_and(|known| known != identity);
        if is_replaced || metadata.len() < self.offset {
            self.offset = 0;
            sink.reset();
        }
        self.file = Some(identity);
        if metadata.len() == self.offset {
            return Ok(());
        }
        file.seek(SeekFrom::Start(self.offset))?;
        self.read(BufReader::with_capacity(1 << 16, file), sink)
    }

    fn read(&mut self, mut file: impl BufRead, sink: &mut impl LineSink) -> io::Result<()> {
        let mut line = Vec::new();
        while file.read_until(b'\n', &mut line)? > 0 {
            let Some(complete) = line.strip_suffix(b"\n") else {
                return Ok(());
            };
            sink.line(self.offset, complete);
            self.offset += line.len() as u64;
            line.clear();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[derive(Default)]
    struct RecordedLines {
        resets: usize,
        lines: Vec<(u64, String)>,
    }

    impl LineSink for RecordedLines {
        fn reset(&mut self) {
            self.resets += 1;
            self.lines.clear();
        }

        fn line(&mut self, offset: u64, line: &[u8]) {
            let text = String::from_utf8(line.to_vec()).unwrap();
            self.lines.push((offset, text));
        }
    }

    #[test]
    fn complete_lines_are_read_once_and_again_when_the_file_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lines");
        let (mut tail, mut seen) = (Tail::new(path.clone()), RecordedLines::default());
        let other = directory.path().join("other");
        let replaced = |text: &str| {
            fs::write(&other, text).unwrap();
            fs::rename(&other, &path).unwrap();
        };
        let appended = |text: &str| {
            let old = fs::read_to_string(&path).unwrap_or_default();
            fs::write(&path, old + text).unwrap();
        };
        type TailCase<'a> = (&'a dyn Fn(), usize, &'a [(u64, &'a str)]);
        let cases: [TailCase<'_>; 7] = [
            (&|| (), 0, &[]),
            (&|| appended("a\nbb\nc"), 0, &[(0, "a"), (2, "bb")]),
            (&|| (), 0, &[(0, "a"), (2, "bb")]),
            (&|| appended("c\n"), 0, &[(0, "a"), (2, "bb"), (5, "cc")]),
            (&|| fs::write(&path, "a\n").unwrap(), 1, &[(0, "a")]),
            (&|| replaced("a\nx\n"), 2, &[(0, "a"), (2, "x")]),
            (&|| fs::remove_file(&path).unwrap(), 3, &[]),
        ];
        for (number, (change, resets, expected)) in cases.into_iter().enumerate() {
            change();
            tail.follow(&mut seen).unwrap();
            let lines: Vec<_> = seen.lines.iter().map(|(at, s)| (*at, s.as_str())).collect();
            assert_eq!(
                (seen.resets, lines.as_slice()),
                (resets, expected),
                "{number}"
            );
        }
    }
}
