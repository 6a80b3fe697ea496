//! Resolved settings by dotted key, to compare two of them.

use std::collections::BTreeMap;

use toml::{Table, Value};

/// Every setting of a resolved configuration by its dotted key, with its value as TOML. `None` if the text is not TOML.
#[must_use]
pub fn flat(resolved: &str) -> Option<BTreeMap<String, String>> {
    let mut settings = BTreeMap::new();
    flatten(
        "",
        &Value::Table(resolved.parse::<Table>().ok()?),
        &mut settings,
    );
    Some(settings)
}

fn flatten(path: &str, value: &Value, settings: &mut BTreeMap<String, String>) {
    let Value::Table(table) = value else {
        settings.insert(path.to_owned(), value.to_string());
        return;
    };
    for (key, value) in table {
        let path = match path.is_empty() {
            true => key.clone(),
            false => format!("{path}.{key}"),
        };
        flatten(&path, value, settings);
    }
}

/// The settings in which two resolved configurations differ, as `KEY was VALUE and is VALUE`, by key. Of URLs only the
/// key is given.
#[must_use]
pub fn changed_settings(before: &str, now: &str) -> Vec<String> {
    let (before, now) = (
        flat(before).unwrap_or_default(),
        flat(now).unwrap_or_default(),
    );
    let mut keys: Vec<&String> = before.keys().chain(now.keys()).collect();
    keys.sort();
    keys.dedup();
    let changed = keys
        .into_iter()
        .filter(|key| before.get(*key) != now.get(*key));
    let value = |settings: &BTreeMap<String, String>, key: &String| {
        settings
            .get(key)
            .cloned()
            .unwrap_or_else(|| "absent".into())
    };
    changed
        .map(|key| match key.contains("url") {
            true => format!("{key} has changed"),
            false => format!(
                "{key} was {} and is {}",
                value(&before, key),
                value(&now, key)
            ),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_named_by_key() {
        let before = "[run]\nseed = 1\n[model]\npath = \"a\"\n[transport]\nurl = \"nats://a\"\n[learner.objective]\ntau = 0.5";
        let now =
            "[run]\nseed = 5\n[transport]\nurl = \"nats://b\"\n[learner.objective]\ntau = 0.5";
        assert_eq!(changed_settings(before, before), Vec::<String>::new());
        assert_eq!(
            changed_settings(before, now),
            [
                "model.path was \"a\" and is absent",
                "run.seed was 1 and is 5",
                "transport.url has changed",
            ]
        );
        assert_eq!(flat("not toml"), None);
        let settings = flat(before).expect("TOML");
        assert_eq!(
            settings.get("learner.objective.tau").map(String::as_str),
            Some("0.5")
        );
    }
}
