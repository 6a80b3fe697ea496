//! What a run leaves behind and what it says of itself while it lasts: the run directory and its
//! files, the metrics and their names, the exporter, the live page, progress, waits, and the machine.
//!
//! This crate promises that a file of a run is whole or absent, that a line of a log is valid JSON,
//! and that every metric is declared once, in [`METRICS`]. It alone knows Prometheus. It knows no
//! role, no model and no stream, and of settings only that they are TOML: it takes plain arguments.

mod atomic;
mod environment;
mod error;
mod exporter;
mod journal;
mod lines;
mod measurements;
mod metric_table;
mod metrics_page;
mod page;
mod printable;
mod progress;
mod registry;
mod run_directory;
mod samples;
mod server;
mod station;
mod tensorboard;
mod waits;
mod watch;

pub use atomic::write_atomically;
pub use environment::{Machine, describe_machine, free_bytes, peak_memory_bytes};
pub use error::Error;
pub use exporter::{Exporter, Recording};
pub use journal::{Journal, JournalLine};
pub use measurements::Measurements;
pub use metric_table::METRICS;
pub use metrics_page::metrics_markdown;
pub use page::{MetricsPage, PageParts, PageServer, page_token};
pub use printable::{printable, printable_json, printable_line, takes_ansi};
pub use progress::Progress;
pub use registry::{MetricInfo, MetricKind, MetricUnit, metric, publish};
pub use run_directory::RunDirectory;
pub use samples::{SampleLog, SampleRow, TokenTexts};
pub use station::{Holder, StationCounters, StationSnapshot};
pub use waits::{Wait, WaitGuard, Waits};
pub use watch::{
    Curve, Curves, EvaluationRecord, Reading, RunState, RunStatus, RunView, SampleIndex,
    SamplePage, SampleQuery, evaluation_differences, readings,
};
