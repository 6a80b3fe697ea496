//! The configurations that come with the program, and the keys that its users rely on.

use std::fs;

use house::config;
use serde_json::Value;
use settings::{ObjectiveSettings, Override, resolve, resolve_file};

/// What can be set from the command line on the quickstart, with a value that differs from its own.
const SETTABLE: [(&str, &str); 17] = [
    ("run.seed", "7"),
    ("run.name", "\"another\""),
    ("model.path", "\"models/mine\""),
    ("actor.count", "2"),
    ("actor.mixture_coef", "0.25"),
    ("actor.temperature", "0.9"),
    ("actor.max_new_tokens", "20"),
    ("learner.steps", "10"),
    ("learner.train_batch_size", "16"),
    ("learner.learning_rate", "0.0002"),
    ("learner.max_staleness", "4"),
    ("learner.weight_sync_steps", "2"),
    ("learner.save_steps", "5"),
    ("telemetry.listen", "\"127.0.0.1:9464\""),
    ("learner.objective.tau", "0.5"),
    ("evaluation.prompts", "64"),
    ("preference.judge.cycle", "0.5"),
];

fn overrides(sets: &[&str]) -> Vec<Override> {
    sets.iter()
        .map(|set| set.parse().unwrap_or_else(|e| panic!("{set}: {e}")))
        .collect()
}

/// The quickstart with these settings changed, every key of it.
fn quickstart(sets: &[&str]) -> Value {
    let resolved = resolve_file(&config("quickstart.toml"), &overrides(sets));
    let resolved = resolved.unwrap_or_else(|e| panic!("{sets:?}: {e}"));
    serde_json::to_value(&resolved.settings).expect("settings are a tree of plain values")
}

/// The value of a dotted key.
fn at<'a>(settings: &'a Value, key: &str) -> Option<&'a Value> {
    settings.pointer(&format!("/{}", key.replace('.', "/")))
}

#[test]
fn every_file_resolves_and_what_it_resolves_to_resolves_to_itself() {
    let mut seen = 0;
    for entry in fs::read_dir(config("")).expect("there is a folder of configurations") {
        let path = entry.expect("an entry of a folder").path();
        if path.extension().is_none_or(|extension| extension != "toml") {
            continue;
        }
        let first = resolve_file(&path, &[]).unwrap_or_else(|e| panic!("{e}"));
        let second = resolve(&first.toml, "config.toml", &[]).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(first, second, "{}", path.display());
        seen += 1;
    }
    assert!(seen >= 6, "only {seen} configurations");
}

#[test]
fn the_default_file_is_what_an_empty_configuration_means() {
    let file = resolve_file(&config("default.toml"), &[]).expect("the default file resolves");
    let empty = resolve("", "nothing", &[]).expect("nothing at all resolves");
    assert_eq!(file, empty);
}

#[test]
fn the_quickstart_is_ipo_md() {
    let settings = resolve_file(&config("quickstart.toml"), &[])
        .expect("the quickstart resolves")
        .settings;
    assert!(matches!(settings.learner.objective, ObjectiveSettings::Ipo { tau, .. } if tau > 0.0));
    assert!(
        settings.actor.mixture_coef > 0.0,
        "{}",
        settings.actor.mixture_coef
    );
}

#[test]
fn every_key_can_be_set_alone_and_changes_nothing_else() {
    let before = quickstart(&[]);
    for (key, text) in SETTABLE {
        let mut after = quickstart(&[&format!("{key}={text}")]);
        let expected: Value = serde_json::from_str(text).expect("the table's values are JSON too");
        assert_eq!(at(&after, key), Some(&expected), "{key}");
        assert_ne!(
            at(&before, key),
            Some(&expected),
            "{key} = {text} is its value already"
        );
        let (section, last) = key.rsplit_once('.').expect("every key is in a section");
        let place = format!("/{}", section.replace('.', "/"));
        let section = after
            .pointer_mut(&place)
            .and_then(Value::as_object_mut)
            .expect("it was read above");
        match at(&before, key) {
            Some(own) => section.insert(last.to_owned(), own.clone()),
            // Without a value of its own it is not written at all.
            None => section.remove(last),
        };
        assert_eq!(after, before, "{key} changed more than itself");
    }
}

#[test]
fn judges_and_objectives_are_chosen_by_kind_with_their_own_temperature() {
    let rules = "preference.judge.rules=[{ kind = \"ended\", weight = 1.0 }]";
    let rule = quickstart(&["preference.judge.kind=rule", rules]);
    assert_eq!(at(&rule, "preference.judge.kind"), Some(&"rule".into()));
    for (kind, temperature) in [
        ("ipo", Some("tau")),
        ("dpo", Some("beta")),
        ("slic", Some("beta")),
        ("rpo", Some("beta")),
        ("rpo", Some("eta")),
        ("nash-md-pg", Some("tau")),
        ("dpo", None),
    ] {
        let chosen = format!("learner.objective.kind={kind}");
        let warm = temperature.map(|key| format!("learner.objective.{key}=0.75"));
        let sets: Vec<&str> = [Some(chosen.as_str()), warm.as_deref()]
            .into_iter()
            .flatten()
            .collect();
        let table = quickstart(&sets);
        assert_eq!(at(&table, "learner.objective.kind"), Some(&kind.into()));
        if let Some(key) = temperature {
            assert_eq!(
                at(&table, &format!("learner.objective.{key}")),
                Some(&0.75.into()),
                "{kind}"
            );
        }
    }
    let bandit = resolve_file(
        &config("bandit.toml"),
        &overrides(&["preference.judge.matrix=[[0.5,0.5,0.5],[0.5,0.5,0.5],[0.5,0.5,0.5]]"]),
    );
    assert!(bandit.is_ok(), "{bandit:?}");
}
