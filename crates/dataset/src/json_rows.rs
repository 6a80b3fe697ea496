//! Rows of JSON files: JSON Lines, a list, pretty-printed objects, one object with one list of rows.
//!
//! A file is read as a stream: besides what the caller keeps, one row is in memory. Where the first line does not tell
//! the layout, the file is read again from its start.

use std::{
    io::{BufRead, BufReader, Read},
    path::Path,
};

use serde_json::Value;

use crate::{
    error::{DatasetError, RowPosition},
    json::{self, MAX_ROW_BYTES, Malformed, TextPosition},
};

/// Columns that identify an object as a row rather than a wrapper of rows.
const ROW_COLUMNS: [&str; 11] = [
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "messages",
    "conversations",
    "conversation",
    "instruction",
    "question",
    "question_id",
    "text",
];

/// Receiver of rows.
pub(crate) type RowSink<'a> = &'a mut dyn FnMut(RowPosition, Value) -> Result<(), DatasetError>;

/// Reader of the rows of a JSON file.
pub(crate) struct JsonRows<'a> {
    /// Name of the file in errors.
    pub(crate) path: &'a Path,
    /// Opens the file at its start.
    pub(crate) open: &'a dyn Fn() -> Result<Box<dyn BufRead>, DatasetError>,
}

