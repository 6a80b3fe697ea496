//! Synthetic tasks with a known gold preference: a summarisation task and a bandit.
//!
//! Everything here is a pure function of a seed: no downloads, no clock, no tensors. Because the preference is known
//! exactly, reward over-optimisation, calibration and intransitivity can be measured instead of estimated. The crate
//! knows nothing of models beyond the files it writes, and nothing of actors, judges and learners.

mod bandit;
mod base;
mod error;
mod facts;
mod fixed_point;
mod gold;
mod grammar;
mod llama;
mod pairs;
mod post;
mod seed;
mod stream;
mod style;
mod summary;
mod target;
mod template;
mod tokenizer;
mod vocabulary;

pub use bandit::Bandit;
pub use base::base_config_json;
pub use error::PlaygroundError;
pub use facts::Facts;
pub use fixed_point::{fixed_point, mixture};
pub use gold::{SUMMARY_CAP, Utility, preference, utility};
pub use pairs::{FLIP, noisy_label};
pub use post::{LONGEST_PROMPT, Post};
pub use stream::{held_out_post, held_out_seed, train_post, train_seed};
pub use style::{Style, exploitability, style_of, style_preference};
pub use target::{SftTarget, TargetKind, sft_target};
pub use tokenizer::write_tokenizer;
pub use vocabulary::{BOS, EOS, PAD, SEP, VOCABULARY_SIZE, Vocabulary, WordCategory};
