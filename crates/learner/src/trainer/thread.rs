//! Trainer thread: holds the policy in training.

use std::{path::PathBuf, thread::JoinHandle};

use crossbeam_channel::{Receiver, Sender};
use messages::LabelledPair;
use model::DType;
use tokio::sync::oneshot;

use crate::{
    checkpoint::{self, Checkpoint},
    error::LearnerError,
    trainer::{StepOutcome, Trainer},
};

type TrainerReply<T> = oneshot::Sender<Result<T, LearnerError>>;

/// Command to the trainer thread, with the channel of its reply.
enum TrainerCommand {
    Step {
        pairs: Vec<LabelledPair>,
        step: u64,
        reply: TrainerReply<(StepOutcome, Vec<LabelledPair>)>,
    },
    Weights {
        dtype: DType,
        reply: TrainerReply<Option<Vec<u8>>>,
    },
    IsFinite {
        reply: TrainerReply<bool>,
    },
    Save {
        to: PathBuf,
        checkpoint: Box<Checkpoint>,
        reply: TrainerReply<()>,
    },
    Restore {
        from: PathBuf,
        reply: TrainerReply<()>,
    },
}

/// Handle of the trainer thread.
pub(crate) struct TrainerThread {
    commands: Sender<TrainerCommand>,
    thread: JoinHandle<()>,
}

impl TrainerThread {
    /// Starts the thread around `trainer`.
    ///
    /// # Errors
    /// If the operating system cannot start a thread.
    pub(crate) fn spawn(trainer: Trainer) -> Result<Self, LearnerError> {
        let (commands, inbox) = crossbeam_channel::bounded(1);
        let thread = std::thread::Builder::new()
            .name("learner-train".into())
            .spawn(move || run(trainer, &inbox))
            .map_err(LearnerError::Thread)?;
        Ok(Self { commands, thread })
    }

    /// Takes step `step`, counted from 0; returns the pairs with the outcome.
    ///
    /// # Errors
    /// If the step fails or the thread has ended.
    pub(crate) async fn step(
        &self,
        pairs: Vec<LabelledPair>,
        step: u64,
    ) -> Result<(StepOutcome, Vec<LabelledPair>), LearnerError> {
        self.call(|reply| TrainerCommand::Step { pairs, step, reply })
            .await
    }

    /// The trained weights as a blob in this dtype; `None` if they are not finite.
    ///
    /// # Errors
    /// If copying fails or the thread has ended.
    pub(crate) async fn weights(&self, dtype: DType) -> Result<Option<Vec<u8>>, LearnerError> {
        self.call(|reply| TrainerCommand::Weights { dtype, reply })
            .await
    }

    /// Whether every trained weight is finite.
    ///
    /// # Errors
    /// If computing fails or the thread has ended.
    pub(crate) async fn is_finite(&self) -> Result<bool, LearnerError> {
        self.call(|reply| TrainerCommand::IsFinite { reply }).await
    }

    /// Writes a checkpoint to the folder `to`.
    ///
    /// # Errors
    /// If a file cannot be written or the thread has ended.
    pub(crate) async fn save(
        &self,
        to: PathBuf,
        checkpoint: Checkpoint,
    ) -> Result<(), LearnerError> {
        let checkpoint = Box::new(checkpoint);
        self.call(|reply| TrainerCommand::Save {
            to,
            checkpoint,
            reply,
        })
        .await
    }

    /// Restores weights and optimiser from a checkpoint.
    ///
    /// # Errors
    /// If the checkpoint cannot be read or the thread has ended.
    pub(crate) async fn restore(&self, from: PathBuf) -> Result<(), LearnerError> {
        self.call(|reply| TrainerCommand::Restore { from, reply })
            .await
    }

    /// Ends the thread and waits for it.
    ///
    /// # Errors
    /// If it panicked.
    pub(crate) fn join(self) -> Result<(), LearnerError> {
        drop(self.commands);
        self.thread.join().map_err(|_| LearnerError::ThreadPanicked)
    }

    async fn call<T>(
        &self,
        command: impl FnOnce(TrainerReply<T>) -> TrainerCommand,
    ) -> Result<T, LearnerError> {
        let (reply, replied) = oneshot::channel();
        // One caller, one command at a time: sending never blocks.
        self.commands
            .send(command(reply))
            .map_err(|_| LearnerError::ThreadPanicked)?;
        replied.await.map_err(|_| LearnerError::ThreadPanicked)?
    }
}

fn run(mut trainer: Trainer, inbox: &Receiver<TrainerCommand>) {
    for command in inbox {
        match command {
            TrainerCommand::Step { pairs, step, reply } => {
                let outcome = trainer.step(&pairs, step);
                send(reply, outcome.map(|outcome| (outcome, pairs)));
            }
            TrainerCommand::Weights { dtype, reply } => send(reply, weights(&trainer, dtype)),
            TrainerCommand::IsFinite { reply } => {
                let finite = trainer.policy().trained().is_finite();
                send(reply, finite.map_err(LearnerError::from));
            }
            TrainerCommand::Save {
                to,
                checkpoint,
                reply,
            } => {
                send(reply, checkpoint::write(&to, &checkpoint, &trainer));
            }
            TrainerCommand::Restore { from, reply } => send(reply, trainer.restore(&from)),
        }
    }
}

fn weights(trainer: &Trainer, dtype: DType) -> Result<Option<Vec<u8>>, LearnerError> {
    let weights = trainer.policy().trained();
    Ok(if weights.is_finite()? {
        Some(weights.to_dtype(dtype)?.to_blob()?)
    } else {
        None
    })
}

fn send<T>(reply: TrainerReply<T>, result: Result<T, LearnerError>) {
    if reply.send(result).is_err() {
        tracing::debug!("the learner ended before its trainer thread had replied");
    }
}
