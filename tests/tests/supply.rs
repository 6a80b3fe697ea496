//! What the program is made of and how it is shipped: licences, sources and versions of its dependencies, its notices,
//! its container image, its units.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    process::Command,
};

use cargo_metadata::{Metadata, Package, PackageId};
use system_tests::{
    Sandbox, agon_binary, config, dependencies, is_satisfied, third_party_notices, tool,
    workspace_root,
};
use toml::{Table, Value};

fn read(name: &str) -> String {
    let path = workspace_root().join(name);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The rules of `deny.toml`.
fn rules() -> Table {
    read("deny.toml").parse().expect("deny.toml is TOML")
}

#[track_caller]
fn strings(value: &Value) -> Vec<&str> {
    let items = value.as_array().expect("a list").iter();
    items.map(|item| item.as_str().expect("text")).collect()
}

/// Crates that are not ours.
fn foreign(metadata: &Metadata) -> Vec<&Package> {
    let resolve = metadata
        .resolve
        .as_ref()
        .expect("cargo resolves the workspace");
    let used: BTreeSet<&PackageId> = resolve.nodes.iter().map(|node| &node.id).collect();
    let packages = metadata.packages.iter();
    packages
        .filter(|package| used.contains(&package.id) && package.source.is_some())
        .collect()
}

#[test]
fn every_dependency_has_an_allowed_licence_and_a_known_source() {
    let rules = rules();
    let licences = strings(&rules["licenses"]["allow"]);
    let exceptions = rules["licenses"]["exceptions"].as_array().expect("a list");
    let exceptions: BTreeMap<&str, Vec<&str>> = exceptions
        .iter()
        .map(|exception| {
            (
                exception["crate"].as_str().expect("a name"),
                strings(&exception["allow"]),
            )
        })
        .collect();
    let registries = strings(&rules["sources"]["allow-registry"]);
    let metadata = dependencies(true);
    let mut used = BTreeSet::new();
    for package in foreign(&metadata) {
        let name = package.name.as_str();
        let more = exceptions.get(name).map(Vec::as_slice).unwrap_or_default();
        used.extend((!more.is_empty()).then_some(name));
        let licence = package.license.as_deref().unwrap_or_default();
        let is_allowed = |licence: &str| licences.contains(&licence) || more.contains(&licence);
        assert_eq!(
            is_satisfied(licence, &is_allowed),
            Ok(true),
            "{name}: {licence:?}"
        );
        let source = package
            .source
            .as_ref()
            .expect("it is foreign")
            .repr
            .as_str();
        let registry = source.strip_prefix("registry+").unwrap_or(source);
        assert!(registries.contains(&registry), "{name} comes from {source}");
    }
    let unused: Vec<_> = exceptions
        .keys()
        .filter(|name| !used.contains(*name))
        .collect();
    assert!(
        unused.is_empty(),
        "exceptions for crates that are not used: {unused:?}"
    );
}

#[test]
fn banned_crates_and_costly_duplicates_stay_out() {
    let rules = rules();
    let metadata = dependencies(false);
    let mut versions: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for package in foreign(&metadata) {
        versions
            .entry(package.name.as_str())
            .or_default()
            .push(package.version.to_string());
    }
    for rule in rules["bans"]["deny"].as_array().expect("a list") {
        let name = rule["crate"].as_str().expect("a name");
        let found = versions.get(name).map(Vec::as_slice).unwrap_or_default();
        let is_kept_single = rule.get("deny-multiple-versions").is_some();
        let allowed = usize::from(is_kept_single);
        assert!(
            found.len() <= allowed,
            "{name}: {found:?}, at most {allowed} allowed"
        );
        assert!(
            found.len() == allowed,
            "{name} is not used: remove its rule from deny.toml"
        );
    }
}

#[test]
fn the_notices_are_those_of_the_dependencies() {
    let file = "THIRD-PARTY-NOTICES.txt";
    let advice = format!("cargo run --package system-tests --bin notices > {file}");
    assert!(
        read(file) == third_party_notices(),
        "{file} is out of date: {advice}"
    );
    let sandbox = Sandbox::new();
    let output = sandbox.run(&["licenses"]).succeeded();
    assert_eq!(output.stdout.trim_end(), read(file).trim_end());
}

/// An instruction of a Dockerfile with its arguments; continued lines are joined.
struct Instruction {
    name: String,
    arguments: String,
}

fn instructions(text: &str) -> Vec<Instruction> {
    let joined = text.replace("\\\n", " ");
    let lines = joined
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|line| {
            let (name, arguments) = line.split_once(' ').unwrap_or((line, ""));
            Instruction {
                name: name.to_owned(),
                arguments: arguments.split_whitespace().collect::<Vec<_>>().join(" "),
            }
        })
        .collect()
}

