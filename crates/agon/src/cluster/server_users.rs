//! The users of a run's NATS server: one for each role, with a key and the permissions that the role needs. With them a
//! process that samples or labels can neither publish weights nor read what others receive.
//!
//! The server's configuration holds public keys only; the seeds are in files that only their owner can read.

use std::{
    fs::{self, OpenOptions},
    io::{ErrorKind, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use anyhow::Context;
use settings::Settings;
use telemetry::create_private_directory;
use transport::{NewKey, RoleAccess};

use crate::run::STREAM_NAMES;

/// Default of the server's largest message, in MiB: pairs of long completions have three values for each token.
const MAX_PAYLOAD_MIB: usize = 8;

/// A role of a run on its server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ServerRole {
    /// Leads the run and publishes weights.
    Learner,
    /// Samples completions.
    Actor,
    /// Labels pairs.
    Preference,
    /// Reads the run's status: `agon status`.
    View,
}

impl ServerRole {
    /// All roles.
    pub(crate) const ALL: [Self; 4] = [Self::Learner, Self::Actor, Self::Preference, Self::View];

    /// Name of the role.
    pub(crate) fn name(self) -> &'static str {
        self.access().role
    }

    /// Streams and entries of the role on the server.
    fn access(self) -> RoleAccess {
        match self {
            Self::Learner => RoleAccess {
                role: "learner",
                leads: true,
                receives: &["labelled pairs", "dropped prompts"],
                // Pairs from files go to the judge.
                sends: &["prompts", "pairs"],
                writes: &[],
                fetches_weights: true,
            },
            Self::Actor => RoleAccess {
                role: "actor",
                leads: false,
                receives: &["prompts"],
                sends: &["pairs", "dropped prompts.actor"],
                writes: &["heartbeat.actor.>", "corrupt", "clock"],
                fetches_weights: true,
            },
            Self::Preference => RoleAccess {
                role: "preference",
                leads: false,
                receives: &["pairs"],
                sends: &["labelled pairs", "dropped prompts.preference"],
                writes: &["heartbeat.preference.>", "corrupt", "clock"],
                fetches_weights: true,
            },
            Self::View => RoleAccess {
                role: "view",
                leads: false,
                receives: &[],
                sends: &[],
                // The server's time is read as that of an entry without content.
                writes: &["clock"],
                fetches_weights: false,
            },
        }
    }
}

/// The keys of a run, in a folder of their own.
#[derive(Debug, Clone)]
pub(crate) struct RunKeys {
    folder: PathBuf,
    users: [(ServerRole, NewKey); 4],
}

impl RunKeys {
    /// The keys in `folder`; those that it lacks are made.
    ///
    /// # Errors
    /// When a file cannot be read or written, or holds no key.
    pub(crate) fn open(folder: &Path) -> anyhow::Result<Self> {
        create_private_directory(folder)
            .with_context(|| format!("failed to make the folder {}", folder.display()))?;
        let folder = std::path::absolute(folder)
            .with_context(|| format!("failed to find the folder {}", folder.display()))?;
        let user = |role: ServerRole| {
            let key = open_key(&user_file(&folder, role), NewKey::client)?;
            anyhow::Ok((role, key))
        };
        let [learner, actor, preference, view] = ServerRole::ALL;
        let users = [user(learner)?, user(actor)?, user(preference)?, user(view)?];
        let run = open_key(&folder.join(RUN_SEED), NewKey::run)?;
        let public = folder.join(RUN_PUBLIC);
        if fs::read_to_string(&public).ok().as_deref() != Some(run.public.as_str()) {
            telemetry::write_atomically(&public, run.public.as_bytes())?;
        }
        Ok(Self { folder, users })
    }

