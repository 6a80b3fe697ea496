//! Why a learner ends before its last step.

use std::path::PathBuf;

use model::ModelError;
use thiserror::Error;
use transport::TransportError;

/// Why a learner ends before its last step.
#[derive(Debug, Error)]
pub enum LearnerError {
    /// The model fails.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A stream has no other end any more, weights cannot be published, or the server is gone.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The run directory cannot be written.
    #[error(transparent)]
    Telemetry(#[from] telemetry::Error),
    /// The thread that trains is gone.
    #[error("the thread that trains ended unexpectedly (it panicked; see the log)")]
    EngineGone,
    /// A thread cannot be started.
    #[error("failed to start the thread that trains: {0}")]
    Thread(std::io::Error),
    /// A file cannot be read.
    #[error("failed to read {path}: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A checkpoint cannot be written; the ones before it are as they were.
    #[error("failed to write the checkpoint {path}: {reason}; earlier checkpoints are untouched")]
    Unwritable {
        /// The file.
        path: PathBuf,
        /// What the system says.
        reason: String,
    },
    /// A file of rows cannot be used.
    #[error(transparent)]
    Dataset(#[from] dataset::DatasetError),
    /// A checkpoint does not hold what it should.
    #[error("the checkpoint {path} cannot be resumed: {reason}")]
    Checkpoint {
        /// Its folder.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Pairs do not come.
    #[error(
        "no step for {seconds} s: waited for {reason} with {outstanding} prompts on their way and {in_hand} pairs in hand{instead}; see learner.batch_timeout_seconds"
    )]
    Overdue {
        /// The wait's name.
        reason: &'static str,
        /// How long it waited.
        seconds: u64,
        /// Prompts that were sent and have not come back.
        outstanding: usize,
        /// Pairs that have.
        in_hand: usize,
        /// Prompts that were dropped meanwhile, by reason, as the end of a sentence.
        instead: String,
    },
    /// Prompts are not taken.
    #[error(
        "no room for a prompt for {seconds} s: its stream is full and nobody takes from it; see agon status and learner.batch_timeout_seconds"
    )]
    NoRoom {
        /// How long it waited.
        seconds: u64,
    },
    /// The run diverges and going back to a checkpoint has not helped.
    #[error(
        "diverged: the run went back to a checkpoint {rollbacks} times and its numbers are not finite again; its batches are in {quarantine}; lower learner.learning_rate"
    )]
    Diverged {
        /// How often the run went back to a checkpoint.
        rollbacks: u64,
        /// Where the batches are.
        quarantine: PathBuf,
    },
    /// Told to stop before there was anything to save.
    #[error("interrupted while {work}; nothing was saved, begin again")]
    Interrupted {
        /// What was being done.
        work: &'static str,
    },
    /// The objective wants what the prompt set does not have.
    #[error("the objective {objective} needs a golden answer for every prompt, {prompt} has none")]
    NoGolden {
        /// The objective.
        objective: &'static str,
        /// The prompt without one.
        prompt: messages::PromptId,
    },
}

impl From<candle_core::Error> for LearnerError {
    fn from(error: candle_core::Error) -> Self {
        Self::Model(ModelError::Compute(error))
    }
}
