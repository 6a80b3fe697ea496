//! The configurations in `configs/`, and the keys that can be overridden.

use std::fs;

use serde_json::Value;
use settings::{ObjectiveSettings, Override, resolve, resolve_file};
use system_tests::config;

/// Keys that can be overridden on the quickstart, each with a value that differs from its own.
const OVERRIDES: [(&str, &str); 17] = [
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

/// The resolved quickstart with these settings changed.
fn quickstart(sets: &[&str]) -> Value {
    let resolved = resolve_file(&config("quickstart.toml"), &overrides(sets));
    let resolved = resolved.unwrap_or_else(|e| panic!("{sets:?}: {e}"));
    serde_json::to_value(&resolved.settings).expect("settings serialise to JSON")
}

/// The value of a dotted key.
fn at<'a>(settings: &'a Value, key: &str) -> Option<&'a Value> {
    settings.pointer(&format!("/{}", key.replace('.', "/")))
}

#[test]
fn every_file_resolves_and_resolution_is_idempotent() {
    let mut count = 0;
    for entry in fs::read_dir(config("")).expect("there is a folder of configurations") {
        let path = entry.expect("a directory entry").path();
        if path.extension().is_none_or(|extension| extension != "toml") {
            continue;
        }
        let first = resolve_file(&path, &[]).unwrap_or_else(|e| panic!("{e}"));
        let second = resolve(&first.toml, "config.toml", &[]).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(first, second, "{}", path.display());
        count += 1;
    }
    assert!(count >= 6, "only {count} configurations");
}

#[test]
fn the_default_file_equals_an_empty_configuration() {
    let file = resolve_file(&config("default.toml"), &[]).expect("the default file resolves");
    let empty = resolve("", "nothing", &[]).expect("nothing at all resolves");
    assert_eq!(file, empty);
}

#[test]
fn one_trainer_is_offline_semi_online_and_online_by_settings() {
    let of = |name: &str| {
        let resolved = resolve_file(&config(name), &[]).unwrap_or_else(|e| panic!("{e}"));
        resolved.settings
    };
    let offline = of("offline.toml");
    assert!(offline.pairs.is_offline() && offline.pairs.epochs > 0);
    let semi_online = of("semi-online.toml").learner;
    assert!(semi_online.weight_sync_steps > 1);
    let staleness = semi_online.weight_sync_steps - 1;
    assert_eq!(semi_online.max_staleness, staleness);
    assert!(!of("quickstart.toml").pairs.is_used());
}

#[test]
fn the_quickstart_uses_ipo_md() {
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
fn an_override_changes_only_its_key() {
    let before = quickstart(&[]);
    for (key, text) in OVERRIDES {
        let mut after = quickstart(&[&format!("{key}={text}")]);
        let expected: Value = serde_json::from_str(text).expect("the table's values are JSON too");
        assert_eq!(at(&after, key), Some(&expected), "{key}");
        assert_ne!(
            at(&before, key),
            Some(&expected),
            "{key} = {text} is the value in the file"
        );
        let (section, last) = key.rsplit_once('.').expect("every key is in a section");
        let pointer = format!("/{}", section.replace('.', "/"));
        let section = after
            .pointer_mut(&pointer)
            .and_then(Value::as_object_mut)
            .expect("it was read above");
        match at(&before, key) {
            Some(own) => section.insert(last.to_owned(), own.clone()),
            // A key without a value is not serialised.
            None => section.remove(last),
        };
        assert_eq!(after, before, "{key} changed other keys");
    }
}

#[test]
fn judges_and_objectives_are_selected_by_kind_with_their_own_temperature() {
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
        ("rloo", Some("beta")),
        ("rejection-sampling", None),
        ("dpo", None),
    ] {
        let kind_override = format!("learner.objective.kind={kind}");
        let temperature_override = temperature.map(|key| format!("learner.objective.{key}=0.75"));
        // Only the policy's own samples have its gradient.
        let unmixed = (kind == "rloo").then_some("actor.mixture_coef=0");
        let sets: Vec<&str> = [
            Some(kind_override.as_str()),
            temperature_override.as_deref(),
            unmixed,
        ]
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
