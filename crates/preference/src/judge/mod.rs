//! Judges of two completions: the [`Judge`] trait, and one implementation per file.
//!
//! Does not know pairs, streams or what verdicts are used for.

mod chat;
mod encoder;
mod endpoint;
mod ensemble;
mod http;
mod identity;
mod matrix;
mod reward_model;
mod route;
mod rule;
mod score_parser;
mod service;
mod verdict_parser;

#[cfg(test)]
pub(crate) mod fake;

use messages::{Completion, JudgeVersion, Probability, Prompt};

use crate::error::JudgeError;

pub use chat::{ChatJudge, ChatModel, ChatReply, ChatRequest, ReplySettings};
pub use encoder::EncoderJudge;
pub(crate) use ensemble::sum_of_versions;
pub use ensemble::{Ensemble, EnsembleRule};
pub use matrix::Matrix;
pub use reward_model::{JudgeTokenizer, PASS_TOKENS, RewardModelJudge};
pub use route::{Route, RouteRule};
pub use rule::Rules;
pub use verdict_parser::{ScoredToken, TopLogprob};

/// A judge of two completions. Called from one thread, one batch at a time.
pub trait Judge: Send {
    /// Name in labels and metrics; constant.
    fn name(&self) -> &str;

    /// Version; changes whenever the same comparison may get a different verdict.
    fn version(&self) -> JudgeVersion;

    /// Whether p(first ≻ second) = 1 − p(second ≻ first) by construction, so that one order suffices.
    fn is_antisymmetric(&self) -> bool {
        false
    }

    /// One verdict for every comparison of `batch`, in its order.
    ///
    /// # Errors
    /// When the whole batch fails; [`JudgeError::kind`](crate::JudgeError::kind) says whether to retry. A judge
    /// that cannot answer a single comparison abstains from that one.
    fn judge(&mut self, batch: &[Comparison<'_>]) -> Result<Vec<Verdict>, JudgeError>;

    /// As [`Self::judge`], with scores if the judge scores every completion and prefers the higher score. The default
    /// is without scores.
    ///
    /// # Errors
    /// As [`Self::judge`].
    fn judge_scored(&mut self, batch: &[Comparison<'_>]) -> Result<Vec<ScoredVerdict>, JudgeError> {
        let verdicts = self.judge(batch)?.into_iter();
        Ok(verdicts
            .map(|verdict| ScoredVerdict {
                verdict,
                scores: None,
            })
            .collect())
    }
}

/// Two completions of one prompt, in the order in which the judge sees them.
#[derive(Debug, Clone, Copy)]
pub struct Comparison<'a> {
    /// The prompt.
    pub prompt: &'a Prompt,
    /// The completion whose probability of being preferred is computed.
    pub first: &'a Completion,
    /// The completion that it is compared with.
    pub second: &'a Completion,
}

/// A verdict with the scores of both completions, where the judge has scores.
#[derive(Debug, Clone, PartialEq)]
pub struct ScoredVerdict {
    /// The verdict.
    pub verdict: Verdict,
    /// Scores of the first and the second completion, in the judge's units; comparable within a prompt.
    pub scores: Option<[f32; 2]>,
}

/// Verdict of a judge on one comparison.
#[derive(Debug, Clone, PartialEq)]
pub enum Verdict {
    /// Probability that the first completion is preferred to the second.
    Preference(Probability),
    /// The judge gives no preference.
    Abstained {
        /// Reason of the abstention.
        reason: String,
    },
}

impl<'a> Comparison<'a> {
    /// The same two completions in the other order.
    #[must_use]
    pub fn swapped(self) -> Comparison<'a> {
        Comparison {
            prompt: self.prompt,
            first: self.second,
            second: self.first,
        }
    }
}

impl Verdict {
    /// The preference `p`; an abstention if `p` is not a probability.
    #[must_use]
    pub fn from_probability(p: f64) -> Self {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "a probability needs no more than f32"
        )]
        match Probability::new(p as f32) {
            Ok(p) => Self::Preference(p),
            Err(error) => Self::Abstained {
                reason: error.to_string(),
            },
        }
    }

    /// The preference σ(`log_odds`); an abstention for NaN.
    #[must_use]
    pub fn from_log_odds(log_odds: f64) -> Self {
        match Probability::from_log_odds(log_odds) {
            Ok(p) => Self::Preference(p),
            Err(_) => Self::Abstained {
                reason: format!("the difference of the scores is {log_odds}"),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::fake::{abstained, preferred};
    use super::*;

    #[test]
    fn invalid_probabilities_become_abstentions() {
        let invalid = |p| {
            abstained(&format!(
                "{p} is not a probability: it must be a number from 0 to 1"
            ))
        };
        for (p, expected) in [
            (0.0, preferred(0.0)),
            (0.75, preferred(0.75)),
            (1.5, invalid("1.5")),
            (f64::NAN, invalid("NaN")),
        ] {
            assert_eq!(Verdict::from_probability(p), expected, "{p}");
        }
        for (log_odds, expected) in [
            (0.0, preferred(0.5)),
            (f64::INFINITY, preferred(1.0)),
            (f64::NEG_INFINITY, preferred(0.0)),
            (f64::NAN, abstained("the difference of the scores is NaN")),
        ] {
            assert_eq!(Verdict::from_log_odds(log_odds), expected, "{log_odds}");
        }
    }
}
