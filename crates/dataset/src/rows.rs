//! Files as rows.

use std::{
    io::{BufRead, BufReader, Read},
    path::Path,
};

use flate2::read::MultiGzDecoder;
use serde_json::Value;

use crate::DatasetError;

/// The JSON objects of a file with their line numbers: one a line, or one list of them (then the number
/// is the place in the list, from 1). `.gz` is read too. Empty lines are passed over. The rows of a
/// `.parquet` file are numbered from 1.
///
/// # Errors
/// When the file cannot be read or a row is not a JSON object: with file and line.
pub fn read_rows(path: &Path) -> Result<Vec<(usize, Value)>, DatasetError> {
    if path
        .extension()
        .is_some_and(|extension| extension == "parquet")
    {
        return crate::parquet::read(path);
    }
    let unreadable = |source| DatasetError::Unreadable {
        path: path.to_owned(),
        source,
    };
    let file = std::fs::File::open(path).map_err(unreadable)?;
    let gz = path.extension().is_some_and(|extension| extension == "gz");
    let reader: Box<dyn Read> = if gz {
        Box::new(MultiGzDecoder::new(file))
    } else {
        Box::new(file)
    };
    let mut reader = BufReader::new(reader);
    let begins_a_list = reader
        .fill_buf()
        .map_err(unreadable)?
        .trim_ascii_start()
        .first()
        == Some(&b'[');
    let mut text = String::new();
    reader.read_to_string(&mut text).map_err(unreadable)?;
    let list = if begins_a_list {
        serde_json::from_str::<Vec<Value>>(&text).ok()
    } else {
        None
    };
    let rows: Vec<(usize, Result<Value, serde_json::Error>)> = match list {
        Some(list) => (1..).zip(list.into_iter().map(Ok)).collect(),
        None => (1..)
            .zip(text.lines())
            .filter(|(_, line)| !line.trim().is_empty())
            .map(|(number, line)| (number, serde_json::from_str(line)))
            .collect(),
    };
    rows.into_iter()
        .map(|(line, row)| {
            object(row)
                .map(|row| (line, row))
                .map_err(|reason| DatasetError::Row {
                    path: path.to_owned(),
                    line,
                    reason,
                })
        })
        .collect()
}

fn object(row: Result<Value, serde_json::Error>) -> Result<Value, String> {
    let row = row.map_err(|error| format!("not JSON: {error}"))?;
    if row.is_object() {
        Ok(row)
    } else {
        Err("a row must be a JSON object, as in {\"prompt\": \"...\"}".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_malformed_line_is_named() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("rows.jsonl");
        for (text, expected) in [
            (
                "{\"prompt\": \"a\"}\n\n{\"prompt\": \n",
                "rows.jsonl, line 3: not JSON",
            ),
            ("[1]\n", "rows.jsonl, line 1: a row must be a JSON object"),
            ("[{}, 2]", "rows.jsonl, line 2: a row must be a JSON object"),
        ] {
            std::fs::write(&path, text).expect("a file");
            let error = read_rows(&path).expect_err(expected).to_string();
            assert!(error.contains(expected), "{error}");
        }
        let missing = read_rows(&folder.path().join("none.jsonl")).expect_err("no such file");
        assert!(missing.to_string().contains("none.jsonl"));
    }
}
