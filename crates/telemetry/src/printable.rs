//! Escapes untrusted text (prompts, completions, file contents) for output on a terminal.
//!
//! A model can emit any character. Characters that control a terminal or change the text direction are replaced
//! by escapes; everything else, emoji and their joiners included, is unchanged.

use std::borrow::Cow;
use std::io::{self, IsTerminal};

/// Escapes control characters (C0 except line feed and tab, DEL, C1), bidirectional overrides and isolates, and
/// line and paragraph separators.
#[must_use]
pub fn printable(text: &str) -> Cow<'_, str> {
    escaped(
        text,
        |c| !matches!(c, '\n' | '\t') && is_control(c),
        |c| c.escape_default().to_string(),
    )
}

/// As [`printable`], on one line: line feeds and tabs are escaped too.
#[must_use]
pub fn printable_line(text: &str) -> Cow<'_, str> {
    escaped(text, is_control, |c| c.escape_default().to_string())
}

/// Equivalent JSON without these characters: serde_json escapes C0 only.
#[must_use]
pub fn printable_json(json: &str) -> Cow<'_, str> {
    // Line feeds of indented JSON occur outside its strings only.
    let is_escaped = |c: char| c != '\n' && is_control(c);
    escaped(json, is_escaped, |c| format!("\\u{:04x}", u32::from(c)))
}

/// Most bytes of a text that [`shortened`] leaves as they are, those at its start and those at its end.
const KEPT_BYTES: [usize; 2] = [3000, 1000];

/// A text for a log or an error; the middle of a long one, such as a value from a file, is left out.
#[must_use]
pub fn shortened(text: &str) -> Cow<'_, str> {
    let [start, end] = KEPT_BYTES;
    if text.len() <= start + end {
        return text.into();
    }
    let start = text.floor_char_boundary(start);
    let end = text.ceil_char_boundary(text.len() - end);
    let (omitted, first, last) = (end - start, &text[..start], &text[end..]);
    format!("{first}… ({omitted} bytes left out) …{last}").into()
}

/// Whether ANSI escape sequences may be written to this stream: it is a terminal, one that knows them (`TERM` is not
/// `dumb`), and `NO_COLOR` is unset or empty (<https://no-color.org>).
#[must_use]
pub fn takes_ansi(stream: &impl IsTerminal) -> bool {
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let is_dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
    stream.is_terminal() && !no_color && !is_dumb
}

/// Whether ANSI escape sequences may be written to standard error.
pub(crate) fn stderr_takes_ansi() -> bool {
    takes_ansi(&io::stderr())
}

/// Whether this character controls a terminal or the text direction. All are in the Basic Multilingual Plane.
fn is_control(c: char) -> bool {
    let is_bidirectional = matches!(
        c,
        '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
    );
    c.is_control() || is_bidirectional || matches!(c, '\u{2028}' | '\u{2029}')
}

fn escaped(
    text: &str,
    is_escaped: impl Fn(char) -> bool,
    escape: impl Fn(char) -> String,
) -> Cow<'_, str> {
    if !text.chars().any(&is_escaped) {
        return text.into();
    }
    let shown = |c: char| match is_escaped(c) {
        true => escape(c),
        false => c.to_string(),
    };
    text.chars().map(shown).collect::<String>().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Red, a window title, NUL, CSI as one C1 character, DEL, a carriage return, an override, an isolate.
    const HOSTILE: &str = "\u{1b}[31m\u{1b}]0;t\u{7}\0\u{9b}2J\u{7f}\r\u{202e}a\u{2066}";

    #[test]
    fn control_characters_are_escaped_and_others_unchanged() {
        let shown = "\\u{1b}[31m\\u{1b}]0;t\\u{7}\\u{0}\\u{9b}2J\\u{7f}\\r\\u{202e}a\\u{2066}";
        assert_eq!(printable(HOSTILE), shown);
        for unchanged in [
            "",
            "a\n\tb",
            "é שלום 👩\u{200d}👩\u{200d}👧 日本",
            "\\u{1b}",
        ] {
            assert!(matches!(printable(unchanged), Cow::Borrowed(same) if same == unchanged));
        }
        assert_eq!(printable_line("a\n\tb"), "a\\n\\tb");
    }

    #[test]
    fn the_middle_of_a_long_text_is_left_out() {
        let text = "é".repeat(2000);
        assert!(matches!(shortened(&text), Cow::Borrowed(same) if same == text));
        let long = format!("value {}; remedy", "é".repeat(100_000));
        let short = shortened(&long);
        assert!(
            short.starts_with("value éé") && short.ends_with("é; remedy"),
            "{short}"
        );
        assert!(
            short.contains("bytes left out") && short.len() < 4100,
            "{}",
            short.len()
        );
    }

    #[test]
    fn escaped_json_parses_to_the_same_value() {
        let json = serde_json::json!({"text": HOSTILE, "emoji": "👧"});
        for written in [json.to_string(), format!("{json:#}")] {
            let shown = printable_json(&written);
            assert!(
                !shown.chars().any(|c| c != '\n' && is_control(c)),
                "{shown}"
            );
            assert_eq!(
                serde_json::from_str::<serde_json::Value>(&shown).unwrap(),
                json
            );
            assert!(shown.contains('👧'));
        }
    }
}
