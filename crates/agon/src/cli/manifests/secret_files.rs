//! Files with secrets that a configuration names: keys, tokens, credentials, certificates.
//!
//! In Kubernetes they are mounted from a Secret a role; no manifest holds their content.

use anyhow::Context;
use toml::{Table, Value};

/// Folder of the mounted files.
pub(super) const MOUNT: &str = "/run/secrets/agon";

/// Endings of the keys that name such files.
const ENDINGS: [&str; 8] = [
    "password_path",
    "token_path",
    "nkey_path",
    "credentials_path",
    "certificate_path",
    "ca_path",
    "api_key_path",
    "key_path",
];

/// Token of the exporter and the page, which every process in a cluster needs: they listen on all addresses.
const LISTENER_TOKEN: [&str; 2] = ["telemetry", "token_path"];

/// A file with a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SecretFile {
    /// Key of the file in the configuration without `_path`, which is also its name in the Secret: `transport.credentials`.
    pub(super) name: String,
    /// Path of the file on the machine where the configuration was written; empty if the configuration names none.
    pub(super) local: String,
}

impl SecretFile {
    /// Whether a process of this role reads the file: the server's and the listeners' all of them, the judges' the
    /// preference services.
    pub(super) fn is_read_by(&self, role: &str) -> bool {
        let is_judges = ["preference.", "evaluation."];
        let is_judges = is_judges
            .iter()
            .any(|section| self.name.starts_with(section));
        !is_judges || role == "preference"
    }
}

/// A configuration whose files with secrets are the mounted ones.
#[derive(Debug)]
pub(super) struct MountedConfiguration {
    /// The configuration as TOML.
    pub(super) toml: String,
    /// The files, in the order of their keys.
    pub(super) files: Vec<SecretFile>,
}

impl MountedConfiguration {
    /// Replaces the paths of all files with secrets in a resolved configuration by those at which they are mounted.
    ///
    /// # Errors
    /// When the configuration is not TOML.
    pub(super) fn new(resolved: &str) -> anyhow::Result<Self> {
        let table: Table = resolved
            .parse()
            .context("failed to read the resolved configuration")?;
        let mut root = Value::Table(table);
        let mut files = Vec::new();
        mount(&mut root, "", &mut files);
        files.sort_by(|a, b| a.name.cmp(&b.name));
        let toml = toml::to_string(&root).context("failed to write the configuration")?;
        Ok(Self { toml, files })
    }
}

/// Replaces the paths below `value`, whose key is `key`.
fn mount(value: &mut Value, key: &str, files: &mut Vec<SecretFile>) {
    let below = |name: &str| match key {
        "" => name.to_owned(),
        _ => format!("{key}.{name}"),
    };
    match value {
        Value::Table(table) => {
            for (name, value) in table.iter_mut() {
                mount(value, &below(name), files);
            }
        }
        Value::String(path)
            if names_a_secret(key) && (!path.is_empty() || key == LISTENER_TOKEN.join(".")) =>
        {
            let name = key.trim_end_matches("_path").to_owned();
            let mounted = format!("{MOUNT}/{name}");
            let local = std::mem::replace(path, mounted);
            files.push(SecretFile { name, local });
        }
        _ => {}
    }
}

fn names_a_secret(key: &str) -> bool {
    let last = key.rsplit('.').next().unwrap_or_default();
    ENDINGS.iter().any(|ending| last.ends_with(ending))
}

#[cfg(test)]
mod tests {
    use settings::resolve;

    use super::*;

    #[test]
    fn every_path_of_a_secret_is_mounted() {
        let text = "[transport]\nkind = \"jetstream\"\nurl = \"nats://n:4222\"\ncredentials_path = \"a.creds\"\n\
                    ca_path = \"/etc/ca.pem\"\n[preference.judge]\nkind = \"http\"\nurls = [\"http://j/v1\"]\n\
                    model = \"m\"\napi_key_path = \"k\"\n[model]\npath = \"folder\"\n";
        let resolved = resolve(text, "test", &[]).expect("they are valid");
        let mounted = MountedConfiguration::new(&resolved.toml).expect("TOML");
        let names: Vec<&str> = mounted
            .files
            .iter()
            .map(|file| file.name.as_str())
            .collect();
        let expected = [
            "preference.judge.api_key",
            "telemetry.token",
            "transport.ca",
            "transport.credentials",
        ];
        assert_eq!(names, expected);
        assert_eq!(mounted.files[3].local, "a.creds");
        assert!(!mounted.files[0].is_read_by("actor") && mounted.files[0].is_read_by("preference"));
        let again = resolve(&mounted.toml, "the mounted one", &[]).expect("they are valid");
        assert!(
            again
                .toml
                .contains("/run/secrets/agon/transport.credentials"),
            "{}",
            again.toml
        );
        assert!(again.toml.contains("path = \"folder\""), "{}", again.toml);
        assert!(!again.toml.contains("a.creds"), "{}", again.toml);
    }
}
