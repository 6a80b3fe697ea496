//! Resolution of a configuration file and command-line overrides to valid settings.

use std::path::Path;

use toml::{Table, Value};

use crate::{
    checks, choice, error::SettingsError, evaluation, redaction::without_secrets, repair,
    settings::Settings, staleness,
};

/// The commented default file: all keys with their defaults and meanings.
pub const DEFAULT_TOML: &str = include_str!("../../../configs/default.toml");

/// One override, `--set key=value`.
#[derive(Debug, Clone, PartialEq)]
pub struct Override {
    key: String,
    value: Value,
}

impl Override {
    /// The override of `key`, dotted, with `value`.
    #[must_use]
    pub fn new(key: &str, value: Value) -> Self {
        Self {
            key: key.to_owned(),
            value,
        }
    }
}

/// Resolved settings, also as the TOML text for the run directory.
#[derive(Debug, Clone, PartialEq)]
pub struct Resolved {
    /// The settings.
    pub settings: Settings,
    /// All settings as TOML, which resolves to the same settings.
    pub toml: String,
}

impl std::str::FromStr for Override {
    type Err = SettingsError;

    /// Parses `dotted.key=VALUE` with a TOML value. An unquoted string of letters, digits and a few symbols is accepted
    /// as a string, so that no quotes need escaping in a shell.
    fn from_str(text: &str) -> Result<Self, SettingsError> {
        let not_an_override = || SettingsError::NotAnOverride {
            text: text.to_owned(),
        };
        let (key, value) = text.split_once('=').ok_or_else(not_an_override)?;
        let (key, value) = (key.trim().to_owned(), value.trim());
        if key.is_empty() || key.split('.').any(str::is_empty) {
            return Err(not_an_override());
        }
        let value = match toml::from_str::<Table>(&format!("value = {value}")) {
            Ok(mut table) if table.len() == 1 => {
                table.remove("value").ok_or_else(not_an_override)?
            }
            Ok(_) => return Err(not_an_override()),
            Err(_) if is_bare_string(value) => Value::String(value.to_owned()),
            Err(error) => {
                return Err(SettingsError::NotToml {
                    origin: format!("the value of --set {key}"),
                    reason: without_secrets(error.message()),
                });
            }
        };
        Ok(Self { key, value })
    }
}

fn is_bare_string(text: &str) -> bool {
    let is_plain = |c: char| c.is_alphanumeric() || "-_./:~@+".contains(c);
    // A URL may have more symbols; what it may not have is reported without repeating it.
    let ends_url = |c: char| c.is_whitespace() || "\"'[]{}".contains(c);
    let is_url = text.contains("://") && !text.contains(ends_url);
    !text.is_empty() && (is_url || text.chars().all(is_plain))
}

/// Reads the file at `path` and resolves it.
///
/// # Errors
/// When the file cannot be read or has mistakes; all of them are reported.
pub fn resolve_file(path: &Path, overrides: &[Override]) -> Result<Resolved, SettingsError> {
    let text = std::fs::read_to_string(path).map_err(|source| SettingsError::Unreadable {
        path: path.to_owned(),
        source,
    })?;
    resolve(&text, &path.display().to_string(), overrides)
}

/// Merges the defaults, `text` and `overrides`, later ones taking precedence. `origin` names the text in errors.
///
/// # Errors
/// When the text is not TOML or has mistakes; all of them are reported.
pub fn resolve(
    text: &str,
    origin: &str,
    overrides: &[Override],
) -> Result<Resolved, SettingsError> {
    let user = parse(text, origin)?;
    let mut table = parse(DEFAULT_TOML, "the default file")?;
    let mut defaults = table.clone();
    choice::apply_defaults(&mut defaults);
    choice::merge(&mut table, user);
    choice::merge(&mut table, nested(overrides));
    evaluation::name_single_judge(&mut table);
    choice::apply_defaults(&mut table);
    staleness::resolve_sync(&mut table);
    let problems = |problems| SettingsError::Problems {
        origin: origin.to_owned(),
        problems,
    };
    let settings = repair::read(table, &defaults).map_err(problems)?;
    let contradictions = checks::contradictions(&settings);
    if !contradictions.is_empty() {
        return Err(problems(contradictions));
    }
    let toml = toml::to_string(&settings).map_err(|error| SettingsError::NotToml {
        origin: "the resolved configuration".into(),
        reason: error.to_string(),
    })?;
    Ok(Resolved { settings, toml })
}

fn parse(text: &str, origin: &str) -> Result<Table, SettingsError> {
    text.parse::<Table>()
        .map_err(|error| SettingsError::NotToml {
            origin: origin.to_owned(),
            reason: without_secrets(&error.to_string()),
        })
}

