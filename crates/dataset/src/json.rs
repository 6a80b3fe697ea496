//! Tolerant JSON reader: JSON Lines, a list, pretty-printed objects, a byte order mark, Python's `NaN` and `Infinity`.
//! Errors have line and column.

use std::{borrow::Cow, path::Path};

use serde_json::{Deserializer, Map, Value};

use crate::error::{DatasetError, RowPosition};

/// Error message for a row that is not an object.
pub(crate) const NOT_AN_OBJECT: &str = "a row must be a JSON object, as in {\"prompt\": \"...\"}";

/// Placeholder string for numbers that JSON lacks; as long as `NaN`, so that columns do not shift.
const NON_JSON_NUMBER: &str = "\"\u{7f}\"";

/// Columns that identify an object as a row rather than a wrapper of rows.
const ROW_COLUMNS: [&str; 10] = [
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "messages",
    "conversations",
    "conversation",
    "instruction",
    "question",
    "text",
];

/// A syntax error and its position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Malformed {
    /// Line, counted from 1.
    line: usize,
    /// Byte in the line, counted from 1; 0 for an error of the whole file.
    column: usize,
    reason: String,
}

impl Malformed {
    pub(crate) fn in_file(self, path: &Path) -> DatasetError {
        let path = path.to_owned();
        match self.column {
            0 => DatasetError::File {
                path,
                reason: self.reason,
            },
            column => DatasetError::Json {
                path,
                line: self.line,
                column,
                reason: self.reason,
            },
        }
    }

    /// An error of the whole file.
    fn whole_file(reason: String) -> Self {
        Self {
            line: 1,
            column: 0,
            reason,
        }
    }

    /// The error of parsing `text` from byte `start` on.
    fn at(text: &str, start: usize, error: &serde_json::Error) -> Self {
        let before = &text[..start];
        let line = before.matches('\n').count() + error.line().max(1);
        let indent = match error.line() {
            0 | 1 => start - before.rfind('\n').map_or(0, |end| end + 1),
            _ => 0,
        };
        let message = error.to_string();
        let reason = message
            .rsplit_once(" at line ")
            .map_or(message.as_str(), |(reason, _)| reason);
        let remedy = match reason.contains("surrogate") || reason.contains("end of hex escape") {
            true => {
                ": a lone surrogate, as Python writes text that was cut within a character; cut the text elsewhere, or remove the escape"
            }
            false => "",
        };
        Self {
            line,
            column: (indent + error.column()).max(1),
            reason: format!("{reason}{remedy}"),
        }
    }

    /// An error at byte `offset` of `text`.
    fn at_offset(text: &str, offset: usize, reason: &str) -> Self {
        let before = &text[..offset];
        Self {
            line: before.matches('\n').count() + 1,
            column: offset - before.rfind('\n').map_or(0, |end| end + 1) + 1,
            reason: reason.to_owned(),
        }
    }
}

/// Parses a text of rows with their positions: JSON Lines; one list; one object with one list of objects; consecutive
/// multi-line values.
pub(crate) fn rows(text: &str) -> Result<Vec<(RowPosition, Value)>, Malformed> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let text = masked(text);
    let start = text.len() - text.trim_start().len();
    let mut rows = match text.as_bytes().get(start) {
        None => Vec::new(),
        Some(b'[') => list(&text, start)?,
        Some(b'{') => objects(&text, start)?,
        Some(_) => return Err(not_json(&text, start)),
    };
    if matches!(text, Cow::Owned(_)) {
        for (_, value) in &mut rows {
            unmask(value);
        }
    }
    Ok(rows)
}

/// Parses one line of JSON Lines.
///
/// # Errors
/// When it is not a JSON object; the message has the column.
pub fn parse_row(line: &str) -> Result<Map<String, Value>, String> {
    let line = line.strip_prefix('\u{feff}').unwrap_or(line);
    let line = masked(line);
    let mut value: Value = serde_json::from_str(&line).map_err(|error| {
        let Malformed { column, reason, .. } = Malformed::at(&line, 0, &error);
        format!("column {column}: not JSON: {reason}")
    })?;
    if matches!(line, Cow::Owned(_)) {
        unmask(&mut value);
    }
    match value {
        Value::Object(row) => Ok(row),
        _ => Err(NOT_AN_OBJECT.into()),
    }
}

