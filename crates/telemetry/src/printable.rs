//! Text of prompts, completions and files on a terminal: shown, never obeyed.
//!
//! A model can write any character. What would drive a terminal or turn the direction of a line around it is
//! written as an escape; all else, emoji and their joiners included, stays as it is.

use std::borrow::Cow;
use std::io::{self, IsTerminal};

/// `text` with every character escaped that a terminal or a reader would obey: control characters (C0 but
/// line feed and tab, DEL, C1), bidirectional overrides and isolates, and separators of lines and paragraphs.
#[must_use]
pub fn printable(text: &str) -> Cow<'_, str> {
    escaped(
        text,
        |c| !matches!(c, '\n' | '\t') && drives(c),
        |c| c.escape_default().to_string(),
    )
}

/// The same on one line: line feeds and tabs are escaped too.
#[must_use]
pub fn printable_line(text: &str) -> Cow<'_, str> {
    escaped(text, drives, |c| c.escape_default().to_string())
}

/// JSON that says the same and holds none of these characters: serde_json escapes C0 alone.
#[must_use]
pub fn printable_json(json: &str) -> Cow<'_, str> {
    // Line feeds of indented JSON stand between its strings.
    let within = |c: char| c != '\n' && drives(c);
    escaped(json, within, |c| format!("\\u{:04x}", u32::from(c)))
}

/// Whether colours and moving lines may be written to this stream: to a terminal, unless `NO_COLOR` is set and
/// not empty (<https://no-color.org>).
#[must_use]
pub fn takes_ansi(stream: &impl IsTerminal) -> bool {
    let refuses = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    stream.is_terminal() && !refuses
}

/// Whether standard error takes them.
pub(crate) fn stderr_takes_ansi() -> bool {
    takes_ansi(&io::stderr())
}

/// Whether a terminal or a reader obeys this character. All of them are in Unicode's first plane.
fn drives(c: char) -> bool {
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

    /// Red, a title, NUL, CSI as one C1 character, DEL, a carriage return, an override, an isolate.
    const HOSTILE: &str = "\u{1b}[31m\u{1b}]0;t\u{7}\0\u{9b}2J\u{7f}\r\u{202e}a\u{2066}";

    #[test]
    fn what_drives_a_terminal_is_shown_and_the_rest_stays() {
        let shown = "\\u{1b}[31m\\u{1b}]0;t\\u{7}\\u{0}\\u{9b}2J\\u{7f}\\r\\u{202e}a\\u{2066}";
        assert_eq!(printable(HOSTILE), shown);
        for kept in [
            "",
            "a\n\tb",
            "é שלום 👩\u{200d}👩\u{200d}👧 日本",
            "\\u{1b}",
        ] {
            assert!(matches!(printable(kept), Cow::Borrowed(same) if same == kept));
        }
        assert_eq!(printable_line("a\n\tb"), "a\\n\\tb");
    }

    #[test]
    fn json_says_the_same_without_them() {
        let json = serde_json::json!({"text": HOSTILE, "emoji": "👧"});
        for written in [json.to_string(), format!("{json:#}")] {
            let shown = printable_json(&written);
            assert!(!shown.chars().any(|c| c != '\n' && drives(c)), "{shown}");
            assert_eq!(
                serde_json::from_str::<serde_json::Value>(&shown).unwrap(),
                json
            );
            assert!(shown.contains('👧'));
        }
    }
}
