//! Files as text, unpacked: by what they begin with, whatever their names.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Cursor, Read},
    path::Path,
};

use flate2::read::MultiGzDecoder;

use crate::error::DatasetError;

/// Bytes that tell one kind of file from the others.
const HEAD: usize = 8;

/// What a file is, by its first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Plain,
    Gzip,
    Zstd,
    Parquet,
    /// Something that is not read, and how to make of it what is.
    Foreign(&'static str),
}

impl Kind {
    fn of(head: &[u8]) -> Self {
        match head {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            // A frame to be skipped, with which some writers begin (pzstd, seekable zstd).
            [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            [b'P', b'A', b'R', b'1', ..] => Self::Parquet,
            [b'A', b'R', b'R', b'O', b'W', b'1', ..] | [0xff, 0xff, 0xff, 0xff, ..] => {
                Self::Foreign("an Arrow file: write the data set as Parquet (Dataset.to_parquet)")
            }
            [b'P', b'K', 3, 4, ..] => Self::Foreign("a zip archive: unpack it"),
            [b'B', b'Z', b'h', ..] => Self::Foreign("compressed by bzip2: pack it by gzip or zstd"),
            [0xfd, b'7', b'z', b'X', b'Z', ..] => {
                Self::Foreign("compressed by xz: pack it by gzip or zstd")
            }
            [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => Self::Foreign("UTF-16: write it as UTF-8"),
            _ => Self::Plain,
        }
    }
}

/// What the file is.
pub(crate) fn kind(path: &Path) -> Result<Kind, DatasetError> {
    let (head, _) = File::open(path).and_then(head).map_err(unreadable(path))?;
    Ok(Kind::of(&head))
}

/// The text of a file, unpacked when it is gzip or zstd.
///
/// # Errors
/// When it cannot be read, or is of a kind that has no lines.
pub fn open(path: &Path) -> Result<Box<dyn BufRead>, DatasetError> {
    let file = File::open(path).map_err(unreadable(path))?;
    unpacked(path, file)
}

/// The text of `input`, unpacked when it is gzip or zstd; errors call it `name`.
///
/// # Errors
/// When it cannot be read, or is of a kind that has no lines.
pub fn unpacked(name: &Path, input: impl Read + 'static) -> Result<Box<dyn BufRead>, DatasetError> {
    let (head, rest) = head(input).map_err(unreadable(name))?;
    let kind = Kind::of(&head);
    let whole = Cursor::new(head).chain(rest);
    let foreign = |reason: &str| DatasetError::File {
        path: name.to_owned(),
        reason: format!("it is {reason}"),
    };
    Ok(match kind {
        Kind::Plain => Box::new(BufReader::new(whole)),
        Kind::Gzip => Box::new(BufReader::new(MultiGzDecoder::new(whole))),
        Kind::Zstd => {
            let decoder = zstd::stream::read::Decoder::new(whole).map_err(unreadable(name))?;
            Box::new(BufReader::new(decoder))
        }
        Kind::Parquet => {
            return Err(foreign(
                "Parquet, which has no lines: write it as JSON Lines",
            ));
        }
        Kind::Foreign(reason) => return Err(foreign(reason)),
    })
}

fn head<R: Read>(mut input: R) -> io::Result<(Vec<u8>, R)> {
    let mut head = Vec::with_capacity(HEAD);
    input.by_ref().take(HEAD as u64).read_to_end(&mut head)?;
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
    fn what_is_packed_is_known_by_its_first_bytes() {
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
            "a torn file is an error"
        );
    }

    #[test]
    fn what_is_not_read_says_how_it_would_be() {
        for (bytes, says) in [
            (
                &b"PAR1...."[..],
                "rows.txt: it is Parquet, which has no lines",
            ),
            (b"ARROW1\0\0", "to_parquet"),
            (b"PK\x03\x04...", "a zip archive"),
            (b"BZh91AY&", "by bzip2"),
            (b"\xff\xfe{\0", "UTF-16"),
        ] {
            let error = text(bytes).expect_err(says);
            assert!(error.contains(says), "{error}");
        }
    }
}
