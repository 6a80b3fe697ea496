//! What can go wrong between a pair and its label, by what the caller can do about it.

use std::io;

use thiserror::Error;
use transport::Closed;

/// Why a judge cannot be made, or the service cannot go on. Every message reads after "failed to";
/// the cause, where there is one, is the error's source.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PreferenceError {
    /// A rule's pattern is not a regular expression.
    #[error(
        "compile preference.judge.rules[{rule}].pattern: write it in the syntax of the regex crate"
    )]
    Pattern {
        /// The rule's index, from 0.
        rule: usize,
        /// What is wrong with it.
        source: regex::Error,
    },
    /// A rule's weight is not a number to score with.
    #[error("use {weight} as preference.judge.rules[{rule}].weight: give a finite number")]
    Weight {
        /// The rule's index, from 0.
        rule: usize,
        /// The weight.
        weight: f64,
    },
    /// The rules' temperature is negative or not finite.
    #[error("use {0} as preference.judge.temperature: give 0 or a positive number")]
    Temperature(f64),
    /// A matrix that is not one of probabilities, as many rows as columns.
    #[error("use preference.judge.matrix: {reason}")]
    Matrix {
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// The judge's thread cannot be started.
    #[error("start the thread of the judge {judge}")]
    Thread {
        /// The judge's name.
        judge: String,
        /// What the system says.
        source: io::Error,
    },
    /// The judge panicked. Its pairs are back in their stream; a judge that has panicked is not asked
    /// again, so the service needs a new one.
    #[error(
        "judge pairs: the judge {judge} panicked: {message}; start the service again with a new judge"
    )]
    JudgePanicked {
        /// The judge's name.
        judge: String,
        /// What the panic says.
        message: String,
    },
    /// Nobody takes labels or drop notes any more. The pairs in hand are back in their stream.
    #[error(transparent)]
    Closed(#[from] Closed),
}

/// Why a judge could not answer a batch at all, in words for people. It costs the batch: its pairs are
/// dropped and counted, and the next batch is asked as usual.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{reason}")]
pub struct JudgeError {
    reason: String,
}

impl JudgeError {
    /// A failure with this reason: a lowercase fragment that reads after "the judge failed:".
    #[must_use]
    pub fn new(reason: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
        }
    }
}
