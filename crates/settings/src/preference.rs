//! `[preference]`: the preference service. Its judges are in `judge`, its reward models in `fit` and `apo`.

use std::{net::SocketAddr, path::PathBuf};

use serde::{Deserialize, Serialize};

use crate::{
    apo::ApoSettings,
    checks::Checks,
    fit::FitSettings,
    judge::{ChatSettings, JudgeSettings},
    model::DtypeSetting,
    settings::Settings,
};

/// Labelling of pairs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PreferenceSettings {
    /// Judge replicas in this process, in addition to one per URL of a remote judge.
    pub replicas: usize,
    /// Precision of matrix products of reward models during inference.
    pub precision: DtypeSetting,
    /// Maximum number of comparisons per batch.
    pub max_batch: usize,
    /// Maximum time in milliseconds that an incomplete batch waits for more comparisons.
    pub max_wait_ms: u64,
    /// Maximum number of queued comparisons. When the queue is full, streams wait and HTTP requests get status 429.
    pub max_queue: usize,
    /// Orders in which a comparison is judged.
    pub orders: OrdersSetting,
    /// Probabilities closer to ½ than this are ties: ½.
    pub tie_margin: f64,
    /// Maximum difference between the two orders of a comparison, above which the judge abstains; 1: never.
    pub max_order_gap: f64,
    /// Log-odds that a completion which did not end with an end-of-turn token loses in labels.
    pub missing_eos_penalty: f64,
    /// Log-odds that a completion loses in labels for each of its tokens.
    pub length_penalty: f64,
    /// Whether labels compare scores per token.
    pub length_normalization: bool,
    /// Capacity of the verdict cache, whose keys are judge version and content; 0: no cache.
    pub cache_size: usize,
    /// Timeout of one judge call, in seconds.
    pub timeout_seconds: f64,
    /// Maximum number of retries of a failed call.
    pub max_retries: usize,
    /// Delay before the first retry in milliseconds; doubled for each further retry, with jitter.
    pub retry_base_ms: u64,
    /// Consecutive failures that open a replica's circuit breaker.
    pub circuit_failures: usize,
    /// Time in seconds after which an open circuit breaker lets one probe through.
    pub circuit_probe_seconds: f64,
    /// The judge.
    pub judge: JudgeSettings,
    /// Prompt and verdicts of judges that are chat models.
    pub chat: ChatSettings,
    /// The service over HTTP.
    pub http: HttpServiceSettings,
    /// Training of reward models.
    pub fit: FitSettings,
    /// Adversarial preference optimisation.
    pub apo: ApoSettings,
}

/// Orders in which a comparison is judged; judges that are antisymmetric by construction use one order always.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OrdersSetting {
    /// Both in evaluations and over HTTP, one in training.
    Auto,
    /// The given order.
    One,
    /// Both; the probabilities are averaged.
    Both,
}

/// The HTTP service `POST /v1/preferences`, for other trainers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HttpServiceSettings {
    /// Listen address, `host:port`; empty: disabled.
    pub listen: String,
    /// File with the bearer token that clients must send; empty: none, and the address must be loopback.
    pub token_path: PathBuf,
    /// Maximum number of open connections.
    pub max_connections: usize,
    /// Maximum number of comparisons per request.
    pub max_pairs: usize,
    /// Maximum size of a request in bytes.
    pub max_bytes: usize,
    /// Maximum number of characters of a prompt or response.
    pub max_characters: usize,
}

impl PreferenceSettings {
    pub(crate) fn check(&self, settings: &Settings, checks: &mut Checks) {
        self.check_service(checks);
        self.http.check(checks);
        self.judge.check("preference.judge", settings, checks);
        self.chat.check(checks);
        self.fit.check(checks);
        if self.apo.refresh_steps > 0 {
            self.apo.check(settings, checks);
        }
    }

