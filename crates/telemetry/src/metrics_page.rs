//! Every metric that is published, as a page for people: METRICS.md.

use std::fmt::Write as _;

use crate::registry::{MetricInfo, MetricKind};
use crate::{METRICS, station, waits};

/// A metric that has no name in the journal.
pub(crate) struct ProcessMetric {
    pub(crate) name: &'static str,
    pub(crate) kind: &'static str,
    pub(crate) labels: &'static str,
    pub(crate) help: &'static str,
}

const HEAD: &str = "# Metrics

What `agon metrics` prints. Every process serves them for Prometheus at `telemetry.listen`; those with a
journal name are in `metrics.jsonl` too, where a learner measures them, and in TensorBoard's event files.

Histograms have `_bucket`, `_sum` and `_count`. Buckets of seconds: 1 ms to 1000 s, two a decade;
of steps: 0 to 64. What is said to count since the run began goes on after `--resume`.

| Prometheus | journal | kind | unit | labels | what it says |
|---|---|---|---|---|---|
";

const PROCESS: &str = "
## Without a journal name

| Prometheus | kind | labels | what it says |
|---|---|---|---|
";

/// METRICS.md: a table of every metric with both names, kind, unit, labels and help.
#[must_use]
pub fn metrics_markdown() -> String {
    let mut page = HEAD.to_owned();
    for info in METRICS {
        row(&mut page, info).expect("a text takes what is written");
    }
    page += PROCESS;
    let start = ProcessMetric {
        name: "process_start_time_seconds",
        kind: "gauge",
        labels: "",
        help: "when the process began, in seconds since 1970: a change is a restart",
    };
    for metric in station::METRICS
        .iter()
        .chain(waits::METRICS)
        .chain([&start])
    {
        let ProcessMetric {
            name,
            kind,
            labels,
            help,
        } = metric;
        writeln!(page, "| `{name}` | {kind} | {labels} | {help} |")
            .expect("a text takes what is written");
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
        ("actor", _) => "role, actor",
        ("stream", _) => "role, stream",
        _ => "role",
    };
    writeln!(
        page,
        "| `{}` | `{}` | {kind} | {} | {labels} | {} |",
        info.prometheus_name(),
        info.name,
        info.unit.name(),
        info.help
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_written_page_is_what_the_program_knows() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../METRICS.md");
        let written = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            written == metrics_markdown(),
            "METRICS.md is not what the program publishes; write it anew: agon metrics > METRICS.md"
        );
    }
}
