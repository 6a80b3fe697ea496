//! `[run]`, `[transport]` and `[topology]`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Which run this is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunSettings {
    /// Names the run directory, and the run on a server that several share.
    pub name: String,
    /// Where run directories lie.
    pub output_dir: PathBuf,
    /// Every random stream of the run derives from it.
    pub seed: u64,
}

/// How the roles meet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum TransportSettings {
    /// In one process, through bounded queues.
    Memory {},
    /// In many, over NATS JetStream.
    Jetstream(Box<JetStreamSettings>),
}

/// A NATS server and how to use it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JetStreamSettings {
    /// Where it is; several of one cluster, separated by commas. Empty: `server` is started.
    pub url: String,
    /// The nats-server that `agon train` starts when there is no `url`.
    pub server: String,
    /// A file with `user:password`; empty: none.
    pub password_path: PathBuf,
    /// A file with a token; empty: none.
    pub token_path: PathBuf,
    /// A file with an nkey's seed; empty: none.
    pub nkey_path: PathBuf,
    /// A credentials file; empty: none.
    pub credentials_path: PathBuf,
    /// Whether the connection must be encrypted.
    pub tls: bool,
    /// A certificate authority beside the system's; empty: none.
    pub ca_path: PathBuf,
    /// The client's certificate; empty: none.
    pub certificate_path: PathBuf,
    /// The key of the client's certificate; empty: none.
    pub key_path: PathBuf,
    /// Copies of every stream in a cluster of servers.
    pub replicas: usize,
    /// Seconds without a sign of life after which what a process holds is given to others.
    pub lease_seconds: u64,
    /// How often a message is delivered before it is given up.
    pub max_deliveries: u32,
    /// Seconds without an answer from the server after which a process gives up.
    pub timeout_seconds: u64,
    /// How weights travel.
    pub weights: WeightsEncoding,
    /// Every so many publications whole weights follow, with `weights = "delta"`.
    pub full_every: u64,
    /// The number format of weights on their way.
    pub weights_dtype: crate::DtypeSetting,
}

/// How weights travel from the learner to the actors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WeightsEncoding {
    /// Whole.
    Full,
    /// What changed since the last whole ones, compressed.
    Delta,
}

/// The processes that `agon train` starts and watches where the roles meet over JetStream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TopologySettings {
    /// Actor processes.
    pub actors: usize,
    /// Preference processes.
    pub preference: usize,
    /// Restarts of one process within `restart_seconds` after which the run ends.
    pub max_restarts: usize,
    /// The span of time in which restarts are counted.
    pub restart_seconds: u64,
}
