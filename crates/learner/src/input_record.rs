//! Record of the inputs of a run: digests of its inputs, and the settings that change their meaning.
//!
//! A checkpoint holds the record of its run, so that a resumed run finds out what has changed. Does not know how the
//! digests are computed.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Characters of a value that a message shows: enough to tell digests apart.
const SHOWN_CHARACTERS: usize = 48;

/// Inputs of a run by name, such as `run.seed` or `weights of model.path`, each with its value or digest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputRecord(BTreeMap<String, String>);

impl InputRecord {
    /// Adds an input.
    pub fn insert(&mut self, name: impl Into<String>, value: impl Into<String>) {
        self.0.insert(name.into(), value.into());
    }

    /// The value or digest of an input.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// The inputs that differ from those of the run's `earlier` record, as `NAME was VALUE and is VALUE`, by name. What
    /// only one of the two names is not compared: a learner of several processes does not know the judge's files.
    #[must_use]
    pub fn changes(&self, earlier: &Self) -> Vec<String> {
        let change = |(name, now): (&String, &String)| {
            let before = earlier.0.get(name).filter(|before| *before != now)?;
            Some(format!(
                "{name} was {} and is {}",
                shown(before),
                shown(now)
            ))
        };
        self.0.iter().filter_map(change).collect()
    }
}

fn shown(value: &str) -> String {
    match value.chars().count() > SHOWN_CHARACTERS {
        true => value.chars().take(SHOWN_CHARACTERS).chain(['…']).collect(),
        false => value.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(values: &[(&str, &str)]) -> InputRecord {
        let mut record = InputRecord::default();
        for (name, value) in values {
            record.insert(*name, *value);
        }
        record
    }

    #[test]
    fn changes_name_what_was_and_what_is() {
        let earlier = record(&[
            ("run.seed", "1"),
            ("prompts", "ab"),
            ("judge", "cd"),
            ("label", ""),
        ]);
        let long = "x".repeat(60);
        let now = record(&[
            ("run.seed", "5"),
            ("prompts", "ab"),
            ("label", &long),
            ("new", "1"),
        ]);
        assert_eq!(earlier.changes(&earlier), Vec::<String>::new());
        assert_eq!(
            now.changes(&earlier),
            [
                format!("label was  and is {}…", "x".repeat(48)),
                "run.seed was 1 and is 5".to_owned(),
            ]
        );
    }
}
