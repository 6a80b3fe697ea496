//! Readers of the files of a run directory.

use std::{fs, path::Path};

use serde_json::Value;

/// Reads `report.json` of a run.
///
/// # Panics
/// If it does not exist or is not JSON.
pub fn report(run: &Path) -> Value {
    let path = run.join("report.json");
    let text = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Reads the complete lines of `metrics.jsonl` of a run, evaluations included; empty if the file does not exist.
///
/// # Panics
/// If a line is not JSON.
pub fn metrics(run: &Path) -> Vec<Value> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
    let complete = text.rfind('\n').map_or("", |end| &text[..end]);
    let parse = |line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
    complete.lines().map(parse).collect()
}

/// The lines of [`metrics`] that belong to a learner step, in order.
pub fn steps(run: &Path) -> Vec<Value> {
    let lines = metrics(run).into_iter();
    lines.filter(|line| line.get("loss").is_some()).collect()
}

/// A metric of every learner step; NaN where it is missing or not finite.
pub fn column(run: &Path, name: &str) -> Vec<f64> {
    let value_of = |line: &Value| {
        line.get(name)
            .map_or(f64::NAN, |value| value.as_f64().unwrap_or(f64::NAN))
    };
    steps(run).iter().map(value_of).collect()
}

/// The number at a JSON pointer, such as `/stages/actor/received`.
///
/// # Panics
/// If there is none.
#[track_caller]
pub fn number(value: &Value, pointer: &str) -> f64 {
    let found = value.pointer(pointer).and_then(Value::as_f64);
    found.unwrap_or_else(|| panic!("no number at {pointer} in {value:#}"))
}
