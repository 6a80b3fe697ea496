//! Errors of the crate, by what the caller can do about them.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;
use transport::TransportError;

/// Failure to build a judge or to continue the service; the cause, where there is one, is the error's source.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PreferenceError {
    /// A rule's pattern is not a regular expression.
    #[error(
        "failed to compile preference.judge.rules[{rule}].pattern: write it in the syntax of the regex crate"
    )]
    Pattern {
        /// Index of the rule, from 0.
        rule: usize,
        /// Syntax error.
        source: regex::Error,
    },
    /// A rule's weight is not finite.
    #[error("preference.judge.rules[{rule}].weight is {weight}: give a finite number")]
    Weight {
        /// Index of the rule, from 0.
        rule: usize,
        /// The weight.
        weight: f64,
    },
    /// The temperature of the rules is negative or not finite.
    #[error("preference.judge.temperature is {0}: give 0 or a positive number")]
    Temperature(f64),
    /// The matrix is not square or has an entry that is not a probability.
    #[error("preference.judge.matrix: {reason}")]
    Matrix {
        /// The violated condition and how to meet it.
        reason: String,
    },
    /// A file with an API key or a token cannot be read, or is empty.
    #[error("failed to read the key in {}: it must be one line of visible ASCII", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// I/O error, if reading failed.
        source: Option<io::Error>,
    },
    /// The token of the HTTP service cannot be read, or is none.
    #[error(transparent)]
    Token(#[from] telemetry::TelemetryError),
    /// The HTTP client of a remote judge cannot be built.
    #[error("failed to build the HTTP client for {url}")]
    Client {
        /// URL of the judge.
        url: String,
        /// Error of the HTTP library.
        source: reqwest::Error,
    },
    /// The HTTP server cannot listen.
    #[error("failed to listen on preference.http.listen = {listen:?}: name a free host:port")]
    Listen {
        /// The address.
        listen: String,
        /// I/O error.
        source: io::Error,
    },
    /// The HTTP service would answer other machines without authentication.
    #[error(
        "failed to listen on preference.http.listen = {address}: an address reachable from other machines needs a token; name its file with preference.http.token_path, or listen on 127.0.0.1"
    )]
    Exposed {
        /// The address.
        address: SocketAddr,
    },
    /// A thread cannot be started.
    #[error("failed to start the thread {thread} of the judge {judge}")]
    Thread {
        /// Name of the judge.
        judge: String,
        /// Name of the thread.
        thread: String,
        /// I/O error.
        source: io::Error,
    },
    /// A preference model cannot be loaded, evaluated or trained.
    #[error(transparent)]
    Model(#[from] model::ModelError),
    /// There are neither annotated pairs nor golden answers to train on.
    #[error("failed to fit a preference model: there are no pairs; see preference.fit.pairs")]
    NothingToFit,
    /// The loss, the gradient norm or the weights of a preference model are not finite.
    #[error(
        "failed to fit a preference model: the loss, its gradient or the weights are not finite at step {step}; lower preference.fit.learning_rate"
    )]
    FitDiverged {
        /// The step, from 1.
        step: u64,
    },
    /// The training thread panicked.
    #[error("failed to fit a preference model: its thread panicked; see the log")]
    FitPanicked,
    /// A preference model computes scores that are not finite.
    #[error(
        "failed to evaluate the preference model: its scores are not finite; its weights are damaged"
    )]
    NotFinite,
    /// Training was interrupted.
    #[error("the fit of the preference model was interrupted; begin again with the same command")]
    FitStopped,
    /// Replicas of a newly trained model cannot be built.
    #[error("failed to build judge replicas from the preference model of an APO round: {0}")]
    Replicas(String),
    /// The reports of earlier APO rounds cannot be read.
    #[error("failed to read {path}: {source}")]
    Unreadable {
        /// The file.
        path: std::path::PathBuf,
        /// I/O error.
        source: io::Error,
    },
    /// A line of `rounds.jsonl` is not a round report.
    #[error(
        "failed to read {path}, line {line}: {reason}; remove the line to go on without that round"
    )]
    MalformedRound {
        /// The file.
        path: std::path::PathBuf,
        /// The line, from 1.
        line: usize,
        /// Error of the JSON parser.
        reason: String,
    },
    /// The model or the report of an APO round cannot be written.
    #[error("failed to write {path}: {source}")]
    Unwritable {
        /// The file.
        path: std::path::PathBuf,
        /// I/O error.
        source: io::Error,
    },
    /// Every replica of the judge is dead. Unacknowledged pairs are back in their stream.
    #[error("failed to judge pairs: {0}; start the service again with a new judge")]
    NoJudge(ComparisonError),
    /// No receiver for labels or drop notes is left, or the server is gone. Unacknowledged pairs are back in their
    /// stream.
    #[error(transparent)]
    Transport(#[from] TransportError),
}

