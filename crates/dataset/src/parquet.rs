//! Reader of Parquet files.

use std::{io, path::Path, sync::Arc};

use parquet::{
    basic::Compression,
    errors::ParquetError,
    file::{
        metadata::{ParquetMetaData, RowGroupMetaData},
        reader::{FileReader, SerializedFileReader},
    },
    record::{Field, Row, reader::TreeBuilder},
    schema::types::{SchemaDescPtr, SchemaDescriptor, Type, TypePtr},
};
use serde_json::{Map, Value};

use crate::{
    columns::Columns,
    error::{DatasetError, RowPosition},
    json_rows::RowSink,
    limits::{FileLimits, RowBytes, check_expansion, open_regular},
    turn::without_nulls,
};
use panic_guard::guarded;

/// Values of a column that are decoded at once.
const BATCH: usize = 128;

/// Passes the rows of a Parquet file to `each` as JSON objects, numbered from 1, including nested lists and structs.
/// Nulls nested in a column are removed: they only fill keys that other rows have. With `columns`, only those that a
/// format may read are decoded; the others are null.
pub(crate) fn read(
    path: &Path,
    columns: Option<&Columns>,
    each: RowSink<'_>,
) -> Result<(), DatasetError> {
    let file = open_regular(path)?.into_inner();
    let size = file.metadata().map_err(unreadable(path))?.len();
    let opened = guarded(|| SerializedFileReader::new(file));
    let reader = opened
        .map_err(ParquetError::General)
        .and_then(|reader| reader)
        .map_err(corrupt(path, "not a complete Parquet file"))?;
    let file = ParquetFile {
        path,
        size,
        limits: columns.map_or_else(FileLimits::default, |columns| columns.limits),
        projection: Projection::of(reader.metadata(), columns),
        reader,
    };
    file.check()?;
    file.rows(each)
}

fn unreadable(path: &Path) -> impl Fn(io::Error) -> DatasetError {
    |source| DatasetError::Unreadable {
        path: path.to_owned(),
        source,
    }
}

fn corrupt(path: &Path, what: &str) -> impl Fn(ParquetError) -> DatasetError {
    move |error| unreadable(path)(io::Error::other(format!("{what}: {error}")))
}

/// The columns to decode.
struct Projection {
    /// Names of all columns, in order, and whether each is decoded.
    names: Vec<(String, bool)>,
    schema: SchemaDescPtr,
}

impl Projection {
    fn of(metadata: &ParquetMetaData, columns: Option<&Columns>) -> Self {
        let root = metadata.file_metadata().schema();
        let fields = root.get_fields();
        let names: Vec<&str> = fields.iter().map(|field| field.name()).collect();
        let takes_texts = columns.is_some_and(|columns| columns.may_be_implicit(&names));
        let is_read = |field: &TypePtr| {
            columns.is_none_or(|columns| {
                columns.may_read(field.name()) || (takes_texts && is_text(field))
            })
        };
        let read: Vec<TypePtr> = fields
            .iter()
            .filter(|field| is_read(field))
            .cloned()
            .collect();
        let names = fields
            .iter()
            .map(|field| (field.name().to_owned(), is_read(field)));
        let names = names.collect();
        let projected = Type::group_type_builder(root.name())
            .with_fields(read)
            .build();
        let schema = match projected {
            Ok(projected) => Arc::new(SchemaDescriptor::new(Arc::new(projected))),
            Err(_) => metadata.file_metadata().schema_descr_ptr(),
        };
        Self { names, schema }
    }

    fn is_read(&self, name: &str) -> bool {
        self.names
            .iter()
            .any(|(known, is_read)| known == name && *is_read)
    }

    fn is_empty(&self) -> bool {
        !self.names.iter().any(|(_, is_read)| *is_read)
    }

    /// A row with all names; the columns that are not decoded are null.
    fn row(&self, mut decoded: Map<String, Value>) -> Value {
        let column = |(name, _): &(String, bool)| {
            let value = decoded.get_mut(name).map(Value::take);
            (name.clone(), value.unwrap_or_default())
        };
        Value::Object(self.names.iter().map(column).collect())
    }
}

fn is_text(field: &TypePtr) -> bool {
    field.is_primitive() && field.get_physical_type() == parquet::basic::Type::BYTE_ARRAY
}

/// An open file.
struct ParquetFile<'a> {
    path: &'a Path,
    /// Size in bytes.
    size: u64,
    limits: FileLimits,
    projection: Projection,
    reader: SerializedFileReader<std::fs::File>,
}