/// All overrides as one nested table; later ones take precedence.
fn nested(overrides: &[Override]) -> Table {
    let mut root = Table::new();
    for Override { key, value } in overrides {
        let mut table = &mut root;
        let mut parts: Vec<&str> = key.split('.').collect();
        let Some(last) = parts.pop() else { continue };
        for part in parts {
            let below = table
                .entry(part)
                .or_insert_with(|| Value::Table(Table::new()));
            if !below.is_table() {
                *below = Value::Table(Table::new());
            }
            table = below
                .as_table_mut()
                .expect("it was replaced by a table above");
        }
        table.insert(last.to_owned(), value.clone());
    }
    root
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{judge::JudgeSettings, objective::ObjectiveSettings};

    fn overrides(texts: &[&str]) -> Vec<Override> {
        texts
            .iter()
            .map(|text| text.parse().expect("an override"))
            .collect()
    }

    fn error_of(text: &str, sets: &[&str]) -> String {
        resolve(text, "test.toml", &overrides(sets))
            .expect_err(text)
            .to_string()
    }

    #[test]
    fn the_defaults_resolve_and_resolution_is_idempotent() {
        let first = resolve("", "nothing", &[]).expect("the defaults are valid");
        let second = resolve(&first.toml, "config.toml", &[]).expect("the resolved file resolves");
        assert_eq!(first, second);
        assert_eq!(
            resolve(DEFAULT_TOML, "default.toml", &[])
                .expect("the default file is a valid configuration"),
            first
        );
    }

    #[test]
    fn all_mistakes_are_reported_with_their_path_and_the_nearest_key() {
        let message = error_of(
            "[learner]\nlearning_rat = 1e-4\nsteps = \"many\"\n[actor]\ntemprature = 1.0\n\
             [learner.objective]\nkind = \"dpo\"\ntau = 0.1\n[preference.judge]\nkind = \"golden\"\n[nonsense]\na = 1",
            &[],
        );
        for expected in [
            "6 mistakes",
            "learner.learning_rat: unknown key; did you mean `learning_rate`?",
            "learner.steps: invalid type: string \"many\", expected u64",
            "actor.temprature: unknown key; did you mean `temperature`?",
            "learner.objective.tau: unknown key",
            "preference.judge.kind: no `golden` here; did you mean `gold`?",
            "nonsense: unknown key",
        ] {
            assert!(
                message.contains(expected),
                "{expected:?} is not in\n{message}"
            );
        }
    }

    #[test]
    fn changing_a_kind_brings_its_defaults_and_removes_the_previous_keys() {
        let file = "[learner.objective]\nkind = \"ipo\"\ntau = 0.05";
        let of = |sets: &[&str]| {
            resolve(file, "f", &overrides(sets))
                .expect("resolves")
                .settings
                .learner
                .objective
        };
        assert!(matches!(of(&[]), ObjectiveSettings::Ipo { tau, .. } if tau == 0.05));
        let set = [
            "learner.objective.kind=\"dpo\"",
            "learner.objective.beta=0.5",
        ];
        assert_eq!(of(&set), ObjectiveSettings::Dpo { beta: 0.5 });
        assert_eq!(
            of(&["learner.objective.kind=slic"]),
            ObjectiveSettings::Slic { beta: 0.1 }
        );
        assert!(
            matches!(of(&["learner.objective.tau=1"]), ObjectiveSettings::Ipo { tau, .. } if tau == 1.0)
        );
    }

    #[test]
    fn overrides_are_toml_or_bare_strings() {
        let sets = [
            "run.name=trial-7",
            "telemetry.listen=127.0.0.1:9464",
            "model.reference_probabilities=[0.5, 0.5]",
            "prompts.kind=\"bandit\"",
            "actor.max_new_tokens=1",
            "preference.judge.kind=matrix",
            "preference.judge.matrix=[[0.5,0.25],[0.75,0.5]]",
        ];
        let settings = resolve("", "f", &overrides(&sets))
            .expect("resolves")
            .settings;
        assert_eq!(settings.run.name, "trial-7");
        assert_eq!(settings.telemetry.listen.port(), 9464);
        let matrix = vec![vec![0.5, 0.25], vec![0.75, 0.5]];
        assert_eq!(settings.preference.judge, JudgeSettings::Matrix { matrix });
        for bad in ["run.name", "=1", "a..b=1", "a=[1", "a=1\nb=2"] {
            assert!(bad.parse::<Override>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_file_that_is_not_toml_is_reported_with_the_line() {
        let message = error_of("[run]\nname = \n", &[]);
        assert!(
            message.contains("test.toml is not TOML") && message.contains("line 2"),
            "{message}"
        );
        let missing = resolve_file(Path::new("/nowhere/x.toml"), &[]).expect_err("no such file");
        assert!(missing.to_string().contains("/nowhere/x.toml"));
    }
}
