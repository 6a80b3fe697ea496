//! Labelled pairs in, weights out.
//!
//! A [`Learner`] sends prompts as credits, takes labelled pairs that are fresh enough, takes optimiser steps on a
//! thread of its own, publishes weights, evaluates the policy against its reference through the same streams, and
//! writes checkpoints that hold the whole run. [`sft`] fine-tunes on given completions with the same optimiser. Does
//! not know who samples the completions or who judges them.

mod apo_sampler;
mod boundary_counts;
mod checkpoint;
mod curriculum;
mod dropped_prompts;
mod error;
mod evaluation;
mod evaluator;
mod file_pairs;
mod ganpo;
mod input_record;
mod judge_evaluation;
mod length_control;
mod micro_batch;
pub mod objective;
mod pair_buffer;
mod pair_file;
mod pair_selection;
mod pair_source;
mod parts;
mod progress;
mod progress_deadline;
mod prompt_scheduler;
mod prompts;
mod publisher;
mod recovery;
mod reporter;
mod run;
mod run_scale;
pub mod sft;
mod step_metrics;
mod trainer;
mod win_rates;

pub use apo_sampler::ApoSchedule;
pub use boundary_counts::BoundaryCounts;
pub use checkpoint::{
    NewestCheckpoint, SkippedCheckpoint, apo_step_of as checkpoint_apo_step,
    check_whole as check_checkpoint, is_complete as is_complete_checkpoint,
    latest as latest_checkpoint, newest_model as newest_checkpoint_model,
    newest_whole as newest_whole_checkpoint, tidy as tidy_checkpoints,
    version_of as checkpoint_version,
};
pub use error::LearnerError;
pub use evaluation::{Evaluation, EvaluationConditions, EvaluationExample, FurtherComparison};
pub use evaluator::EVALUATION_WINDOW;
pub use file_pairs::{
    BatchShare, PairAnswer, PairCounts, PairFiles, PairLimit, PairRow, file_pair_id, planned_steps,
    visit_pairs,
};
pub use input_record::InputRecord;
pub use judge_evaluation::{
    IndependentUnit, JudgeEvaluation, judge_evaluations, length_controlled_win_rate, win_rate,
};
pub use parts::{
    FilePairsJudge, FilePairsPlan, InitialPolicy, LearnerCounters, LearnerParts, LearnerStreams,
    PromptPlan, RunOrigin,
};
pub use prompts::{NoPrompts, PromptFiles, PromptLimits, PromptRow, PromptSet, TemplateUse};
pub use recovery::RecoveryCounts;
pub use reporter::Sampling;
pub use run::{Ending, Learner, Summary};
pub use trainer::followers::{checkpoint_average, checkpoint_reference};
pub use trainer::{PolicySamples, ReferenceLogprobs, StepOutcome, Trainer};
pub use win_rates::win;
