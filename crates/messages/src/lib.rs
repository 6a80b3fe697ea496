//! The nouns that travel between the roles: [`Prompt`], [`Pair`], [`LabelledPair`], [`Dropped`] and
//! [`WeightsManifest`], with the ids and seeds that name them, and their one [`wire`] encoding.
//!
//! Token ids travel; text is for people. This crate knows no tensor, no stream and no file.

mod dialogue;
mod id;
mod pair;
mod probability;
mod prompt;
mod transcript;
mod weights;
pub mod wire;

pub use dialogue::{Dialogue, Message, PromptText};
pub use id::{Digest, JudgeVersion, PromptId, Seed, WeightsVersion};
pub use pair::{Completion, DropReason, Dropped, Finish, Label, LabelledPair, Pair, Station};
pub use probability::{InvalidProbability, Probability};
pub use prompt::{Prompt, Purpose, Release};
pub use weights::WeightsManifest;
