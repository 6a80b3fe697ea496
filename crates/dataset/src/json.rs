//! JSON as people's programs write it: as lines, as a list, pretty-printed, with a byte order mark, with Python's
//! `NaN` and `Infinity`. A mistake has its line and column.

use std::{borrow::Cow, path::Path};

use serde_json::{Deserializer, Map, Value};

use crate::error::{DatasetError, Place};

/// What is wrong with a row that is no object.
pub(crate) const NOT_AN_OBJECT: &str = "a row must be a JSON object, as in {\"prompt\": \"...\"}";

/// A string that stands for a number that JSON does not have; as wide as `NaN`, so that places keep.
const NO_NUMBER: &str = "\"\u{7f}\"";

/// Columns by which an object is a row and not a wrapper of rows.
const OF_ROWS: [&str; 10] = [
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

/// What is wrong with a text, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Malformed {
    /// From 1.
    line: usize,
    /// The byte in it, from 1; 0 where the line as a whole is meant.
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

    /// The whole text cannot be used.
    fn whole(reason: String) -> Self {
        Self {
            line: 1,
            column: 0,
            reason,
        }
    }

    /// `error`, which was met in `text` from the byte `start` on.
    fn at(text: &str, start: usize, error: &serde_json::Error) -> Self {
        let before = &text[..start];
        let line = before.matches('\n').count() + error.line().max(1);
        let indent = match error.line() {
            0 | 1 => start - before.rfind('\n').map_or(0, |end| end + 1),
            _ => 0,
        };
        let said = error.to_string();
        let reason = said
            .rsplit_once(" at line ")
            .map_or(said.as_str(), |(reason, _)| reason);
        let remedy = match reason.contains("surrogate") || reason.contains("end of hex escape") {
            true => {
                ": half a character, as Python writes text that was cut within one; cut the text elsewhere, or take the escape out"
            }
            false => "",
        };
        Self {
            line,
            column: (indent + error.column()).max(1),
            reason: format!("{reason}{remedy}"),
        }
    }

    /// `reason`, at the byte `place` of `text`.
    fn here(text: &str, place: usize, reason: &str) -> Self {
        let before = &text[..place];
        Self {
            line: before.matches('\n').count() + 1,
            column: place - before.rfind('\n').map_or(0, |end| end + 1) + 1,
            reason: reason.to_owned(),
        }
    }
}

/// The values of a text of rows, with their places: JSON Lines; one list; one object that holds one list of
/// objects; values one after the other, of several lines each.
pub(crate) fn rows(text: &str) -> Result<Vec<(Place, Value)>, Malformed> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let text = masked(text);
    let start = text.len() - text.trim_start().len();
    let mut rows = match text.as_bytes().get(start) {
        None => Vec::new(),
        Some(b'[') => list(&text, start)?,
        Some(b'{') => objects(&text, start)?,
        Some(_) => return Err(no_json(&text, start)),
    };
    if matches!(text, Cow::Owned(_)) {
        for (_, value) in &mut rows {
            unmask(value);
        }
    }
    Ok(rows)
}

/// The object in a line of rows.
///
/// # Errors
/// When it is not a JSON object: with the column.
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

fn no_json(text: &str, start: usize) -> Malformed {
    let first = text[start..].lines().next().unwrap_or_default();
    let begins: String = first.chars().take(24).collect();
    match first.contains([',', '\t']) && !first.starts_with('"') {
        true => Malformed::whole(format!(
            "the file begins with {begins:?}: neither JSON nor Parquet; write CSV and its like as JSON Lines"
        )),
        false => Malformed::here(
            text,
            start,
            &format!(
                "the file begins with {begins:?}, where an object {{...}} or a list [...] is needed: write CSV and plain text \
                 as JSON Lines, each row as {{\"prompt\": \"...\"}}"
            ),
        ),
    }
}

