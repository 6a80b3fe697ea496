//! Static files of the page (HTML, CSS, JavaScript), embedded in the binary.

use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const SVG: &str = "image/svg+xml";

/// All files: path, content type, content.
const FILES: [(&str, &str, &str); 12] = [
    ("/", HTML, include_str!("web/page.html")),
    ("/page.css", CSS, include_str!("web/page.css")),
    ("/icon.svg", SVG, include_str!("web/icon.svg")),
    ("/main.js", SCRIPT, include_str!("web/main.js")),
    ("/elements.js", SCRIPT, include_str!("web/elements.js")),
    ("/format.js", SCRIPT, include_str!("web/format.js")),
    ("/chart.js", SCRIPT, include_str!("web/chart.js")),
    ("/curves.js", SCRIPT, include_str!("web/curves.js")),
    ("/pipeline.js", SCRIPT, include_str!("web/pipeline.js")),
    ("/samples.js", SCRIPT, include_str!("web/samples.js")),
    ("/tables.js", SCRIPT, include_str!("web/tables.js")),
    ("/verdicts.js", SCRIPT, include_str!("web/verdicts.js")),
];

/// The file at this path.
pub(super) fn file(path: &str) -> Option<Response> {
    let (_, content_type, content) = FILES.iter().find(|(known, _, _)| *known == path)?;
    Some(([(CONTENT_TYPE, *content_type)], *content).into_response())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_loads_nothing_external_and_never_inserts_markup() {
        for (path, content_type, content) in FILES {
            for external in ["http://", "https://", "@import", "//cdn", "url("] {
                let allowed = content.replace("http://www.w3.org/", "");
                assert!(!allowed.contains(external), "{path} refers to {external}");
            }
            if content_type == SCRIPT {
                for sink in [
                    "innerHTML",
                    "outerHTML",
                    "insertAdjacentHTML",
                    "document.write",
                    "eval(",
                ] {
                    assert!(!content.contains(sink), "{path} uses {sink}");
                }
            }
        }
    }

    #[test]
    fn all_referenced_files_exist() {
        let references = |content: &str, prefix: &str| -> Vec<String> {
            let parts = content.split(prefix).skip(1);
            parts
                .filter_map(|part| Some(part.split_once('"')?.0.to_owned()))
                .collect()
        };
        let mut seen = 0;
        for (path, _, content) in FILES {
            let files = [
                references(content, "from \"./"),
                references(content, "src=\"/"),
                references(content, "href=\"/"),
            ];
            for name in files.concat() {
                assert!(
                    file(&format!("/{name}")).is_some(),
                    "{path} refers to {name}"
                );
                seen += 1;
            }
        }
        assert!(seen >= FILES.len() - 1, "only {seen} references are found");
    }
}
