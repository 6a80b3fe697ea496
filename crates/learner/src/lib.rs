//! Labelled pairs in, weights out.
//!
//! A [`Learner`] sends prompts as credits, takes labelled pairs that are fresh enough, takes optimiser steps on a
//! thread of its own, publishes weights, evaluates the policy against its reference through the same streams, and
//! writes checkpoints that hold the whole run. [`sft`] fine-tunes on given completions with the same optimiser. Does
//! not know who samples the completions or who judges them.

mod apo_sampler;
mod boundary_counts;
mod checkpoint;
mod dropped_prompts;
mod error;
mod evaluation;
mod evaluator;
mod ganpo;
mod length_control;
pub mod objective;
mod pair_buffer;
mod pair_source;
mod progress;
mod prompt_scheduler;
mod prompts;
mod publisher;
mod recovery;
mod reporter;
mod run;
pub mod sft;
mod step_metrics;
mod trainer;

pub use apo_sampler::ApoSchedule;
pub use boundary_counts::BoundaryCounts;
pub use checkpoint::{latest as latest_checkpoint, step_of as checkpoint_step};
pub use error::LearnerError;
pub use evaluation::{Evaluation, EvaluationConditions, EvaluationExample, Interval};
pub use evaluator::EVALUATION_WINDOW;
pub use prompts::{PromptFiles, PromptLimits, PromptRow, PromptSet, log_dialogue_use};
pub use reporter::Sampling;
pub use run::{
    Ending, InitialPolicy, Learner, LearnerCounters, LearnerParts, LearnerStreams, PromptPlan,
    Summary,
};
pub use trainer::{PolicySamples, StepOutcome, Trainer};
