//! Data sets: JSON Lines, JSON, gzip, zstd, Parquet.

use std::{fs, io::Write, path::Path, sync::Arc};

use dataset::{Columns, read};
use flate2::{Compression, write::GzEncoder};
use parquet::{
    data_type::{ByteArray, ByteArrayType},
    file::{properties::WriterProperties, writer::SerializedFileWriter},
    schema::parser::parse_message_type,
};
use serde_json::{Value, json};

use crate::targets::{Input, Outcome};

/// A file of rows.
struct RowFile {
    name: &'static str,
    bytes: Vec<u8>,
}

pub(super) fn prepare(scratch: &Path) -> Input {
    let folder = scratch.to_owned();
    let rows = rows();
    let lines = lines(&rows);
    let files = [
        RowFile {
            name: "rows.jsonl.gz",
            bytes: gzip(lines.as_bytes()),
        },
        RowFile {
            name: "rows.jsonl.zst",
            bytes: zstd::encode_all(lines.as_bytes(), 3).expect("memory is enough"),
        },
        RowFile {
            name: "rows.parquet",
            bytes: parquet_file(&folder.join("valid.parquet")),
        },
    ];
    let columns = Columns::default();
    Box::new(move |mutator| {
        let choice = mutator.below(6);
        let (name, bytes) = match choice {
            0 => (
                "rows.json",
                mutator.json_text(&Value::from(rows.clone())).into_bytes(),
            ),
            1 | 2 => {
                let row = mutator.pick(&rows).clone();
                let row = mutator.json_text(&row);
                ("rows.jsonl", format!("{lines}{row}\n").into_bytes())
            }
            _ => {
                let file = &files[choice - 3];
                (file.name, mutator.bytes(&file.bytes))
            }
        };
        let path = folder.join(name);
        fs::write(&path, bytes).expect("a file in a temporary directory");
        let outcome = match mutator.below(3) {
            0 => Outcome::of(read(&path, &columns, |row| row.prompt()), &[name]),
            1 => Outcome::of(read(&path, &columns, |row| row.answered()), &[name]),
            _ => Outcome::of(read(&path, &columns, |row| row.pair()), &[name]),
        };
        fs::remove_file(&path).expect("it was written");
        outcome
    })
}

fn rows() -> Vec<Value> {
    let turns =
        json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]);
    vec![
        json!({"prompt": "a", "completion": " b"}),
        json!({"prompt": "a", "chosen": "b", "rejected": "c"}),
        json!({"messages": turns}),
        json!({"chosen": turns, "rejected": turns, "tools": [{"type": "function"}]}),
        json!({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}),
    ]
}

fn lines(rows: &[Value]) -> String {
    rows.iter().map(|row| format!("{row}\n")).collect()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).expect("memory is enough");
    encoder.finish().expect("memory is enough")
}

/// A Parquet file of prompts and completions.
fn parquet_file(path: &Path) -> Vec<u8> {
    let schema =
        "message rows { required binary prompt (UTF8); optional binary completion (UTF8); }";
    let schema = Arc::new(parse_message_type(schema).expect("a schema"));
    let file = fs::File::create(path).expect("a file in a temporary directory");
    let properties = Arc::new(WriterProperties::builder().build());
    let mut writer = SerializedFileWriter::new(file, schema, properties).expect("a writer");
    let mut group = writer.next_row_group().expect("a row group");
    for levels in [None, Some([1, 1].as_slice())] {
        let mut column = group.next_column().expect("no error").expect("a column");
        let values = ["a", "b"].map(ByteArray::from);
        let written = column
            .typed::<ByteArrayType>()
            .write_batch(&values, levels, None);
        written.expect("they fit");
        column.close().expect("a complete column");
    }
    group.close().expect("a complete row group");
    writer.close().expect("a complete file");
    fs::read(path).expect("it was written")
}
