//! Observability of a run: metrics and their Prometheus exporter, the run directory and its log files, the
//! live web page, progress bars, named waits, and a description of the machine.
//!
//! This crate promises that a file of a run is complete or absent, that every line of a log is valid JSON,
//! that every metric is declared once, in [`METRICS`], that an untrusted run directory is read within bounds
//! and without requests, and that a hostile HTTP client takes a bounded share of the process. No other crate depends
//! on Prometheus. It does not know roles, models or streams, and of the settings only that they are TOML: it takes
//! plain arguments.

mod environment;
mod error;
pub mod http;
mod interval;
mod metrics;
mod page;
mod printable;
mod progress;
mod regular_file;
mod run_dir;
mod server;
mod standard_error;
mod verdicts;
mod view;

pub use crate::metrics::declaration::{MetricInfo, MetricKind, MetricUnit};
pub use crate::metrics::exporter::{Exporter, MetricsPage, Recording};
pub use crate::metrics::measurements::Measurements;
pub use crate::metrics::reference::metrics_markdown;
pub use crate::metrics::registry::{metric, publish};
pub use crate::metrics::stage::{InFlightGauge, StageCounters, StageSnapshot};
pub use crate::metrics::table::METRICS;
pub use crate::metrics::waits::{NamedWait, Wait, WaitGuard, Waits};
pub use crate::run_dir::atomic::write_atomically;
pub use crate::run_dir::descriptors::wait_for_descriptor;
pub use crate::run_dir::directory::RunDirectory;
pub use crate::run_dir::files::RunFiles;
pub use crate::run_dir::journal::{Journal, JournalLine};
pub use crate::run_dir::private::create_private_directory;
pub use crate::run_dir::samples::{SampleLog, SampleRow, SampleTexts};
pub use environment::{Machine, describe_machine, free_bytes, peak_memory_bytes};
pub use error::TelemetryError;
pub use interval::Interval;
pub use page::{PageParts, PageServer};
pub use printable::{printable, printable_json, printable_line, shortened, takes_ansi};
pub use progress::Progress;
pub use standard_error::StandardError;
pub use verdicts::{HUMAN_VERDICT_PAIRS_FILE, restore_human_verdict_pairs};
pub use view::{
    Curve, Curves, EvaluationRecord, Reading, RunState, RunStatus, RunView, SampleIndex,
    SamplePage, SampleQuery, evaluation_differences, readings,
};
