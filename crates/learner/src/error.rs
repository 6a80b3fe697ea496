//! Errors that end a learner before its last step.

use std::path::PathBuf;

use model::ModelError;
use thiserror::Error;
use transport::TransportError;

/// Error that ends a learner before its last step.
#[derive(Debug, Error)]
pub enum LearnerError {
    /// The model fails.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A stream is closed at its other end, weights cannot be published, or the server is unreachable.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The run directory cannot be written.
    #[error(transparent)]
    Telemetry(#[from] telemetry::TelemetryError),
    /// A thread panicked.
    #[error("the trainer thread ended unexpectedly (it panicked; see the log)")]
    ThreadPanicked,
    /// The task that uploads weights panicked.
    #[error("the upload of weights ended unexpectedly (it panicked; see the log)")]
    UploadPanicked,
    /// The trainer thread cannot be started.
    #[error("failed to start the trainer thread: {0}")]
    Thread(std::io::Error),
    /// A file cannot be read.
    #[error("failed to read {path}: {source}")]
    Unreadable {
        /// Path of the file.
        path: PathBuf,
        /// Error of the operating system.
        source: std::io::Error,
    },
    /// A checkpoint cannot be written; earlier ones are unchanged.
    #[error("failed to write the checkpoint {path}: {reason}; earlier checkpoints are untouched")]
    Unwritable {
        /// Path of the file.
        path: PathBuf,
        /// Error of the operating system.
        reason: String,
    },
    /// A data file cannot be used.
    #[error(transparent)]
    Dataset(#[from] dataset::DatasetError),
    /// A checkpoint cannot be resumed.
    #[error("the checkpoint {path} cannot be resumed: {reason}")]
    Checkpoint {
        /// Path of its folder.
        path: PathBuf,
        /// Reason.
        reason: String,
    },
    /// A checkpoint is not whole, or of another build.
    #[error(
        "the checkpoint {path} cannot be resumed: {reason}; --resume=auto takes the newest whole one, --resume=FOLDER another"
    )]
    DamagedCheckpoint {
        /// Path of its folder.
        path: PathBuf,
        /// Reason.
        reason: String,
    },
    /// A run has no checkpoint that it could be resumed from.
    #[error(
        "the run in {directory} cannot be resumed, and it has begun, so it does not start again from nothing: {reason}; name a checkpoint with --resume=FOLDER, or start a new run in another directory"
    )]
    NoWholeCheckpoint {
        /// Run directory.
        directory: PathBuf,
        /// The content found instead.
        reason: String,
    },
    /// A run is resumed with other inputs.
    #[error(
        "the run cannot be resumed from {path} with other inputs than it began with: {changes}; put them back, or accept the changes with --accept-changes"
    )]
    ChangedInputs {
        /// Path of the checkpoint.
        path: PathBuf,
        /// Each change by name.
        changes: String,
    },
    /// Pairs do not arrive in time.
    #[error(
        "no step for {seconds} s: waited for {reason} with {outstanding} prompts outstanding and {buffered} pairs buffered{dropped}; see learner.batch_timeout_seconds"
    )]
    Overdue {
        /// Name of the wait.
        reason: &'static str,
        /// Duration of the wait.
        seconds: u64,
        /// Number of outstanding prompts.
        outstanding: usize,
        /// Number of buffered pairs.
        buffered: usize,
        /// Prompts dropped meanwhile, by reason, as the end of a sentence.
        dropped: String,
    },
    /// The judge has given none of the pairs from files a label.
    #[error(
        "the judge {judge} gave none of the {pairs} pairs of {files} a label that is trained on{dropped}; see preference.judge and learner.min_margin, or set pairs.label = \"file\""
    )]
    NoLabels {
        /// Kind of the judge.
        judge: &'static str,
        /// Number of pairs.
        pairs: u64,
        /// Paths of their files.
        files: String,
        /// Pairs dropped meanwhile, by reason, as the end of a sentence.
        dropped: String,
    },
    /// The stream of prompts or pairs stays full.
    #[error(
        "no room for {what} for {seconds} s: its stream is full and nobody takes from it; see agon status and learner.batch_timeout_seconds"
    )]
    NoRoom {
        /// The file or value that needs room.
        what: &'static str,
        /// Duration of the wait.
        seconds: u64,
    },
    /// The run diverges, and rollbacks have not helped.
    #[error(
        "diverged: the run was rolled back to a checkpoint {rollbacks} times, and its loss, gradient or weights are again not finite or far beyond its past; its batches are in {quarantine}; lower learner.learning_rate"
    )]
    Diverged {
        /// Number of rollbacks to a checkpoint.
        rollbacks: u64,
        /// Folder of the quarantined batches.
        quarantine: PathBuf,
    },
    /// Supervised fine-tuning diverges.
    #[error(
        "diverged: the loss of supervised fine-tuning is {loss} at step {step}, after {first} at the first; nothing was saved; lower sft.learning_rate"
    )]
    SftDiverged {
        /// Step, from 1.
        step: u64,
        /// Loss of the policy, in nats per token; that of the weights after it, if NaN.
        loss: f64,
        /// Loss of the first step.
        first: f64,
    },
    /// A shutdown was requested before there was anything to save.
    #[error("interrupted while {work}; nothing was saved, start again")]
    Interrupted {
        /// Work in progress.
        work: &'static str,
    },
    /// The objective needs golden answers that the prompt set does not have.
    #[error("the objective {objective} needs a golden answer for every prompt, {prompt} has none")]
    NoGolden {
        /// Name of the objective.
        objective: &'static str,
        /// Prompt without a golden answer.
        prompt: messages::PromptId,
    },
}

impl From<candle_core::Error> for LearnerError {
    fn from(error: candle_core::Error) -> Self {
        Self::Model(ModelError::Compute(error))
    }
}

impl messages::Classified for LearnerError {
    fn class(&self) -> messages::ErrorClass {
        use messages::ErrorClass;
        match self {
            Self::Diverged { .. } | Self::SftDiverged { .. } => ErrorClass::Diverged,
            Self::Interrupted { .. } => ErrorClass::Interrupted,
            Self::ChangedInputs { .. } => ErrorClass::Usage,
            Self::Unreadable { .. }
            | Self::Checkpoint { .. }
            | Self::DamagedCheckpoint { .. }
            | Self::NoWholeCheckpoint { .. }
            | Self::NoGolden { .. } => ErrorClass::Resource,
            Self::Dataset(error) => error.class(),
            Self::Model(error) => error.class(),
            Self::Telemetry(error) => error.class(),
            _ => ErrorClass::Failed,
        }
    }
}