impl ParquetFile<'_> {
    /// Checks what the metadata says: the codecs, and the limits.
    fn check(&self) -> Result<(), DatasetError> {
        let metadata = self.reader.metadata();
        if let Some(codec) = unsupported_codec(metadata) {
            return Err(DatasetError::file(
                self.path,
                format!(
                    "it is compressed with {codec}, which is not supported: write it with compression=\"zstd\", \
                     \"snappy\", \"gzip\" or \"lz4\""
                ),
            ));
        }
        let groups = metadata.row_groups();
        let rows: u64 = groups
            .iter()
            .map(|group| not_negative(group.num_rows()))
            .sum();
        let bytes: u64 = groups.iter().map(|group| self.decoded_bytes(group)).sum();
        let remedy = "write the rows as JSON Lines if that is intended";
        let checked = self.limits.check_rows(rows);
        checked
            .and_then(|()| self.limits.check_bytes(bytes))
            .and_then(|()| check_expansion(bytes, self.size, remedy))
            .map_err(|reason| DatasetError::file(self.path, reason))
    }

    /// Decompressed bytes of the columns that are read.
    fn decoded_bytes(&self, group: &RowGroupMetaData) -> u64 {
        let columns = group.columns().iter();
        let read = columns.filter(|column| {
            let path = column.column_path().parts();
            path.first()
                .is_some_and(|name| self.projection.is_read(name))
        });
        read.map(|column| not_negative(column.uncompressed_size()))
            .sum()
    }

    fn rows(&self, each: RowSink<'_>) -> Result<(), DatasetError> {
        let mut bytes = RowBytes {
            limits: self.limits,
            packed: self.size,
            read: 0,
        };
        let mut number = 0;
        for group in 0..self.reader.num_row_groups() {
            self.group(group, &mut |row| {
                number += 1;
                let added = bytes.add(text_bytes(&row));
                added.map_err(|reason| DatasetError::file(self.path, reason))?;
                each(RowPosition::Row(number), row)
            })?;
        }
        Ok(())
    }

    fn group(
        &self,
        index: usize,
        each: &mut dyn FnMut(Value) -> Result<(), DatasetError>,
    ) -> Result<(), DatasetError> {
        let what = format!("row group {index} is corrupt");
        let corrupt = corrupt(self.path, &what);
        // The library panics on some corrupt files and on values that it cannot convert.
        let panicked = |reason: String| corrupt(ParquetError::General(reason));
        if self.projection.is_empty() {
            let rows = self.reader.metadata().row_group(index).num_rows();
            return (0..rows).try_for_each(|_| each(self.projection.row(Map::new())));
        }
        let group = guarded(|| self.reader.get_row_group(index)).map_err(panicked)?;
        let group = group.map_err(&corrupt)?;
        let schema = Arc::clone(&self.projection.schema);
        let builder = TreeBuilder::new().with_batch_size(BATCH);
        let rows = guarded(|| builder.as_iter(schema, &*group)).map_err(panicked)?;
        let mut rows = rows.map_err(&corrupt)?;
        loop {
            let next = guarded(|| rows.next().map(|read| Ok(decoded(&read?))));
            match next.map_err(panicked)? {
                Some(read) => each(self.projection.row(read.map_err(&corrupt)?))?,
                None => return Ok(()),
            }
        }
    }
}