    fn check_service(&self, checks: &mut Checks) {
        let path = |key: &str| format!("preference.{key}");
        checks.at_least(self.replicas as u64, 1, &path("replicas"));
        checks.at_least(self.max_batch as u64, 1, &path("max_batch"));
        checks.at_least(self.max_queue as u64, 1, &path("max_queue"));
        checks.at_least(self.circuit_failures as u64, 1, &path("circuit_failures"));
        checks.positive(self.timeout_seconds, &path("timeout_seconds"));
        checks.positive(self.circuit_probe_seconds, &path("circuit_probe_seconds"));
        checks.require(
            (0.0..0.5).contains(&self.tie_margin),
            &path("tie_margin"),
            format!("{} must be from 0 to below 1/2", self.tie_margin),
        );
        checks.ratio(self.max_order_gap, &path("max_order_gap"));
        checks.non_negative(self.missing_eos_penalty, &path("missing_eos_penalty"));
        checks.non_negative(self.length_penalty, &path("length_penalty"));
        checks.require(
            !self.length_normalization || self.judge.score_temperature(&self.chat).is_some(),
            &path("length_normalization"),
            format!(
                "the judge {:?} gives no scores to divide by lengths: use length_penalty, or one of the kinds \
                 \"bradley-terry\", \"encoder\", \"rule\" with a temperature above 0, or a chat judge with form = \
                 \"pointwise\"",
                self.judge.name()
            ),
        );
    }
}

impl HttpServiceSettings {
    fn check(&self, checks: &mut Checks) {
        let path = |key: &str| format!("preference.http.{key}");
        checks.at_least(self.max_connections as u64, 1, &path("max_connections"));
        checks.at_least(self.max_pairs as u64, 1, &path("max_pairs"));
        checks.at_least(self.max_bytes as u64, 1, &path("max_bytes"));
        checks.at_least(self.max_characters as u64, 1, &path("max_characters"));
        checks.require(
            self.listen.is_empty() || self.listen.contains(':'),
            &path("listen"),
            format!("{:?} is not host:port", self.listen),
        );
        checks.require(
            self.listen.is_empty() || self.is_local() || !self.token_path.as_os_str().is_empty(),
            &path("listen"),
            format!(
                "{:?} is reachable from other machines: name a file with a token, preference.http.token_path, or listen \
                 on 127.0.0.1",
                self.listen
            ),
        );
    }

    /// Whether the address is loopback, or a name, which is checked when it is bound.
    fn is_local(&self) -> bool {
        match self.listen.parse::<SocketAddr>() {
            Ok(address) => address.ip().to_canonical().is_loopback(),
            Err(_) => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::checks::tests::{assert_reported, problems};

    #[test]
    fn penalties_and_normalisation_have_bounds_and_need_scores() {
        let rule = "[preference]\nlength_normalization = true\n[preference.judge]\nkind = \"rule\"\n\
                    rules = [{ kind = \"ended\", weight = 1 }]\n";
        assert_eq!(problems(rule), Vec::<String>::new());
        assert_reported(&[
            (
                "[preference]\nlength_normalization = true",
                "preference.length_normalization: the judge \"gold\" gives no scores",
            ),
            (
                &format!("{rule}temperature = 0.0"),
                "preference.length_normalization: the judge \"rule\"",
            ),
            (
                "[preference]\nmissing_eos_penalty = -1.0",
                "preference.missing_eos_penalty: -1 must not be negative",
            ),
            (
                "[preference]\nlength_penalty = nan",
                "preference.length_penalty: NaN must not be negative",
            ),
        ]);
    }

    #[test]
    fn a_service_beyond_loopback_needs_a_token() {
        for text in [
            "listen = \"\"",
            "listen = \"127.0.0.1:8000\"",
            "listen = \"localhost:8000\"",
            "listen = \"[::1]:0\"",
            "listen = \"0.0.0.0:80\"\ntoken_path = \"token\"",
        ] {
            let problems = problems(&format!("[preference.http]\n{text}"));
            assert_eq!(problems, Vec::<String>::new(), "{text}");
        }
        let section = "[preference.http]\n";
        for listen in ["0.0.0.0:80", "[::]:80", "192.168.0.7:80"] {
            let text = format!("{section}listen = {listen:?}");
            assert_reported(&[(&text, "preference.http.token_path")]);
        }
        let text = format!("{section}max_connections = 0");
        assert_reported(&[(&text, "preference.http.max_connections")]);
    }
}
