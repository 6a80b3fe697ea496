//! Labelled pairs in, weights out.
//!
//! A [`Learner`] sends prompts as credits, takes labelled pairs, decides which are fresh enough, takes
//! optimiser steps on a thread of its own, publishes weights, evaluates the policy against its
//! reference through the same streams, and writes checkpoints that are the whole run. Who answers and who
//! judges it does not know. [`sft`] trains on given completions with the same optimiser.

mod batch;
mod checkpoint;
mod engine;
mod error;
mod evaluation;
mod feed;
mod ganpo;
mod intake;
mod length_control;
pub mod objective;
mod prompts;
mod quarantine;
mod rounds;
mod run;
mod seams;
pub mod sft;
mod step;

pub use checkpoint::{latest as latest_checkpoint, step_of as checkpoint_step};
pub use error::LearnerError;
pub use evaluation::{Evaluation, EvaluationConditions, Example, Interval};
pub use feed::Pacing;
pub use prompts::{Limits, PromptFiles, PromptRow, PromptSet, say_how_dialogues_are_used};
pub use rounds::Rounds;
pub use run::{EVALUATION_WINDOW, Ending, Learner, LearnerParts, Sampling, Summary};
pub use seams::Seams;
pub use step::{PolicySamples, StepOutcome, Trainer};
