//! `[evaluation]`: comparisons of the policy with its reference on held-out prompts.

use serde::{Deserialize, Serialize};

/// Frequency and size of evaluations.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvaluationSettings {
    /// Steps between two evaluations; 0: only at the end.
    pub eval_steps: u64,
    /// Held-out prompts per evaluation; 0: no evaluations.
    pub prompts: usize,
    /// Number of prompts shown in the final report.
    pub show: usize,
}
