//! Reader of Parquet files.

use std::{fs::File, io, path::Path};

use parquet::{
    basic::Compression,
    errors::ParquetError,
    file::{
        metadata::ParquetMetaData,
        reader::{FileReader, SerializedFileReader},
    },
    record::{Field, Row},
};
use serde_json::{Map, Value};

use crate::{
    error::{DatasetError, RowPosition},
    turn::without_nulls,
};

/// Reads the rows of a Parquet file as JSON objects, numbered from 1, including nested lists and structs. Nulls nested
/// in a column are removed: they only fill keys that other rows have.
pub(crate) fn read(path: &Path) -> Result<Vec<(RowPosition, Value)>, DatasetError> {
    let unreadable = |source| DatasetError::Unreadable {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(unreadable)?;
    let corrupt = |what: String| {
        move |error: ParquetError| unreadable(io::Error::other(format!("{what}: {error}")))
    };
    let reader =
        SerializedFileReader::new(file).map_err(corrupt("not a complete Parquet file".into()))?;
    if let Some(codec) = unsupported_codec(reader.metadata()) {
        return Err(DatasetError::File {
            path: path.to_owned(),
            reason: format!(
                "it is compressed with {codec}, which is not supported: write it with compression=\"zstd\", \"snappy\", \"gzip\" or \"lz4\""
            ),
        });
    }
    let mut rows = Vec::new();
    for group in 0..reader.num_row_groups() {
        let what = || format!("row group {group} is corrupt");
        let group = reader.get_row_group(group).map_err(corrupt(what()))?;
        for read in group.get_row_iter(None).map_err(corrupt(what()))? {
            let read = read.map_err(corrupt(what()))?;
            rows.push((RowPosition::Row(rows.len() + 1), row(&read)));
        }
    }
    Ok(rows)
}

/// The first unsupported compression codec of a column.
fn unsupported_codec(metadata: &ParquetMetaData) -> Option<&'static str> {
    let columns = metadata
        .row_groups()
        .iter()
        .flat_map(|group| group.columns());
    columns
        .filter_map(|column| match column.compression() {
            Compression::BROTLI(_) => Some("brotli"),
            Compression::LZO => Some("LZO"),
            _ => None,
        })
        .next()
}

fn object(row: &Row) -> Value {
    let fields = row.get_column_iter();
    Value::Object(
        fields
            .map(|(name, field)| (name.clone(), value(field)))
            .collect(),
    )
}

/// A row without the nulls nested in its columns.
fn row(row: &Row) -> Value {
    let mut row = object(row);
    let columns = row.as_object_mut().into_iter().flatten();
    columns.for_each(|(_, column)| without_nulls(column));
    row
}

fn value(field: &Field) -> Value {
    match field {
        Field::Group(row) => object(row),
        Field::ListInternal(list) => list.elements().iter().map(value).collect(),
        // Text without the UTF8 annotation.
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => text.into(),
            Err(_) => field.to_json_value(),
        },
        Field::MapInternal(map) => {
            let entries = map
                .entries()
                .iter()
                .map(|(key, of)| (text(&value(key)), value(of)));
            Value::Object(entries.collect::<Map<_, _>>())
        }
        other => other.to_json_value(),
    }
}

fn text(key: &Value) -> String {
    key.as_str().map_or_else(|| key.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parquet::basic::Compression;
    use parquet::data_type::{ByteArray, ByteArrayType};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;
    use serde_json::json;

    use super::*;

    const SCHEMA: &str = "message rows {
        optional binary prompt (UTF8);
        optional group turns (LIST) { repeated group list { required group element {
            required binary role (UTF8);
            required binary content (UTF8);
            optional binary name (UTF8);
        } } }
    }";

    /// Writes a file of row groups of two rows: one with a prompt, one with turns.
    fn write_file(path: &Path, groups: usize, compression: Compression) {
        let schema = Arc::new(parse_message_type(SCHEMA).expect("a schema"));
        let properties = WriterProperties::builder()
            .set_compression(compression)
            .build();
        let file = File::create(path).expect("a file");
        let mut writer =
            SerializedFileWriter::new(file, schema, Arc::new(properties)).expect("a writer");
        let texts = |values: &[&str]| -> Vec<ByteArray> {
            values.iter().map(|text| ByteArray::from(*text)).collect()
        };
        for group in 0..groups {
            let mut rows = writer.next_row_group().expect("a row group");
            let prompt = format!("prompt {group}");
            // Values, definition levels, repetition levels of each column.
            let columns = [
                (texts(&[&prompt]), vec![1, 0], None),
                (
                    texts(&["user", "assistant"]),
                    vec![0, 2, 2],
                    Some(vec![0, 0, 1]),
                ),
                (texts(&["hi", "hello"]), vec![0, 2, 2], Some(vec![0, 0, 1])),
                // Only the first has a name.
                (texts(&["Ann"]), vec![0, 3, 2], Some(vec![0, 0, 1])),
            ];
            for (values, defined, repeated) in columns {
                let mut column = rows.next_column().expect("no error").expect("a column");
                column
                    .typed::<ByteArrayType>()
                    .write_batch(&values, Some(&defined), repeated.as_deref())
                    .expect("they fit");
                column.close().expect("a complete column");
            }
            rows.close().expect("a complete row group");
        }
        writer.close().expect("a complete file");
    }

    #[test]
    fn rows_are_read_as_json_with_nested_lists() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("rows.parquet");
        let codecs = [
            Compression::UNCOMPRESSED,
            Compression::SNAPPY,
            Compression::ZSTD(Default::default()),
            Compression::GZIP(Default::default()),
            Compression::LZ4_RAW,
        ];
        for compression in codecs {
            write_file(&path, 2, compression);
            let rows = read(&path).unwrap_or_else(|error| panic!("{compression}: {error}"));
            let turns = json!([
                {"role": "user", "content": "hi", "name": "Ann"},
                {"role": "assistant", "content": "hello"},
            ]);
            let expected = [
                (
                    RowPosition::Row(1),
                    json!({"prompt": "prompt 0", "turns": null}),
                ),
                (RowPosition::Row(2), json!({"prompt": null, "turns": turns})),
                (
                    RowPosition::Row(3),
                    json!({"prompt": "prompt 1", "turns": null}),
                ),
                (RowPosition::Row(4), json!({"prompt": null, "turns": turns})),
            ];
            assert_eq!(rows, expected, "{compression}");
        }
    }

    #[test]
    fn truncated_and_corrupt_files_are_reported() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("rows.parquet");
        write_file(&path, 3, Compression::SNAPPY);
        let complete = std::fs::read(&path).expect("a file");
        std::fs::write(&path, &complete[..complete.len() - 9]).expect("a file");
        let truncated = read(&path).expect_err("truncated").to_string();
        assert!(
            truncated.contains("rows.parquet") && truncated.contains("not a complete Parquet file"),
            "{truncated}"
        );
        // The pages of the first row group follow the four bytes of the magic number.
        let mut corrupt = complete;
        corrupt[4..24].fill(0xff);
        std::fs::write(&path, corrupt).expect("a file");
        let corrupt = read(&path).expect_err("corrupt").to_string();
        assert!(corrupt.contains("row group 0 is corrupt"), "{corrupt}");
    }
}