/// Failure of a judge on a whole batch, with a reason and what may be done about it.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{reason}")]
pub struct JudgeError {
    kind: JudgeErrorKind,
    reason: String,
    retry_after: Option<Duration>,
}

/// Retry class of a [`JudgeError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JudgeErrorKind {
    /// The judge or the connection failed: retry, on another replica if possible.
    Transient,
    /// The judge is overloaded: retry later; not counted as a failure.
    RateLimited,
    /// The request is invalid for this judge: do not retry.
    Permanent,
    /// The judge panicked on this request and can be rebuilt.
    Panicked,
    /// The judge panicked on this request and cannot be rebuilt.
    Dead,
}

impl JudgeError {
    /// A transient failure. `reason` is a lowercase fragment that reads after "the judge failed:".
    #[must_use]
    pub fn new(reason: impl Into<String>) -> Self {
        Self::with_kind(JudgeErrorKind::Transient, reason)
    }

    /// A request that this judge can never answer. The requests of a larger batch are retried one by one; a single
    /// request gets an abstention with `reason`.
    #[must_use]
    pub fn permanent(reason: impl Into<String>) -> Self {
        Self::with_kind(JudgeErrorKind::Permanent, reason)
    }

    /// An overloaded judge. The pool pauses the replica, as long as [`Self::with_retry_after`] says or, without it, for
    /// longer with every refusal in a row. It does not count against the request's retries.
    #[must_use]
    pub fn rate_limited(reason: impl Into<String>) -> Self {
        Self::with_kind(JudgeErrorKind::RateLimited, reason)
    }

    pub(crate) fn with_kind(kind: JudgeErrorKind, reason: impl Into<String>) -> Self {
        Self {
            kind,
            reason: reason.into(),
            retry_after: None,
        }
    }

    /// The same error without `secret` in its reason: servers repeat what was sent to them.
    pub(crate) fn without_secret(self, secret: &str) -> Self {
        Self {
            reason: self.reason.replace(secret, "(the key)"),
            ..self
        }
    }

    /// The same error; the replica gets no request before `delay` has passed, within the pool's bound.
    #[must_use]
    pub fn with_retry_after(self, delay: Duration) -> Self {
        Self {
            retry_after: Some(delay),
            ..self
        }
    }

    /// Retry class.
    #[must_use]
    pub fn kind(&self) -> JudgeErrorKind {
        self.kind
    }

    /// Time before the replica accepts another request, if it gave one.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        self.retry_after
    }
}

/// Failure of the pool to answer a comparison.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ComparisonError {
    /// The request used up its retries while the judge answered others.
    #[error("the judge {judge} failed: {reason}")]
    JudgeFailed {
        /// Name of the judge.
        judge: String,
        /// Last failure.
        reason: String,
    },
    /// The queue is full.
    #[error(
        "the queue is full: {waiting} comparisons wait for a judge, and preference.max_queue is reached"
    )]
    QueueFull {
        /// Number of waiting requests.
        waiting: usize,
    },
    /// The caller's deadline passed.
    #[error("no answer within {} s{}", timeout.as_secs_f64(), outage(.reason.as_deref()))]
    TimedOut {
        /// The deadline, from the call on.
        timeout: Duration,
        /// The current outage, if there is one.
        reason: Option<String>,
    },
    /// Every replica is dead.
    #[error("the judge {judge} has no replica left: {reason}")]
    NoJudge {
        /// Name of the judge.
        judge: String,
        /// Last failure.
        reason: String,
    },
}

fn outage(reason: Option<&str>) -> String {
    reason.map_or_else(String::new, |reason| format!(": {reason}"))
}

impl messages::Classified for PreferenceError {
    fn class(&self) -> messages::ErrorClass {
        use messages::ErrorClass;
        match self {
            Self::Pattern { .. }
            | Self::Weight { .. }
            | Self::Temperature(_)
            | Self::Matrix { .. }
            | Self::Exposed { .. } => ErrorClass::Usage,
            Self::Key { .. } | Self::Listen { .. } => ErrorClass::Resource,
            Self::Token(error) => error.class(),
            Self::FitStopped => ErrorClass::Interrupted,
            Self::FitDiverged { .. } => ErrorClass::Diverged,
            _ => ErrorClass::Failed,
        }
    }
}
