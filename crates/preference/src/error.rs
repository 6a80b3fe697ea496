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
    /// A preference model cannot be read, asked or fitted.
    #[error(transparent)]
    Model(#[from] model::ModelError),
    /// There is neither an annotated pair nor a golden answer.
    #[error("fit a preference model: there are no pairs; see preference.fit.pairs")]
    NothingToFit,
    /// The loss of a preference model is not finite.
    #[error(
        "fit a preference model: the loss is not finite at step {step}; lower preference.fit.learning_rate"
    )]
    FitDiverged {
        /// The step, from 1.
        step: u64,
    },
    /// The thread that fits has panicked.
    #[error("fit a preference model: its thread panicked; see the log")]
    FitPanicked,
    /// A preference model gives numbers that are not.
    #[error("ask the preference model: its scores are not finite; its weights are damaged")]
    NotFinite,
    /// Fitting was told to stop.
    #[error("fit a preference model: interrupted; begin again with the same command")]
    FitStopped,
    /// What earlier rounds left behind cannot be read.
    #[error("read {path}: {source}")]
    Unreadable {
        /// The file.
        path: std::path::PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A line of what earlier rounds left behind is not one.
    #[error("read {path}, line {line}: {reason}; remove the line to go on without that round")]
    Torn {
        /// The file.
        path: std::path::PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// What a round of the game leaves behind cannot be written.
    #[error("write {path}: {source}")]
    Unwritable {
        /// The file.
        path: std::path::PathBuf,
        /// What the system says.
        source: io::Error,
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
