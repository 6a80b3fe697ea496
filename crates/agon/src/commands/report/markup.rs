//! Texts, numbers and tables as markup. What comes from a run is escaped here.

use std::fmt::Write as _;

use serde_json::Value;
use telemetry::printable;

/// A text as it is shown, whatever it says.
pub(super) fn escaped(text: &str) -> String {
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

/// A number for people, or a dash.
pub(super) fn short(value: &Value) -> String {
    match value {
        Value::Number(number) if number.is_f64() => {
            format!("{:.3}", number.as_f64().unwrap_or(f64::NAN))
        }
        Value::Null => "–".into(),
        Value::String(text) => escaped(text),
        other => escaped(&other.to_string()),
    }
}

/// A table of cells that are markup already.
pub(super) fn table(page: &mut String, heads: &[&str], rows: &[Vec<String>]) -> std::fmt::Result {
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

/// The entries of a list; none where there is no list.
pub(super) fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}
