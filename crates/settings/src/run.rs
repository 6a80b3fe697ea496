//! `[run]`: name, output directory and seed.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::checks::Checks;

/// Maximum length of a run's name in bytes: a file name with a prefix and a suffix, as in the name of a systemd unit,
/// has 255.
const MAX_NAME_BYTES: usize = 200;

/// Identity of the run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunSettings {
    /// Name of the run directory, and of the run on a shared NATS server.
    pub name: String,
    /// Parent of run directories.
    pub output_dir: PathBuf,
    /// Seed from which all random streams of the run derive.
    pub seed: u64,
}

impl RunSettings {
    /// Checks that the name is a single path component, so that the run directory is inside `run.output_dir`.
    pub(crate) fn check_folder_name(&self, checks: &mut Checks) {
        let name = self.name.as_str();
        let is_forbidden = |c: char| c == '/' || c == '\\' || c.is_control();
        let is_component = !name.trim().is_empty() && ![".", ".."].contains(&name);
        checks.require(
            is_component && !name.contains(is_forbidden),
            "run.name",
            format!(
                "{name:?} must be the name of one folder in run.output_dir, without / and \\ and control characters: \
                 set run.output_dir to choose its parent"
            ),
        );
        self.check_name_length(checks);
    }

    fn check_name_length(&self, checks: &mut Checks) {
        let bytes = self.name.len();
        checks.require(
            bytes <= MAX_NAME_BYTES,
            "run.name",
            format!(
                "{bytes} bytes are too long for the name of a folder: use at most {MAX_NAME_BYTES}"
            ),
        );
    }

    /// Checks that the name is valid in NATS subjects and bucket names.
    pub(crate) fn check_nats_name(&self, checks: &mut Checks) {
        let name = self.name.as_str();
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        checks.require(
            !name.is_empty() && name.chars().all(is_allowed),
            "run.name",
            format!(
                "{name:?} must consist of letters, digits, - and _: it is part of the names of streams on the server"
            ),
        );
        self.check_name_length(checks);
    }
}

#[cfg(test)]
mod tests {
    use crate::checks::tests::problems;

    #[test]
    fn a_run_name_fits_a_file_name() {
        for transport in ["memory", "jetstream"] {
            let of = |length: usize| {
                let name = "x".repeat(length);
                problems(&format!(
                    "[run]\nname = {name:?}\n[transport]\nkind = {transport:?}"
                ))
            };
            assert_eq!(of(200), Vec::<String>::new(), "{transport}");
            let expected =
                "run.name: 201 bytes are too long for the name of a folder: use at most 200";
            assert_eq!(of(201), [expected], "{transport}");
        }
    }

    #[test]
    fn a_run_name_is_a_single_path_component() {
        for name in [
            "", " ", ".", "..", "a/b", "../a", "/a", "a\\b", "a\tb", "a\nb",
        ] {
            let problems = problems(&format!("[run]\nname = {name:?}"));
            assert!(problems[0].contains("run.name: "), "{name:?}: {problems:?}");
        }
        for name in ["trial-7", "a.b", "Lauf 3", "…"] {
            let problems = problems(&format!("[run]\nname = {name:?}"));
            assert_eq!(problems, Vec::<String>::new(), "{name:?}");
        }
    }
}
