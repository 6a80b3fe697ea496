//! From a file and the command line's overrides to settings without mistakes.

use std::path::Path;

use toml::{Table, Value};

use crate::{Settings, SettingsError, choice, repair, validate};

/// The commented default file: every key, its default and its meaning.
pub const DEFAULT_TOML: &str = include_str!("../../../configs/default.toml");

/// One `--set key=value`.
#[derive(Debug, Clone, PartialEq)]
pub struct Override {
    key: String,
    value: Value,
}

/// Settings, and the same as the TOML text that goes into the run directory.
#[derive(Debug, Clone, PartialEq)]
pub struct Resolved {
    /// The settings.
    pub settings: Settings,
    /// All of them as TOML: a file that resolves to the same settings.
    pub toml: String,
}

impl std::str::FromStr for Override {
    type Err = SettingsError;

    /// Reads `dotted.key=VALUE`, VALUE being TOML. A plain word that is not TOML is taken as a string,
    /// so that a shell's quotes need no quoting.
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
            Err(_) if is_plain_word(value) => Value::String(value.to_owned()),
            Err(error) => {
                return Err(SettingsError::NotToml {
                    origin: format!("the value of --set {key}"),
                    reason: error.message().to_owned(),
                });
            }
        };
        Ok(Self { key, value })
    }
}

fn is_plain_word(text: &str) -> bool {
    !text.is_empty()
        && text
            .chars()
            .all(|c| c.is_alphanumeric() || "-_./:~@+".contains(c))
}

/// Reads the file at `path` and resolves it.
///
/// # Errors
/// When the file cannot be read or holds mistakes; all of them are named.
pub fn resolve_file(path: &Path, overrides: &[Override]) -> Result<Resolved, SettingsError> {
    let text = std::fs::read_to_string(path).map_err(|source| SettingsError::Unreadable {
        path: path.to_owned(),
        source,
    })?;
    resolve(&text, &path.display().to_string(), overrides)
}

/// Lays `overrides` over `text` over the defaults. `origin` names the text in errors.
///
/// # Errors
/// When the text is not TOML or holds mistakes; all of them are named.
pub fn resolve(
    text: &str,
    origin: &str,
    overrides: &[Override],
) -> Result<Resolved, SettingsError> {
    let user = parse(text, origin)?;
    let mut table = parse(DEFAULT_TOML, "the default file")?;
    let mut defaults = table.clone();
    choice::fill_in(&mut defaults);
    choice::lay_over(&mut table, user);
    choice::lay_over(&mut table, nested(overrides));
    choice::fill_in(&mut table);
    let problems = |problems| SettingsError::Problems {
        origin: origin.to_owned(),
        problems,
    };
    let settings = repair::read(table, &defaults).map_err(problems)?;
    let contradictions = validate::contradictions(&settings);
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
            reason: error.to_string(),
        })
}

/// All overrides as one table, later ones winning.
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
                .expect("it was made a table on the line above");
        }
        table.insert(last.to_owned(), value.clone());
    }
    root
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{JudgeSettings, ObjectiveSettings};

    fn overrides(texts: &[&str]) -> Vec<Override> {
        texts
            .iter()
            .map(|text| text.parse().expect("an override"))
            .collect()
    }

    fn refusal(text: &str, sets: &[&str]) -> String {
        resolve(text, "test.toml", &overrides(sets))
            .expect_err(text)
            .to_string()
    }

    #[test]
    fn the_default_file_alone_resolves_and_what_it_resolves_to_resolves_to_itself() {
        let first = resolve("", "nothing", &[]).expect("the defaults hold");
        let second = resolve(&first.toml, "config.toml", &[]).expect("the resolved file resolves");
        assert_eq!(first, second);
        assert_eq!(
            resolve(DEFAULT_TOML, "default.toml", &[]).expect("it is a template too"),
            first
        );
    }

    #[test]
    fn every_mistake_is_reported_at_once_with_its_path_and_the_nearest_key() {
        let message = refusal(
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
    fn a_new_kind_brings_its_own_defaults_and_drops_the_old_keys() {
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
    fn overrides_are_toml_or_plain_words() {
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
    fn a_file_that_is_not_toml_is_refused_with_the_line() {
        let message = refusal("[run]\nname = \n", &[]);
        assert!(
            message.contains("test.toml is not TOML") && message.contains("line 2"),
            "{message}"
        );
        let missing = resolve_file(Path::new("/nowhere/x.toml"), &[]).expect_err("no such file");
        assert!(missing.to_string().contains("/nowhere/x.toml"));
    }
}
