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
#[serde(transparent)]
pub struct InputRecord {
    values: BTreeMap<String, String>,
    /// Settings with the files that an input was read from, by the input's name; not part of a checkpoint.
    #[serde(skip)]
    sources: BTreeMap<String, String>,
}

impl InputRecord {
    /// Adds an input.
    pub fn insert(&mut self, name: impl Into<String>, value: impl Into<String>) {
        self.values.insert(name.into(), value.into());
    }

    /// Adds an input that `source`, such as `pairs.path = FILE`, was read from; changes name it.
    pub fn insert_from(
        &mut self,
        name: impl Into<String>,
        source: impl Into<String>,
        value: impl Into<String>,
    ) {
        let name = name.into();
        self.sources.insert(name.clone(), source.into());
        self.insert(name, value);
    }

    /// The value or digest of an input.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(String::as_str)
    }

    /// The inputs that differ from those of the run's `earlier` record, as `NAME (SOURCE) was VALUE and is VALUE`, by name. What
    /// only one of the two names is not compared: a learner of several processes does not know the judge's files.
    #[must_use]
    pub fn changes(&self, earlier: &Self) -> Vec<String> {
        let change = |(name, now): (&String, &String)| {
            let before = earlier.values.get(name).filter(|before| *before != now)?;
            let source = self.sources.get(name);
            let source = source.map_or(String::new(), |source| format!(" ({source})"));
            Some(format!(
                "{name}{source} was {} and is {}",
                shown(before),
                shown(now)
            ))
        };
        self.values.iter().filter_map(change).collect()
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

    #[test]
    fn the_source_of_an_input_is_named_and_not_stored() {
        let mut earlier = InputRecord::default();
        earlier.insert_from("rows", "pairs.path = old.jsonl", "ab");
        let text = serde_json::to_string(&earlier).expect("a record is JSON");
        assert_eq!(text, r#"{"rows":"ab"}"#);
        let earlier: InputRecord = serde_json::from_str(&text).expect("a record");
        let mut now = InputRecord::default();
        now.insert_from("rows", "pairs.path = new.jsonl", "cd");
        let expected = "rows (pairs.path = new.jsonl) was ab and is cd";
        assert_eq!(now.changes(&earlier), [expected]);
    }
}
