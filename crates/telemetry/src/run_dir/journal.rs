//! Journal of per-step metrics: `metrics.jsonl`.
//!
//! Every line is one valid JSON object, `{"step":…,"wall_seconds":…,"loss":…}`. A non-finite value is written as
//! null and its name is listed under `nonfinite`. The line of an evaluation also has `conditions`, an object:
//! everything that its values depend on beside the weights.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::run_dir::lines::{LineFile, read_lines};
use crate::run_dir::tensorboard::EventFile;
use crate::{error::TelemetryError, metrics::measurements::Measurements};

const STEP: &str = "step";
const WALL_SECONDS: &str = "wall_seconds";
const NONFINITE: &str = "nonfinite";
const CONDITIONS: &str = "conditions";

/// Appender of `metrics.jsonl`; one process appends, any process may read.
#[derive(Debug)]
pub struct Journal {
    lines: LineFile,
    events: Option<EventFile>,
}

/// A line of `metrics.jsonl`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(try_from = "Map<String, Value>")]
pub struct JournalLine {
    /// The learner step.
    pub step: u64,
    /// Seconds since the run began, without the pauses between sessions.
    pub wall_seconds: f64,
    /// The measurements; non-finite values are NaN.
    pub measurements: Measurements,
    /// The conditions of an evaluation; `None` on other lines.
    pub conditions: Option<Value>,
}

impl Journal {
    /// Opens the journal at `path` for appending; a last line truncated by a crash is removed.
    ///
    /// # Errors
    /// When the file cannot be created, read or repaired.
    pub fn open(path: &Path) -> Result<Self, TelemetryError> {
        Ok(Self {
            lines: LineFile::open(path)?,
            events: None,
        })
    }

    /// Also writes all later measurements to a new TensorBoard event file in `directory`, for a session that
    /// continues after `step`.
    ///
    /// # Errors
    /// When the file cannot be created.
    pub fn enable_tensorboard(
        &mut self,
        directory: &Path,
        step: u64,
    ) -> Result<(), TelemetryError> {
        self.events = Some(EventFile::create(directory, step)?);
        Ok(())
    }

    /// Appends one line, which is passed to the operating system before this returns. `wall_seconds` is the time
    /// since the run began.
    ///
    /// # Errors
    /// When a measurement is named `step`, `wall_seconds`, `nonfinite` or `conditions`, or the write fails.
    pub fn append(
        &mut self,
        step: u64,
        wall_seconds: f64,
        measurements: &Measurements,
    ) -> Result<(), TelemetryError> {
        self.append_row(step, wall_seconds, measurements, None)
    }

    /// Appends the line of an evaluation made under these `conditions`, as [`Self::append`].
    ///
    /// # Errors
    /// As [`Self::append`].
    pub fn append_evaluation(
        &mut self,
        step: u64,
        wall_seconds: f64,
        measurements: &Measurements,
        conditions: Value,
    ) -> Result<(), TelemetryError> {
        self.append_row(step, wall_seconds, measurements, Some(conditions))
    }

    fn append_row(
        &mut self,
        step: u64,
        wall_seconds: f64,
        measurements: &Measurements,
        conditions: Option<Value>,
    ) -> Result<(), TelemetryError> {
        let mut row = Map::new();
        row.insert(STEP.into(), step.into());
        row.insert(WALL_SECONDS.into(), wall_seconds.into());
        for (name, value) in measurements.iter() {
            if [STEP, WALL_SECONDS, NONFINITE, CONDITIONS].contains(&name) {
                return Err(TelemetryError::ReservedName { name: name.into() });
            }
            // `Value::from` converts non-finite values to null.
            row.insert(name.into(), value.into());
        }
        let is_nonfinite = |&(_, value): &(&str, f64)| !value.is_finite();
        let nonfinite: Vec<_> = measurements
            .iter()
            .filter(is_nonfinite)
            .map(|(name, _)| name)
            .collect();
        if !nonfinite.is_empty() {
            row.insert(NONFINITE.into(), nonfinite.into());
        }
        row.extend(conditions.map(|conditions| (CONDITIONS.to_owned(), conditions)));
        self.lines.append(&row)?;
        match &mut self.events {
            Some(events) => events.append(step, measurements),
            None => Ok(()),
        }
    }

    /// Removes the lines of steps after `step`, which a resumed run repeats; returns their number.
    ///
    /// # Errors
    /// When the file cannot be read or replaced; it is then unchanged.
    pub fn truncate_after(&mut self, step: u64) -> Result<usize, TelemetryError> {
        self.lines.truncate_after(step)
    }

    /// All lines of the journal at `path`; an incomplete last line is ignored.
    ///
    /// # Errors
    /// When the file cannot be read, or a line is not a journal line.
    pub fn read(path: &Path) -> Result<Vec<JournalLine>, TelemetryError> {
        read_lines(path)
    }
}

impl TryFrom<Map<String, Value>> for JournalLine {
    type Error = String;

