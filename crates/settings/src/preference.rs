//! `[preference]`: the service and its circuit; its judges are in `judge`, its models in `fit`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{ApoSettings, ChatSettings, DtypeSetting, FitSettings, JudgeSettings};

/// How pairs are judged.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PreferenceSettings {
    /// Judges of the configured kind side by side in this process; a judge of several URLs has one for
    /// each besides.
    pub replicas: usize,
    /// The numbers that products with a preference model's weights are taken of while it judges.
    pub precision: DtypeSetting,
    /// Comparisons judged at once.
    pub max_batch: usize,
    /// How long a batch waits for company, in milliseconds.
    pub max_wait_ms: u64,
    /// Questions that may wait for a judge; who comes later waits at the door or is told to come again.
    pub max_queue: usize,
    /// In how many orders a comparison is asked.
    pub orders: OrdersSetting,
    /// A p nearer to ½ than this is a tie: ½.
    pub tie_margin: f64,
    /// A comparison whose two orders are further apart than this is abstained from; 1: none is.
    pub max_order_gap: f64,
    /// Verdicts remembered by judge version and content; 0: none.
    pub cache_size: usize,
    /// How long one question to a judge may take, in seconds.
    pub timeout_seconds: f64,
    /// How often a question that failed is asked again.
    pub max_retries: usize,
    /// The pause before the first retry in milliseconds, doubled for each one after it, with jitter.
    pub retry_base_ms: u64,
    /// Failures in a row after which a replica is left alone for a while.
    pub circuit_failures: usize,
    /// How long it is left alone before one question is tried, in seconds.
    pub circuit_probe_seconds: f64,
    /// Who judges.
    pub judge: JudgeSettings,
    /// What a judge that is a chat model is asked.
    pub chat: ChatSettings,
    /// The service over HTTP.
    pub http: HttpServiceSettings,
    /// How preference models are made.
    pub fit: FitSettings,
    /// The adversarial game.
    pub apo: ApoSettings,
}

/// In how many orders a comparison is asked, unless the judge is antisymmetric by construction: then once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OrdersSetting {
    /// Both in evaluations and over HTTP, one in training.
    Auto,
    /// As given.
    One,
    /// Both, and the mean is taken.
    Both,
}

/// `POST /v1/preferences`, for other trainers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HttpServiceSettings {
    /// Where it listens, `host:port`; empty: nowhere.
    pub listen: String,
    /// A file that holds the bearer token clients must show; empty: none is asked for.
    pub token_path: PathBuf,
    /// Comparisons in one request.
    pub max_pairs: usize,
    /// Bytes in one request.
    pub max_bytes: usize,
    /// Characters in one prompt or response.
    pub max_characters: usize,
}
