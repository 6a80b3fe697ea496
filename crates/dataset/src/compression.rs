//! Decompression of files, by their magic numbers and regardless of their names.

use std::{
    cell::Cell,
    io::{self, BufRead, BufReader, Cursor, Read},
    path::Path,
    rc::Rc,
};

use flate2::read::MultiGzDecoder;

use crate::{
    error::DatasetError,
    limits::{BoundedReader, CountingReader, FileLimits, open_regular},
};

/// Length of the longest magic number, in bytes.
const MAGIC_BYTES: usize = 8;

/// Size of the buffer of decompressed text.
const BUFFER_BYTES: usize = 64 << 10;

/// Format of a file, by its magic number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FileFormat {
    Plain,
    Gzip,
    Zstd,
    Parquet,
    /// An unsupported format: its description and how to convert it.
    Unsupported(&'static str),
}

impl FileFormat {
    fn of(head: &[u8]) -> Self {
        match head {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            // A skippable frame, with which some compressors begin (pzstd, seekable zstd).
            [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            [b'P', b'A', b'R', b'1', ..] => Self::Parquet,
            [b'A', b'R', b'R', b'O', b'W', b'1', ..] | [0xff, 0xff, 0xff, 0xff, ..] => {
                Self::Unsupported(
                    "an Arrow file: write the data set as Parquet (Dataset.to_parquet)",
                )
            }
            [b'P', b'K', 3, 4, ..] => Self::Unsupported("a zip archive: extract it"),
            [b'B', b'Z', b'h', ..] => {
                Self::Unsupported("compressed with bzip2: compress it with gzip or zstd")
            }
            [0xfd, b'7', b'z', b'X', b'Z', ..] => {
                Self::Unsupported("compressed with xz: compress it with gzip or zstd")
            }
            [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => Self::Unsupported("UTF-16: convert it to UTF-8"),
            _ => Self::Plain,
        }
    }
}

/// The format of a file.
pub(crate) fn format_of(path: &Path) -> Result<FileFormat, DatasetError> {
    let (head, _) = head(open_regular(path)?).map_err(unreadable(path))?;
    Ok(FileFormat::of(&head))
}

/// Opens a regular file as text, decompressing gzip and zstd, within the default limits.
///
/// # Errors
/// When it cannot be read, or its format is not text; reading fails beyond the limits.
pub fn open(path: &Path) -> Result<Box<dyn BufRead>, DatasetError> {
    open_within(path, FileLimits::default())
}

/// Like [`open`], within these limits.
pub(crate) fn open_within(
    path: &Path,
    limits: FileLimits,
) -> Result<Box<dyn BufRead>, DatasetError> {
    unpacked_within(path, open_regular(path)?, limits)
}

/// Reads `input` as text, decompressing gzip and zstd, within the default limits; errors refer to it as `name`.
///
/// # Errors
/// When it cannot be read, or its format is not text; reading fails beyond the limits.
pub fn unpacked(name: &Path, input: impl Read + 'static) -> Result<Box<dyn BufRead>, DatasetError> {
    unpacked_within(name, input, FileLimits::default())
}

fn unpacked_within(
    name: &Path,
    input: impl Read + 'static,
    limits: FileLimits,
) -> Result<Box<dyn BufRead>, DatasetError> {
    let packed = Rc::new(Cell::new(0));
    let input = CountingReader {
        inner: input,
        count: Rc::clone(&packed),
    };
    let (head, rest) = head(input).map_err(unreadable(name))?;
    let format = FileFormat::of(&head);
    let stream = Cursor::new(head).chain(rest);
    let unsupported = |reason: &str| DatasetError::File {
        path: name.to_owned(),
        reason: format!("it is {reason}"),
    };
    Ok(match format {
        FileFormat::Plain => bounded(stream, limits, None),
        FileFormat::Gzip => bounded(MultiGzDecoder::new(stream), limits, Some(packed)),
        FileFormat::Zstd => {
            let decoder = zstd::stream::read::Decoder::new(stream).map_err(unreadable(name))?;
            bounded(decoder, limits, Some(packed))
        }
        FileFormat::Parquet => {
            return Err(unsupported(
                "Parquet, which has no lines: write it as JSON Lines",
            ));
        }
        FileFormat::Unsupported(reason) => return Err(unsupported(reason)),
    })
}

fn bounded(
    stream: impl Read + 'static,
    limits: FileLimits,
    packed: Option<Rc<Cell<u64>>>,
) -> Box<dyn BufRead> {
    let reader = BoundedReader {
        inner: stream,
        limits,
        read: 0,
        packed,
    };
    Box::new(BufReader::with_capacity(BUFFER_BYTES, reader))
}

/// Reads the magic number; returns it and the rest of the stream.
fn head<R: Read>(mut input: R) -> io::Result<(Vec<u8>, R)> {
    let mut head = Vec::with_capacity(MAGIC_BYTES);
    input
        .by_ref()
        .take(MAGIC_BYTES as u64)
        .read_to_end(&mut head)?;
    Ok((head, input))
}

pub(crate) fn unreadable(path: &Path) -> impl Fn(io::Error) -> DatasetError {
    let path = path.to_owned();
    move |source| DatasetError::Unreadable {
        path: path.clone(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use flate2::{Compression, write::GzEncoder};

    use super::*;

    fn text(bytes: &[u8]) -> Result<String, String> {
        let input = Cursor::new(bytes.to_vec());
        let mut open = unpacked(Path::new("rows.txt"), input).map_err(|error| error.to_string())?;
        let mut text = String::new();
        open.read_to_string(&mut text)
            .map_err(|error| error.to_string())?;
        Ok(text)
    }

    #[test]
    fn compressed_files_are_recognised_by_their_magic_number() {
        let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
        gzip.write_all(b"rows\n").expect("memory");
        let gzip = gzip.finish().expect("memory");
        let zstd = zstd::encode_all(&b"rows\n"[..], 1).expect("memory");
        let skipped = [&[0x50, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 9, 9], &zstd[..]].concat();
        let twice = [&gzip[..], &gzip].concat();
        for packed in [&b"rows\n"[..], &gzip, &zstd, &skipped, &twice] {
            let text = text(packed).expect("text");
            assert!(text == "rows\n" || text == "rows\nrows\n", "{text:?}");
        }
        assert_eq!(text(b""), Ok(String::new()));
        assert!(
            text(&gzip[..gzip.len() - 4]).is_err(),
            "a truncated file is an error"
        );
    }

    #[test]
    fn unsupported_formats_are_reported_with_a_remedy() {
        for (bytes, expected) in [
            (
                &b"PAR1...."[..],
                "rows.txt: it is Parquet, which has no lines",
            ),
            (b"ARROW1\0\0", "to_parquet"),
            (b"PK\x03\x04...", "a zip archive"),
            (b"BZh91AY&", "with bzip2"),
            (b"\xff\xfe{\0", "UTF-16"),
        ] {
            let error = text(bytes).expect_err(expected);
            assert!(error.contains(expected), "{error}");
        }
    }
}