impl JsonRows<'_> {
    /// Passes every row to `each`.
    ///
    /// # Errors
    /// When the file cannot be read, or `each` fails.
    pub(crate) fn read(&self, each: RowSink<'_>) -> Result<(), DatasetError> {
        let mut stream = self.stream()?;
        match stream.skip_space().map_err(self.located())? {
            None => Ok(()),
            Some(b'[') => {
                self.elements(&mut stream, each)?;
                match stream.skip_space().map_err(self.located())? {
                    None => Ok(()),
                    Some(_) => {
                        Err(self.error(&stream, "unexpected text follows the end of the list"))
                    }
                }
            }
            Some(b'{') => self.objects(stream, each),
            Some(_) => Err(stream.not_json().in_file(self.path)),
        }
    }

    fn stream(&self) -> Result<JsonStream, DatasetError> {
        let mut stream = JsonStream::new((self.open)()?);
        stream.skip_byte_order_mark().map_err(self.located())?;
        Ok(stream)
    }

    fn located(&self) -> impl Fn(Malformed) -> DatasetError {
        |error| error.in_file(self.path)
    }

    fn error(&self, stream: &JsonStream, reason: &str) -> DatasetError {
        Malformed::syntax(stream.position, reason).in_file(self.path)
    }

    /// Reads the elements of the list at which the stream stands.
    fn elements(&self, stream: &mut JsonStream, each: RowSink<'_>) -> Result<(), DatasetError> {
        stream.consume(1);
        let mut is_first = true;
        loop {
            match stream.skip_space().map_err(self.located())? {
                None => break,
                Some(b']') if is_first => {
                    stream.consume(1);
                    return Ok(());
                }
                Some(b']') => return Err(self.error(stream, "trailing comma: remove it")),
                Some(_) => {}
            }
            let line = stream.position.line;
            let value = stream.value().map_err(self.located())?;
            each(RowPosition::Line(line), value)?;
            is_first = false;
            match stream.skip_space().map_err(self.located())? {
                Some(b',') => stream.consume(1),
                Some(b']') => {
                    stream.consume(1);
                    return Ok(());
                }
                Some(_) => {
                    let reason = "expected `,` or `]` after an element of the list";
                    return Err(self.error(stream, reason));
                }
                None => break,
            }
        }
        Err(self.error(stream, "the list is not closed: `]` is missing"))
    }

    /// Reads JSON Lines, or else consecutive multi-line values.
    fn objects(&self, mut stream: JsonStream, each: RowSink<'_>) -> Result<(), DatasetError> {
        let start = stream.position;
        let first = match stream.line_value() {
            Ok(value) => value,
            // An incomplete first line begins a multi-line value.
            Err(error) if error.is_incomplete() => return self.document(error, each),
            Err(error) => return Err(error.in_file(self.path)),
        };
        let position = RowPosition::Line(start.line);
        if stream.skip_space().map_err(self.located())?.is_none() {
            return self.unwrapped(position, first, each);
        }
        each(position, first)?;
        while stream.skip_space().map_err(self.located())?.is_some() {
            let position = RowPosition::Line(stream.position.line);
            each(position, stream.line_value().map_err(self.located())?)?;
        }
        Ok(())
    }

    /// Reads consecutive values of any number of lines; `first_line` is the error of the first one.
    fn document(&self, first_line: Malformed, each: RowSink<'_>) -> Result<(), DatasetError> {
        let mut stream = self.stream()?;
        let mut first = None;
        let mut count = 0;
        while stream.skip_space().map_err(self.located())?.is_some() {
            let position = RowPosition::Line(stream.position.line);
            let value = match stream.value() {
                Ok(value) => value,
                Err(Malformed::TooLong { .. }) if count == 0 => return self.wrapped(each),
                Err(Malformed::Unreadable(source)) => {
                    return Err(Malformed::Unreadable(source).in_file(self.path));
                }
                Err(_) if self.is_mostly_lines()? => return Err(first_line.in_file(self.path)),
                Err(error) => return Err(error.in_file(self.path)),
            };
            count += 1;
            if let Some((position, value)) = first.replace((position, value)).filter(|_| count > 1)
            {
                each(position, value)?;
            }
        }
        match first {
            Some((position, value)) if count == 1 => self.unwrapped(position, value, each),
            Some((position, value)) => each(position, value),
            None => Ok(()),
        }
    }

    /// Whether most lines are values of their own.
    fn is_mostly_lines(&self) -> Result<bool, DatasetError> {
        let mut stream = self.stream()?;
        let (mut read, mut failed) = (0u64, 0u64);
        while stream.skip_space().map_err(self.located())?.is_some() {
            match stream.line_value() {
                Ok(_) => read += 1,
                Err(Malformed::Unreadable(source)) => {
                    return Err(Malformed::Unreadable(source).in_file(self.path));
                }
                Err(_) => failed += 1,
            }
        }
        Ok(failed < read)
    }

    /// Reads the rows of the only value of a file: those of the list in an object such as `{"version": 1, "data": [...]}`,
    /// or else the value itself.
    fn unwrapped(
        &self,
        position: RowPosition,
        value: Value,
        each: RowSink<'_>,
    ) -> Result<(), DatasetError> {
        let Value::Object(mut object) = value else {
            return each(position, value);
        };
        let is_row = ROW_COLUMNS.iter().any(|name| object.contains_key(*name));
        let lists = object
            .iter()
            .filter(|(_, value)| !is_row && is_list_of_rows(value))
            .map(|(name, _)| name.clone())
            .collect();
        let rows = match only_list(lists).map_err(self.located())? {
            Some(name) => object.remove(&name),
            None => None,
        };
        match rows {
            Some(Value::Array(rows)) => {
                let mut rows = (1..).map(RowPosition::Row).zip(rows);
                rows.try_for_each(|(position, row)| each(position, row))
            }
            _ => each(position, Value::Object(object)),
        }
    }

    /// Reads the rows of the list in an object that is too long for a row.
    fn wrapped(&self, each: RowSink<'_>) -> Result<(), DatasetError> {
        let (mut lists, mut is_row) = (Vec::new(), false);
        let looked = self.members(&mut |stream, name| {
            is_row |= ROW_COLUMNS.contains(&name);
            if stream.peek().map_err(self.located())? != Some(b'[') {
                return stream.skip_value().map_err(self.located());
            }
            let (mut count, mut are_rows) = (0u64, true);
            self.elements(stream, &mut |_, value| {
                count += 1;
                are_rows &= is_object_of_row(&value);
                Ok(())
            })?;
            lists.extend((count > 0 && are_rows).then(|| name.to_owned()));
            Ok(())
        });
        let too_long = || Malformed::TooLong { line: 1 }.in_file(self.path);
        if is_row {
            return Err(too_long());
        }
        looked?;
        let wanted = only_list(lists).map_err(self.located())?;
        let wanted = wanted.ok_or_else(too_long)?;
        let mut number = 0;
        self.members(&mut |stream, name| {
            if name != wanted {
                return stream.skip_value().map_err(self.located());
            }
            self.elements(stream, &mut |_, value| {
                number += 1;
                each(RowPosition::Row(number), value)
            })
        })
    }

    /// Goes through the members of the object that the file consists of; `each` reads the value of a name.
    fn members(
        &self,
        each: &mut dyn FnMut(&mut JsonStream, &str) -> Result<(), DatasetError>,
    ) -> Result<(), DatasetError> {
        let mut stream = self.stream()?;
        stream.skip_space().map_err(self.located())?;
        stream.consume(1);
        while let Some(b'"') = stream.skip_space().map_err(self.located())? {
            let name = stream.value().map_err(self.located())?;
            if stream.skip_space().map_err(self.located())? != Some(b':') {
                return Err(self.error(&stream, "expected `:` after a name"));
            }
            stream.consume(1);
            stream.skip_space().map_err(self.located())?;
            each(&mut stream, name.as_str().unwrap_or_default())?;
            match stream.skip_space().map_err(self.located())? {
                Some(b',') => stream.consume(1),
                _ => break,
            }
        }
        if stream.skip_space().map_err(self.located())? != Some(b'}') {
            return Err(self.error(&stream, "expected `,` or `}` in an object"));
        }
        stream.consume(1);
        match stream.skip_space().map_err(self.located())? {
            None => Ok(()),
            Some(_) => Err(self.error(&stream, "unexpected text follows the object")),
        }
    }
}