    fn try_from(mut row: Map<String, Value>) -> Result<Self, String> {
        let mut take = |name: &str| row.shift_remove(name).unwrap_or_default();
        let step = take(STEP).as_u64().ok_or("`step` is not a whole number")?;
        let wall_seconds = take(WALL_SECONDS).as_f64().unwrap_or(f64::NAN);
        take(NONFINITE);
        let conditions = Some(take(CONDITIONS)).filter(|conditions| !conditions.is_null());
        let mut measurements = Vec::with_capacity(row.len());
        for (name, value) in row {
            let number = match value {
                Value::Null => f64::NAN,
                value => value
                    .as_f64()
                    .ok_or_else(|| format!("`{name}` is not a number"))?,
            };
            measurements.push((name.into(), number));
        }
        Ok(Self {
            step,
            wall_seconds,
            measurements: Measurements::of_distinct(measurements),
            conditions,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn measured(values: &[(&'static str, f64)]) -> Measurements {
        values.iter().copied().collect()
    }

    #[test]
    fn lines_with_nonfinite_values_are_valid_json() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.jsonl");
        let mut journal = Journal::open(&path).unwrap();
        journal
            .append(1, 0.5, &measured(&[("loss", 0.25), ("loss/ipo", 1e-9)]))
            .unwrap();
        let broken = [
            ("loss", f64::NAN),
            ("tau", 0.1),
            ("grad_norm", f64::NEG_INFINITY),
        ];
        journal.append(2, 1.0, &measured(&broken)).unwrap();
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            "{\"step\":1,\"wall_seconds\":0.5,\"loss\":0.25,\"loss/ipo\":1e-9}\n\
             {\"step\":2,\"wall_seconds\":1.0,\"loss\":null,\"tau\":0.1,\"grad_norm\":null,\
             \"nonfinite\":[\"loss\",\"grad_norm\"]}\n"
        );
        let lines = Journal::read(&path).unwrap();
        assert_eq!(
            lines[0].measurements,
            measured(&[("loss", 0.25), ("loss/ipo", 1e-9)])
        );
        assert_eq!(
            (
                lines[1].step,
                lines[1].wall_seconds,
                lines[1].measurements.len()
            ),
            (2, 1.0, 3)
        );
        assert!(lines[1].measurements.get("grad_norm").unwrap().is_nan());
        assert_eq!(lines[1].measurements.get("tau"), Some(0.1));
    }

    #[test]
    fn the_line_of_an_evaluation_has_its_conditions() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.jsonl");
        let mut journal = Journal::open(&path).unwrap();
        let conditions = serde_json::json!({"stop_ids": [1, 2], "chat_template": null});
        let rate = measured(&[("eval/win_rate", 0.5)]);
        journal
            .append_evaluation(3, 1.0, &rate, conditions.clone())
            .unwrap();
        journal.append(4, 2.0, &measured(&[("loss", 1.0)])).unwrap();
        let lines = Journal::read(&path).unwrap();
        assert_eq!(lines[0].conditions, Some(conditions));
        assert_eq!(lines[0].measurements, rate);
        assert_eq!(lines[1].conditions, None);
    }

    #[test]
    fn a_measurement_with_a_reserved_name_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.jsonl");
        let mut journal = Journal::open(&path).unwrap();
        for name in ["step", "wall_seconds", "nonfinite", "conditions"] {
            let message = journal
                .append(1, 0.0, &measured(&[(name, 1.0)]))
                .unwrap_err()
                .to_string();
            assert!(message.contains(&format!("`{name}`")), "{message}");
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), "");
    }

    #[test]
    fn a_resumed_run_repeats_its_later_steps() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.jsonl");
        let mut journal = Journal::open(&path).unwrap();
        for step in 1..=5u32 {
            journal
                .append(step.into(), 0.0, &measured(&[("loss", step.into())]))
                .unwrap();
        }
        drop(journal);
        let whole = fs::read_to_string(&path).unwrap();
        fs::write(&path, format!("{whole}{{\"step\":6,\"wall")).unwrap();

        let mut journal = Journal::open(&path).unwrap();
        assert_eq!(journal.truncate_after(3).unwrap(), 2);
        journal
            .append(4, 0.0, &measured(&[("loss", 40.0)]))
            .unwrap();
        let lines = Journal::read(&path).unwrap();
        let losses: Vec<_> = lines
            .iter()
            .map(|l| (l.step, l.measurements.get("loss").unwrap()))
            .collect();
        assert_eq!(losses, [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]);
    }

    #[test]
    fn a_line_that_is_not_a_journal_line_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.jsonl");
        let cases = [
            "{\"loss\":1}",
            "{\"step\":-1}",
            "{\"step\":1,\"loss\":\"low\"}",
            "[1]",
        ];
        for line in cases {
            fs::write(&path, format!("{line}\n")).unwrap();
            let message = Journal::read(&path).unwrap_err().to_string();
            assert!(
                message.starts_with("failed to read line 1 of "),
                "{line}: {message}"
            );
        }
    }
}
