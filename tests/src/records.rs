//! What a run leaves in its directory, read.

use std::{fs, path::Path};

use serde_json::Value;

/// `report.json` of a run.
///
/// # Panics
/// When it is not there or is not JSON.
pub fn report(run: &Path) -> Value {
    let path = run.join("report.json");
    let text = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The complete lines of `metrics.jsonl` of a run, evaluations included; none when it is not there yet.
///
/// # Panics
/// When a line is not JSON.
pub fn metrics(run: &Path) -> Vec<Value> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
    let complete = text.rfind('\n').map_or("", |end| &text[..end]);
    let read = |line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
    complete.lines().map(read).collect()
}

/// Those of them that tell of a learner step, in their order.
pub fn steps(run: &Path) -> Vec<Value> {
    let lines = metrics(run).into_iter();
    lines.filter(|line| line.get("loss").is_some()).collect()
}

/// One number of every learner step; NaN where it was not finite.
pub fn column(run: &Path, name: &str) -> Vec<f64> {
    let of = |line: &Value| {
        line.get(name)
            .map_or(f64::NAN, |value| value.as_f64().unwrap_or(f64::NAN))
    };
    steps(run).iter().map(of).collect()
}

/// The number at `pointer`, as in `/stations/actor/taken`.
///
/// # Panics
/// When there is none.
#[track_caller]
pub fn number(value: &Value, pointer: &str) -> f64 {
    let found = value.pointer(pointer).and_then(Value::as_f64);
    found.unwrap_or_else(|| panic!("no number at {pointer} of {value:#}"))
}
