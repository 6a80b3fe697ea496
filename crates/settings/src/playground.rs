//! `[playground]`: the synthetic summarisation task.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::checks::Checks;

/// The base policy of the synthetic summarisation task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlaygroundSettings {
    /// Hidden size.
    pub hidden_size: usize,
    /// Number of transformer blocks.
    pub layers: usize,
    /// Number of attention heads.
    pub heads: usize,
    /// Hidden size of the feed-forward network.
    pub intermediate_size: usize,
    /// Cache directory of base policies.
    pub base_dir: PathBuf,
}

impl PlaygroundSettings {
    pub(crate) fn check(&self, checks: &mut Checks) {
        checks.require(
            self.heads > 0 && self.hidden_size.is_multiple_of(2 * self.heads.max(1)),
            "playground.hidden_size",
            format!(
                "{} must be an even multiple of playground.heads = {}",
                self.hidden_size, self.heads
            ),
        );
    }
}
