//! Follower of a line-based file that another process appends to.
//!
//! An incomplete last line is left for the next call. A file that was truncated or replaced is read again from its
//! start. Overlong lines are skipped, so that memory is bounded. This part does not know the contents of the lines.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::run_dir::files::open_inside;

/// Maximum length of a line in bytes.
const MAX_LINE_BYTES: u64 = 64 << 20;

/// Maximum size of a file in bytes: far above the log of a run of weeks, and far below a sparse file that takes hours to
/// read.
const MAX_FILE_BYTES: u64 = 64 << 30;

/// Read position of a followed file.
#[derive(Debug)]
pub(crate) struct Tail {
    root: PathBuf,
    name: &'static str,
    path: PathBuf,
    /// Start of the next line, in bytes.
    offset: u64,
    /// Device and inode of the file that was read.
    file: Option<(u64, u64)>,
    max_line_bytes: u64,
    /// Whether `offset` is within an overlong line.
    skips: bool,
}

/// Consumer of lines.
pub(crate) trait LineSink {
    /// Discards all lines: the file is read again from its start.
    fn reset(&mut self);

    /// Handles a complete line, without its line feed, that starts at byte `offset` of the file.
    fn line(&mut self, offset: u64, line: &[u8]);

    /// Counts a line that is too long to be handled.
    fn overlong(&mut self);
}

impl Tail {
    /// A follower at the start of the file `name` of the directory `root`, which need not exist.
    pub(crate) fn new(root: &Path, name: &'static str) -> Self {
        Self {
            root: root.to_owned(),
            name,
            path: root.join(name),
            offset: 0,
            file: None,
            max_line_bytes: MAX_LINE_BYTES,
            skips: false,
        }
    }

    /// Opens the file, which must be a regular file of the directory.
    pub(crate) fn open(&self) -> io::Result<File> {
        open_inside(&self.root, self.name)
    }

    /// Path of the followed file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Passes all new complete lines to `sink`.
    pub(crate) fn follow(&mut self, sink: &mut impl LineSink) -> io::Result<()> {
        let mut file = match self.open() {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if self.file.take().is_some() {
                    self.start_over(sink);
                }
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let metadata = file.metadata()?;
        if metadata.len() > MAX_FILE_BYTES {
            let bytes = metadata.len();
            let reason =
                format!("it has {bytes} bytes, more than the {MAX_FILE_BYTES} that are read");
            return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
        }
        let identity = (metadata.dev(), metadata.ino());
        let is_replaced = self.file.is_some_and(|known| known != identity);
        if is_replaced || metadata.len() < self.offset {
            self.start_over(sink);
        }
        self.file = Some(identity);
        if metadata.len() == self.offset {
            return Ok(());
        }
        file.seek(SeekFrom::Start(self.offset))?;
        self.read(BufReader::with_capacity(1 << 16, file), sink)
    }

    fn start_over(&mut self, sink: &mut impl LineSink) {
        self.offset = 0;
        self.skips = false;
        sink.reset();
    }

    fn read(&mut self, mut file: impl BufRead, sink: &mut impl LineSink) -> io::Result<()> {
        let mut line = Vec::new();
        loop {
            line.clear();
            let read = Read::by_ref(&mut file)
                .take(self.max_line_bytes)
                .read_until(b'\n', &mut line)? as u64;
            let complete = line.strip_suffix(b"\n");
            match complete {
                Some(_) if self.skips => self.skips = false,
                Some(complete) => sink.line(self.offset, complete),
                None if read < self.max_line_bytes && !self.skips => return Ok(()),
                None if !self.skips => {
                    self.skips = true;
                    sink.overlong();
                }
                None if read == 0 => return Ok(()),
                None => {}
            }
            self.offset += read;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[derive(Default)]
    struct RecordedLines {
        resets: usize,
        overlong: usize,
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

        fn overlong(&mut self) {
            self.overlong += 1;
        }
    }

    #[test]
    fn a_file_beyond_measure_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let sparse = File::create(directory.path().join("lines")).unwrap();
        sparse.set_len(MAX_FILE_BYTES + 1).unwrap();
        let mut tail = Tail::new(directory.path(), "lines");
        let error = tail.follow(&mut RecordedLines::default()).unwrap_err();
        assert!(error.to_string().contains("68719476737 bytes"), "{error}");
    }

    #[test]
    fn complete_lines_are_read_once_and_again_when_the_file_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lines");
        let (mut tail, mut seen) = (
            Tail::new(directory.path(), "lines"),
            RecordedLines::default(),
        );
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

    #[test]
    fn overlong_lines_are_skipped_and_counted() {
        type Lines<'a> = &'a [(u64, &'a str)];

        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lines");
        let mut tail = Tail {
            max_line_bytes: 4,
            ..Tail::new(directory.path(), "lines")
        };
        let mut seen = RecordedLines::default();
        let cases: [(&str, usize, Lines<'_>); 5] = [
            ("123\n1234", 1, &[(0, "123")]),
            ("123\n12345678901", 1, &[(0, "123")]),
            ("123\n12345678901\nab", 1, &[(0, "123")]),
            ("123\n12345678901\nabc\n", 1, &[(0, "123"), (16, "abc")]),
            (
                "123\n12345678901\nabc\n12345\n\n",
                2,
                &[(0, "123"), (16, "abc"), (26, "")],
            ),
        ];
        for (text, overlong, expected) in cases {
            fs::write(&path, text).unwrap();
            tail.follow(&mut seen).unwrap();
            let lines: Vec<_> = seen.lines.iter().map(|(at, s)| (*at, s.as_str())).collect();
            assert_eq!(
                (seen.overlong, lines.as_slice()),
                (overlong, expected),
                "{text:?}"
            );
            assert!(tail.offset <= text.len() as u64, "{text:?}");
        }
    }
}
