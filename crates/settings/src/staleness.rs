//! `learner.max_staleness = "sync"`: the staleness that follows from the interval of publications.

use serde::{Deserialize, Deserializer, de::Error};
use toml::{Table, Value};

/// The string for the staleness of semi-online training.
const SYNC: &str = "sync";

/// Replaces `learner.max_staleness = "sync"` by `learner.weight_sync_steps` − 1: every pair is trained on before the
/// weights after the ones that sampled it are published, or with them. The resolved configuration has the number.
pub(crate) fn resolve_sync(settings: &mut Table) {
    let Some(Value::Table(learner)) = settings.get_mut("learner") else {
        return;
    };
    let is_sync = learner.get("max_staleness").and_then(Value::as_str) == Some(SYNC);
    let steps = learner.get("weight_sync_steps").and_then(Value::as_integer);
    // Without a number of steps, that setting is the mistake to report.
    if let (true, Some(steps)) = (is_sync, steps.or(Some(1))) {
        let staleness = steps.saturating_sub(1).max(0);
        learner.insert("max_staleness".into(), Value::Integer(staleness));
    }
}

/// Deserialises a resolved staleness; the error names both forms of the setting.
pub(crate) fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let value = Value::deserialize(deserializer)?;
    let number = value.as_integer().and_then(|n| u64::try_from(n).ok());
    number.ok_or_else(|| {
        D::Error::custom(format!(
            "{value} is neither a number of steps from 0 on nor {SYNC:?}"
        ))
    })
}

#[cfg(test)]
mod tests {
    use crate::{checks::tests::problems, resolve};

    #[test]
    fn sync_is_the_staleness_of_the_publications() {
        let staleness = |text: &str| {
            let resolved = resolve(text, "test", &[]).expect("valid settings");
            resolved.settings.learner.max_staleness
        };
        assert_eq!(staleness(""), 1);
        for (steps, expected) in [(1, 0), (10, 9), (100, 99)] {
            let text = format!("[learner]\nmax_staleness = \"sync\"\nweight_sync_steps = {steps}");
            assert_eq!(staleness(&text), expected, "{steps}");
        }
        let set = ["learner.weight_sync_steps=4", "learner.max_staleness=sync"];
        let sets = set.map(|set| set.parse().expect("an override"));
        let resolved = resolve("", "test", &sets).expect("valid settings");
        assert_eq!(resolved.settings.learner.max_staleness, 3);
        assert!(resolved.toml.contains("max_staleness = 3"));
        for mistake in ["\"synchronous\"", "-1", "1.5"] {
            let found = problems(&format!("[learner]\nmax_staleness = {mistake}"));
            let expected = "neither a number of steps from 0 on nor \"sync\"";
            assert!(
                found.iter().any(|problem| problem.contains(expected)),
                "{found:?}"
            );
        }
    }
}
