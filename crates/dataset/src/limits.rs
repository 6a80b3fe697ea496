//! Limits of data files, which may be untrusted: files are read as streams, and what they expand to is
//! bounded.

use std::{
    cell::Cell,
    fs::{self, File, FileType},
    io::{self, Read},
    os::unix::fs::FileTypeExt,
    path::Path,
    rc::Rc,
};

use crate::error::DatasetError;

/// Maximum size of one file's rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileLimits {
    /// Decompressed bytes; in Parquet, of the columns that are read.
    pub max_file_bytes: u64,
    /// Number of rows.
    pub max_rows: u64,
    /// Section of the settings with these keys; `None` if fixed.
    pub section: Option<&'static str>,
}

impl Default for FileLimits {
    fn default() -> Self {
        Self {
            max_file_bytes: 4 << 30,
            max_rows: 10_000_000,
            section: None,
        }
    }
}

/// Bytes up to which a file may expand by any factor.
const EXPANDED_BYTES: u64 = 256 << 20;
/// Largest factor by which a file may expand beyond that; text is compressed to a tenth.
const MAX_EXPANSION: u64 = 200;
/// Bytes that a row takes besides its text.
const ROW_BYTES: u64 = 64;

impl FileLimits {
    /// Suffix of an error about the limit `key`, with the remedy.
    fn remedy(self, key: &str) -> String {
        match self.section {
            Some(section) => format!("the maximum of {section}.{key}: raise it, or split the file"),
            None => "the maximum: split the file".to_owned(),
        }
    }

    /// Checks the number of rows.
    pub(crate) fn check_rows(self, rows: u64) -> Result<(), String> {
        if rows > self.max_rows {
            let (most, remedy) = (self.max_rows, self.remedy("max_rows"));
            return Err(format!("it has more than {most} rows, {remedy}"));
        }
        Ok(())
    }

    /// Checks decompressed bytes.
    pub(crate) fn check_bytes(self, bytes: u64) -> Result<(), String> {
        if bytes > self.max_file_bytes {
            let (most, remedy) = (self.max_file_bytes, self.remedy("max_file_bytes"));
            return Err(format!("its rows have more than {most} bytes, {remedy}"));
        }
        Ok(())
    }
}

/// Checks that `packed` bytes of a file do not expand to many times as much.
pub(crate) fn check_expansion(bytes: u64, packed: u64, remedy: &str) -> Result<(), String> {
    if bytes > EXPANDED_BYTES && bytes / MAX_EXPANSION > packed {
        return Err(format!(
            "it expands to more than {MAX_EXPANSION} times its size, to {bytes} bytes so far: {remedy}"
        ));
    }
    Ok(())
}

/// Bytes of the rows of a Parquet file that were read so far.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowBytes {
    pub(crate) limits: FileLimits,
    /// Size of the file.
    pub(crate) packed: u64,
    pub(crate) read: u64,
}

impl RowBytes {
    /// Counts a row with texts of this many bytes.
    pub(crate) fn add(&mut self, text: u64) -> Result<(), String> {
        self.read = self.read.saturating_add(text).saturating_add(ROW_BYTES);
        self.limits.check_bytes(self.read)?;
        let remedy = "write the rows as JSON Lines if that is intended";
        check_expansion(self.read, self.packed, remedy)
    }
}

/// Opens a regular file: a pipe or a device may never end. At most the size that it has now is read.
pub(crate) fn open_regular(path: &Path) -> Result<io::Take<File>, DatasetError> {
    let unreadable = |source| DatasetError::Unreadable {
        path: path.to_owned(),
        source,
    };
    let metadata = fs::metadata(path).map_err(unreadable)?;
    if !metadata.is_file() {
        return Err(DatasetError::File {
            path: path.to_owned(),
            reason: format!(
                "it is {}, not a regular file: write the rows to a file",
                kind(metadata.file_type())
            ),
        });
    }
    let file = File::open(path).map_err(unreadable)?;
    Ok(file.take(metadata.len()))
}

fn kind(kind: FileType) -> &'static str {
    if kind.is_dir() {
        "a folder"
    } else if kind.is_fifo() {
        "a named pipe"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "a device"
    }
}

/// Reader that counts its bytes.
pub(crate) struct CountingReader<R> {
    pub(crate) inner: R,
    pub(crate) count: Rc<Cell<u64>>,
}

impl<R: Read> Read for CountingReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.inner.read(buffer)?;
        self.count.set(self.count.get() + length as u64);
        Ok(length)
    }
}

/// Reader of a decompressed stream, which fails beyond its limits.
pub(crate) struct BoundedReader<R> {
    pub(crate) inner: R,
    pub(crate) limits: FileLimits,
    /// Bytes of the stream so far.
    pub(crate) read: u64,
    /// Compressed bytes so far; `None` if the stream is not compressed.
    pub(crate) packed: Option<Rc<Cell<u64>>>,
}

impl<R: Read> Read for BoundedReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.inner.read(buffer)?;
        self.read += length as u64;
        self.limits
            .check_bytes(self.read)
            .map_err(io::Error::other)?;
        if let Some(packed) = &self.packed {
            let remedy = "decompress it if that is intended";
            check_expansion(self.read, packed.get(), remedy).map_err(io::Error::other)?;
        }
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_end_with_an_error_beyond_their_limits() {
        let limits = FileLimits {
            max_file_bytes: 1 << 30,
            section: Some("prompts"),
            ..FileLimits::default()
        };
        let read = |limits, packed: Option<u64>| {
            let mut reader = BoundedReader {
                inner: io::repeat(b' ').take(2 << 30),
                limits,
                read: 0,
                packed: packed.map(|bytes| Rc::new(Cell::new(bytes))),
            };
            let mut buffer = vec![0; 1 << 20];
            let mut total = 0u64;
            loop {
                match reader.read(&mut buffer) {
                    Ok(0) => return Ok(total),
                    Ok(length) => total += length as u64,
                    Err(error) => return Err((total >> 20, error.to_string())),
                }
            }
        };
        let (total, error) = read(limits, None).expect_err("too large");
        assert!(
            total == 1024 && error.contains("prompts.max_file_bytes"),
            "{error}"
        );
        let (total, error) = read(limits, Some(100)).expect_err("a bomb");
        assert!(
            total == 256 && error.contains("more than 200 times"),
            "{error}"
        );
        let (total, error) = read(limits, Some(2 << 20)).expect_err("a bomb");
        assert!(
            total == 400 && error.contains("more than 200 times"),
            "{error}"
        );
        assert_eq!(read(FileLimits::default(), Some(100 << 20)), Ok(2 << 30));
    }

    #[test]
    fn rows_count_besides_their_text() {
        let mut bytes = RowBytes {
            limits: FileLimits::default(),
            packed: 1000,
            read: 0,
        };
        let added = (0..10_000_000).find_map(|row| Some((row, bytes.add(0).err()?)));
        let (rows, error) = added.expect("a bomb");
        assert_eq!(rows, EXPANDED_BYTES / ROW_BYTES);
        assert!(error.contains("as JSON Lines"), "{error}");
        let error = FileLimits::default()
            .check_rows(10_000_001)
            .expect_err("too many");
        assert!(error.contains("more than 10000000 rows"), "{error}");
    }
}
