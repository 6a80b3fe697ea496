//! Prompts in, pairs out: every prompt is answered at least twice from the mixture of the policy being
//! trained and its fixed reference.
//!
//! An [`Actor`] waits on streams; its model lives on a thread of its own. Weights change only when
//! nothing is being written, so no completion mixes versions. A prompt is acknowledged when its pair, or
//! the note that it was dropped, is stored. Who judges the pairs and who learns from them, an actor does
//! not know.

mod drift;
mod engine;
mod error;
mod metrics;
mod run;
mod supply;

pub use error::ActorError;
pub use run::{Actor, ActorParts, IdenticalPairs};
pub use supply::Pacing;
