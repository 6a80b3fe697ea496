//! The thread that holds the policy in training.

use std::{path::PathBuf, thread::JoinHandle};

use crossbeam_channel::{Receiver, Sender};
use messages::LabelledPair;
use model::DType;
use tokio::sync::oneshot;

use crate::{
    LearnerError,
    checkpoint::{self, Checkpoint},
    step::{StepOutcome, Trainer},
};

type Reply<T> = oneshot::Sender<Result<T, LearnerError>>;

/// What the thread can be told.
enum Command {
    Step {
        pairs: Vec<LabelledPair>,
        step: u64,
        reply: Reply<(StepOutcome, Vec<LabelledPair>)>,
    },
    Weights {
        dtype: DType,
        reply: Reply<Option<Vec<u8>>>,
    },
    IsFinite {
        reply: Reply<bool>,
    },
    Save {
        to: PathBuf,
        checkpoint: Box<Checkpoint>,
        reply: Reply<()>,
    },
    Restore {
        from: PathBuf,
        reply: Reply<()>,
    },
}

/// The async end of the thread.
pub(crate) struct Engine {
    commands: Sender<Command>,
    thread: JoinHandle<()>,
}

impl Engine {
    /// Starts the thread around `trainer`.
    pub(crate) fn spawn(trainer: Trainer) -> Result<Self, LearnerError> {
        let (commands, inbox) = crossbeam_channel::bounded(1);
        let thread = std::thread::Builder::new()
            .name("learner-train".into())
            .spawn(move || obey(trainer, &inbox))
            .map_err(LearnerError::Thread)?;
        Ok(Self { commands, thread })
    }

    /// Takes step `step`, counted from 0; gives the pairs back.
    pub(crate) async fn step(
        &self,
        pairs: Vec<LabelledPair>,
        step: u64,
    ) -> Result<(StepOutcome, Vec<LabelledPair>), LearnerError> {
        self.call(|reply| Command::Step { pairs, step, reply })
            .await
    }

    /// The weights as a blob in this number format; `None` when they are not finite.
    pub(crate) async fn weights(&self, dtype: DType) -> Result<Option<Vec<u8>>, LearnerError> {
        self.call(|reply| Command::Weights { dtype, reply }).await
    }

    /// Whether every weight is finite.
    pub(crate) async fn is_finite(&self) -> Result<bool, LearnerError> {
        self.call(|reply| Command::IsFinite { reply }).await
    }

    /// Writes a checkpoint into the folder `to`, which must not exist.
    pub(crate) async fn save(
        &self,
        to: PathBuf,
        checkpoint: Checkpoint,
    ) -> Result<(), LearnerError> {
        let checkpoint = Box::new(checkpoint);
        self.call(|reply| Command::Save {
            to,
            checkpoint,
            reply,
        })
        .await
    }

    /// Goes back to the weights and the optimiser of a checkpoint.
    pub(crate) async fn restore(&self, from: PathBuf) -> Result<(), LearnerError> {
        self.call(|reply| Command::Restore { from, reply }).await
    }

    /// Ends the thread.
    pub(crate) fn join(self) -> Result<(), LearnerError> {
        drop(self.commands);
        self.thread.join().map_err(|_| LearnerError::EngineGone)
    }

    async fn call<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, LearnerError> {
        let (reply, answer) = oneshot::channel();
        // One caller, one command at a time: there is always room.
        self.commands
            .send(command(reply))
            .map_err(|_| LearnerError::EngineGone)?;
        answer.await.map_err(|_| LearnerError::EngineGone)?
    }
}

fn obey(mut trainer: Trainer, inbox: &Receiver<Command>) {
    for command in inbox {
        match command {
            Command::Step { pairs, step, reply } => {
                let outcome = trainer.step(&pairs, step);
                answer(reply, outcome.map(|outcome| (outcome, pairs)));
            }
            Command::Weights { dtype, reply } => answer(reply, weights(&trainer, dtype)),
            Command::IsFinite { reply } => {
                let finite = trainer.policy().trained().is_finite();
                answer(reply, finite.map_err(LearnerError::from));
            }
            Command::Save {
                to,
                checkpoint,
                reply,
            } => {
                answer(reply, checkpoint::write(&to, &checkpoint, &trainer));
            }
            Command::Restore { from, reply } => answer(reply, trainer.restore(&from)),
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

fn answer<T>(reply: Reply<T>, result: Result<T, LearnerError>) {
    if reply.send(result).is_err() {
        tracing::debug!("the learner left before its thread had answered");
    }
}
