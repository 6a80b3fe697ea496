//! The dependency rules of the workspace, checked against `cargo metadata`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, Package};
use system_tests::workspace_root;

/// Workspace crates that each crate may depend on, in its tests too. A role depends on no other role, and only the
/// program depends on roles.
const ALLOWED_DEPENDENCIES: [(&str, &[&str]); 19] = [
    ("messages", &[]),
    ("settings", &["messages"]),
    ("dataset", &["messages", "panic-guard"]),
    ("playground", &[]),
    ("transport", &["messages", "settings"]),
    ("telemetry", &["messages", "settings"]),
    ("jinja", &[]),
    ("kernels", &[]),
    ("panic-guard", &[]),
    (
        "model",
        &["jinja", "kernels", "messages", "panic-guard", "settings"],
    ),
    ("hub", &["messages", "model", "settings", "telemetry"]),
    ("mistral", &["messages", "model"]),
    ("actor", ROLE),
    ("preference", ROLE),
    ("learner", LEARNER),
    (
        "agon",
        &[
            "actor",
            "dataset",
            "hub",
            "kernels",
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
    ("system-tests", &["playground", "settings"]),
    ("fuzz", FUZZED),
    (FEATURES_ONLY, &[]),
];

/// The package that enables features of third-party crates for the whole workspace; its code uses none of its
/// dependencies.
const FEATURES_ONLY: &str = "shared-features";

/// Dependencies of a role.
const ROLE: &[&str] = &[
    "messages",
    "settings",
    "dataset",
    "model",
    "transport",
    "telemetry",
];

/// Dependencies of the fuzzer: the crates with parsers, and the support code of the system tests.
const FUZZED: &[&str] = &[
    "dataset",
    "jinja",
    "messages",
    "model",
    "preference",
    "settings",
    "system-tests",
    "telemetry",
];

/// Dependencies of the learner.
const LEARNER: &[&str] = &[
    "messages",
    "settings",
    "dataset",
    "kernels",
    "model",
    "transport",
    "telemetry",
];

/// Third-party crates, each with the only crates that may have it as a normal or build dependency.
const EXCLUSIVE_DEPENDENCIES: [(&str, &[&str]); 14] = [
    ("candle-core", &["kernels", "model", "learner"]),
    ("candle-nn", &["kernels", "model"]),
    ("candle-transformers", &["model"]),
    ("tokenizers", &["model"]),
    ("mistralrs", &["mistral"]),
    ("flume", &["transport"]),
    ("async-nats", &["transport"]),
    ("axum", &["preference", "telemetry"]),
    ("ureq", &["hub"]),
    ("plotters", &["agon"]),
    ("reqwest", &["preference", "agon"]),
    ("metrics", &["telemetry"]),
    ("metrics-exporter-prometheus", &["telemetry"]),
    ("toml", &["settings", "telemetry", "agon", "system-tests"]),
];

/// Third-party crates that at least one crate must depend on.
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

/// Names of a package's normal and build dependencies, and of its development dependencies if `with_tests`.
fn dependencies(package: &Package, with_tests: bool) -> BTreeSet<String> {
    let of_code = |kind| matches!(kind, DependencyKind::Normal | DependencyKind::Build);
    let found = package
        .dependencies
        .iter()
        .filter(|d| with_tests || of_code(d.kind));
    found.map(|dependency| dependency.name.clone()).collect()
}

#[test]
fn crates_depend_only_on_allowed_workspace_crates() {
    let metadata = metadata();
    let allowed: BTreeMap<&str, &[&str]> = ALLOWED_DEPENDENCIES.into_iter().collect();
    let packages = metadata.workspace_packages();
    let members: BTreeSet<&str> = packages
        .iter()
        .map(|package| package.name.as_str())
        .collect();
    assert_eq!(
        members,
        allowed.keys().copied().collect(),
        "the crates of the workspace"
    );
    for package in packages {
        let depends = dependencies(package, true);
        let depends: BTreeSet<&str> = depends
            .iter()
            .map(String::as_str)
            .filter(|d| members.contains(d))
            .collect();
        let allowed: BTreeSet<&str> = allowed[package.name.as_str()].iter().copied().collect();
        let forbidden: Vec<_> = depends.difference(&allowed).collect();
        assert!(
            forbidden.is_empty(),
            "{} must not depend on {forbidden:?}",
            package.name
        );
    }
}

#[test]
fn exclusive_dependencies_are_used_by_their_owners_only() {
    let metadata = metadata();
    for package in metadata.workspace_packages() {
        let depends = dependencies(package, false);
        for (dependency, owners) in EXCLUSIVE_DEPENDENCIES {
            assert!(
                !depends.contains(dependency) || owners.contains(&package.name.as_str()),
                "{} depends on {dependency}, which is reserved for {owners:?}",
                package.name
            );
        }
        let with_tests = dependencies(package, true);
        let may_tokenize = ["model", "playground"].contains(&package.name.as_str());
        assert!(
            !with_tests.contains("tokenizers") || may_tokenize,
            "{} depends on tokenizers",
            package.name
        );
    }
}

#[test]
fn candle_is_a_dependency_of_the_compute_crates_only() {
    let compute_crates = ["kernels", "model", "learner"];
    for package in metadata().workspace_packages() {
        let candle_crates: Vec<_> = dependencies(package, true)
            .into_iter()
            .filter(|d| d.starts_with("candle"))
            .collect();
        assert!(
            candle_crates.is_empty() || compute_crates.contains(&package.name.as_str()),
            "{} depends on {candle_crates:?}",
            package.name
        );
    }
}

#[test]
fn mistral_rs_is_an_optional_dependency() {
    for package in metadata().workspace_packages() {
        let dependencies = package.dependencies.iter();
        for dependency in dependencies.filter(|d| d.name.starts_with("mistralrs")) {
            assert!(
                dependency.optional,
                "{} always builds mistral.rs",
                package.name
            );
        }
        let default_features = package.features.get("default");
        assert!(
            default_features.is_none_or(Vec::is_empty),
            "{}",
            package.name
        );
    }
}

#[test]
fn required_dependencies_are_used() {
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
fn no_crate_declares_an_unused_dependency() {
    let metadata = metadata();
    let mut unused = Vec::new();
    for package in metadata.workspace_packages() {
        if package.name == FEATURES_ONLY {
            continue;
        }
        let folder = package
            .manifest_path
            .parent()
            .expect("a manifest is in a folder");
        let mut text = String::new();
        for directory in ["src", "tests", "benches", "examples"] {
            let directory = folder.join(directory);
            if directory.exists() {
                append_sources(directory.as_std_path(), &mut text);
            }
        }
        for dependency in &package.dependencies {
            let name = dependency
                .rename
                .as_ref()
                .unwrap_or(&dependency.name)
                .replace('-', "_");
            if !uses_crate(&text, &name) {
                unused.push(format!("{} -> {}", package.name, dependency.name));
            }
        }
    }
    assert!(unused.is_empty(), "unused dependencies: {unused:#?}");
}

/// Whether code uses the crate `name`: in a path, a macro or a derive.
fn uses_crate(text: &str, name: &str) -> bool {
    text.match_indices(name).any(|(at, _)| {
        let before = text[..at].chars().next_back();
        let after = &text[at + name.len()..];
        let starts_here = before.is_none_or(|c| !c.is_alphanumeric() && c != '_' && c != ':');
        starts_here
            && ["::", "!", ";", " as "]
                .iter()
                .any(|next| after.starts_with(next))
    })
}

/// Appends every Rust file under `path` without its comment lines.
fn append_sources(path: &Path, text: &mut String) {
    if path.is_dir() {
        let entries = fs::read_dir(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        for entry in entries {
            append_sources(&entry.expect("a directory entry").path(), text);
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
