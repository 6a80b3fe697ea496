//! Trainer thread: holds the policy in training.
//!
//! Does not know what is read from the trainer, nor where checkpoints are.

use std::{path::PathBuf, thread::JoinHandle};

use crossbeam_channel::{Receiver, Sender};
use messages::LabelledPair;
use model::{DType, PublishedForm, PublishedWeights};
use tokio::sync::oneshot;

use crate::{
    error::LearnerError,
    run_scale::StepLimits,
    trainer::{StepOutcome, Trainer, followers::Publication},
};

type TrainerReply<T> = oneshot::Sender<Result<T, LearnerError>>;

/// Command to the trainer thread, with the channel of its reply.
enum TrainerCommand {
    Step {
        pairs: Vec<LabelledPair>,
        step: u64,
        limits: StepLimits,
        reply: TrainerReply<(StepOutcome, Vec<LabelledPair>)>,
    },
    Restore {
        from: PathBuf,
        reply: TrainerReply<()>,
    },
    /// Reads from the trainer and replies.
    Inspect(Box<dyn FnOnce(&Trainer) + Send>),
}

/// A copy of the weights to publish.
pub(crate) struct CopiedWeights {
    pub(crate) weights: PublishedWeights,
    pub(crate) content: PublishedContent,
}

/// Models that were published with a policy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct PublishedContent {
    /// Version of the reference that an evaluation compares with; `None`: the one of the start, which actors have.
    pub(crate) evaluated_reference: Option<u64>,
    /// Whether the moving average is among them.
    pub(crate) has_average: bool,
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

    /// Takes step `step`, counted from 0, within these limits; returns the pairs with the outcome.
    ///
    /// # Errors
    /// If the step fails or the thread has ended.
    pub(crate) async fn step(
        &self,
        pairs: Vec<LabelledPair>,
        step: u64,
        limits: StepLimits,
    ) -> Result<(StepOutcome, Vec<LabelledPair>), LearnerError> {
        self.call(|reply| TrainerCommand::Step {
            pairs,
            step,
            limits,
            reply,
        })
        .await
    }

    /// The policy's trained weights as a blob in f32.
    ///
    /// # Errors
    /// If copying fails or the thread has ended.
    pub(crate) async fn weights(&self) -> Result<Vec<u8>, LearnerError> {
        self.inspect(|trainer| Ok(trainer.policy().trained().to_dtype(DType::F32)?.to_blob()?))
            .await
    }

    /// The weights to publish, in this form, which no later step changes.
    ///
    /// # Errors
    /// If copying fails or the thread has ended.
    pub(crate) async fn publish(
        &self,
        form: PublishedForm,
        publication: Publication,
    ) -> Result<CopiedWeights, LearnerError> {
        self.inspect(move |trainer| {
            let followers = trainer.followers();
            let is_evaluated = publication == Publication::Evaluation;
            Ok(CopiedWeights {
                weights: trainer.publish(form, publication)?,
                content: PublishedContent {
                    evaluated_reference: followers.evaluated_reference(),
                    has_average: is_evaluated && followers.has_average(),
                },
            })
        })
        .await
    }

    /// Euclidean norm of all trained weights; not finite if any of them is not.
    ///
    /// # Errors
    /// If computing fails or the thread has ended.
    pub(crate) async fn weight_norm(&self) -> Result<f64, LearnerError> {
        self.inspect(|trainer| Ok(trainer.policy().trained().norm()?))
            .await
    }

    /// Calls `read` with the trainer, on its thread.
    ///
    /// # Errors
    /// When `read` fails, or the thread has ended.
    pub(crate) async fn inspect<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Trainer) -> Result<T, LearnerError> + Send + 'static,
    ) -> Result<T, LearnerError> {
        self.call(|reply| {
            TrainerCommand::Inspect(Box::new(move |trainer| send(reply, read(trainer))))
        })
        .await
    }

    /// Restores weights, optimiser, reference and average from a checkpoint.
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
            TrainerCommand::Step {
                mut pairs,
                step,
                limits,
                reply,
            } => {
                let outcome = trainer.step_within(&mut pairs, step, limits);
                send(reply, outcome.map(|outcome| (outcome, pairs)));
            }
            TrainerCommand::Restore { from, reply } => send(reply, trainer.restore(&from)),
            TrainerCommand::Inspect(inspect) => inspect(&trainer),
        }
    }
}

fn send<T>(reply: TrainerReply<T>, result: Result<T, LearnerError>) {
    if reply.send(result).is_err() {
        tracing::debug!("the learner ended before its trainer thread had replied");
    }
}
