//! A run as those see it who look on: its numbers, its samples, its rounds and its settings, read from
//! its directory while it goes on or long after.
//!
//! Nothing here writes, locks or delays a run: files are followed as they grow, and read again from the
//! start when a resumed run has cut them back. Memory is bounded, however long the run is. This part does
//! not know how what it reads is shown.

mod comparability;
mod curves;
mod exposition;
mod run_view;
mod sample_index;
mod tail;

pub use comparability::{EvaluationRecord, evaluation_differences};
pub use curves::{Curve, Curves};
pub use exposition::{Reading, readings};
pub use run_view::{RunState, RunStatus, RunView};
pub use sample_index::{SampleIndex, SamplePage, SampleQuery};
