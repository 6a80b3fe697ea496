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
    json, parquet,
    parsed_row::ParsedRow,
    tally::Tally,
};

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
/// When a file cannot be read, or a row is not a JSON object: with file and line.
pub fn read_rows(path: &Path) -> Result<Vec<DatasetRow>, DatasetError> {
    let mut rows = Vec::new();
    for file in files(path)? {
        let path: Arc<Path> = file.into();
        for (position, value) in values(&path)? {
            let source = RowSource {
                path: Arc::clone(&path),
                position,
            };
            let Value::Object(columns) = value else {
                return Err(source.refuse(json::NOT_AN_OBJECT));
            };
            rows.push(DatasetRow { source, columns });
        }
    }
    Ok(rows)
}

fn values(path: &Path) -> Result<Vec<(RowPosition, Value)>, DatasetError> {
    if compression::format_of(path)? == FileFormat::Parquet
        || path.extension().is_some_and(|e| e == "parquet")
    {
        return parquet::read(path);
    }
    let mut bytes = Vec::new();
    compression::open(path)?
        .read_to_end(&mut bytes)
        .map_err(compression::unreadable(path))?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let valid = error.utf8_error().valid_up_to();
        let line = 1 + error.as_bytes()[..valid]
            .iter()
            .filter(|&&b| b == b'\n')
            .count();
        DatasetError::Row {
            path: path.to_owned(),
            position: RowPosition::Line(line),
            reason: format!(
                "byte {:#04x} is not UTF-8: convert the file to UTF-8",
                error.as_bytes()[valid]
            ),
        }
    })?;
    json::rows(&text).map_err(|error| error.in_file(path))
}

/// Reads and parses the rows of `path` in any of the formats, and extracts a value from each. Logs the unread columns
/// once, and warnings about inconsistent rows once per file.
///
/// # Errors
/// As [`read_rows`], and the parse errors of a row and the errors of `extract`, with file and line.
pub fn read<T>(
    path: &Path,
    columns: &Columns,
    extract: impl Fn(&ParsedRow<'_>) -> Result<T, String>,
) -> Result<Vec<WithSource<T>>, DatasetError> {
    let (mut read, mut unread) = (Vec::new(), BTreeSet::new());
    let mut tallies: BTreeMap<Arc<Path>, Tally> = BTreeMap::new();
    for DatasetRow {
        source,
        columns: row,
    } in read_rows(path)?
    {
        let parsed = ParsedRow::of(&row, columns);
        let extracted = parsed.and_then(|parsed| Ok((extract(&parsed)?, parsed)));
        let (value, parsed) = extracted.map_err(|reason| source.refuse(reason))?;
        let tally = tallies.entry(Arc::clone(&source.path)).or_default();
        tally.count(parsed.kind(), source.position);
        unread.extend(parsed.unread().into_iter().map(str::to_owned));
        read.push(WithSource { source, value });
    }
    for (file, tally) in &tallies {
        tally.log(file, &columns.prompt.name);
    }
    log_unread(path, &unread);
    Ok(read)
}

/// Logs the columns that no format reads.
fn log_unread(path: &Path, unread: &BTreeSet<String>) {
    if !unread.is_empty() {
        let columns: Vec<&str> = unread.iter().map(String::as_str).collect();
        tracing::info!(
            path = %path.display(),
            columns = columns.join(", "),
            "columns that are not read"
        );
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

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
}
