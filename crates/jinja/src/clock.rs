//! The fixed date at which templates are rendered.

use crate::{error::TemplateError, limits};

/// Python's `strftime` at midnight of Friday 26 July 2024, the default date of Llama 3's template: prompts must not
/// depend on the current date.
pub(crate) fn strftime(format: &str) -> Result<String, TemplateError> {
    let mut written = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            written.push(c);
            continue;
        }
        let rest = chars.as_str();
        let directive = DIRECTIVES
            .iter()
            .find(|(directive, _)| rest.starts_with(directive));
        let Some((directive, text)) = directive else {
            let shown: String = rest.chars().take(1).collect();
            return Err(TemplateError::unsupported(&format!(
                "the directive %{shown} of strftime"
            )));
        };
        written.push_str(text);
        limits::text(written.len())?;
        for _ in directive.chars() {
            chars.next();
        }
    }
    Ok(written)
}

const DIRECTIVES: [(&str, &str); 55] = [
    ("c", "Fri Jul 26 00:00:00 2024"),
    ("x", "07/26/24"),
    ("X", "00:00:00"),
    ("D", "07/26/24"),
    ("R", "00:00"),
    ("r", "12:00:00 AM"),
    ("s", "1721952000"),
    ("n", "\n"),
    ("t", "\t"),
    ("Z", ""),
    ("z", ""),
    ("k", " 0"),
    ("l", "12"),
    ("P", "am"),
    ("g", "24"),
    ("-y", "24"),
    ("-e", "26"),
    ("^B", "JULY"),
    ("^b", "JUL"),
    ("^A", "FRIDAY"),
    ("^a", "FRI"),
    ("Y", "2024"),
    ("y", "24"),
    ("C", "20"),
    ("G", "2024"),
    ("B", "July"),
    ("b", "Jul"),
    ("h", "Jul"),
    ("m", "07"),
    ("-m", "7"),
    ("d", "26"),
    ("-d", "26"),
    ("e", "26"),
    ("A", "Friday"),
    ("a", "Fri"),
    ("w", "5"),
    ("u", "5"),
    ("j", "208"),
    ("-j", "208"),
    ("U", "29"),
    ("W", "30"),
    ("V", "30"),
    ("H", "00"),
    ("-H", "0"),
    ("I", "12"),
    ("-I", "12"),
    ("M", "00"),
    ("-M", "0"),
    ("S", "00"),
    ("-S", "0"),
    ("f", "000000"),
    ("p", "AM"),
    ("F", "2024-07-26"),
    ("T", "00:00:00"),
    ("%", "%"),
];
