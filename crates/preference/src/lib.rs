//! Pairs in, labelled pairs out: the [`Judge`]s, and the service [`Preference`] that runs one.
//!
//! What is promised: a pair is acknowledged only when its label, or the note that it was dropped, is
//! stored; pairs leave in the order in which they came; no failure of a judge is retried for ever.
//! This crate does not know who writes pairs, who trains on them, or which model a judge may hold.

pub mod apo;
mod calibration;
mod error;
pub mod fit;
mod intake;
mod judge;
mod judge_thread;
mod metrics;
mod panel;
mod run;

pub use calibration::{BINS, Bin, Calibration, Judged, LengthQuarter};
pub use error::{JudgeError, PreferenceError};
pub use judge::{
    Comparison, EncoderJudge, Ensemble, Judge, Learned, Matrix, Reads, Rules, Ruling, Verdict,
    both_orders,
};
pub use run::{Preference, PreferenceParts};
