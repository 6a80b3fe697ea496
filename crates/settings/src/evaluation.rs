//! `[evaluation]`: comparisons of the policy with its reference on held-out prompts, and their judges.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::{checks::Checks, judge::JudgeSettings, settings::Settings};

/// Longest name of an evaluation judge, in characters.
const MAX_NAME: usize = 32;

/// Names that a judge cannot have: that of a key, of the run's judge in a tournament, and of the other columns in the
/// report's table of evaluations.
const TAKEN_NAMES: [&str; 10] = [
    "kind",
    "run",
    "step",
    "interval",
    "length-controlled",
    "average",
    "KL",
    "length",
    "truncated",
    "entropy",
];

/// Frequency, size and evaluation judges.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvaluationSettings {
    /// Steps between two evaluations; 0: only at the end.
    pub eval_steps: u64,
    /// Held-out prompts per evaluation; 0: no evaluations.
    pub prompts: usize,
    /// Number of prompts shown in the final report.
    pub show: usize,
    /// Evaluation judges by name, in addition to the run's judge. They give no labels.
    pub judge: BTreeMap<String, JudgeSettings>,
}

impl EvaluationSettings {
    pub(crate) fn check(&self, settings: &Settings, checks: &mut Checks) {
        for (name, judge) in &self.judge {
            let path = format!("evaluation.judge.{name}");
            check_name(&path, name, judge, checks);
            judge.check(&path, settings, checks);
            checks.require(
                !judge.is_trained_by_the_run(),
                &path,
                "an evaluation judge is not trained by the run: name the folder of its model in path",
            );
        }
    }
}

fn check_name(path: &str, name: &str, judge: &JudgeSettings, checks: &mut Checks) {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    let fits = !name.is_empty() && name.len() <= MAX_NAME && name.chars().all(is_plain);
    checks.require(
        fits,
        path,
        format!("a judge's name has up to {MAX_NAME} letters, digits, \"-\" and \"_\""),
    );
    checks.require(
        !TAKEN_NAMES.contains(&name),
        path,
        format!(
            "{name:?} is a name that reports or the configuration use themselves: choose another"
        ),
    );
    checks.require(
        name != "gold" || matches!(judge, JudgeSettings::Gold { .. }),
        path,
        "the name \"gold\" is the playground's known preference: choose another",
    );
}

/// Names the judge of `[evaluation.judge]` after its kind, where that table is a single judge.
pub(crate) fn name_single_judge(settings: &mut Table) {
    let evaluation = settings.get_mut("evaluation").and_then(Value::as_table_mut);
    let Some(Value::Table(judges)) = evaluation.and_then(|table| table.get_mut("judge")) else {
        return;
    };
    if let Some(kind) = judges.get("kind").and_then(Value::as_str) {
        let (name, judge) = (kind.to_owned(), std::mem::take(judges));
        judges.insert(name, Value::Table(judge));
    }
}

#[cfg(test)]
mod tests {
    use super::EvaluationSettings;
    use crate::{
        checks::tests::assert_reported,
        judge::JudgeSettings,
        resolve::{Override, resolve},
    };

    fn evaluation(text: &str, sets: &[&str]) -> EvaluationSettings {
        let sets: Vec<Override> = sets.iter().map(|set| set.parse().unwrap()).collect();
        let resolved = resolve(text, "f", &sets).expect(text);
        let again = resolve(&resolved.toml, "config.toml", &[]).expect("it resolves again");
        assert_eq!(again, resolved);
        resolved.settings.evaluation
    }

    #[test]
    fn judges_of_evaluations_are_one_or_several_with_the_defaults_of_their_kinds() {
        assert!(evaluation("", &[]).judge.is_empty(), "none by default");
        let rule = "rules = [{ kind = \"ended\", weight = 1.0 }]";
        let single = evaluation(&format!("[evaluation.judge]\nkind = \"rule\"\n{rule}"), &[]);
        let temperature = |judge: &JudgeSettings| match judge {
            JudgeSettings::Rule { temperature, .. } => *temperature,
            other => panic!("{other:?}"),
        };
        assert_eq!(temperature(&single.judge["rule"]), 1.0, "the default");
        let several = format!(
            "[evaluation.judge.strict]\nkind = \"rule\"\n{rule}\n\
             [evaluation.judge.cycling]\nkind = \"gold\"\ncycle = 2.0"
        );
        let several = evaluation(&several, &["evaluation.judge.strict.temperature=0.5"]);
        assert_eq!(temperature(&several.judge["strict"]), 0.5);
        let cycling = &several.judge["cycling"];
        assert_eq!(cycling, &JudgeSettings::Gold { cycle: 2.0 });
        let set = evaluation("", &["evaluation.judge.kind=gold"]);
        assert_eq!(set.judge["gold"], JudgeSettings::Gold { cycle: 0.0 });
    }

    #[test]
    fn mistakes_of_judges_of_evaluations_are_named_with_their_key() {
        assert_reported(&[
            (
                "[evaluation.judge]\nkind = \"golden\"",
                "evaluation.judge.golden.kind: no `golden` here; did you mean `gold`?",
            ),
            (
                "[evaluation.judge.a]\nkind = \"http\"",
                "evaluation.judge.a.urls: name at least one URL",
            ),
            (
                "[evaluation.judge.a]\nkind = \"bradley-terry\"",
                "evaluation.judge.a: an evaluation judge is not trained by the run",
            ),
            (
                "[evaluation.judge.gold]\nkind = \"rule\"\nrules = []",
                "evaluation.judge.gold: the name \"gold\"",
            ),
            (
                "[evaluation.judge.\"a b\"]\nkind = \"gold\"",
                "evaluation.judge.a b: a judge's name has up to 32 letters",
            ),
            (
                "[evaluation.judge.run]\nkind = \"gold\"",
                "evaluation.judge.run: \"run\" is a name that reports",
            ),
            (
                "[evaluation.judge.length]\nkind = \"gold\"",
                "evaluation.judge.length: \"length\" is a name that reports",
            ),
        ]);
    }
}