/// The lines of a text, or the values that lines make together.
fn objects(text: &str, start: usize) -> Result<Vec<(Place, Value)>, Malformed> {
    let lines = (1..)
        .zip(text.split('\n'))
        .filter(|(_, line)| !line.trim().is_empty());
    let (mut read, mut broken) = (Vec::new(), None);
    let (mut failed, mut of_first) = (0, false);
    for (number, line) in lines {
        match serde_json::from_str(line) {
            Ok(value) => read.push((Place::Line(number), value)),
            Err(error) => {
                failed += 1;
                of_first |= read.is_empty() && broken.is_none() && error.is_eof();
                let offset = line.as_ptr() as usize - text.as_ptr() as usize;
                broken.get_or_insert((offset, error));
            }
        }
    }
    match broken {
        None => unwrapped(read),
        // A first line that ends too early begins a value of several lines, unless most lines are rows.
        Some(_) if of_first && failed >= read.len() => document(text, start),
        Some((offset, error)) => Err(Malformed::at(text, offset, &error)),
    }
}

/// Values one after the other.
fn document(text: &str, start: usize) -> Result<Vec<(Place, Value)>, Malformed> {
    let (mut rows, mut cursor) = (Vec::new(), Cursor::new(text, start));
    while let Some(line) = cursor.next_line() {
        rows.push((Place::Line(line), cursor.value()?));
    }
    unwrapped(rows)
}

/// The elements of the list that begins at `start`.
fn list(text: &str, start: usize) -> Result<Vec<(Place, Value)>, Malformed> {
    let (mut rows, mut cursor) = (Vec::new(), Cursor::new(text, start + 1));
    while let Some(line) = cursor.next_line() {
        match (cursor.byte(), rows.is_empty()) {
            (b']', true) => break,
            (b']', false) => return Err(cursor.refuse("trailing comma: take it out")),
            _ => rows.push((Place::Line(line), cursor.value()?)),
        }
        match cursor.next_line().map(|_| cursor.byte()) {
            Some(b',') => cursor.at += 1,
            Some(b']') => break,
            Some(_) => {
                return Err(cursor.refuse("expected `,` or `]` after an element of the list"));
            }
            None => break,
        }
    }
    if cursor.next_line().is_none() {
        return Err(cursor.refuse("the list does not end: `]` is missing"));
    }
    cursor.at += 1;
    match cursor.next_line() {
        None => Ok(rows),
        Some(_) => Err(cursor.refuse("something follows the end of the list")),
    }
}

/// A place in a text.
struct Cursor<'a> {
    text: &'a str,
    at: usize,
    /// The line of the byte `counted`.
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

    /// Passes over white space; gives the line of what follows, if anything does.
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
            None => return Err(self.refuse("a value is missing")),
        };
        self.at += stream.byte_offset();
        Ok(value)
    }

    fn refuse(&self, reason: &str) -> Malformed {
        Malformed::here(self.text, self.at, reason)
    }
}

/// The rows that a single object wraps, as in `{"version": 1, "data": [...]}`; else the values as they are.
fn unwrapped(mut values: Vec<(Place, Value)>) -> Result<Vec<(Place, Value)>, Malformed> {
    let [(_, Value::Object(object))] = values.as_mut_slice() else {
        return Ok(values);
    };
    if OF_ROWS.iter().any(|name| object.contains_key(*name)) {
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
            Ok((1..).map(Place::Row).zip(rows).collect())
        }
        several => Err(Malformed::whole(format!(
            "the file holds several lists of rows ({}): write the one that is meant as JSON Lines",
            several.join(", ")
        ))),
    }
}

/// Whether a value is a list of objects that are not the turns of a dialogue.
fn is_list_of_rows(value: &Value) -> bool {
    let is_row = |row: &Value| {
        row.as_object()
            .is_some_and(|row| !row.contains_key("role") && !row.contains_key("from"))
    };
    value
        .as_array()
        .is_some_and(|rows| !rows.is_empty() && rows.iter().all(is_row))
}

