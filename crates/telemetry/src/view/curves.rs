//! Metrics of a run as downsampled curves of bounded length.
//!
//! A curve keeps every value up to a maximum number of points; from then on neighbouring points are averaged in
//! pairs. So a run of a million steps takes as much memory, and as long to draw, as one of a thousand.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;

use crate::metrics::table::METRICS;
use crate::run_dir::journal::JournalLine;
use crate::view::tail::LineSink;

/// Maximum number of points of a curve.
const MAX_POINTS: usize = 1024;

/// Maximum number of curves: several times the metrics that there are.
const MAX_CURVES: usize = 1000;

/// Maximum length of a curve's name in bytes.
const MAX_NAME_BYTES: usize = 200;

/// Factor of summed values, a power of two: sums of the largest numbers are finite, and means are exact.
const SUM_SCALE: f64 = 1.0 / (1u128 << 64) as f64;

/// All curves of a run, read from its `metrics.jsonl`.
#[derive(Debug, Default)]
pub struct Curves {
    curves: BTreeMap<String, Curve>,
    lines: u64,
    unreadable: u64,
    ignored: u64,
    step: u64,
    wall_seconds: f64,
    conditions: Option<Value>,
}

/// One metric over learner steps. The two lists have the same length.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Curve {
    /// Step of each point: that of the last value averaged into it.
    pub steps: Vec<u64>,
    /// Value of each point; null where no value was finite.
    pub values: Vec<Option<f64>>,
    /// The latest value, not averaged.
    pub last: Option<f64>,
    /// Number of values averaged into a complete point.
    pub stride: usize,
    #[serde(skip)]
    pending: Pending,
}

/// Accumulator of an incomplete point.
#[derive(Debug, Clone, Default, PartialEq)]
struct Pending {
    count: usize,
    finite: usize,
    /// Sum of the finite values times [`SUM_SCALE`].
    sum: f64,
}

impl Curves {
    /// The curve of this journal name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Curve> {
        self.curves.get(name)
    }

    /// Names of all curves, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.curves.keys().map(String::as_str)
    }

    /// Number of lines read.
    #[must_use]
    pub fn lines(&self) -> u64 {
        self.lines
    }

    /// Number of lines that could not be parsed: from another build, or damaged.
    #[must_use]
    pub fn unreadable(&self) -> u64 {
        self.unreadable
    }

    /// Number of values without a curve, because there are too many names or a name is too long.
    #[must_use]
    pub fn ignored(&self) -> u64 {
        self.ignored
    }

    /// The last step read.
    #[must_use]
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Duration of the run up to the last line, in seconds.
    #[must_use]
    pub fn wall_seconds(&self) -> f64 {
        self.wall_seconds
    }

    /// Conditions of the last evaluation; `None` when there was none, or an older build made it.
    #[must_use]
    pub fn conditions(&self) -> Option<&Value> {
        self.conditions.as_ref()
    }

    fn add(&mut self, line: &JournalLine) {
        self.lines += 1;
        if line.conditions.is_some() {
            self.conditions.clone_from(&line.conditions);
        }
        self.step = self.step.max(line.step);
        if line.wall_seconds.is_finite() {
            self.wall_seconds = line.wall_seconds;
        }
        for (name, value) in line.measurements.iter() {
            match self.curves.get_mut(name) {
                Some(curve) => curve.push(line.step, value),
                None => self.begin(name, line.step, value),
            }
        }
    }

    /// Begins a curve with its first value. Other programs' metrics leave room for Agon's own.
    fn begin(&mut self, name: &str, step: u64, value: f64) {
        let is_declared = || METRICS.iter().any(|metric| metric.name == name);
        let is_full = self.curves.len() >= MAX_CURVES && !is_declared();
        if is_full || name.len() > MAX_NAME_BYTES {
            self.ignored += 1;
            return;
        }
        let mut curve = Curve::new();
        curve.push(step, value);
        self.curves.insert(name.to_owned(), curve);
    }
}

impl LineSink for Curves {
    fn reset(&mut self) {
        *self = Self::default();
    }

    fn line(&mut self, _offset: u64, line: &[u8]) {
        match serde_json::from_slice(line) {
            Ok(line) => self.add(&line),
            Err(_) => self.unreadable += 1,
        }
    }

    fn overlong(&mut self) {
        self.unreadable += 1;
    }
}

impl Curve {
    fn new() -> Self {
        Self {
            steps: Vec::new(),
            values: Vec::new(),
            last: None,
            stride: 1,
            pending: Pending::default(),
        }
    }