/// The only one of these lists of rows.
fn only_list(mut lists: Vec<String>) -> Result<Option<String>, Malformed> {
    match lists.len() {
        0 | 1 => Ok(lists.pop()),
        _ => Err(Malformed::File {
            reason: format!(
                "the file contains several lists of rows ({}): write the intended one as JSON Lines",
                lists.join(", ")
            ),
        }),
    }
}

/// Whether a value is a list of objects other than the turns of a dialogue.
fn is_list_of_rows(value: &Value) -> bool {
    value
        .as_array()
        .is_some_and(|rows| !rows.is_empty() && rows.iter().all(is_object_of_row))
}

fn is_object_of_row(row: &Value) -> bool {
    row.as_object()
        .is_some_and(|row| !row.contains_key("role") && !row.contains_key("from"))
}

/// Stream of JSON values, with the position of the next byte.
struct JsonStream {
    input: Box<dyn BufRead>,
    position: TextPosition,
    /// The text of the value that is being read.
    text: Vec<u8>,
}

impl JsonStream {
    fn new(input: Box<dyn BufRead>) -> Self {
        Self {
            input,
            position: json::START,
            text: Vec::new(),
        }
    }

    fn skip_byte_order_mark(&mut self) -> Result<(), Malformed> {
        if self.input.fill_buf()?.starts_with(b"\xef\xbb\xbf") {
            self.input.consume(3);
        }
        Ok(())
    }

    /// The next byte; `None` at the end.
    fn peek(&mut self) -> Result<Option<u8>, Malformed> {
        Ok(self.input.fill_buf()?.first().copied())
    }

    /// Skips bytes of the current line.
    fn consume(&mut self, bytes: usize) {
        self.input.consume(bytes);
        self.position.column += bytes;
    }

    /// Skips white space; returns the next byte, or `None` at the end.
    fn skip_space(&mut self) -> Result<Option<u8>, Malformed> {
        loop {
            let chunk = self.input.fill_buf()?;
            if chunk.is_empty() {
                return Ok(None);
            }
            let is_space = |byte: u8| byte.is_ascii_whitespace() || byte == b'\x0b';
            let spaces = chunk.iter().take_while(|&&byte| is_space(byte)).count();
            let next = chunk.get(spaces).copied();
            self.position = advanced(self.position, &chunk[..spaces]);
            self.input.consume(spaces);
            if next.is_some() {
                return Ok(next);
            }
        }
    }

    /// Reads the rest of the line as a value.
    fn line_value(&mut self) -> Result<Value, Malformed> {
        let start = self.position;
        self.text.clear();
        let (mut is_complete, mut is_too_long) = (false, false);
        while !is_complete {
            let chunk = self.input.fill_buf()?;
            if chunk.is_empty() {
                break;
            }
            let end = chunk.iter().position(|&byte| byte == b'\n');
            let length = end.map_or(chunk.len(), |end| end + 1);
            is_complete = end.is_some();
            let text = &chunk[..end.unwrap_or(length)];
            is_too_long |= self.text.len() + text.len() > MAX_ROW_BYTES;
            if !is_too_long {
                self.text.extend_from_slice(text);
            }
            self.position = advanced(self.position, &chunk[..length]);
            self.input.consume(length);
        }
        match is_too_long {
            true => Err(Malformed::TooLong { line: start.line }),
            false => json::parse_value(&self.text, start),
        }
    }

