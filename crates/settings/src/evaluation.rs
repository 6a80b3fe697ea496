//! `[evaluation]` and `[telemetry]`.

use std::{net::SocketAddr, path::PathBuf};

use serde::{Deserialize, Serialize};

/// How often, and on how much, the policy is compared with its reference.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvaluationSettings {
    /// Steps between two evaluations; 0: only at the end.
    pub eval_steps: u64,
    /// Held-out prompts in an evaluation.
    pub prompts: usize,
    /// How many of them the final report shows.
    pub show: usize,
}

/// What a run tells of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TelemetrySettings {
    /// Where Prometheus finds `/metrics`.
    pub listen: SocketAddr,
    /// Where the live page is served, `host:port`; empty: nowhere.
    pub page: String,
    /// A file that holds the token which the page asks for; empty: none, and the page is for this machine.
    pub token_path: PathBuf,
    /// Whether the numbers of `metrics.jsonl` are written as TensorBoard's event files too.
    pub tensorboard: bool,
    /// Steps between two lines on the terminal.
    pub logging_steps: u64,
    /// Pairs of every step that go to `samples.jsonl`.
    pub samples_per_step: usize,
}

impl TelemetrySettings {
    /// Where the page is served; `None` when it is not, or when `page` is no address, which no settings
    /// that were resolved hold.
    #[must_use]
    pub fn page_address(&self) -> Option<SocketAddr> {
        self.page.parse().ok()
    }
}
