//! Files as rows, and as whatever a row is read as.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::Arc,
};

use serde_json::{Map, Value};

use crate::{
    columns::Columns,
    error::{DatasetError, Place},
    files::files,
    form::Form,
    json,
    open::{self, Kind},
    parquet,
    tally::Tally,
};

/// Where a row comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    path: Arc<Path>,
    place: Place,
}

impl Source {
    /// The error that the row cannot be used, with `reason`.
    #[must_use]
    pub fn refuse(&self, reason: impl Into<String>) -> DatasetError {
        DatasetError::Row {
            path: self.path.to_path_buf(),
            place: self.place,
            reason: reason.into(),
        }
    }
}

/// A row of a file.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Where it comes from.
    pub source: Source,
    /// Its values, in their order.
    pub columns: Map<String, Value>,
}

/// What a row was read as.
#[derive(Debug, Clone, PartialEq)]
pub struct Sourced<T> {
    /// Where it comes from.
    pub source: Source,
    /// What it is.
    pub value: T,
}

/// The rows of a file, of the files of a folder, or of those that a glob matches: JSON Lines, a JSON list, an
/// object with one list of rows, or Parquet. What is packed by gzip or zstd, and what is Parquet, is known by its
/// first bytes. A byte order mark is passed over; Python's `NaN` and `Infinity` are read as null.
///
/// # Errors
/// When a file cannot be read, or a row is not a JSON object: with file and line.
pub fn read_rows(path: &Path) -> Result<Vec<Row>, DatasetError> {
    let mut rows = Vec::new();
    for file in files(path)? {
        let path: Arc<Path> = file.into();
        for (place, value) in values(&path)? {
            let source = Source {
                path: Arc::clone(&path),
                place,
            };
            let Value::Object(columns) = value else {
                return Err(source.refuse(json::NOT_AN_OBJECT));
            };
            rows.push(Row { source, columns });
        }
    }
    Ok(rows)
}

fn values(path: &Path) -> Result<Vec<(Place, Value)>, DatasetError> {
    if open::kind(path)? == Kind::Parquet || path.extension().is_some_and(|e| e == "parquet") {
        return parquet::read(path);
    }
    let mut bytes = Vec::new();
    open::open(path)?
        .read_to_end(&mut bytes)
        .map_err(open::unreadable(path))?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let good = error.utf8_error().valid_up_to();
        let line = 1 + error.as_bytes()[..good]
            .iter()
            .filter(|&&b| b == b'\n')
            .count();
        DatasetError::Row {
            path: path.to_owned(),
            place: Place::Line(line),
            reason: format!(
                "byte {:#04x} is not UTF-8: write the file as UTF-8",
                error.as_bytes()[good]
            ),
        }
    })?;
    json::rows(&text).map_err(|error| error.in_file(path))
}

/// What `take` reads in each row of `path`, in any of the forms. The names of the columns that no form reads are
/// logged once, and of each file what its rows do not have in common.
///
/// # Errors
/// As [`read_rows`], and what `take` or the form says of a row: with file and line.
pub fn read<T>(
    path: &Path,
    columns: &Columns,
    take: impl Fn(&Form<'_>) -> Result<T, String>,
) -> Result<Vec<Sourced<T>>, DatasetError> {
    let (mut read, mut unread) = (Vec::new(), BTreeSet::new());
    let mut tallies: BTreeMap<Arc<Path>, Tally> = BTreeMap::new();
    for Row {
        source,
        columns: row,
    } in read_rows(path)?
    {
        let form = Form::of(&row, columns);
        let taken = form.and_then(|form| Ok((take(&form)?, form)));
        let (value, form) = taken.map_err(|reason| source.refuse(reason))?;
        let tally = tallies.entry(Arc::clone(&source.path)).or_default();
        tally.count(form.kind(), source.place);
        let more = form.unread();
        let news = more.into_iter().filter(|name| !unread.contains(*name));
        let news: Vec<String> = news.map(str::to_owned).collect();
        unread.extend(news);
        read.push(Sourced { source, value });
    }
    for (file, tally) in &tallies {
        tally.say(file, &columns.prompt.name);
    }
    say_unread(path, &unread);
    Ok(read)
}

fn say_unread(path: &Path, unread: &BTreeSet<String>) {
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

    fn all(name: &str, content: &[u8]) -> Result<Vec<(Place, String)>, String> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join(name);
        fs::write(&path, content).expect("a file");
        let rows = read_rows(&path).map_err(|error| error.to_string())?;
        let text = |row: Row| (row.source.place, Value::Object(row.columns).to_string());
        Ok(rows.into_iter().map(text).collect())
    }

    #[test]
    fn what_cannot_be_read_is_named_with_its_place() {
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
    fn rows_of_several_files_know_theirs() {
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