    /// The settings with which a process of this role uses the keys, each with its file.
    pub(crate) fn settings(&self, role: ServerRole) -> [(&'static str, PathBuf); 2] {
        let run_key = match role {
            ServerRole::Learner => RUN_SEED,
            ServerRole::Actor | ServerRole::Preference | ServerRole::View => RUN_PUBLIC,
        };
        [
            ("transport.nkey_path", user_file(&self.folder, role)),
            ("transport.run_key_path", self.folder.join(run_key)),
        ]
    }

    /// The part of the server's configuration with its users, for the runs of these names.
    pub(crate) fn authorization(&self, runs: &[&str]) -> String {
        let mut text = "authorization {\n  users: [\n".to_owned();
        for (role, key) in &self.users {
            let permissions = runs
                .iter()
                .map(|run| role.access().permissions(run, &STREAM_NAMES));
            let (mut publish, mut subscribe) = (Vec::new(), Vec::new());
            for permissions in permissions {
                publish.extend(permissions.publish);
                subscribe.extend(permissions.subscribe);
            }
            text += &format!(
                "    {{ # {}\n      nkey: {}\n      permissions: {{\n        publish: {{ allow: {} }}\n        \
                 subscribe: {{ allow: {} }}\n      }}\n    }}\n",
                role.name(),
                key.public,
                list(&publish),
                list(&subscribe),
            );
        }
        text + "  ]\n}\n"
    }
}

/// The server's configuration without its users: its address, its largest message and the folder of its storage.
pub(crate) fn server_config(address: &str, max_payload_mib: usize, store: &Path) -> String {
    let store = store.display().to_string();
    format!(
        "listen: {address:?}\nmax_payload: {max_payload_mib}MB\njetstream {{ store_dir: {store:?} }}\n"
    )
}

/// File with the seed of a run's key.
const RUN_SEED: &str = "run.key";

/// File with the public half of a run's key.
const RUN_PUBLIC: &str = "run.pub";

/// File with the seed of a role's key.
fn user_file(folder: &Path, role: ServerRole) -> PathBuf {
    folder.join(format!("{}.nk", role.name()))
}

/// The key whose seed is in the file at `path`, which is made if it does not exist.
fn open_key(
    path: &Path,
    make: fn() -> Result<NewKey, transport::TransportError>,
) -> anyhow::Result<NewKey> {
    let failed = || format!("failed to write the key {}", path.display());
    let created = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path);
    match created {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(NewKey::read(path)?),
        Err(error) => Err(error).with_context(failed),
        Ok(mut file) => {
            let key = make()?;
            file.write_all(key.seed.as_bytes()).with_context(failed)?;
            file.sync_all().with_context(failed)?;
            Ok(key)
        }
    }
}

/// A list of subjects in the server's configuration, one a line.
fn list(subjects: &[String]) -> String {
    let lines: Vec<String> = subjects
        .iter()
        .map(|subject| format!("          {subject:?}\n"))
        .collect();
    format!("[\n{}        ]", lines.concat())
}

/// Bytes that a message of this run is certain to have if completions reach their largest length: of each token its id,
/// three log-probabilities and some text.
pub(crate) fn message_bytes(settings: &Settings) -> usize {
    /// Bytes of a token in a pair.
    const TOKEN: usize = 17;
    /// Bytes of everything else.
    const REST: usize = 4 << 10;
    let apo = &settings.preference.apo;
    let completions = match apo.refresh_steps {
        0 => 2,
        _ => apo.samples.max(2),
    };
    completions
        .saturating_mul(settings.actor.max_new_tokens)
        .saturating_mul(TOKEN)
        .saturating_add(REST)
}

/// Largest message that a server for this run should take, in MiB.
pub(crate) fn max_payload_mib(settings: &Settings) -> usize {
    let needed = message_bytes(settings).saturating_mul(2).div_ceil(1 << 20);
    needed.max(MAX_PAYLOAD_MIB)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn keys_are_made_once_readable_by_their_owner_and_not_in_the_servers_configuration() {
        let directory = tempfile::tempdir().expect("a folder");
        let folder = directory.path().join("keys");
        let keys = RunKeys::open(&folder).expect("keys");
        let text = keys.authorization(&["one"]);
        let again = RunKeys::open(&folder).expect("the same keys");
        assert_eq!(text, again.authorization(&["one"]));
        let mode =
            |path: &Path| fs::metadata(path).expect("it exists").permissions().mode() & 0o777;
        assert_eq!(mode(&folder), 0o700);
        let mut seeds = 0;
        for entry in fs::read_dir(&folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            assert_eq!(mode(&path), 0o600, "{}", path.display());
            let content = fs::read_to_string(&path).expect("text");
            if content.starts_with('S') {
                seeds += 1;
                assert!(!text.contains(&content), "{}", path.display());
            }
        }
        assert_eq!(seeds, 5);
    }

    #[test]
    fn a_torn_key_is_an_error_that_names_its_file() {
        let directory = tempfile::tempdir().expect("a folder");
        fs::write(directory.path().join("actor.nk"), "SU").expect("a file");
        let error = RunKeys::open(directory.path()).expect_err("no key");
        assert!(error.to_string().contains("actor.nk"), "{error}");
    }
}