/// The text with a string of the same width in place of Python's `NaN`, `Infinity` and `-Infinity`.
fn masked(text: &str) -> Cow<'_, str> {
    if !text.contains("NaN") && !text.contains("Infinity") {
        return text.into();
    }
    let (mut masked, mut in_string, mut rest) = (String::with_capacity(text.len()), false, text);
    while let Some(next) = rest.chars().next() {
        let literal = ["NaN", "-Infinity", "Infinity"]
            .into_iter()
            .find(|literal| !in_string && rest.starts_with(literal));
        let taken = match (next, literal) {
            (_, Some(literal)) => {
                masked.push_str(NO_NUMBER);
                masked.extend(std::iter::repeat_n(' ', literal.len() - NO_NUMBER.len()));
                rest = &rest[literal.len()..];
                continue;
            }
            // An escape is two characters.
            ('\\', None) if in_string => 1 + rest[1..].chars().next().map_or(0, char::len_utf8),
            // No string goes beyond its line: what one that is broken swallows ends there.
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
        masked.push_str(&rest[..taken]);
        rest = &rest[taken..];
    }
    masked.into()
}

/// Makes null of the strings that [`masked`] put in.
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

    fn read(text: &str) -> Vec<(Place, Value)> {
        rows(text).unwrap_or_else(|error| panic!("{text:?}: {error:?}"))
    }

    #[test]
    fn rows_are_read_however_they_are_laid_out() {
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
                (Place::Line(lines[0]), a.clone()),
                (Place::Line(lines[1]), b.clone()),
            ];
            assert_eq!(read(text), expected, "{text:?}");
        }
        assert_eq!(read(" \n"), []);
        assert_eq!(read("[ ]"), []);
        assert_eq!(read("{\n}"), [(Place::Line(1), json!({}))]);
    }

    #[test]
    fn an_object_around_one_list_of_rows_is_taken_off() {
        let expected = [
            (Place::Row(1), json!({"prompt": "a"})),
            (Place::Row(2), json!({"prompt": "b"})),
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
            assert_eq!(read(&row.to_string()), [(Place::Line(1), row)]);
        }
        let error = rows("{\"train\": [{\"prompt\": \"a\"}], \"test\": [{\"prompt\": \"b\"}]}")
            .expect_err("two");
        assert!(
            error.reason.contains("several lists of rows (train, test)"),
            "{error:?}"
        );
    }

    #[test]
    fn mistakes_have_their_line_and_column() {
        for (text, line, column, says) in [
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
                "write CSV and plain text as JSON Lines",
            ),
            ("{\"a\": \"\\ud83d\"}\n", 1, 14, "cut the text elsewhere"),
            ("{\"a\": \"\\ud83d x\"}\n", 1, 14, "cut the text elsewhere"),
        ] {
            let error = rows(text).expect_err(says);
            assert_eq!(
                (error.line, error.column),
                (line, column),
                "{text:?}: {error:?}"
            );
            assert!(error.reason.contains(says), "{text:?}: {error:?}");
        }
        let error = rows("prompt,answer\na,b\n").expect_err("CSV");
        assert!(error.reason.contains("CSV"), "{error:?}");
    }

    #[test]
    fn numbers_that_only_python_writes_are_null() {
        let text =
            "{\"a\": NaN, \"b\": [Infinity, -Infinity], \"c\": \"NaN, \\\" Infinity\", \"d\": 1}";
        let expected = json!({"a": null, "b": [null, null], "c": "NaN, \" Infinity", "d": 1});
        assert_eq!(read(text), [(Place::Line(1), expected.clone())]);
        assert_eq!(parse_row(text).map(Value::Object), Ok(expected));
        // Integers beyond 64 bits are read too, as the nearest f64.
        assert_eq!(
            read("{\"id\": 36893488147419103232}")[0].1["id"],
            json!(36893488147419103232.0)
        );
    }

    #[test]
    fn a_line_is_read_alone() {
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
