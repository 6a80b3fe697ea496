//! Read-only view of a run: metrics, samples, APO rounds and settings, read from its directory during the run or
//! afterwards.
//!
//! Nothing here writes, locks or delays a run: files are followed as they grow, and re-read from the start when a
//! resumed run has truncated them. Memory is bounded, however long the run is. This part does not know how the
//! data is displayed.

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
