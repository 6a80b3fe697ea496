//! The messages exchanged between the roles: [`Prompt`], [`Pair`], [`LabelledPair`], [`Dropped`] and
//! [`WeightsManifest`], the [`StoredWeights`] that it announces, their ids, versions and seeds, their [`wire`] encoding, the [`MessageLimits`] that received ones
//! are checked against, and the [`ErrorClass`] of every crate's errors.
//!
//! Token ids are authoritative; text is for display and for judges that read text. This crate does not know
//! tensors, streams or files.

mod check;
mod dialogue;
mod error_class;
mod file_name;
mod id;
mod pair;
mod probability;
mod prompt;
mod transcript;
mod weights;
pub mod wire;

pub use check::{CompletionCounts, InvalidMessage, MessageLimits};
pub use dialogue::{Dialogue, Message, PromptText};
pub use error_class::{Classified, ErrorClass};
pub use file_name::{FileName, InvalidFileName};
pub use id::{Digest, JudgeVersion, PromptId, Seed, WeightsVersion};
pub use pair::{
    Completion, DropReason, Dropped, EvaluationVerdict, Finish, GOLD, Label, LabelledPair, Pair,
    Stage,
};
pub use probability::{InvalidProbability, Probability};
pub use prompt::{Pacing, Prompt, PromptBatch, Purpose};
pub use weights::{StoredWeights, WeightsManifest};
