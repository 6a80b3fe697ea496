//! The arrows between the crates of the house, and the *only*s, held over what cargo says.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, Package};
use house::workspace_root;

/// Whom a crate of the house may know. A role knows no other role, and only the program knows roles.
const ARROWS: [(&str, &[&str]); 15] = [
    ("messages", &[]),
    ("settings", &[]),
    ("dataset", &["messages"]),
    ("playground", &[]),
    ("transport", &["messages", "settings"]),
    ("telemetry", &["messages", "settings"]),
    ("jinja", &[]),
    ("model", &["jinja", "messages", "settings"]),
    ("mistral", &["messages", "model"]),
    ("actor", ROLE),
    ("preference", ROLE),
    ("learner", ROLE),
    (
        "agon",
        &[
            "actor",
            "dataset",
            "learner",
            "messages",
            "mistral",
            "model",
            "playground",
            "preference",
            "settings",
            "telemetry",
            "transport",
        ],
    ),
    ("house", &["playground", "settings"]),
    (FEATURES_ALONE, &[]),
];

/// The package that only turns on features of crates that others use: the one whose code names none of its
/// dependencies.
const FEATURES_ALONE: &str = "shared-features";

const ROLE: &[&str] = &[
    "messages",
    "settings",
    "dataset",
    "model",
    "transport",
    "telemetry",
];

/// Who alone may depend on whose crates, for normal and build dependencies.
const ONLYS: [(&str, &[&str]); 14] = [
    ("candle-core", &["model", "learner"]),
    ("candle-nn", &["model"]),
    ("candle-transformers", &["model"]),
    ("tokenizers", &["model"]),
    ("mistralrs", &["mistral"]),
    ("flume", &["transport"]),
    ("async-nats", &["transport"]),
    ("axum", &["preference", "telemetry"]),
    ("hf-hub", &["agon"]),
    ("plotters", &["agon"]),
    ("reqwest", &["preference", "agon"]),
    ("metrics", &["telemetry"]),
    ("metrics-exporter-prometheus", &["telemetry"]),
    ("toml", &["settings", "telemetry", "agon"]),
];

/// What the house is built on.
const REQUIRED: [&str; 7] = [
    "tokio",
    "crossbeam-channel",
    "flume",
    "candle-core",
    "candle-transformers",
    "metrics",
    "metrics-exporter-prometheus",
];

fn metadata() -> Metadata {
    MetadataCommand::new()
        .manifest_path(workspace_root().join("Cargo.toml"))
        .no_deps()
        .other_options(["--offline".to_owned()])
        .exec()
        .expect("cargo describes the workspace")
}

/// The crates a package depends on: those of its code, or all, its tests' too.
fn dependencies(package: &Package, with_tests: bool) -> BTreeSet<String> {
    let of_code = |kind| matches!(kind, DependencyKind::Normal | DependencyKind::Build);
    let found = package
        .dependencies
        .iter()
        .filter(|d| with_tests || of_code(d.kind));
    found.map(|dependency| dependency.name.clone()).collect()
}

#[test]
fn crates_know_only_whom_they_may_know() {
    let metadata = metadata();
    let allowed: BTreeMap<&str, &[&str]> = ARROWS.into_iter().collect();
    let packages = metadata.workspace_packages();
    let members: BTreeSet<&str> = packages
        .iter()
        .map(|package| package.name.as_str())
        .collect();
    assert_eq!(
        members,
        allowed.keys().copied().collect(),
        "the crates of the house"
    );
    for package in packages {
        let known = dependencies(package, true);
        let known: BTreeSet<&str> = known
            .iter()
            .map(String::as_str)
            .filter(|d| members.contains(d))
            .collect();
        let may: BTreeSet<&str> = allowed[package.name.as_str()].iter().copied().collect();
        let strangers: Vec<_> = known.difference(&may).collect();
        assert!(
            strangers.is_empty(),
            "{} may not know {strangers:?}",
            package.name
        );
    }
}

