//! Licences of the dependencies: SPDX expressions, and the notices that travel with the program.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use cargo_metadata::{CargoOpt, Metadata, MetadataCommand, Package};

use crate::workspace_root;

/// Platform of the released program.
const PLATFORM: &str = "x86_64-unknown-linux-gnu";

/// Beginnings of the names of files that hold a licence or a notice, in upper case.
const LICENCE_FILES: [&str; 4] = ["LICENSE", "LICENCE", "COPYING", "UNLICENSE"];

/// Licence under which a dependency is used wherever its own terms permit: the project's own.
const OWN_LICENCE: &str = "Apache-2.0";

/// Beginning of the notices.
const HEADER: &str = "\
Third-party notices of Agon

The program `agon`, built with the default features, contains the crates below and the standard library of Rust (MIT OR
Apache-2.0). They are unchanged; their sources are at https://crates.io/crates/NAME/VERSION. Where a crate can be used
under the Apache License 2.0 it is; the text of that license is the first one below.

This file is the output of `cargo run --package system-tests --bin notices`; `agon licenses` prints it.
";

/// Describes the workspace and all its dependencies on the platform of the released program.
///
/// # Panics
/// If cargo cannot.
#[must_use]
pub fn dependencies(all_features: bool) -> Metadata {
    let mut command = MetadataCommand::new();
    command.manifest_path(workspace_root().join("Cargo.toml"));
    let options = ["--locked", "--filter-platform", PLATFORM].map(str::to_owned);
    command.other_options(options.to_vec());
    if all_features {
        command.features(CargoOpt::AllFeatures);
    }
    command.exec().expect("cargo describes the workspace")
}

/// Whether an SPDX expression is satisfied by licences of which `is_allowed` holds. A slash is an older form of OR.
///
/// # Errors
/// When the expression is malformed.
pub fn is_satisfied(expression: &str, is_allowed: &dyn Fn(&str) -> bool) -> Result<bool, String> {
    let spaced = expression
        .replace('/', " OR ")
        .replace('(', " ( ")
        .replace(')', " ) ");
    let mut words: Vec<&str> = spaced.split_whitespace().rev().collect();
    let satisfied = alternatives(&mut words, is_allowed);
    match (satisfied, words.is_empty()) {
        (Some(satisfied), true) => Ok(satisfied),
        _ => Err(format!("{expression:?} is not an SPDX expression")),
    }
}

/// Parses `A OR B ...`; the words are in reverse order.
fn alternatives(words: &mut Vec<&str>, is_allowed: &dyn Fn(&str) -> bool) -> Option<bool> {
    let mut satisfied = conjunction(words, is_allowed)?;
    while words.pop_if(|word| *word == "OR").is_some() {
        satisfied |= conjunction(words, is_allowed)?;
    }
    Some(satisfied)
}

/// Parses `A AND B ...`.
fn conjunction(words: &mut Vec<&str>, is_allowed: &dyn Fn(&str) -> bool) -> Option<bool> {
    let mut satisfied = licence(words, is_allowed)?;
    while words.pop_if(|word| *word == "AND").is_some() {
        satisfied &= licence(words, is_allowed)?;
    }
    Some(satisfied)
}

/// Parses a licence, with its exception if it has one, or an expression in parentheses.
fn licence(words: &mut Vec<&str>, is_allowed: &dyn Fn(&str) -> bool) -> Option<bool> {
    let first = words.pop()?;
    if first == "(" {
        let satisfied = alternatives(words, is_allowed)?;
        return words.pop_if(|word| *word == ")").map(|_| satisfied);
    }
    if [")", "AND", "OR", "WITH"].contains(&first) {
        return None;
    }
    match words.pop_if(|word| *word == "WITH") {
        Some(_) => Some(is_allowed(&format!("{first} WITH {}", words.pop()?))),
        None => Some(is_allowed(first)),
    }
}

/// The notices of all crates in the released program: their names, versions and licences, and every text that a
/// licence requires to be passed on, once.
///
/// # Panics
/// If cargo cannot describe the program, or a crate has no licence.
#[must_use]
pub fn third_party_notices() -> String {
    let metadata = dependencies(false);
    let linked = linked_crates();
    let mut packages: Vec<&Package> = metadata
        .packages
        .iter()
        .filter(|package| package.source.is_some() && linked.contains(&label(package)))
        .collect();
    packages.sort_by_key(|package| label(package));
    let list = packages
        .iter()
        .map(|package| format!("{}: {}\n", label(package), expression(package)));
    let mut notices = format!("{HEADER}\n{}", list.collect::<String>());
    let own = workspace_root().join("LICENSE");
    let own = fs::read_to_string(&own).unwrap_or_else(|e| panic!("{}: {e}", own.display()));
    notices += &section(&["Apache License 2.0".to_owned()], &own);
    for (text, crates) in texts(&packages) {
        notices += &section(&crates, &text);
    }
    notices
}