    /// Appends the value of a step. The last point is visible before it is complete.
    fn push(&mut self, step: u64, value: f64) {
        if self.pending.count == 0 {
            if self.steps.len() == MAX_POINTS {
                self.halve();
            }
            self.steps.push(step);
            self.values.push(None);
        }
        self.last = value.is_finite().then_some(value);
        self.pending.add(self.last);
        if let (Some(step_of_last), Some(value_of_last)) =
            (self.steps.last_mut(), self.values.last_mut())
        {
            *step_of_last = step;
            *value_of_last = self.pending.mean();
        }
        if self.pending.count == self.stride {
            self.pending = Pending::default();
        }
    }

    /// Averages neighbouring points in pairs.
    fn halve(&mut self) {
        self.stride *= 2;
        self.steps = self
            .steps
            .chunks(2)
            .filter_map(|two| two.last().copied())
            .collect();
        self.values = self
            .values
            .chunks(2)
            .map(|two| {
                let mut both = Pending::default();
                two.iter().for_each(|&value| both.add(value));
                both.mean()
            })
            .collect();
    }
}

impl Pending {
    fn add(&mut self, value: Option<f64>) {
        self.count += 1;
        if let Some(value) = value {
            self.finite += 1;
            self.sum += value * SUM_SCALE;
        }
    }

    fn mean(&self) -> Option<f64> {
        #[expect(
            clippy::cast_precision_loss,
            reason = "a point has fewer than 2^53 values"
        )]
        let count = self.finite as f64;
        (self.finite > 0).then(|| self.sum / count / SUM_SCALE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nonfinite_values_are_gaps_of_curves() {
        let mut curves = Curves::default();
        for line in [
            r#"{"step":1,"wall_seconds":0.5,"loss":2.0,"beta":0.1}"#,
            r#"{"step":2,"wall_seconds":1.0,"loss":null,"nonfinite":["loss"]}"#,
            "{\"step\":",
            r#"{"step":3,"wall_seconds":1.5,"loss":1.0}"#,
        ] {
            curves.line(0, line.as_bytes());
        }
        let loss = curves.get("loss").unwrap();
        assert_eq!(loss.steps, [1, 2, 3]);
        assert_eq!(loss.values, [Some(2.0), None, Some(1.0)]);
        assert_eq!((loss.last, loss.stride), (Some(1.0), 1));
        assert_eq!(curves.names().collect::<Vec<_>>(), ["beta", "loss"]);
        assert_eq!(
            (curves.lines(), curves.unreadable(), curves.step()),
            (3, 1, 3)
        );
        assert_eq!(curves.wall_seconds(), 1.5);
        curves.reset();
        assert_eq!((curves.lines(), curves.get("loss")), (0, None));
    }

    #[test]
    fn a_long_curve_is_downsampled_by_averaging() {
        let mut curve = Curve::new();
        let steps = 4 * MAX_POINTS as u64 + 3;
        for step in 1..=steps {
            curve.push(step, if step % 2 == 0 { 3.0 } else { 1.0 });
        }
        assert!(curve.steps.len() <= MAX_POINTS, "{}", curve.steps.len());
        assert_eq!(curve.stride, 8);
        assert_eq!((curve.steps[0], curve.steps[1]), (8, 16));
        assert_eq!(curve.steps.last(), Some(&steps));
        assert_eq!(curve.last, Some(1.0));
        let whole = &curve.values[..curve.values.len() - 1];
        assert!(whole.iter().all(|&value| value == Some(2.0)), "{whole:?}");
    }

    #[test]
    fn extreme_values_have_finite_means() {
        let mut curve = Curve::new();
        for step in 1..=4 * MAX_POINTS as u64 {
            curve.push(step, if step % 4 == 0 { -1e308 } else { 1e308 });
        }
        assert_eq!(curve.stride, 4);
        let mean = curve.values[0].unwrap();
        assert!((mean / 5e307 - 1.0).abs() < 1e-12, "{mean}");
    }

    #[test]
    fn the_number_of_curves_is_bounded() {
        let names = 200_000;
        let values: Vec<_> = (0..names).map(|n| format!("\"m{n}\":1")).collect();
        let line = format!("{{\"step\":1,{}}}", values.join(","));
        let long = format!("{{\"step\":2,\"{}\":1}}", "x".repeat(1 + MAX_NAME_BYTES));
        let mut curves = Curves::default();
        for line in [&line, &long] {
            curves.line(0, line.as_bytes());
        }
        assert_eq!((curves.names().count(), curves.step()), (MAX_CURVES, 2));
        let declared = format!("{{\"step\":3,\"{}\":1}}", METRICS[0].name);
        curves.line(0, declared.as_bytes());
        assert_eq!(curves.names().count(), MAX_CURVES + 1);
        assert_eq!(curves.ignored(), names - MAX_CURVES as u64 + 1);
    }
}