    /// Reads the value at which the stream stands.
    fn value(&mut self) -> Result<Value, Malformed> {
        let start = self.position;
        self.text.clear();
        let mut text = std::mem::take(&mut self.text);
        let scanned = self.scan(&mut |part| {
            text.extend_from_slice(part);
            text.len() <= MAX_ROW_BYTES
        });
        self.text = text;
        let parsed = scanned.map(|()| json::parse_value(&self.text, start))?;
        match parsed {
            Err(error) if !error.is_incomplete() => Err(error),
            _ if self.text.len() > MAX_ROW_BYTES => Err(Malformed::TooLong { line: start.line }),
            parsed => parsed,
        }
    }

    /// Skips the value at which the stream stands.
    fn skip_value(&mut self) -> Result<(), Malformed> {
        self.scan(&mut |_| true)
    }

    /// Goes to the end of a value by its brackets and quotes; `take` receives its parts, and returns whether to go on.
    fn scan(&mut self, take: &mut dyn FnMut(&[u8]) -> bool) -> Result<(), Malformed> {
        let mut end = ValueEnd::default();
        loop {
            let chunk = self.input.fill_buf()?;
            if chunk.is_empty() {
                return Ok(());
            }
            let found = chunk.iter().position(|&byte| end.is_after(byte));
            let length = found.unwrap_or(chunk.len());
            let goes_on = take(&chunk[..length]);
            self.position = advanced(self.position, &chunk[..length]);
            self.input.consume(length);
            if found.is_some() || !goes_on {
                return Ok(());
            }
        }
    }

    /// The error for a text that begins like neither an object nor a list.
    fn not_json(mut self) -> Malformed {
        let mut line = Vec::new();
        let start = self.input.by_ref().take(1 << 10);
        if let Err(error) = BufReader::new(start).read_until(b'\n', &mut line) {
            return error.into();
        }
        let text = String::from_utf8_lossy(&line);
        let first = text.trim_end();
        let begins: String = first.chars().take(24).collect();
        match first.contains([',', '\t']) && !first.starts_with('"') {
            true => Malformed::File {
                reason: format!(
                    "the file begins with {begins:?}: neither JSON nor Parquet; convert CSV and similar formats to JSON Lines"
                ),
            },
            false => Malformed::syntax(
                self.position,
                &format!(
                    "the file begins with {begins:?}, where an object {{...}} or a list [...] is expected: convert CSV and plain \
                     text to JSON Lines, each row as {{\"prompt\": \"...\"}}"
                ),
            ),
        }
    }
}

/// The position after these bytes.
fn advanced(position: TextPosition, bytes: &[u8]) -> TextPosition {
    let newlines = bytes.iter().filter(|&&byte| byte == b'\n').count();
    match bytes.iter().rposition(|&byte| byte == b'\n') {
        None => TextPosition {
            column: position.column + bytes.len(),
            ..position
        },
        Some(last) => TextPosition {
            line: position.line + newlines,
            column: bytes.len() - last,
        },
    }
}

/// Detector of the end of a value.
#[derive(Default)]
struct ValueEnd {
    /// Number of bytes so far, of which only the first matters.
    has_begun: bool,
    /// Number of open brackets.
    depth: usize,
    is_in_string: bool,
    is_escaped: bool,
    /// Whether the previous byte completed the value.
    is_complete: bool,
}

