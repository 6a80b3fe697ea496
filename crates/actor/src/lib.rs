//! Prompts in, pairs out: samples at least two completions of every prompt from the mixture of the trained policy
//! and its fixed reference.
//!
//! An [`Actor`] waits on streams; its model runs on a thread of its own. Promises: weights change only while no
//! completion is being sampled, so no completion mixes versions; a prompt is acknowledged only after its pair, or
//! the note that it was dropped, is stored; an invalid prompt is dead-lettered and never ends the process.
//! Does not know who judges the pairs or who learns from them.

mod error;
mod metrics;
mod pair_publisher;
mod prompt_queue;
mod quantization_check;
mod run;
mod sampler_thread;
mod weight_loader;

pub use error::ActorError;
pub use pair_publisher::IdenticalPairs;
pub use quantization_check::PrecisionLimit;
pub use run::{Actor, ActorModel, ActorParts, ActorStreams, CompletionPlan};
