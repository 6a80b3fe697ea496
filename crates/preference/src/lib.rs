//! Pairs in, labelled pairs out: the [`Judge`]s, the [`Bench`] on which they sit, and the service
//! [`Preference`] that puts pairs to them, and the [`Server`] that does so for others.
//!
//! What is promised: a pair is acknowledged only when its label, or the note that it was dropped, is
//! stored; pairs leave in the order in which they came; while no judge can be asked, pairs wait.
//! This crate does not know who writes pairs, who trains on them, or which model a judge may hold.

pub mod apo;
mod bench;
mod calibration;
mod distinct;
mod error;
pub mod fit;
mod judge;
mod judge_thread;
mod labelling;
mod run;
mod server;
mod texts;
mod wire;

pub use bench::{
    Answer, Bench, BenchSettings, Judges, Orders, Outage, Question, Rebuild, Replica, Ruling,
};
pub use calibration::{BINS, Bin, Calibration, Judged, LengthQuarter};
pub use error::{JudgeError, JudgeErrorKind, PreferenceError, RulingError};
pub use judge::{
    Alternative, ChatJudge, ChatModel, Comparison, EncoderJudge, Ensemble, Judge, Learned, Matrix,
    Reads, Rules, Said, Scored, ScoredToken, Verdict,
};
pub use run::{Preference, PreferenceParts};
pub use server::{Server, ServerParts};
pub use texts::{Closing, Texts, TextsAlone, Tokens};
