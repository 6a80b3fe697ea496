//! `[transport]` and `[topology]`: how the roles communicate, and the processes of a run.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{checks::Checks, model::DtypeSetting, settings::Settings, url};

/// Transport between the roles.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum TransportSettings {
    /// In one process, through bounded queues.
    Memory {},
    /// In several processes, over NATS JetStream.
    Jetstream(Box<JetStreamSettings>),
}

/// Connection to NATS, delivery guarantees, and encoding of weights.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JetStreamSettings {
    /// Server URLs of one cluster, comma-separated. Empty: `server` is started.
    pub url: String,
    /// The nats-server executable that `agon train` starts when `url` is empty.
    pub server: String,
    /// File with `user:password`; empty: none.
    pub password_path: PathBuf,
    /// File with a token; empty: none.
    pub token_path: PathBuf,
    /// File with an nkey seed; empty: none.
    pub nkey_path: PathBuf,
    /// Credentials file; empty: none.
    pub credentials_path: PathBuf,
    /// Whether TLS is required.
    pub tls: bool,
    /// Certificate authority in addition to the system's; empty: none.
    pub ca_path: PathBuf,
    /// Client certificate; empty: none.
    pub certificate_path: PathBuf,
    /// Private key of the client certificate; empty: none.
    pub key_path: PathBuf,
    /// File with the run's key, with which the learner signs the run's record and its weights: the seed for the learner,
    /// the public key for other roles. Empty: nothing is signed or checked.
    pub run_key_path: PathBuf,
    /// Replicas of every stream in a cluster of servers.
    pub replicas: usize,
    /// Heartbeat timeout in seconds, after which a process's unacknowledged messages are delivered to others.
    pub lease_seconds: u64,
    /// Maximum number of deliveries of a message before it is dead-lettered.
    pub max_deliveries: u32,
    /// Timeout of the server in seconds: at the start of a process, and while it is connected and does not answer.
    pub timeout_seconds: u64,
    /// Time in seconds for which a running process waits for a server that is away.
    pub max_outage_seconds: u64,
    /// Encoding of published weights.
    pub weights: WeightsEncoding,
    /// Publications from one full one to the next, with `weights = "delta"`.
    pub full_every: u64,
    /// Dtype of published weights.
    pub weights_dtype: DtypeSetting,
}

/// Encoding of weights published by the learner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WeightsEncoding {
    /// Full weights.
    Full,
    /// Compressed difference from the last full weights.
    Delta,
}

/// Processes that `agon train` starts and supervises, with JetStream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TopologySettings {
    /// Number of actor processes.
    pub actors: usize,
    /// Number of preference processes.
    pub preference: usize,
    /// Restarts of one process within `restart_seconds` after which the run ends.
    pub max_restarts: usize,
    /// Time window in which restarts are counted.
    pub restart_seconds: u64,
}

impl TransportSettings {
    /// Checks `[transport]`, `[topology]` and, as the constraints depend on the transport, the run's name.
    pub(crate) fn check(&self, settings: &Settings, checks: &mut Checks) {
        let Self::Jetstream(jetstream) = self else {
            settings.run.check_folder_name(checks);
            return;
        };
        jetstream.check(checks);
        settings.run.check_nats_name(checks);
        let topology = &settings.topology;
        checks.at_least(topology.restart_seconds, 1, "topology.restart_seconds");
        checks.require(
            topology.preference <= 1 || settings.preference.apo.refresh_steps == 0,
            "topology.preference",
            "adversarial preference optimisation needs all its samples in one process: set it to 1",
        );
        checks.require(
            topology.actors > 0 || !jetstream.url.is_empty(),
            "topology.actors",
            "without actors of its own the run needs a server that others can reach: set transport.url",
        );
    }
}

impl JetStreamSettings {
    fn check(&self, checks: &mut Checks) {
        checks.at_least(self.lease_seconds, 1, "transport.lease_seconds");
        url::check(
            &self.url,
            "transport.url",
            "a password goes into a file that transport.password_path names, a token into that of \
             transport.token_path",
            checks,
        );
        checks.at_least(self.timeout_seconds, 1, "transport.timeout_seconds");
        checks.at_least(
            self.max_outage_seconds,
            self.timeout_seconds,
            "transport.max_outage_seconds",
        );
        checks.at_least(
            u64::from(self.max_deliveries),
            1,
            "transport.max_deliveries",
        );
        checks.at_least(self.full_every, 1, "transport.full_every");
        checks.require(
            (1..=5).contains(&self.replicas),
            "transport.replicas",
            format!("{} must be from 1 to 5", self.replicas),
        );
        checks.require(
            self.certificate_path.as_os_str().is_empty() == self.key_path.as_os_str().is_empty(),
            "transport.key_path",
            "set both certificate_path and key_path, or neither",
        );
    }
}

#[cfg(test)]
mod tests {
    use crate::checks::tests::{assert_reported, problems};

    #[test]
    fn urls_with_secrets_are_refused_without_repeating_them() {
        for url in [
            "nats://ann:SESAME@host:4222",
            "nats://SESAME@host:4222",
            "ann:SESAME@host",
            "nats://one:4222,nats://ann:SESAME@two:4222",
            "wss://host:443/?token=SESAME",
            "tls://host:4222#SESAME",
        ] {
            let text = format!("[transport]\nkind = \"jetstream\"\nurl = {url:?}");
            let problems = problems(&text);
            let problem = problems.first().map_or("", String::as_str);
            assert!(problem.contains("transport.url: "), "{url}: {problem}");
            assert!(problem.contains("transport.password_path"), "{problem}");
            assert!(!problem.contains("SESAME"), "{problem}");
        }
        for url in ["", "nats://host:4222", "host", "nats://a:1,tls://[::1]:2"] {
            let text = format!("[transport]\nkind = \"jetstream\"\nurl = {url:?}");
            assert_eq!(problems(&text), Vec::<String>::new(), "{url}");
        }
    }

    #[test]
    fn an_outage_may_last_at_least_as_long_as_a_request() {
        let text = "[transport]\nkind = \"jetstream\"\ntimeout_seconds = 9\nmax_outage_seconds = 8";
        assert_reported(&[(text, "transport.max_outage_seconds: 8 must be at least 9")]);
    }
}
