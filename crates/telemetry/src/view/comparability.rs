//! Comparability of evaluations: differences between the conditions under which they were made.
//!
//! The same weights score 7.97 without their stop tokens and 15.36 with them, so differences in conditions are
//! reported wherever runs are compared. This part does not know the meaning of a condition.

use std::collections::BTreeSet;

use serde::Serialize;
use serde_json::Value;

use crate::printable::printable_line;

/// Minimum difference between truncation rates that is reported.
const TRUNCATION_DIFFERENCE: f64 = 0.05;

/// Maximum number of differences that are reported.
const MAX_DIFFERENCES: usize = 20;

/// Maximum length of a difference in characters.
const MAX_CHARACTERS: usize = 500;

/// Conditions of the last evaluation of a run or model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EvaluationRecord {
    /// Name of the run or model.
    pub name: String,
    /// Stop tokens, chat template, sampling: an object; `None` if not recorded.
    pub conditions: Option<Value>,
    /// Fraction of the policy's completions truncated at the maximum length.
    pub truncation_rate: Option<f64>,
}

/// Differences between these evaluations, one printable sentence each; empty when they are comparable. There are at
/// most twenty, and long ones are cut off.
#[must_use]
pub fn evaluation_differences(records: &[EvaluationRecord]) -> Vec<String> {
    let unknown: Vec<_> = records
        .iter()
        .filter(|record| record.conditions.is_none())
        .map(|record| record.name.as_str())
        .collect();
    let mut differences = Vec::new();
    if !unknown.is_empty() && records.len() > 1 {
        differences.push(format!(
            "no conditions are recorded for {}: it was evaluated by an older build",
            unknown.join(", ")
        ));
    }
    differences.extend(
        keys(records)
            .into_iter()
            .filter_map(|key| condition_difference(key, records)),
    );
    differences.extend(truncation_difference(records));
    let omitted = differences.len().saturating_sub(MAX_DIFFERENCES);
    differences.truncate(MAX_DIFFERENCES);
    for difference in &mut differences {
        *difference = shortened(difference);
    }
    if omitted > 0 {
        differences.push(format!("{omitted} more differences"));
    }
    differences
}

fn shortened(text: &str) -> String {
    let text = printable_line(text);
    match text.char_indices().nth(MAX_CHARACTERS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.into_owned(),
    }
}

/// Names of all conditions, in order of first occurrence.
fn keys(records: &[EvaluationRecord]) -> Vec<&str> {
    let (mut keys, mut seen) = (Vec::new(), BTreeSet::new());
    let objects = records
        .iter()
        .filter_map(|r| r.conditions.as_ref()?.as_object());
    for key in objects.flat_map(|conditions| conditions.keys()) {
        if seen.insert(key.as_str()) {
            keys.push(key.as_str());
        }
    }
    keys
}

/// The difference in one condition, if any.
fn condition_difference(key: &str, records: &[EvaluationRecord]) -> Option<String> {
    let known: Vec<_> = records
        .iter()
        .filter_map(|record| Some((&record.name, &record.conditions.as_ref()?[key])))
        .collect();
    let differ = known.windows(2).any(|two| two[0].1 != two[1].1);
    differ.then(|| {
        let each = known.iter().map(|(name, value)| match value {
            Value::Null => format!("none in {name}"),
            Value::String(text) => format!("{text} in {name}"),
            value => format!("{value} in {name}"),
        });
        format!("{key}: {}", each.collect::<Vec<_>>().join(", "))
    })
}

/// The difference in truncation rates, if large enough.
fn truncation_difference(records: &[EvaluationRecord]) -> Option<String> {
    let known: Vec<_> = records
        .iter()
        .filter_map(|record| Some((&record.name, record.truncation_rate?)))
        .collect();
    let rates = || known.iter().map(|&(_, rate)| rate);
    let spread = rates().fold(0.0, f64::max) - rates().fold(1.0, f64::min);
    (spread > TRUNCATION_DIFFERENCE).then(|| {
        let each = known
            .iter()
            .map(|(name, rate)| format!("{:.1} % in {name}", 100.0 * rate));
        let each = each.collect::<Vec<_>>().join(", ");
        format!("fraction of truncated completions: {each}")
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn record(name: &str, conditions: Option<Value>, truncation_rate: f64) -> EvaluationRecord {
        EvaluationRecord {
            name: name.into(),
            conditions,
            truncation_rate: Some(truncation_rate),
        }
    }

    #[test]
    fn differences_are_reported_and_nothing_else() {
        let conditions = |stop: &[u32], template: Option<&str>| {
            Some(json!({"stop_ids": stop, "chat_template": template, "max_new_tokens": 64}))
        };
        let a = record("a", conditions(&[2], Some("0123")), 0.10);
        let differences = |b: EvaluationRecord| evaluation_differences(&[a.clone(), b]);
        let same = record("b", conditions(&[2], Some("0123")), 0.14);
        assert!(differences(same).is_empty());
        let stops = record("b", conditions(&[1, 2], Some("0123")), 0.10);
        assert_eq!(differences(stops), ["stop_ids: [2] in a, [1,2] in b"]);
        let template = record("b", conditions(&[2], None), 0.10);
        assert_eq!(
            differences(template),
            ["chat_template: 0123 in a, none in b"]
        );
        let truncated = record("b", conditions(&[2], Some("0123")), 0.35);
        assert_eq!(
            differences(truncated),
            ["fraction of truncated completions: 10.0 % in a, 35.0 % in b"]
        );
        let unknown = differences(record("b", None, 0.10));
        assert_eq!(unknown.len(), 1);
        assert!(unknown[0].contains("recorded for b"), "{unknown:?}");
        assert!(evaluation_differences(&[record("b", None, 1.0)]).is_empty());
        assert!(evaluation_differences(&[]).is_empty());
    }

    #[test]
    fn many_and_long_differences_are_cut_off() {
        let conditions = |value: &str| {
            let entries = (0..20_000).map(|n| (format!("key{n}"), json!(value)));
            Some(entries.collect::<serde_json::Map<_, _>>().into())
        };
        let long = "\u{1b}[31m".to_owned() + &"x".repeat(1000);
        let records = [
            record("a", conditions("y"), 0.1),
            record("b", conditions(&long), 0.1),
        ];
        let differences = evaluation_differences(&records);
        assert_eq!(differences.len(), MAX_DIFFERENCES + 1);
        assert_eq!(differences[MAX_DIFFERENCES], "19980 more differences");
        for difference in &differences {
            assert!(difference.chars().count() <= MAX_CHARACTERS + 1);
            assert!(!difference.contains('\u{1b}'), "{difference:?}");
        }
    }
}
