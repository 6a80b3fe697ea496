//! Writing completions from the token-by-token mixture of a policy and its reference.

mod distribution;
mod sampler;

use serde::{Deserialize, Serialize};

pub use crate::ops::Precision;
#[cfg(test)]
pub(crate) use distribution::log_softmax_at;
pub use distribution::{Draw, Scratch, draw, mix};
pub use sampler::{Finished, Request, Sampler};

/// How tokens are drawn from the mixed logits.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SamplingSettings {
    /// Divides the mixed logits; greater than 0.
    pub temperature: f64,
    /// Only so many of the likeliest tokens; 0: all.
    pub top_k: usize,
    /// Only the likeliest tokens that together reach this probability; 1: all.
    pub top_p: f64,
    /// Only tokens with at least this share of the likeliest one's probability; 0: all.
    pub min_p: f64,
    /// The longest completion, in tokens.
    pub max_new_tokens: usize,
    /// How the weights are kept while tokens are drawn.
    pub precision: Precision,
}

impl SamplingSettings {
    /// The whole distribution at temperature 1, for which the theory of self-play holds.
    #[must_use]
    pub fn plain(max_new_tokens: usize) -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            max_new_tokens,
            precision: Precision::F32,
        }
    }

    fn truncates(&self) -> bool {
        self.top_k > 0 || self.top_p < 1.0 || self.min_p > 0.0
    }
}
