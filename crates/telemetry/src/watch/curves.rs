//! The numbers of a run as curves of bounded length.
//!
//! A curve keeps every value until there are too many; from then on neighbours are averaged two by two.
//! So a run of a million steps takes as much memory, and as long to draw, as one of a thousand.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;

use super::tail::Follow;
use crate::JournalLine;

/// How many points a curve has at most.
const MOST_POINTS: usize = 1024;

/// Every curve of a run, read from its `metrics.jsonl`.
#[derive(Debug, Default)]
pub struct Curves {
    curves: BTreeMap<String, Curve>,
    lines: u64,
    unreadable: u64,
    step: u64,
    wall_seconds: f64,
    conditions: Option<Value>,
}

/// One number over learner steps. The two lists are of the same length.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Curve {
    /// The step of each point; of the last of the values that are averaged in it.
    pub steps: Vec<u64>,
    /// The value of each point; null where none was finite.
    pub values: Vec<Option<f64>>,
    /// The newest value, not averaged.
    pub last: Option<f64>,
    /// How many values a whole point is the mean of.
    pub stride: usize,
    #[serde(skip)]
    pending: Pending,
}

/// The values of a point that is not whole yet.
#[derive(Debug, Clone, Default, PartialEq)]
struct Pending {
    seen: usize,
    finite: usize,
    sum: f64,
}

impl Curves {
    /// The curve of this name of the journal.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Curve> {
        self.curves.get(name)
    }

    /// The names that have a curve, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.curves.keys().map(String::as_str)
    }

    /// How many lines were read.
    #[must_use]
    pub fn lines(&self) -> u64 {
        self.lines
    }

    /// How many lines could not be read: a journal of another build, or a damaged one.
    #[must_use]
    pub fn unreadable(&self) -> u64 {
        self.unreadable
    }

    /// The last step that was read.
    #[must_use]
    pub fn step(&self) -> u64 {
        self.step
    }

    /// How long the run had taken by then, in seconds.
    #[must_use]
    pub fn wall_seconds(&self) -> f64 {
        self.wall_seconds
    }

    /// The conditions of the last evaluation; `None` when there was none, or an older build made it.
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
                None => {
                    let mut curve = Curve::new();
                    curve.push(line.step, value);
                    self.curves.insert(name.to_owned(), curve);
                }
            }
        }
    }
}

impl Follow for Curves {
    fn restart(&mut self) {
        *self = Self::default();
    }

    fn line(&mut self, _offset: u64, line: &[u8]) {
        match serde_json::from_slice(line) {
            Ok(line) => self.add(&line),
            Err(_) => self.unreadable += 1,
        }
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

    /// Adds the value of a step. The last point is shown before it is whole.
    fn push(&mut self, step: u64, value: f64) {
        if self.pending.seen == 0 {
            if self.steps.len() == MOST_POINTS {
                self.halve();
            }
            self.steps.push(step);
            self.values.push(None);
        }
        self.last = value.is_finite().then_some(value);
        self.pending.add(self.last);
        if let (Some(last), Some(shown)) = (self.steps.last_mut(), self.values.last_mut()) {
            *last = step;
            *shown = self.pending.mean();
        }
        if self.pending.seen == self.stride {
            self.pending = Pending::default();
        }
    }

    /// Averages neighbours two by two.
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
        self.seen += 1;
        if let Some(value) = value {
            self.finite += 1;
            self.sum += value;
        }
    }

    fn mean(&self) -> Option<f64> {
        #[expect(clippy::cast_precision_loss, reason = "no point has 2^53 values")]
        let count = self.finite as f64;
        (self.finite > 0).then(|| self.sum / count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_become_curves_and_what_is_not_finite_is_a_gap() {
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
        curves.restart();
        assert_eq!((curves.lines(), curves.get("loss")), (0, None));
    }

    #[test]
    fn a_long_curve_is_averaged_and_keeps_its_mean() {
        let mut curve = Curve::new();
        let steps = 4 * MOST_POINTS as u64 + 3;
        for step in 1..=steps {
            curve.push(step, if step % 2 == 0 { 3.0 } else { 1.0 });
        }
        assert!(curve.steps.len() <= MOST_POINTS, "{}", curve.steps.len());
        assert_eq!(curve.stride, 8);
        assert_eq!((curve.steps[0], curve.steps[1]), (8, 16));
        assert_eq!(curve.steps.last(), Some(&steps));
        assert_eq!(curve.last, Some(1.0));
        let whole = &curve.values[..curve.values.len() - 1];
        assert!(whole.iter().all(|&value| value == Some(2.0)), "{whole:?}");
    }
}
