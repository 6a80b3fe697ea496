//! Declarations of metrics: name, kind, unit, help.
//!
//! A journal name maps to one Prometheus name: prefix `agon_`, `_` for `/`, and the suffix `_seconds` or `_bytes`
//! when that is the unit and the name does not end in it.

/// Declaration of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MetricInfo {
    /// Name in the journal, such as `eval/win_rate`.
    pub name: &'static str,
    /// Gauge or histogram.
    pub kind: MetricKind,
    /// Unit of its values.
    pub unit: MetricUnit,
    /// Help text.
    pub help: &'static str,
    /// Label whose value follows the name in the journal, as in `eval/judge_win_rate/NAME`; `None` for metrics of one
    /// value.
    pub label: Option<&'static str>,
}

/// A metric that exists in Prometheus only.
pub(crate) struct ProcessMetric {
    pub(crate) name: &'static str,
    pub(crate) kind: &'static str,
    pub(crate) labels: &'static str,
    pub(crate) help: &'static str,
}

/// Kind of a metric in Prometheus.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MetricKind {
    /// The latest value.
    Gauge,
    /// The distribution of all values: `_bucket`, `_sum` and `_count`.
    Histogram,
}

/// Unit of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MetricUnit {
    /// Dimensionless.
    Number,
    /// A fraction from 0 to 1.
    Ratio,
    /// Nats: natural-logarithm units of information.
    Nats,
    /// Seconds.
    Seconds,
    /// Bytes.
    Bytes,
    /// Tokens.
    Tokens,
    /// Learner steps.
    Steps,
    /// A count.
    Count,
    /// Tokens per second.
    TokensPerSecond,
    /// Pairs per second.
    PairsPerSecond,
}

impl MetricUnit {
    /// The unit's name in METRICS.md.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Number => "number",
            Self::Ratio => "ratio",
            Self::Nats => "nats",
            Self::Seconds => "seconds",
            Self::Bytes => "bytes",
            Self::Tokens => "tokens",
            Self::Steps => "steps",
            Self::Count => "count",
            Self::TokensPerSecond => "tokens per second",
            Self::PairsPerSecond => "pairs per second",
        }
    }
}

impl MetricInfo {
    /// Name in Prometheus, such as `agon_eval_win_rate` or `agon_time_step_seconds`.
    #[must_use]
    pub fn prometheus_name(&self) -> String {
        let name = format!("agon_{}", self.name.replace('/', "_"));
        let suffix = match self.unit {
            MetricUnit::Seconds => "_seconds",
            MetricUnit::Bytes => "_bytes",
            MetricUnit::Steps if self.kind == MetricKind::Histogram => "_steps",
            _ => "",
        };
        if name.ends_with(suffix) {
            name
        } else {
            name + suffix
        }
    }
}