impl ValueEnd {
    /// Whether `byte`, the next one, is after the value.
    fn is_after(&mut self, byte: u8) -> bool {
        if self.is_complete {
            return true;
        }
        let is_first = !std::mem::replace(&mut self.has_begun, true);
        if self.is_in_string {
            let is_escaped = std::mem::take(&mut self.is_escaped);
            match byte {
                b'\\' if !is_escaped => self.is_escaped = true,
                b'"' if !is_escaped => {
                    self.is_in_string = false;
                    self.is_complete = self.depth == 0;
                }
                _ => {}
            }
            return false;
        }
        match byte {
            b'"' if is_first || self.depth > 0 => self.is_in_string = true,
            b'{' | b'[' if is_first || self.depth > 0 => self.depth += 1,
            b'}' | b']' if self.depth > 0 => {
                self.depth -= 1;
                self.is_complete = self.depth == 0;
            }
            // A number or a name ends before a separator.
            _ if self.depth == 0 && !is_first => {
                return b",]}:\"{[".contains(&byte) || byte.is_ascii_whitespace();
            }
            _ => {}
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use serde_json::json;

    use super::*;
    use crate::json::parse_row;

    /// Reads a text with a buffer of this many bytes.
    fn rows_by(text: &str, buffer: usize) -> Result<Vec<(RowPosition, Value)>, DatasetError> {
        let open = || -> Result<Box<dyn BufRead>, DatasetError> {
            let text = Cursor::new(text.as_bytes().to_vec());
            Ok(Box::new(BufReader::with_capacity(buffer, text)))
        };
        let path = Path::new("rows.json");
        let mut rows = Vec::new();
        let reader = JsonRows { path, open: &open };
        reader.read(&mut |position, value| {
            rows.push((position, value));
            Ok(())
        })?;
        Ok(rows)
    }

    fn rows(text: &str) -> Result<Vec<(RowPosition, Value)>, DatasetError> {
        let all = rows_by(text, 1 << 10);
        // Every cut between two reads gives the same.
        let cut = rows_by(text, 3).map_err(|error| error.to_string());
        let found = all.as_ref().map_err(ToString::to_string);
        assert_eq!(cut.as_ref().map_err(String::clone), found, "{text:?}");
        all
    }

    fn read(text: &str) -> Vec<(RowPosition, Value)> {
        rows(text).unwrap_or_else(|error| panic!("{text:?}: {error}"))
    }

    #[test]
    fn rows_are_read_in_every_layout() {
        let (a, b) = (json!({"prompt": "a"}), json!({"prompt": "b"}));
        for (text, lines) in [
            ("{\"prompt\": \"a\"}\n\n{\"prompt\": \"b\"}\r\n", [1, 3]),
            ("\u{feff}{\"prompt\": \"a\"}\n{\"prompt\": \"b\"}", [1, 2]),
            (
                "\u{feff}[{\"prompt\": \"a\"}, {\"prompt\": \"b\"}]\n",
                [1, 1],
            ),
            (
                " [\n {\n  \"prompt\": \"a\"\n },\n {\n  \"prompt\": \"b\"\n }\n]\n",
                [2, 5],
            ),
            (
                "{\n \"prompt\": \"a\"\n}\n{\n \"prompt\": \"b\"\n}\n",
                [1, 4],
            ),
        ] {
            let expected = [
                (RowPosition::Line(lines[0]), a.clone()),
                (RowPosition::Line(lines[1]), b.clone()),
            ];
            assert_eq!(read(text), expected, "{text:?}");
        }
        assert_eq!(read(" \n"), []);
        assert_eq!(read("[ ]"), []);
        assert_eq!(read("{\n}"), [(RowPosition::Line(1), json!({}))]);
    }

    #[test]
    fn an_object_with_one_list_of_rows_is_unwrapped() {
        let expected = [
            (RowPosition::Row(1), json!({"prompt": "a"})),
            (RowPosition::Row(2), json!({"prompt": "b"})),
        ];
        for text in [
            "{\n \"version\": \"1.0\",\n \"data\": [\n  {\"prompt\": \"a\"},\n  {\"prompt\": \"b\"}\n ]\n}\n",
            "{\"data\": [{\"prompt\": \"a\"}, {\"prompt\": \"b\"}]}",
        ] {
            assert_eq!(read(text), expected, "{text}");
        }
        for row in [
            json!({"prompt": "a", "tools": [{"type": "function"}]}),
            json!({"dialogue": [{"role": "user", "content": "a"}]}),
            json!({"data": [1]}),
        ] {
            assert_eq!(read(&row.to_string()), [(RowPosition::Line(1), row)]);
        }
        let error = rows("{\"train\": [{\"prompt\": \"a\"}], \"test\": [{\"prompt\": \"b\"}]}")
            .expect_err("two");
        assert!(
            error
                .to_string()
                .contains("several lists of rows (train, test)"),
            "{error}"
        );
    }

    #[test]
    fn errors_have_line_and_column() {
        for (text, line, column, expected) in [
            (
                "[{\"prompt\":\"a\"},\n{\"prompt\":\"b\"},\n]",
                3,
                1,
                "trailing comma",
            ),
            ("[{\"prompt\":\"a\",},\n{}]", 1, 16, "trailing comma"),
            ("[{},\n {\"a\" 1}]", 2, 7, "expected `:`"),
            ("[{}\n{}]", 2, 1, "expected `,` or `]`"),
            ("[{},\n{}", 2, 3, "`]` is missing"),
            ("[{},", 1, 5, "`]` is missing"),
            ("[{}]\n[{}]", 2, 1, "follows the end"),
            (
                "{\"a\": 1}\n{\"a\": 1,}\n{\"a\": 2}\n",
                2,
                9,
                "trailing comma",
            ),
            ("{\"a\": \n{\"a\": 1}\n{\"a\": 2}\n", 1, 6, "EOF"),
            ("{\n \"a\": 1\n \"b\": 2\n}", 3, 2, "expected `,`"),
            ("{\"a\": NaN}\n{\"a\": NaN 1}\n", 2, 11, "expected `,`"),
            (
                "prompt\nhello\n",
                1,
                1,
                "convert CSV and plain text to JSON Lines",
            ),
            ("{\"a\": \"\\ud83d\"}\n", 1, 14, "cut the text elsewhere"),
            ("{\"a\": \"\\ud83d x\"}\n", 1, 14, "cut the text elsewhere"),
        ] {
            let error = rows(text).expect_err(expected).to_string();
            let position = format!("rows.json, line {line}, column {column}: not JSON: ");
            assert!(
                error.starts_with(&position) && error.contains(expected),
                "{text:?}: {error}"
            );
        }
        let error = rows("prompt,answer\na,b\n").expect_err("CSV").to_string();
        assert!(error.contains("CSV"), "{error}");
    }

    #[test]
    fn non_json_numbers_of_python_are_null() {
        let text =
            "{\"a\": NaN, \"b\": [Infinity, -Infinity], \"c\": \"NaN, \\\" Infinity\", \"d\": 1}";
        let expected = json!({"a": null, "b": [null, null], "c": "NaN, \" Infinity", "d": 1});
        assert_eq!(read(text), [(RowPosition::Line(1), expected.clone())]);
        assert_eq!(parse_row(text).map(Value::Object), Ok(expected));
        // Integers beyond 64 bits are read too, as the nearest f64.
        assert_eq!(
            read("{\"id\": 36893488147419103232}")[0].1["id"],
            json!(36893488147419103232.0)
        );
    }

    #[test]
    fn long_files_are_read_and_long_rows_are_refused() {
        let row = format!("{{\"prompt\": \"{}\"}}", "a".repeat(1 << 20));
        let many = vec![row.as_str(); 20];
        let wrapped = format!(
            "{{\"version\": 1, \"data\": [{}], \"by\": {{}}}}",
            many.join(", ")
        );
        for text in [
            many.join("\n"),
            format!("[{}]", many.join(",\n")),
            wrapped.clone(),
        ] {
            let rows = rows_by(&text, 1 << 16).map(|rows| rows.len());
            assert_eq!(rows.ok(), Some(20), "{}", &text[..30]);
        }
        let long = format!("{{\"prompt\": \"{}\"}}", "a".repeat(MAX_ROW_BYTES));
        let unclosed = format!("{{\"prompt\": \"a}}\n{}", many.join("\n"));
        for (text, expected) in [
            (long.clone(), "line 1: the row is longer than"),
            (format!("{row}\n{long}\n"), "line 2: the row is longer than"),
            (
                format!("[{row},\n{long}]"),
                "line 2: the row is longer than",
            ),
            (unclosed, "line 1, column "),
            (
                wrapped.replace("\"by\": {}", "\"more\": [{}]"),
                "several lists of rows (data, more)",
            ),
            (
                wrapped.replace("\"by\"", "\"text\""),
                "line 1: the row is longer than",
            ),
            (wrapped.replace("\"by\": {}", "\"by\" 3"), "expected `:`"),
        ] {
            let error = rows_by(&text, 1 << 16).map(|rows| rows.len());
            let error = error.expect_err(expected).to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
