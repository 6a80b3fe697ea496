//! What can go wrong between a pair and its label, by what the caller can do about it.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;
use transport::TransportError;

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
    /// A file with a key or a token cannot be read, or holds none.
    #[error("read the key in {}: it must be one line of visible ASCII", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// What the system says, where it is what failed.
        source: Option<io::Error>,
    },
    /// The client of judges elsewhere cannot be made.
    #[error("make a client for {url}")]
    Client {
        /// Whom it was for.
        url: String,
        /// What is wrong.
        source: reqwest::Error,
    },
    /// The service over HTTP cannot listen.
    #[error("listen on preference.http.listen = {listen:?}: name a free host:port")]
    Listen {
        /// The address.
        listen: String,
        /// What the system says.
        source: io::Error,
    },
    /// The judge's thread cannot be started.
    #[error("start the thread {thread} of the judge {judge}")]
    Thread {
        /// The judge's name.
        judge: String,
        /// The thread's.
        thread: String,
        /// What the system says.
        source: io::Error,
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
    /// A fitted model cannot judge.
    #[error("seat the preference model of a round: {0}")]
    Seats(String),
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
    /// No judge is left to ask. Its pairs are back in their stream; the service needs a new bench.
    #[error("judge pairs: {0}; start the service again with a new judge")]
    NoJudge(RulingError),
    /// Nobody takes labels or drop notes any more, or the server is gone. The pairs in hand are back in
    /// their stream.
    #[error(transparent)]
    Transport(#[from] TransportError),
}

/// Why a judge could not answer a batch at all, in words for people, and what may be done about it.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{reason}")]
pub struct JudgeError {
    kind: JudgeErrorKind,
    reason: String,
    retry_after: Option<Duration>,
}

/// What may be done about a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JudgeErrorKind {
    /// Ask again, elsewhere if possible: the judge is at fault, or the way to it.
    Transient,
    /// Ask again when it has time: nobody is at fault.
    Busy,
    /// Do not ask this again: the question is at fault.
    Permanent,
    /// The judge is gone with this question, and can be made again.
    Panicked,
    /// The judge is gone with this question, for good.
    Dead,
}

impl JudgeError {
    /// A failure that may pass. `reason` is a lowercase fragment that reads after "the judge failed:".
    #[must_use]
    pub fn new(reason: impl Into<String>) -> Self {
        Self::of(JudgeErrorKind::Transient, reason)
    }

    /// A question that this judge can never answer. A batch of several is asked again one by one; a
    /// question alone is abstained from with `reason`.
    #[must_use]
    pub fn permanent(reason: impl Into<String>) -> Self {
        Self::of(JudgeErrorKind::Permanent, reason)
    }

    /// A judge that asks to come again after `rest`. It costs the question none of its retries.
    #[must_use]
    pub fn busy(reason: impl Into<String>, rest: Duration) -> Self {
        Self::of(JudgeErrorKind::Busy, reason).after(rest)
    }

    pub(crate) fn of(kind: JudgeErrorKind, reason: impl Into<String>) -> Self {
        Self {
            kind,
            reason: reason.into(),
            retry_after: None,
        }
    }

    /// The same, and the judge is not asked anything before `rest` is over.
    #[must_use]
    pub fn after(self, rest: Duration) -> Self {
        Self {
            retry_after: Some(rest),
            ..self
        }
    }

    /// What may be done about it.
    #[must_use]
    pub fn kind(&self) -> JudgeErrorKind {
        self.kind
    }

    /// How long the judge wants to be left alone.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        self.retry_after
    }
}

/// Why there is no ruling on a question.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RulingError {
    /// The judge answers others, and has failed on this question as often as it may.
    #[error("the judge {judge} failed: {reason}")]
    Failed {
        /// The judge's name.
        judge: String,
        /// The last failure.
        reason: String,
    },
    /// Every place in the queue is taken.
    #[error("no room: {waiting} questions wait for a judge, and preference.max_queue is reached")]
    Full {
        /// How many wait.
        waiting: usize,
    },
    /// The caller's deadline has passed.
    #[error("no answer within {} s{}", patience.as_secs_f64(), outage(.reason.as_deref()))]
    Late {
        /// How long was waited.
        patience: Duration,
        /// Why no judge can be asked, when none can.
        reason: Option<String>,
    },
    /// Every replica is gone for good.
    #[error("the judge {judge} is gone: {reason}")]
    NoJudge {
        /// The judge's name.
        judge: String,
        /// What the last failure says.
        reason: String,
    },
}

fn outage(reason: Option<&str>) -> String {
    reason.map_or_else(String::new, |reason| {
        format!(": every circuit of the judge is open ({reason})")
    })
}
