//! METRICS.md: the reference of all published metrics.

use std::fmt::Write as _;

use crate::metrics::declaration::{MetricInfo, MetricKind, ProcessMetric};
use crate::metrics::{stage, table::METRICS, waits};

const HEAD: &str = "# Metrics

Output of `agon metrics`. Every process serves its metrics for Prometheus at `telemetry.listen`. Those with a
journal name that the learner measures are also written to `metrics.jsonl` and to TensorBoard's event files.

Histograms have `_bucket`, `_sum` and `_count`. Buckets of seconds: 1 ms to 1000 s, two per decade; of steps:
0 to 64. Counts \"since the run began\" continue after `--resume`.

| Prometheus | journal | kind | unit | labels | meaning |
|---|---|---|---|---|---|
";

const PROCESS: &str = "
## In Prometheus only

| Prometheus | kind | labels | meaning |
|---|---|---|---|
";

/// Content of METRICS.md: a table of every metric with both names, kind, unit, labels and help.
#[must_use]
pub fn metrics_markdown() -> String {
    let mut page = HEAD.to_owned();
    for info in METRICS {
        row(&mut page, info).expect("writing to a String succeeds");
    }
    page += PROCESS;
    let start = ProcessMetric {
        name: "process_start_time_seconds",
        kind: "gauge",
        labels: "",
        help: "start time of the process, in seconds since 1970; a change means a restart",
    };
    for metric in stage::METRICS.iter().chain(waits::METRICS).chain([&start]) {
        let ProcessMetric {
            name,
            kind,
            labels,
            help,
        } = metric;
        writeln!(page, "| `{name}` | {kind} | {labels} | {help} |")
            .expect("writing to a String succeeds");
    }
    page
}

fn row(page: &mut String, info: &MetricInfo) -> std::fmt::Result {
    let kind = match info.kind {
        MetricKind::Gauge => "gauge",
        MetricKind::Histogram => "histogram",
    };
    let topic = info.name.split('/').next().unwrap_or_default();
    let labels = match (topic, info.name) {
        ("judge", _) | (_, "health/judge_circuit_open") => "role, judge",
        _ if info.label == Some("judge") => "role, judge",
        ("actor", _) => "role, actor",
        ("stream", _) => "role, stream",
        _ => "role",
    };
    let journal = match info.label {
        Some(label) => format!("{}/{}", info.name, label.to_uppercase()),
        None => info.name.to_owned(),
    };
    writeln!(
        page,
        "| `{}` | `{journal}` | {kind} | {} | {labels} | {} |",
        info.prometheus_name(),
        info.unit.name(),
        info.help
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_md_is_up_to_date() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../METRICS.md");
        let committed = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            committed == metrics_markdown(),
            "METRICS.md is out of date; regenerate it: agon metrics > METRICS.md"
        );
    }
}
