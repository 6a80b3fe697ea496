//! `[evaluation]` and `[telemetry]`.

use std::net::SocketAddr;

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
    /// Steps between two lines on the terminal.
    pub logging_steps: u64,
    /// Pairs of every step that go to `samples.jsonl`.
    pub samples_per_step: usize,
}