#[test]
fn the_dockerfile_is_sound() {
    let text = read("Dockerfile");
    let instructions = instructions(&text);
    let of = |name: &'static str| instructions.iter().filter(move |one| one.name == name);
    let known = [
        "ARG",
        "FROM",
        "WORKDIR",
        "COPY",
        "RUN",
        "USER",
        "ENTRYPOINT",
        "LABEL",
    ];
    for one in &instructions {
        assert!(
            known.contains(&one.name.as_str()),
            "unknown instruction {}",
            one.name
        );
    }
    // The compiler is the project's, and images have tags that do not move to another release.
    let toolchain: Table = read("rust-toolchain.toml").parse().expect("TOML");
    let channel = toolchain["toolchain"]["channel"].as_str().expect("text");
    let images: Vec<&str> = of("FROM")
        .map(|from| from.arguments.split(' ').next().unwrap_or_default())
        .collect();
    assert!(
        images[0].starts_with(&format!("docker.io/library/rust:{channel}-")),
        "{images:?}"
    );
    for image in &images {
        assert!(
            image.contains(':') && !image.ends_with(":latest"),
            "{image}"
        );
    }
    for copy in of("COPY") {
        let (from_stage, paths) = match copy.arguments.strip_prefix("--from=") {
            Some(rest) => (true, rest.split_once(' ').expect("paths").1),
            None => (false, copy.arguments.as_str()),
        };
        let paths: Vec<&str> = paths.split(' ').collect();
        let (_, sources) = paths.split_last().expect("a destination");
        for source in sources.iter().filter(|_| !from_stage) {
            assert!(
                workspace_root().join(source).exists(),
                "COPY {source}: it does not exist"
            );
        }
    }
    assert!(
        of("RUN").any(|run| run.arguments.contains("cargo build --locked --release")),
        "{text}"
    );
    let entry = of("ENTRYPOINT").next().expect("the image runs the program");
    assert_eq!(entry.arguments, "[\"/usr/local/bin/agon\"]");
    // Numeric, so that Kubernetes can tell that it is not root.
    let user = of("USER").next_back().expect("the image names a user");
    assert_eq!(user.arguments, "65532:65532");
    let last_from = instructions
        .iter()
        .rposition(|one| one.name == "FROM")
        .expect("a stage");
    let last_user = instructions
        .iter()
        .rposition(|one| one.name == "USER")
        .expect("a user");
    assert!(last_user > last_from, "the user is that of the last stage");
    for ignored in ["target", "runs", ".git"] {
        assert!(
            read(".dockerignore").lines().any(|line| line == ignored),
            "{ignored} is copied"
        );
    }
}

/// Units of a run over a server, as `agon manifests --systemd` prints them: file name and text.
fn units(sandbox: &Sandbox) -> BTreeMap<String, String> {
    let path = config("cluster.toml").display().to_string();
    let set = "transport.url=nats://127.0.0.1:4222";
    let output = sandbox
        .run(&["manifests", &path, "--systemd", "--set", set])
        .succeeded();
    let mut units: BTreeMap<String, String> = BTreeMap::new();
    let mut file = String::new();
    for line in output.stdout.lines() {
        if let Some(name) = line
            .strip_prefix("# ")
            .filter(|name| name.ends_with(".service"))
        {
            file = name.to_owned();
        }
        let unit = units.entry(file.clone()).or_default();
        unit.push_str(line);
        unit.push('\n');
    }
    units
}

#[test]
fn units_are_valid_and_confined() {
    let Some(analyze) = tool("units_are_valid_and_confined", &["systemd-analyze"]) else {
        return;
    };
    let sandbox = Sandbox::new();
    let units = units(&sandbox);
    assert_eq!(units.len(), 3, "{:?}", units.keys());
    let installed = "/usr/local/bin/agon";
    for (file, text) in &units {
        assert!(text.contains(&format!("ExecStart={installed} ")), "{text}");
        let text = text.replace(installed, &agon_binary().display().to_string());
        let path = sandbox.write(&file.replace("@.", "@1."), text);
        let run = |arguments: &[&str], path: &Path| {
            let output = Command::new(&analyze).args(arguments).arg(path).output();
            let output = output.expect("systemd-analyze runs");
            let said = [output.stdout, output.stderr].concat();
            (
                output.status.success(),
                String::from_utf8_lossy(&said).into_owned(),
            )
        };
        let (is_valid, said) = run(&["verify", "--man=no", "--recursive-errors=no"], &path);
        assert!(is_valid, "{file}: {said}");
        // The exposure that systemd computes, from 0 (none) to 100.
        let (is_confined, said) = run(&["security", "--offline=true", "--threshold=20"], &path);
        assert!(is_confined, "{file}: {said}");
    }
}
