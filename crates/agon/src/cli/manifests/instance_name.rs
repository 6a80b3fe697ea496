//! Names of a run's resources in Kubernetes: valid, short, and distinct for distinct runs.

use messages::Digest;

/// Prefix of every name.
const PREFIX: &str = "agon-";

/// Maximum length of an instance's name: a pod's name is this one with a role (`-preference`) and the suffix of its
/// Deployment (17 characters), and must fit a host name's 63.
const MAX_LENGTH: usize = 63 - "-preference".len() - 17;

/// Hexadecimal digits of the digest in a name.
const DIGEST_LENGTH: usize = 8;

/// Name of a run's resources, as RFC 1123 has labels: lower-case letters, digits and `-`.
///
/// A run's name that is such a name and short is kept. Of every other the valid part is followed by a digest of the
/// whole, so that `my_run`, `my-run` and `My-Run` stay distinct.
pub(super) fn instance_name(run: &str) -> String {
    let valid: String = run
        .to_ascii_lowercase()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect();
    let valid = valid.trim_matches('-');
    let is_kept = valid == run
        && !valid.is_empty()
        && PREFIX.len() + valid.len() <= MAX_LENGTH
        && !ends_like_a_digest(valid);
    if is_kept {
        return format!("{PREFIX}{valid}");
    }
    let room = MAX_LENGTH - PREFIX.len() - 1 - DIGEST_LENGTH;
    let stem: String = valid.chars().take(room).collect();
    let digest = Digest::of(run.as_bytes()).to_string();
    let parts = [
        PREFIX.trim_end_matches('-'),
        stem.trim_end_matches('-'),
        &digest[..DIGEST_LENGTH],
    ];
    let parts: Vec<&str> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    parts.join("-")
}

/// Whether a name could be that of another run with its digest.
fn ends_like_a_digest(name: &str) -> bool {
    let last = name.rsplit('-').next().unwrap_or_default();
    last.len() == DIGEST_LENGTH && last.chars().all(|c| c.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn valid_short_names_are_kept() {
        assert_eq!(instance_name("quickstart"), "agon-quickstart");
        assert_eq!(instance_name("run-7"), "agon-run-7");
    }

    #[test]
    fn names_are_labels_of_rfc_1123_and_distinct() {
        let long = "x".repeat(200);
        let longer = format!("{long}y");
        let names = [
            "my_run",
            "my-run",
            "My-Run",
            "my-run-",
            "-my-run",
            "_my_run",
            "-",
            "_",
            "--",
            "a",
            "A",
            "0",
            &long,
            &longer,
            "deadbeef",
            "run-deadbeef",
            "a--b",
            "a_-b",
            "preference",
            "actor",
        ];
        let mut seen = BTreeSet::new();
        for name in names {
            let instance = instance_name(name);
            let is_allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            assert!(instance.chars().all(is_allowed), "{name:?}: {instance}");
            assert!(
                !instance.ends_with('-') && instance.starts_with("agon"),
                "{name:?}: {instance}"
            );
            assert!(instance.len() <= MAX_LENGTH, "{name:?}: {instance}");
            assert!(
                seen.insert(instance.clone()),
                "{instance} stands for two runs"
            );
        }
        // A name that looks as if it had a digest already is not that of the run whose digest it is.
        let mine = instance_name("my_run");
        assert_ne!(instance_name(mine.trim_start_matches("agon-")), mine);
    }
}
