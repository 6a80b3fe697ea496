//! Reader of rows and of parsed values.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::Arc,
};

use serde_json::{Map, Value};

use crate::{
    columns::Columns,
    compression::{self, FileFormat},
    error::{DatasetError, RowPosition},
    files::files,
    json,
    json_rows::{JsonRows, RowSink},
    limits::FileLimits,
    parquet,
    parsed_row::ParsedRow,
    tally::Tally,
};

/// Maximum number of unread columns that are named in the log.
const MAX_LOGGED_COLUMNS: usize = 20;

/// Origin of a row: file and position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowSource {
    path: Arc<Path>,
    position: RowPosition,
}

impl RowSource {
    /// An error about this row with the given reason.
    #[must_use]
    pub fn refuse(&self, reason: impl Into<String>) -> DatasetError {
        DatasetError::Row {
            path: self.path.to_path_buf(),
            position: self.position,
            reason: reason.into(),
        }
    }
}

/// A row of a data set.
#[derive(Debug, Clone, PartialEq)]
pub struct DatasetRow {
    /// Origin of the row.
    pub source: RowSource,
    /// Columns, in file order.
    pub columns: Map<String, Value>,
}

/// A value with the origin of its row.
#[derive(Debug, Clone, PartialEq)]
pub struct WithSource<T> {
    /// Origin of the row.
    pub source: RowSource,
    /// The value.
    pub value: T,
}

/// Reads the rows of a file, of all files of a folder, or of the matches of a glob: JSON Lines, a JSON list, an object
/// with one list of rows, or Parquet. gzip, zstd and Parquet are recognised by their magic numbers. A byte order mark
/// is skipped; Python's `NaN` and `Infinity` are read as null.
///
/// # Errors
/// When a file cannot be read or exceeds the default limits, or a row is not a JSON object: with file and line.
pub fn read_rows(path: &Path) -> Result<Vec<DatasetRow>, DatasetError> {
    let mut rows = Vec::new();
    visit_rows(path, None, &mut |row| {
        rows.push(row);
        Ok(())
    })?;
    Ok(rows)
}

/// Checks that the rows of `path` can be read, within the default limits and as far as a format may read them.
///
/// # Errors
/// As [`read_rows`].
pub fn check(path: &Path) -> Result<(), DatasetError> {
    visit_rows(path, Some(&Columns::default()), &mut |_| Ok(()))
}

/// Passes each row to `each`; with `columns`, other columns may be null.
fn visit_rows(
    path: &Path,
    columns: Option<&Columns>,
    each: &mut dyn FnMut(DatasetRow) -> Result<(), DatasetError>,
) -> Result<(), DatasetError> {
    let limits = columns.map_or_else(FileLimits::default, |columns| columns.limits);
    for file in files(path)? {
        let path: Arc<Path> = file.into();
        let mut count = 0;
        visit_file(&path, columns, &mut |position, value| {
            count += 1;
            let checked = limits.check_rows(count);
            checked.map_err(|reason| DatasetError::file(&path, reason))?;
            let source = RowSource {
                path: Arc::clone(&path),
                position,
            };
            match value {
                Value::Object(columns) => each(DatasetRow { source, columns }),
                _ => Err(source.refuse(json::NOT_AN_OBJECT)),
            }
        })?;
    }
    Ok(())
}

fn visit_file(
    path: &Path,
    columns: Option<&Columns>,
    each: RowSink<'_>,
) -> Result<(), DatasetError> {
    if compression::format_of(path)? == FileFormat::Parquet
        || path.extension().is_some_and(|e| e == "parquet")
    {
        return parquet::read(path, columns, each);
    }
    let limits = columns.map_or_else(FileLimits::default, |columns| columns.limits);
    let open = || compression::open_within(path, limits);
    JsonRows { path, open: &open }.read(each)
}

