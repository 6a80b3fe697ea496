//! `[evaluation]`: comparisons of the policy with its reference on held-out prompts.

use serde::{Deserialize, Serialize};

use crate::checks::Checks;

/// Frequency and size of evaluations.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvaluationSettings {
    /// Steps between two evaluations; 0: only at the end.
    pub eval_steps: u64,
    /// Held-out prompts per evaluation.
    pub prompts: usize,
    /// Number of prompts shown in the final report.
    pub show: usize,
}

impl EvaluationSettings {
    pub(crate) fn check(&self, checks: &mut Checks) {
        checks.at_least(self.prompts as u64, 1, "evaluation.prompts");
    }
}
