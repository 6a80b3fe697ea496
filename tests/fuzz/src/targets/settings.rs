//! Configurations: the files of `configs/`.

use std::{fs, path::Path};

use settings::{Override, resolve};
use system_tests::workspace_root;

use crate::targets::{Input, Outcome};

/// What a configuration may hold.
const FRAGMENTS: [&str; 14] = [
    "\n[",
    "\n[[",
    "]\n",
    " = ",
    "\"",
    "'''",
    "{ kind = \"http\" }",
    "nan",
    "inf",
    "-0",
    "1979-05-27T07:32:00Z",
    "\nkind = \"jetstream\"\n",
    ".a.a",
    "[[[[",
];

/// The name of every mutant.
const ORIGIN: &str = "mutant.toml";

pub(super) fn prepare(_: &Path) -> Input {
    let folder = workspace_root().join("configs");
    let files = fs::read_dir(&folder).expect("the project has configurations");
    let mut files: Vec<_> = files
        .map(|file| file.expect("a directory entry").path())
        .collect();
    files.retain(|file| {
        file.extension()
            .is_some_and(|extension| extension == "toml")
    });
    files.sort();
    let read = |file: &std::path::PathBuf| fs::read_to_string(file).expect("a readable file");
    let valid: Vec<String> = files.iter().map(read).collect();
    Box::new(move |mutator| {
        let text = mutator.pick(&valid);
        if mutator.below(4) == 0 {
            let text = mutator.text("learner.steps=100", &FRAGMENTS);
            return Outcome::of(text.parse::<Override>(), &["--set", "KEY=VALUE"]);
        }
        let text = mutator.text(text, &FRAGMENTS);
        let resolved = match resolve(&text, ORIGIN, &[]) {
            Ok(resolved) => resolved,
            refused => return Outcome::of(refused, &[ORIGIN]),
        };
        match resolve(&resolved.toml, ORIGIN, &[]) {
            Ok(again) if again == resolved => Outcome::Accepted,
            Ok(_) => Outcome::Violation("what was resolved resolves to something else".into()),
            Err(error) => Outcome::Violation(format!("what was resolved is refused: {error}")),
        }
    })
}
