//! Who says which of two completions is better: the [`Judge`] trait, one judge a file.
//!
//! A judge knows one prompt and two completions at a time. It does not know pairs, streams or what its
//! answers are used for.

mod chat;
mod encoder;
mod endpoint;
mod ensemble;
mod http;
mod learned;
mod matrix;
mod rule;
mod service;
mod verdict_text;

#[cfg(test)]
pub(crate) mod fake;

use messages::{Completion, JudgeVersion, Probability, Prompt};

use crate::JudgeError;

pub use chat::{ChatJudge, ChatModel, Said};
pub use encoder::EncoderJudge;
pub(crate) use endpoint::key;
pub use ensemble::Ensemble;
pub use learned::{Learned, Reads};
pub use matrix::Matrix;
pub use rule::Rules;
pub use verdict_text::{Alternative, ScoredToken};

/// Says which of two completions is better, many at a time. It is asked from one thread, one batch
/// after the other.
pub trait Judge: Send {
    /// Its name in labels and metrics; always the same.
    fn name(&self) -> &str;

    /// Its version, which changes whenever the same question may be answered differently.
    fn version(&self) -> JudgeVersion;

    /// Whether p(first ≻ second) = 1 − p(second ≻ first) by construction, so that asking in the other
    /// order tells nothing new. `false` unless a judge says otherwise.
    fn is_antisymmetric(&self) -> bool {
        false
    }

    /// One verdict for every comparison of `batch`, in its order.
    ///
    /// # Errors
    /// When the batch as a whole cannot be answered; [`JudgeError::kind`](crate::JudgeError::kind) says
    /// whether it may be asked again. A judge that cannot answer one comparison abstains from that one.
    fn judge(&mut self, batch: &[Comparison<'_>]) -> Result<Vec<Verdict>, JudgeError>;

    /// As [`Self::judge`], with the completions' scores of a judge that gives every completion a score of its
    /// own and prefers the higher. Other judges leave it as it is: they have none.
    ///
    /// # Errors
    /// As [`Self::judge`].
    fn judge_scored(&mut self, batch: &[Comparison<'_>]) -> Result<Vec<Scored>, JudgeError> {
        let verdicts = self.judge(batch)?.into_iter();
        Ok(verdicts
            .map(|verdict| Scored {
                verdict,
                scores: None,
            })
            .collect())
    }
}

/// Two completions of one prompt, in the order in which the judge sees them.
#[derive(Debug, Clone, Copy)]
pub struct Comparison<'a> {
    /// What was asked.
    pub prompt: &'a Prompt,
    /// The completion whose preference is asked for.
    pub first: &'a Completion,
    /// The one it is compared with.
    pub second: &'a Completion,
}

/// A verdict, and the scores of the first and the second completion where the judge has scores.
#[derive(Debug, Clone, PartialEq)]
pub struct Scored {
    /// What was said.
    pub verdict: Verdict,
    /// In the judge's own units; they mean the same for all completions of a prompt.
    pub scores: Option<[f32; 2]>,
}

/// A judge's answer to one comparison.
#[derive(Debug, Clone, PartialEq)]
pub enum Verdict {
    /// The probability that the first completion is preferred to the second.
    Preference(Probability),
    /// The judge declines to answer.
    Abstained {
        /// Why, for people.
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
    /// The preference `p`, or an abstention that says what is wrong with it: a judge whose arithmetic
    /// ran out of numbers has no opinion.
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

    /// σ(`log_odds`) as a preference, or an abstention when that is no number.
    #[must_use]
    pub fn from_log_odds(log_odds: f64) -> Self {
        match Probability::from_log_odds(log_odds) {
            Ok(p) => Self::Preference(p),
            Err(_) => Self::Abstained {
                reason: format!("the scores differ by {log_odds}, which is no number to judge by"),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::fake::{abstained, preferred};
    use super::*;

    #[test]
    fn numbers_become_preferences_and_what_is_none_an_abstention() {
        let no_probability = |p| {
            abstained(&format!(
                "{p} is not a probability: it must be a number from 0 to 1"
            ))
        };
        for (p, expected) in [
            (0.0, preferred(0.0)),
            (0.75, preferred(0.75)),
            (1.5, no_probability("1.5")),
            (f64::NAN, no_probability("NaN")),
        ] {
            assert_eq!(Verdict::from_probability(p), expected, "{p}");
        }
        for (log_odds, expected) in [
            (0.0, preferred(0.5)),
            (f64::INFINITY, preferred(1.0)),
            (f64::NEG_INFINITY, preferred(0.0)),
            (
                f64::NAN,
                abstained("the scores differ by NaN, which is no number to judge by"),
            ),
        ] {
            assert_eq!(Verdict::from_log_odds(log_odds), expected, "{log_odds}");
        }
    }
}
