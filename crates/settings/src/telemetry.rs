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
    /// File with the bearer token of the page and of the metrics; empty: none, and both must be on loopback addresses.
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
        self.require_token(self.listen, "telemetry.listen", checks);
        let page = &self.page;
        let Some(address) = self.page_address() else {
            let message = format!(
                "{page:?} is not an address with a port, such as \"127.0.0.1:8080\"; \"\" is no page"
            );
            return checks.require(page.is_empty(), "telemetry.page", message);
        };
        self.require_token(address, "telemetry.page", checks);
    }

    /// An address that other machines can reach needs a token.
    fn require_token(&self, address: SocketAddr, key: &str, checks: &mut Checks) {
        let is_local = address.ip().to_canonical().is_loopback();
        checks.require(
            is_local || !self.token_path.as_os_str().is_empty(),
            key,
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
    fn addresses_beyond_loopback_need_a_token() {
        for text in [
            "page = \"\"",
            "page = \"127.0.0.1:8080\"",
            "page = \"[::1]:0\"",
            "page = \"0.0.0.0:80\"\ntoken_path = \"token\"",
            "listen = \"[::ffff:127.0.0.1]:0\"",
            "listen = \"0.0.0.0:9464\"\ntoken_path = \"token\"",
        ] {
            let problems = problems(&format!("[telemetry]\n{text}"));
            assert_eq!(problems, Vec::<String>::new(), "{text}");
        }
        assert_reported(&[
            ("[telemetry]\npage = \"0.0.0.0:80\"", "telemetry.token_path"),
            (
                "[telemetry]\nlisten = \"0.0.0.0:80\"",
                "telemetry.token_path",
            ),
            ("[telemetry]\nlisten = \"[::]:80\"", "telemetry.listen"),
            (
                "[telemetry]\npage = \"localhost\"",
                "is not an address with a port",
            ),
            ("[telemetry]\nlogging_steps = 0", "telemetry.logging_steps"),
        ]);
    }
}