/// The error for a text that begins like neither an object nor a list.
fn not_json(text: &str, start: usize) -> Malformed {
    let first = text[start..].lines().next().unwrap_or_default();
    let begins: String = first.chars().take(24).collect();
    match first.contains([',', '\t']) && !first.starts_with('"') {
        true => Malformed::whole_file(format!(
            "the file begins with {begins:?}: neither JSON nor Parquet; convert CSV and similar formats to JSON Lines"
        )),
        false => Malformed::at_offset(
            text,
            start,
            &format!(
                "the file begins with {begins:?}, where an object {{...}} or a list [...] is expected: convert CSV and plain \
                 text to JSON Lines, each row as {{\"prompt\": \"...\"}}"
            ),
        ),
    }
}

/// Parses JSON Lines, or else consecutive multi-line values.
fn objects(text: &str, start: usize) -> Result<Vec<(RowPosition, Value)>, Malformed> {
    let lines = (1..)
        .zip(text.split('\n'))
        .filter(|(_, line)| !line.trim().is_empty());
    let (mut read, mut first_error) = (Vec::new(), None);
    let (mut failed, mut first_line_is_incomplete) = (0, false);
    for (number, line) in lines {
        match serde_json::from_str(line) {
            Ok(value) => read.push((RowPosition::Line(number), value)),
            Err(error) => {
                failed += 1;
                first_line_is_incomplete |=
                    read.is_empty() && first_error.is_none() && error.is_eof();
                let offset = line.as_ptr() as usize - text.as_ptr() as usize;
                first_error.get_or_insert((offset, error));
            }
        }
    }
    match first_error {
        None => unwrapped(read),
        // An incomplete first line begins a multi-line value, unless most lines are rows.
        Some(_) if first_line_is_incomplete && failed >= read.len() => document(text, start),
        Some((offset, error)) => Err(Malformed::at(text, offset, &error)),
    }
}

/// Parses consecutive values of any number of lines.
fn document(text: &str, start: usize) -> Result<Vec<(RowPosition, Value)>, Malformed> {
    let (mut rows, mut cursor) = (Vec::new(), Cursor::new(text, start));
    while let Some(line) = cursor.next_line() {
        rows.push((RowPosition::Line(line), cursor.value()?));
    }
    unwrapped(rows)
}

/// Parses the elements of the list at `start`.
fn list(text: &str, start: usize) -> Result<Vec<(RowPosition, Value)>, Malformed> {
    let (mut rows, mut cursor) = (Vec::new(), Cursor::new(text, start + 1));
    while let Some(line) = cursor.next_line() {
        match (cursor.byte(), rows.is_empty()) {
            (b']', true) => break,
            (b']', false) => return Err(cursor.error("trailing comma: remove it")),
            _ => rows.push((RowPosition::Line(line), cursor.value()?)),
        }
        match cursor.next_line().map(|_| cursor.byte()) {
            Some(b',') => cursor.at += 1,
            Some(b']') => break,
            Some(_) => {
                return Err(cursor.error("expected `,` or `]` after an element of the list"));
            }
            None => break,
        }
    }
    if cursor.next_line().is_none() {
        return Err(cursor.error("the list is not closed: `]` is missing"));
    }
    cursor.at += 1;
    match cursor.next_line() {
        None => Ok(rows),
        Some(_) => Err(cursor.error("unexpected text follows the end of the list")),
    }
}

/// Position in a text, with its line number.
struct Cursor<'a> {
    text: &'a str,
    at: usize,
    /// Line of the byte `counted`.
    line: usize,
    counted: usize,
}

impl<'a> Cursor<'a> {
    fn new(text: &'a str, at: usize) -> Self {
        Self {
            text,
            at,
            line: 1,
            counted: 0,
        }
    }

    /// Skips white space; returns the line of what follows, or `None` at the end.
    fn next_line(&mut self) -> Option<usize> {
        let rest = &self.text[self.at..];
        self.at += rest.len() - rest.trim_start().len();
        self.line += self.text[self.counted..self.at].matches('\n').count();
        self.counted = self.at;
        (self.at < self.text.len()).then_some(self.line)
    }

    fn byte(&self) -> u8 {
        self.text.as_bytes()[self.at]
    }

    fn value(&mut self) -> Result<Value, Malformed> {
        let mut stream = Deserializer::from_str(&self.text[self.at..]).into_iter::<Value>();
        let value = match stream.next() {
            Some(Ok(value)) => value,
            Some(Err(error)) => return Err(Malformed::at(self.text, self.at, &error)),
            None => return Err(self.error("a value is missing")),
        };
        self.at += stream.byte_offset();
        Ok(value)
    }

