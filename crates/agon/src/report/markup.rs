//! HTML fragments: the beginning of a page, text, numbers and tables. Text from a run is escaped here.

use std::fmt::Write as _;

use serde_json::Value;
use telemetry::printable;

/// Escapes text for HTML; control characters are replaced.
pub(crate) fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for character in printable(text).chars() {
        match character {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            plain => safe.push(plain),
        }
    }
    safe
}

const STYLE: &str = include_str!("page.css");

/// The beginning of a page, up to and with its heading. The page may load nothing and run no script.
pub(crate) fn page_start(title: &str) -> String {
    let title = escaped(title);
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
    )
}

/// Magnitude from which numbers are written with an exponent.
const MAX_DECIMAL: f64 = 1e15;

/// Maximum length of a cell's text in characters.
const MAX_CHARACTERS: usize = 20_000;

/// Maximum number of rows of a table.
pub(crate) const MAX_ROWS: usize = 2000;

/// A number with this many decimals, or with an exponent if it is large.
pub(crate) fn number(value: f64, decimals: usize) -> String {
    match value.abs() < MAX_DECIMAL {
        true => format!("{value:.decimals$}"),
        false => format!("{value:.decimals$e}"),
    }
}

/// A value as escaped text of bounded length: three decimals for floats, a dash for null.
pub(crate) fn short(value: &Value) -> String {
    match value {
        Value::Number(value) if value.is_f64() => number(value.as_f64().unwrap_or(f64::NAN), 3),
        Value::Null => "–".into(),
        Value::String(text) => escaped(cut_off(text)),
        other => escaped(cut_off(&other.to_string())),
    }
}

fn cut_off(text: &str) -> &str {
    let end = text.char_indices().nth(MAX_CHARACTERS);
    end.map_or(text, |(end, _)| &text[..end])
}

/// Writes a table whose cells are HTML.
pub(crate) fn table(page: &mut String, heads: &[&str], rows: &[Vec<String>]) -> std::fmt::Result {
    page.push_str("<div class=\"wide\"><table><thead><tr>");
    for head in heads {
        write!(page, "<th scope=\"col\">{head}</th>")?;
    }
    page.push_str("</tr></thead><tbody>\n");
    for row in rows {
        let cells: String = row.iter().map(|cell| format!("<td>{cell}</td>")).collect();
        writeln!(page, "<tr>{cells}</tr>")?;
    }
    page.push_str("</tbody></table></div>\n");
    Ok(())
}

/// Elements of an array, at most [`MAX_ROWS`]; none for any other value.
pub(crate) fn list(value: &Value) -> &[Value] {
    let all = value.as_array().map_or(&[][..], Vec::as_slice);
    &all[..all.len().min(MAX_ROWS)]
}
