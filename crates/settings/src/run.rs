//! `[run]` and `[transport]`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Which run this is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunSettings {
    /// Names the run directory.
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
}