/// A text under the names of the crates that it belongs to.
fn section(crates: &[String], text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
    let text = lines.join("\n");
    format!(
        "\n{}\n{}\n\n{}\n",
        "=".repeat(80),
        crates.join(", "),
        text.trim_matches('\n')
    )
}

/// `name version`.
fn label(package: &Package) -> String {
    format!("{} {}", package.name, package.version)
}

/// The SPDX expression of a crate's licence.
fn expression(package: &Package) -> String {
    let expression = package.license.clone();
    expression.unwrap_or_else(|| panic!("{} names no licence", package.name))
}

/// Labels of the crates that are part of the program: its normal dependencies with the default features.
fn linked_crates() -> BTreeSet<String> {
    let output = Command::new(env!("CARGO"))
        .args([
            "tree",
            "--locked",
            "--package",
            "agon",
            "--edges",
            "normal",
            "--prefix",
            "none",
        ])
        .args(["--format", "{p}", "--target", PLATFORM])
        .current_dir(workspace_root())
        .output()
        .expect("cargo runs");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "cargo tree: {error}");
    let text = String::from_utf8_lossy(&output.stdout);
    let lines = text.lines().filter_map(|line| {
        let (name, rest) = line.split_once(" v")?;
        let version = rest.split(' ').next()?;
        Some(format!("{name} {version}"))
    });
    lines.collect()
}

/// Every text that must be passed on, with the crates that it belongs to.
fn texts(packages: &[&Package]) -> BTreeMap<String, Vec<String>> {
    let mut texts: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for package in packages {
        let folder = package
            .manifest_path
            .parent()
            .expect("a manifest is in a folder");
        let only_own = is_satisfied(&expression(package), &|licence| licence == OWN_LICENCE);
        let only_own = only_own.unwrap_or_else(|error| panic!("{}: {error}", package.name));
        let mut files = Vec::new();
        let depth = usize::from(package.links.is_some());
        licence_files(folder.as_std_path(), depth, &mut files);
        files.sort();
        for file in files {
            let name = file
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .to_uppercase();
            let is_bundled = file.parent() != Some(folder.as_std_path());
            if !only_own || is_bundled || name.starts_with("NOTICE") {
                let bytes = fs::read(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
                let text = String::from_utf8_lossy(&bytes).replace("\r\n", "\n");
                let crates = texts.entry(text).or_default();
                if crates.last() != Some(&label(package)) {
                    crates.push(label(package));
                }
            }
        }
    }
    texts
}

/// Finds licences and notices in a folder, and in the folders of libraries that a crate brings along.
fn licence_files(folder: &Path, depth: usize, found: &mut Vec<PathBuf>) {
    let entries = fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    for entry in entries.flatten() {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().to_uppercase();
        let is_licence = LICENCE_FILES.iter().any(|start| name.starts_with(start));
        if path.is_file() && (is_licence || name.starts_with("NOTICE")) {
            found.push(path);
        } else if path.is_dir() && depth > 0 {
            licence_files(&path, depth - 1, found);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_are_those_of_spdx() {
        let allowed = |name: &str| ["MIT", "Apache-2.0", "A WITH B"].contains(&name);
        for (expression, satisfied) in [
            ("MIT", true),
            ("GPL-3.0", false),
            ("GPL-3.0 OR MIT", true),
            ("MIT/GPL-3.0", true),
            ("MIT AND GPL-3.0", false),
            ("MIT OR GPL-3.0 AND GPL-3.0", true),
            ("(MIT OR GPL-3.0) AND Apache-2.0", true),
            ("(MIT AND GPL-3.0) OR GPL-2.0", false),
            ("A WITH B", true),
            ("MIT WITH B", false),
            ("A WITH B OR GPL-3.0", true),
        ] {
            assert_eq!(
                is_satisfied(expression, &allowed),
                Ok(satisfied),
                "{expression}"
            );
        }
        for expression in [
            "",
            "MIT OR",
            "OR MIT",
            "(MIT",
            "MIT)",
            "MIT Apache-2.0",
            "MIT WITH",
        ] {
            assert!(is_satisfied(expression, &allowed).is_err(), "{expression}");
        }
    }
}