fn not_negative(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

/// Bytes of the texts of a value, and a few of every other value.
fn text_bytes(value: &Value) -> u64 {
    match value {
        Value::String(text) => text.len() as u64,
        Value::Array(items) => items.iter().map(|item| text_bytes(item) + 16).sum(),
        Value::Object(members) => {
            let members = members.iter();
            members
                .map(|(name, value)| name.len() as u64 + text_bytes(value))
                .sum()
        }
        _ => 8,
    }
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

fn members(row: &Row) -> Map<String, Value> {
    let fields = row.get_column_iter();
    fields
        .map(|(name, field)| (name.clone(), value(field)))
        .collect()
}

/// The columns of a row without the nulls nested in them.
fn decoded(row: &Row) -> Map<String, Value> {
    let mut columns = members(row);
    columns
        .iter_mut()
        .for_each(|(_, column)| without_nulls(column));
    columns
}

fn value(field: &Field) -> Value {
    match field {
        Field::Group(row) => Value::Object(members(row)),
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
    use std::fs::File;

    use parquet::basic::Compression;
    use parquet::data_type::{ByteArray, ByteArrayType};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;
    use serde_json::json;

    use super::*;

    fn read_all(
        path: &Path,
        columns: Option<&Columns>,
    ) -> Result<Vec<(RowPosition, Value)>, String> {
        let mut rows = Vec::new();
        let read = read(path, columns, &mut |position, row| {
            rows.push((position, row));
            Ok(())
        });
        read.map_err(|error| error.to_string())?;
        Ok(rows)
    }

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
            let rows =
                read_all(&path, None).unwrap_or_else(|error| panic!("{compression}: {error}"));
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
        let truncated = read_all(&path, None).expect_err("truncated");
        assert!(
            truncated.contains("rows.parquet") && truncated.contains("not a complete Parquet file"),
            "{truncated}"
        );
        // The pages of the first row group follow the four bytes of the magic number.
        let mut corrupt = complete;
        corrupt[4..24].fill(0xff);
        std::fs::write(&path, corrupt).expect("a file");
        let corrupt = read_all(&path, None).expect_err("corrupt");
        assert!(corrupt.contains("row group 0 is corrupt"), "{corrupt}");
    }

    #[test]
    fn columns_that_no_format_reads_are_not_decoded() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("rows.parquet");
        write_file(&path, 1, Compression::UNCOMPRESSED);
        let columns = Columns::default();
        let rows = read_all(&path, Some(&columns)).expect("rows");
        let expected = [
            (
                RowPosition::Row(1),
                json!({"prompt": "prompt 0", "turns": null}),
            ),
            (RowPosition::Row(2), json!({"prompt": null, "turns": null})),
        ];
        assert_eq!(rows, expected);
        // A text beside texts with an implicit prompt decides whether they are.
        let names = |names: &[&str]| columns.may_be_implicit(names);
        assert!(names(&["chosen", "rejected", "query"]));
        assert!(!names(&["chosen", "rejected", "prompt"]) && !names(&["chosen", "messages"]));
    }

    /// Writes a file of one column.
    fn write_column<T: parquet::data_type::DataType>(path: &Path, schema: &str, values: &[T::T]) {
        let schema = Arc::new(parse_message_type(schema).expect("a schema"));
        let properties = WriterProperties::builder()
            .set_compression(Compression::SNAPPY)
            .build();
        let file = File::create(path).expect("a file");
        let mut writer =
            SerializedFileWriter::new(file, schema, Arc::new(properties)).expect("a writer");
        let mut rows = writer.next_row_group().expect("a row group");
        let mut column = rows.next_column().expect("no error").expect("a column");
        let batch = column.typed::<T>().write_batch(values, None, None);
        batch.expect("they fit");
        column.close().expect("a complete column");
        rows.close().expect("a complete row group");
        writer.close().expect("a complete file");
    }

    #[test]
    fn bombs_and_impossible_values_are_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("rows.parquet");
        let columns = Columns::default();
        // A dictionary of one text, to which every row refers.
        let text = ByteArray::from(vec![b'a'; 512 << 10]);
        let schema = "message rows { required binary prompt (UTF8); }";
        write_column::<ByteArrayType>(&path, schema, &vec![text; 600]);
        let error = read_all(&path, Some(&columns)).expect_err("a bomb");
        assert!(error.contains("expands to more than 200 times"), "{error}");

        let schema = "message rows { required int64 prompt (TIMESTAMP_MILLIS); }";
        write_column::<parquet::data_type::Int64Type>(&path, schema, &[i64::MAX; 3]);
        let error = read_all(&path, Some(&columns)).expect_err("no such time");
        assert!(error.contains("row group 0 is corrupt"), "{error}");
        let few = Columns {
            limits: FileLimits {
                max_rows: 2,
                section: Some("prompts"),
                ..FileLimits::default()
            },
            ..Columns::default()
        };
        let error = read_all(&path, Some(&few)).expect_err("three rows");
        assert!(error.contains("prompts.max_rows"), "{error}");

        // Without a column that is read, nothing is decoded.
        let schema = "message rows { required int64 id; }";
        write_column::<parquet::data_type::Int64Type>(&path, schema, &[1; 3]);
        let rows = read_all(&path, Some(&columns)).expect("rows");
        assert_eq!(rows.len(), 3);
        assert_eq!(rows[2].1, json!({"id": null}));
    }
}
