//! Tolerant JSON parser: Python's `NaN` and `Infinity` are null. Errors have line and column.

use std::{
    borrow::Cow,
    io::{self, BufRead, Read},
    path::Path,
};

use serde_json::{Map, Value};

use crate::error::{DatasetError, RowPosition};

/// Error message for a row that is not an object.
pub(crate) const NOT_AN_OBJECT: &str = "a row must be a JSON object, as in {\"prompt\": \"...\"}";

/// Placeholder string for numbers that JSON lacks; as long as `NaN`, so that columns do not shift.
const NON_JSON_NUMBER: &str = "\"\u{7f}\"";

/// Position in a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TextPosition {
    /// Line, counted from 1.
    pub(crate) line: usize,
    /// Byte in the line, counted from 1.
    pub(crate) column: usize,
}

/// The start of a text.
pub(crate) const START: TextPosition = TextPosition { line: 1, column: 1 };

/// An error of a text of rows.
#[derive(Debug)]
pub(crate) enum Malformed {
    /// A syntax error.
    Syntax {
        position: TextPosition,
        reason: String,
        /// Whether the text ends too early.
        is_incomplete: bool,
    },
    /// A byte that is not UTF-8, in this line.
    Encoding { line: usize, byte: u8 },
    /// A value that begins in this line is longer than rows may be.
    TooLong { line: usize },
    /// An error of the whole file.
    File { reason: String },
    /// An I/O error, or a limit of the file.
    Unreadable(io::Error),
}

impl From<io::Error> for Malformed {
    fn from(source: io::Error) -> Self {
        Self::Unreadable(source)
    }
}

impl Malformed {
    pub(crate) fn in_file(self, path: &Path) -> DatasetError {
        let path = path.to_owned();
        let row = |line, reason| DatasetError::Row {
            path: path.clone(),
            position: RowPosition::Line(line),
            reason,
        };
        match self {
            Self::Syntax {
                position, reason, ..
            } => DatasetError::Json {
                path,
                line: position.line,
                column: position.column,
                reason,
            },
            Self::Encoding { line, byte } => row(
                line,
                format!("byte {byte:#04x} is not UTF-8: convert the file to UTF-8"),
            ),
            Self::TooLong { line } => row(line, too_long()),
            Self::File { reason } => DatasetError::File { path, reason },
            Self::Unreadable(source) => DatasetError::Unreadable { path, source },
        }
    }

    /// A syntax error at this position.
    pub(crate) fn syntax(position: TextPosition, reason: &str) -> Self {
        Self::Syntax {
            position,
            reason: reason.to_owned(),
            is_incomplete: false,
        }
    }

    /// Whether a value ends too early, or is too long to tell.
    pub(crate) fn is_incomplete(&self) -> bool {
        matches!(
            self,
            Self::Syntax {
                is_incomplete: true,
                ..
            } | Self::TooLong { .. }
        )
    }

    /// The error of parsing a text that starts at this position.
    fn at(start: TextPosition, error: &serde_json::Error) -> Self {
        let indent = match error.line() {
            0 | 1 => start.column - 1,
            _ => 0,
        };
        let position = TextPosition {
            line: start.line + error.line().max(1) - 1,
            column: (indent + error.column()).max(1),
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
        Self::Syntax {
            position,
            reason: format!("{reason}{remedy}"),
            is_incomplete: error.is_eof(),
        }
    }

    fn not_utf8(bytes: &[u8], valid: usize, start: TextPosition) -> Self {
        let newlines = bytes[..valid].iter().filter(|&&byte| byte == b'\n');
        Self::Encoding {
            line: start.line + newlines.count(),
            byte: bytes.get(valid).copied().unwrap_or_default(),
        }
    }
}

/// Maximum length of one row of JSON, in bytes; parsed it takes many times as much.
pub(crate) const MAX_ROW_BYTES: usize = 16 << 20;

/// Parses one value, which starts at this position of its file.
pub(crate) fn parse_value(bytes: &[u8], start: TextPosition) -> Result<Value, Malformed> {
    let text = std::str::from_utf8(bytes)
        .map_err(|error| Malformed::not_utf8(bytes, error.valid_up_to(), start))?;
    let text = masked(text);
    let mut value = serde_json::from_str(&text).map_err(|error| Malformed::at(start, &error))?;
    if matches!(text, Cow::Owned(_)) {
        unmask(&mut value);
    }
    Ok(value)
}

/// The lines of `input`, none of which is longer than a row may be. After an error there are no more: the rest of a line that
/// is too long is not read.
pub fn row_lines(mut input: impl BufRead) -> impl Iterator<Item = Result<String, String>> {
    let mut has_failed = false;
    std::iter::from_fn(move || {
        if has_failed {
            return None;
        }
        let line = next_line(&mut input).transpose()?;
        has_failed = line.is_err();
        Some(line)
    })
}

/// The next line without its end; `None` at the end of the input.
fn next_line(input: &mut impl BufRead) -> Result<Option<String>, String> {
    let mut line = Vec::new();
    // One byte more than a row and the end of its line.
    let limit = MAX_ROW_BYTES as u64 + 2;
    let read = input.take(limit).read_until(b'\n', &mut line);
    read.map_err(|error| format!("the line cannot be read: {error}"))?;
    if line.is_empty() {
        return Ok(None);
    }
    line.pop_if(|byte| *byte == b'\n');
    if line.len() > MAX_ROW_BYTES {
        return Err(too_long());
    }
    line.pop_if(|byte| *byte == b'\r');
    let text = String::from_utf8(line);
    text.map(Some)
        .map_err(|_| "the line cannot be read: it is not UTF-8, convert the file to UTF-8".into())
}

fn too_long() -> String {
    format!("the row is longer than {MAX_ROW_BYTES} bytes: is a quote or a bracket missing?")
}

/// Parses one line of JSON Lines.
///
/// # Errors
/// When it is not a JSON object; the message has the column.
pub fn parse_row(line: &str) -> Result<Map<String, Value>, String> {
    let line = line.strip_prefix('\u{feff}').unwrap_or(line);
    let value = parse_value(line.as_bytes(), START).map_err(|error| match error {
        Malformed::Syntax {
            position, reason, ..
        } => format!("column {}: not JSON: {reason}", position.column),
        other => other.in_file(Path::new("the line")).to_string(),
    })?;
    match value {
        Value::Object(row) => Ok(row),
        _ => Err(NOT_AN_OBJECT.into()),
    }
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
    use super::*;

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

    /// A line without an end takes no more memory than a row.
    #[test]
    fn a_line_that_is_too_long_ends_the_lines() {
        let read = |text: &[u8]| row_lines(text).collect::<Vec<_>>();
        let lines = |text: &str| read(text.as_bytes());
        let ok = |line: &str| Ok(line.to_owned());
        assert_eq!(lines("a\r\n\nb"), [ok("a"), ok(""), ok("b")]);
        assert_eq!(lines(""), []);
        let longest = "x".repeat(MAX_ROW_BYTES);
        assert_eq!(lines(&format!("{longest}\na")), [ok(&longest), ok("a")]);
        for text in [format!("a\n{longest}x\nb"), format!("a\n{longest}xxx")] {
            let found = lines(&text);
            assert_eq!(found.len(), 2);
            let error = found[1].as_ref().expect_err("it is too long");
            assert!(error.contains("longer than 16777216 bytes"), "{error}");
        }
        let found = read(b"\xff\na");
        let error = found[0].as_ref().expect_err("it is not UTF-8");
        assert!(
            error.contains("not UTF-8") && found.len() == 1,
            "{found:?}: {error}"
        );
    }
}
