//! HTML fragments: text, numbers and tables. Text from a run is escaped here.

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

/// A value as escaped text: three decimals for floats, a dash for null.
pub(crate) fn short(value: &Value) -> String {
    match value {
        Value::Number(number) if number.is_f64() => {
            format!("{:.3}", number.as_f64().unwrap_or(f64::NAN))
        }
        Value::Null => "–".into(),
        Value::String(text) => escaped(text),
        other => escaped(&other.to_string()),
    }
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

/// Elements of an array; none for any other value.
pub(crate) fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}
