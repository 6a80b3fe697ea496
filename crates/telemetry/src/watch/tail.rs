//! The whole lines of a file that another process appends to.
//!
//! A line that is still being written is left for the next look. A file that became shorter, or that
//! another one took the place of, is read again from its start. This part does not know what the lines say.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// How far a file has been read.
#[derive(Debug)]
pub(crate) struct Tail {
    path: PathBuf,
    /// Where the next line begins, in bytes.
    offset: u64,
    /// The file that was read: its device and number.
    file: Option<(u64, u64)>,
}

/// What is done with lines.
pub(crate) trait Follow {
    /// Forget every line: they come again, as far as they are still there.
    fn restart(&mut self);

    /// A whole line without its end, which begins at byte `offset` of the file.
    fn line(&mut self, offset: u64, line: &[u8]);
}

impl Tail {
    /// Nothing has been read yet. The file need not be there.
    pub(crate) fn new(path: PathBuf) -> Self {
        Self {
            path,
            offset: 0,
            file: None,
        }
    }

    /// The file that is followed.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Hands every line that was not read yet to `reader`.
    pub(crate) fn follow(&mut self, reader: &mut impl Follow) -> io::Result<()> {
        let mut file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if self.file.take().is_some() {
                    self.offset = 0;
                    reader.restart();
                }
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let metadata = file.metadata()?;
        let identity = (metadata.dev(), metadata.ino());
        let is_another = self.file.is_some_and(|known| known != identity);
        if is_another || metadata.len() < self.offset {
            self.offset = 0;
            reader.restart();
        }
        self.file = Some(identity);
        if metadata.len() == self.offset {
            return Ok(());
        }
        file.seek(SeekFrom::Start(self.offset))?;
        self.read(BufReader::with_capacity(1 << 16, file), reader)
    }

    fn read(&mut self, mut file: impl BufRead, reader: &mut impl Follow) -> io::Result<()> {
        let mut line = Vec::new();
        while file.read_until(b'\n', &mut line)? > 0 {
            let Some(whole) = line.strip_suffix(b"\n") else {
                return Ok(());
            };
            reader.line(self.offset, whole);
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
    struct Seen {
        restarts: usize,
        lines: Vec<(u64, String)>,
    }

    impl Follow for Seen {
        fn restart(&mut self) {
            self.restarts += 1;
            self.lines.clear();
        }

        fn line(&mut self, offset: u64, line: &[u8]) {
            let text = String::from_utf8(line.to_vec()).unwrap();
            self.lines.push((offset, text));
        }
    }

    #[test]
    fn whole_lines_are_read_once_and_again_when_the_file_is_another() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lines");
        let (mut tail, mut seen) = (Tail::new(path.clone()), Seen::default());
        let other = directory.path().join("other");
        let replaced = |text: &str| {
            fs::write(&other, text).unwrap();
            fs::rename(&other, &path).unwrap();
        };
        let appended = |text: &str| {
            let old = fs::read_to_string(&path).unwrap_or_default();
            fs::write(&path, old + text).unwrap();
        };
        type Case<'a> = (&'a dyn Fn(), usize, &'a [(u64, &'a str)]);
        let cases: [Case<'_>; 7] = [
            (&|| (), 0, &[]),
            (&|| appended("a\nbb\nc"), 0, &[(0, "a"), (2, "bb")]),
            (&|| (), 0, &[(0, "a"), (2, "bb")]),
            (&|| appended("c\n"), 0, &[(0, "a"), (2, "bb"), (5, "cc")]),
            (&|| fs::write(&path, "a\n").unwrap(), 1, &[(0, "a")]),
            (&|| replaced("a\nx\n"), 2, &[(0, "a"), (2, "x")]),
            (&|| fs::remove_file(&path).unwrap(), 3, &[]),
        ];
        for (number, (change, restarts, expected)) in cases.into_iter().enumerate() {
            change();
            tail.follow(&mut seen).unwrap();
            let lines: Vec<_> = seen.lines.iter().map(|(at, s)| (*at, s.as_str())).collect();
            assert_eq!(
                (seen.restarts, lines.as_slice()),
                (restarts, expected),
                "{number}"
            );
        }
    }
}
