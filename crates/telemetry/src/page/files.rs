//! The page itself: its text, its look and its behaviour, all in the binary.

use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const SVG: &str = "image/svg+xml";

/// Every file: its path, its type, its content.
const FILES: [(&str, &str, &str); 11] = [
    ("/", HTML, include_str!("web/page.html")),
    ("/page.css", CSS, include_str!("web/page.css")),
    ("/icon.svg", SVG, include_str!("web/icon.svg")),
    ("/main.js", SCRIPT, include_str!("web/main.js")),
    ("/elements.js", SCRIPT, include_str!("web/elements.js")),
    ("/numbers.js", SCRIPT, include_str!("web/numbers.js")),
    ("/chart.js", SCRIPT, include_str!("web/chart.js")),
    ("/curves.js", SCRIPT, include_str!("web/curves.js")),
    ("/pipeline.js", SCRIPT, include_str!("web/pipeline.js")),
    ("/samples.js", SCRIPT, include_str!("web/samples.js")),
    ("/tables.js", SCRIPT, include_str!("web/tables.js")),
];

/// The file at this path.
pub(super) fn file(path: &str) -> Option<Response> {
    let (_, kind, content) = FILES.iter().find(|(known, _, _)| *known == path)?;
    Some(([(CONTENT_TYPE, *kind)], *content).into_response())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_needs_nothing_from_elsewhere_and_makes_no_markup_of_texts() {
        for (path, kind, content) in FILES {
            for foreign in ["http://", "https://", "@import", "//cdn", "url("] {
                let allowed = content.replace("http://www.w3.org/", "");
                assert!(!allowed.contains(foreign), "{path} names {foreign}");
            }
            if kind == SCRIPT {
                for hole in [
                    "innerHTML",
                    "outerHTML",
                    "insertAdjacentHTML",
                    "document.write",
                    "eval(",
                ] {
                    assert!(!content.contains(hole), "{path} uses {hole}");
                }
            }
        }
    }

    #[test]
    fn every_file_that_another_names_is_there() {
        let named = |content: &str, before: &str| -> Vec<String> {
            let parts = content.split(before).skip(1);
            parts
                .filter_map(|part| Some(part.split_once('"')?.0.to_owned()))
                .collect()
        };
        let mut seen = 0;
        for (path, _, content) in FILES {
            let files = [
                named(content, "from \"./"),
                named(content, "src=\"/"),
                named(content, "href=\"/"),
            ];
            for name in files.concat() {
                assert!(file(&format!("/{name}")).is_some(), "{path} names {name}");
                seen += 1;
            }
        }
        assert!(seen >= FILES.len() - 1, "only {seen} files are named");
    }
}
