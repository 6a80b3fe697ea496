//! `[telemetry]`: exporter, live page, logs.

use std::{net::SocketAddr, path::PathBuf};

use serde::{Deserialize, Serialize};

use crate::checks::Checks;

/// Exporter, live page and logs of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TelemetrySettings {
    /// Listen address of the Prometheus exporter, `/metrics`.
    pub listen: SocketAddr,
    /// Listen address of the live page, `host:port`; empty: no page.
    pub page: String,
    /// File with the page's bearer token; empty: none, and the page must be on a loopback address.
    pub token_path: PathBuf,
    /// Whether metrics are also written as TensorBoard event files.
    pub tensorboard: bool,
    /// Steps between two progress lines on the terminal.
    pub logging_steps: u64,
    /// Pairs per step that are written to `samples.jsonl`.
    pub samples_per_step: usize,
}

impl TelemetrySettings {
    /// Listen address of the page; `None` when there is no page, or when `page` is not an address, which resolved
    /// settings exclude.
    #[must_use]
    pub fn page_address(&self) -> Option<SocketAddr> {
        self.page.parse().ok()
    }

    pub(crate) fn check(&self, checks: &mut Checks) {
        checks.at_least(self.logging_steps, 1, "telemetry.logging_steps");
        let page = &self.page;
        let Some(address) = self.page_address() else {
            let message = format!(
                "{page:?} is not an address with a port, such as \"127.0.0.1:8080\"; \"\" is no page"
            );
            return checks.require(page.is_empty(), "telemetry.page", message);
        };
        checks.require(
            address.ip().is_loopback() || !self.token_path.as_os_str().is_empty(),
            "telemetry.page",
            format!(
                "{address} is reachable from other machines: name a file with a token, telemetry.token_path, or listen on \
                 127.0.0.1"
            ),
        );
    }
}

#[cfg(test)]
mod tests {
    use crate::checks::tests::{assert_reported, problems};

    #[test]
    fn a_non_loopback_page_needs_a_token() {
        for text in [
            "page = \"\"",
            "page = \"127.0.0.1:8080\"",
            "page = \"[::1]:0\"",
            "page = \"0.0.0.0:80\"\ntoken_path = \"token\"",
        ] {
            let problems = problems(&format!("[telemetry]\n{text}"));
            assert_eq!(problems, Vec::<String>::new(), "{text}");
        }
        assert_reported(&[
            ("[telemetry]\npage = \"0.0.0.0:80\"", "telemetry.token_path"),
            (
                "[telemetry]\npage = \"localhost\"",
                "is not an address with a port",
            ),
            ("[telemetry]\nlogging_steps = 0", "telemetry.logging_steps"),
        ]);
    }
}