    fn error(&self, reason: &str) -> Malformed {
        Malformed::at_offset(self.text, self.at, reason)
    }
}

/// Unwraps the rows of a single object such as `{"version": 1, "data": [...]}`; other values are unchanged.
fn unwrapped(
    mut values: Vec<(RowPosition, Value)>,
) -> Result<Vec<(RowPosition, Value)>, Malformed> {
    let [(_, Value::Object(object))] = values.as_mut_slice() else {
        return Ok(values);
    };
    if ROW_COLUMNS.iter().any(|name| object.contains_key(*name)) {
        return Ok(values);
    }
    let lists: Vec<String> = object
        .iter()
        .filter(|(_, value)| is_list_of_rows(value))
        .map(|(name, _)| name.clone())
        .collect();
    match lists.as_slice() {
        [] => Ok(values),
        [name] => {
            let Some(Value::Array(rows)) = object.remove(name) else {
                return Ok(values);
            };
            Ok((1..).map(RowPosition::Row).zip(rows).collect())
        }
        several => Err(Malformed::whole_file(format!(
            "the file contains several lists of rows ({}): write the intended one as JSON Lines",
            several.join(", ")
        ))),
    }
}

/// Whether a value is a list of objects other than the turns of a dialogue.
fn is_list_of_rows(value: &Value) -> bool {
    let is_row = |row: &Value| {
        row.as_object()
            .is_some_and(|row| !row.contains_key("role") && !row.contains_key("from"))
    };
    value
        .as_array()
        .is_some_and(|rows| !rows.is_empty() && rows.iter().all(is_row))
}

/// Replaces Python's `NaN`, `Infinity` and `-Infinity` by placeholder strings of the same length.
fn masked(text: &str) -> Cow<'_, str> {
    if !text.contains("NaN") && !text.contains("Infinity") {
        return text.into();
    }
    let (mut masked, mut in_string, mut rest) = (String::with_capacity(text.len()), false, text);
    while let Some(next) = rest.chars().next() {
        let literal = ["NaN", "-Infinity", "Infinity"]
            .into_iter()
            .find(|literal| !in_string && rest.starts_with(literal));
        let consumed = match (next, literal) {
            (_, Some(literal)) => {
                masked.push_str(NON_JSON_NUMBER);
                masked.extend(std::iter::repeat_n(
                    ' ',
                    literal.len() - NON_JSON_NUMBER.len(),
                ));
                rest = &rest[literal.len()..];
                continue;
            }
            // An escape is two characters.
            ('\\', None) if in_string => 1 + rest[1..].chars().next().map_or(0, char::len_utf8),
            // Strings do not span lines: an unterminated one ends with its line.
            ('\n', None) => {
                in_string = false;
                1
            }
            ('"', None) => {
                in_string = !in_string;
                1
            }
            (other, None) => other.len_utf8(),
        };
        masked.push_str(&rest[..consumed]);
        rest = &rest[consumed..];
    }
    masked.into()
}

/// Replaces the placeholders of [`masked`] by null.
fn unmask(value: &mut Value) {
    match value {
        Value::String(text) if text == "\u{7f}" => *value = Value::Null,
        Value::Array(values) => values.iter_mut().for_each(unmask),
        Value::Object(values) => values.values_mut().for_each(unmask),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(text: &str) -> Vec<(RowPosition, Value)> {
        rows(text).unwrap_or_else(|error| panic!("{text:?}: {error:?}"))
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
            error.reason.contains("several lists of rows (train, test)"),
            "{error:?}"
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
            let error = rows(text).expect_err(expected);
            assert_eq!(
                (error.line, error.column),
                (line, column),
                "{text:?}: {error:?}"
            );
            assert!(error.reason.contains(expected), "{text:?}: {error:?}");
        }
        let error = rows("prompt,answer\na,b\n").expect_err("CSV");
        assert!(error.reason.contains("CSV"), "{error:?}");
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
    fn a_single_line_is_parsed() {
        assert_eq!(
            parse_row("\u{feff}{\"ids\": [1]}").map(|row| row.len()),
            Ok(1)
        );
        let error = parse_row("{\"ids\": [1,]}").expect_err("a comma");
        assert!(
            error.contains("column 12: not JSON: trailing comma"),
            "{error}"
        );
        assert_eq!(parse_row("[1]"), Err(NOT_AN_OBJECT.into()));
    }
}