#[test]
fn only_one_crate_knows_each_outside_thing() {
    let metadata = metadata();
    for package in metadata.workspace_packages() {
        let depends = dependencies(package, false);
        for (outside, knowers) in ONLYS {
            assert!(
                !depends.contains(outside) || knowers.contains(&package.name.as_str()),
                "{} depends on {outside}, which only {knowers:?} may know",
                package.name
            );
        }
        let tests_of = dependencies(package, true);
        let reads_tokens = ["model", "playground"].contains(&package.name.as_str());
        assert!(
            !tests_of.contains("tokenizers") || reads_tokens,
            "{} knows tokenizers",
            package.name
        );
    }
}

#[test]
fn candle_comes_through_no_other_door() {
    let only_model_and_learner = ["model", "learner"];
    for package in metadata().workspace_packages() {
        let candles: Vec<_> = dependencies(package, true)
            .into_iter()
            .filter(|d| d.starts_with("candle"))
            .collect();
        assert!(
            candles.is_empty() || only_model_and_learner.contains(&package.name.as_str()),
            "{} depends on {candles:?}",
            package.name
        );
    }
}

#[test]
fn mistral_rs_is_compiled_only_when_it_is_asked_for() {
    for package in metadata().workspace_packages() {
        let named = package.dependencies.iter();
        for dependency in named.filter(|d| d.name.starts_with("mistralrs")) {
            assert!(dependency.optional, "{} always builds it", package.name);
        }
        let by_default = package.features.get("default");
        assert!(by_default.is_none_or(Vec::is_empty), "{}", package.name);
    }
}

#[test]
fn what_the_house_is_built_on_is_there() {
    let metadata = metadata();
    let all: BTreeSet<String> = metadata
        .workspace_packages()
        .into_iter()
        .flat_map(|package| dependencies(package, false))
        .collect();
    for required in REQUIRED {
        assert!(all.contains(required), "no crate depends on {required}");
    }
}

#[test]
fn every_dependency_does_work_in_the_crate_that_names_it() {
    let metadata = metadata();
    let mut idle = Vec::new();
    for package in metadata.workspace_packages() {
        if package.name == FEATURES_ALONE {
            continue;
        }
        let folder = package
            .manifest_path
            .parent()
            .expect("a manifest lies in a folder");
        let mut text = String::new();
        for part in ["src", "tests", "benches", "examples"] {
            let part = folder.join(part);
            if part.exists() {
                sources(part.as_std_path(), &mut text);
            }
        }
        for dependency in &package.dependencies {
            let name = dependency
                .rename
                .as_ref()
                .unwrap_or(&dependency.name)
                .replace('-', "_");
            if !names(&text, &name) {
                idle.push(format!("{} -> {}", package.name, dependency.name));
            }
        }
    }
    assert!(
        idle.is_empty(),
        "nothing uses these dependencies: {idle:#?}"
    );
}

/// Whether code names the crate `name` in a path, or a macro or a derive of it.
fn names(text: &str, name: &str) -> bool {
    text.match_indices(name).any(|(at, _)| {
        let before = text[..at].chars().next_back();
        let after = &text[at + name.len()..];
        let own = before.is_none_or(|c| !c.is_alphanumeric() && c != '_' && c != ':');
        own && ["::", "!", ";", " as "]
            .iter()
            .any(|next| after.starts_with(next))
    })
}

/// Appends every Rust file under `path`, its comments left out.
fn sources(path: &Path, text: &mut String) {
    if path.is_dir() {
        let entries = fs::read_dir(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        for entry in entries {
            sources(&entry.expect("an entry of a folder").path(), text);
        }
    } else if path.extension().is_some_and(|extension| extension == "rs") {
        let content =
            fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let code = content
            .lines()
            .filter(|line| !line.trim_start().starts_with("//"));
        code.for_each(|line| {
            text.push_str(line);
            text.push('\n');
        });
    }
}