/// Reads and parses the rows of `path` in any of the formats, and extracts a value from each. Logs the unread columns
/// once, and warnings about inconsistent rows once per file.
///
/// # Errors
/// As [`read_rows`], within the limits of `columns`; and the parse errors of a row and the errors of `extract`, with
/// file and line.
pub fn read<T>(
    path: &Path,
    columns: &Columns,
    extract: impl Fn(&ParsedRow<'_>) -> Result<T, String>,
) -> Result<Vec<WithSource<T>>, DatasetError> {
    let mut read = Vec::new();
    visit(path, columns, |source, row| {
        let value = extract(row).map_err(|reason| source.refuse(reason))?;
        let source = source.clone();
        read.push(WithSource { source, value });
        Ok(())
    })?;
    Ok(read)
}

/// Like [`read`], but passes each parsed row to `each` and keeps none.
///
/// # Errors
/// As [`read`], and those of `each`, at the first of which it ends.
pub fn visit(
    path: &Path,
    columns: &Columns,
    mut each: impl FnMut(&RowSource, &ParsedRow<'_>) -> Result<(), DatasetError>,
) -> Result<(), DatasetError> {
    let mut unread = BTreeSet::new();
    let mut tallies: BTreeMap<Arc<Path>, Tally> = BTreeMap::new();
    visit_rows(path, Some(columns), &mut |row| {
        let DatasetRow {
            source,
            columns: row,
        } = row;
        let parsed = ParsedRow::of(&row, columns).map_err(|reason| source.refuse(reason))?;
        each(&source, &parsed)?;
        let tally = tallies.entry(Arc::clone(&source.path)).or_default();
        tally.count(parsed.kind(), source.position);
        if parsed.repeats_prompt() {
            tally.count_repeated(source.position);
        }
        if parsed.has_stray_speakers() {
            tally.count_stray_speakers(source.position);
        }
        for name in parsed.unread() {
            if !unread.contains(name) {
                unread.insert(name.to_owned());
            }
        }
        Ok(())
    })?;
    for (file, tally) in &tallies {
        tally.log(file, &columns.prompt.name);
    }
    log_unread(path, &unread);
    Ok(())
}

/// Logs the columns that no format reads.
fn log_unread(path: &Path, unread: &BTreeSet<String>) {
    if !unread.is_empty() {
        let mut columns: Vec<&str> = unread.iter().map(String::as_str).collect();
        columns.truncate(MAX_LOGGED_COLUMNS);
        tracing::info!(
            path = %path.display(),
            columns = columns.join(", "),
            count = unread.len(),
            "columns that are not read"
        );
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink, process::Command};

    use super::*;

    fn all(name: &str, content: &[u8]) -> Result<Vec<(RowPosition, String)>, String> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join(name);
        fs::write(&path, content).expect("a file");
        let rows = read_rows(&path).map_err(|error| error.to_string())?;
        let text = |row: DatasetRow| (row.source.position, Value::Object(row.columns).to_string());
        Ok(rows.into_iter().map(text).collect())
    }

    #[test]
    fn malformed_rows_are_reported_with_their_position() {
        for (text, expected) in [
            (
                &b"{\"prompt\": \"a\"}\n\n{\"prompt\": \n"[..],
                "rows.jsonl, line 3, column 11: not JSON",
            ),
            (b"[1]\n", "rows.jsonl, line 1: a row must be a JSON object"),
            (
                b"[{},\n 2]",
                "rows.jsonl, line 2: a row must be a JSON object",
            ),
            (
                b"{}\n{\"a\": \"\xff\"}\n",
                "rows.jsonl, line 2: byte 0xff is not UTF-8",
            ),
        ] {
            let error = all("rows.jsonl", text).expect_err(expected);
            assert!(error.contains(expected), "{error}");
        }
        let missing = read_rows(Path::new("none.jsonl")).expect_err("no such file");
        assert!(missing.to_string().contains("none.jsonl: No such file"));
    }

    #[test]
    fn errors_name_the_file_among_several() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        fs::write(folder.path().join("b.jsonl"), "{\"prompt\": 3}\n").expect("a file");
        fs::write(folder.path().join("a.json"), "[{\"prompt\": \"x\"}]").expect("a file");
        let columns = Columns::default();
        let error =
            read(folder.path(), &columns, |form| form.prompt()).expect_err("3 is no prompt");
        assert!(
            error
                .to_string()
                .contains("b.jsonl, line 1: column \"prompt\""),
            "{error}"
        );
        fs::remove_file(folder.path().join("b.jsonl")).expect("it is there");
        let read = read(folder.path(), &columns, |form| form.prompt()).expect("a prompt");
        assert_eq!(read.len(), 1);
    }

    /// The error of the file, read as prompts.
    fn refused(path: &Path, columns: &Columns) -> String {
        let read = read(path, columns, |row| row.prompt()).map(|rows| rows.len());
        read.expect_err("refused").to_string()
    }

    #[test]
    fn only_regular_files_are_read() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = |name: &str| folder.path().join(name);
        let made = Command::new("mkfifo").arg(path("pipe.jsonl")).status();
        assert!(made.is_ok_and(|status| status.success()), "mkfifo");
        symlink("/dev/zero", path("zero.jsonl")).expect("a link");
        symlink("/dev/zero", path("zero.parquet")).expect("a link");
        let columns = Columns::default();
        for (name, expected) in [
            ("pipe.jsonl", "it is a named pipe, not a regular file"),
            ("zero.jsonl", "it is a device, not a regular file"),
            ("zero.parquet", "it is a device, not a regular file"),
            ("", "not a regular file"),
        ] {
            let error = refused(&path(name), &columns);
            assert!(error.contains(expected), "{error}");
        }
        // Files of /proc say that they are empty, and may never end.
        assert_eq!(read_rows(Path::new("/proc/version")).expect("no rows"), []);
    }

    #[test]
    fn limits_are_named() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("rows.jsonl");
        fs::write(&path, "{\"prompt\": \"a\"}\n".repeat(4)).expect("a file");
        let within = |max_file_bytes, max_rows| Columns {
            limits: FileLimits {
                max_file_bytes,
                max_rows,
                section: Some("sft"),
            },
            ..Columns::default()
        };
        let rows = read(&path, &within(64, 4), |row| row.prompt());
        assert_eq!(rows.map(|rows| rows.len()).ok(), Some(4));
        for (columns, expected) in [
            (
                within(63, 4),
                "more than 63 bytes, the maximum of sft.max_file_bytes: raise it",
            ),
            (
                within(64, 3),
                "more than 3 rows, the maximum of sft.max_rows: raise it",
            ),
        ] {
            let error = refused(&path, &columns);
            assert!(
                error.contains(expected) && error.contains("rows.jsonl"),
                "{error}"
            );
        }
    }

    /// A zstd frame of many MiB of one byte: four bytes for each block of 128 KiB.
    fn zstd_of(byte: u8, blocks: usize) -> Vec<u8> {
        let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x38];
        for block in 0..blocks {
            let header = (128u32 << 10) << 3 | 1 << 1 | u32::from(block + 1 == blocks);
            frame.extend(&header.to_le_bytes()[..3]);
            frame.push(byte);
        }
        frame
    }

    #[test]
    fn compressed_bombs_are_refused() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("rows.jsonl.zst");
        let columns = Columns::default();
        fs::write(&path, zstd_of(b' ', 16)).expect("a file");
        assert_eq!(read_rows(&path).expect("white space"), []);
        for (byte, expected) in [
            (b' ', "expands to more than 200 times its size"),
            (b'7', "not JSON"),
        ] {
            fs::write(&path, zstd_of(byte, 2500)).expect("a file");
            let error = refused(&path, &columns);
            assert!(error.contains(expected), "{error}");
        }
        let mut row = zstd::encode_all(&b"{\"prompt\": \""[..], 1).expect("memory");
        row.extend(zstd_of(b'a', 2500));
        fs::write(&path, row).expect("a file");
        let error = refused(&path, &columns);
        assert!(
            error.contains("expands to more than 200 times") || error.contains("longer than"),
            "{error}"
        );
    }
}
