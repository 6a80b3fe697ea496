//! Runs of many processes: the server they meet on, who takes part, and what befalls them.

use std::{path::Path, process::Command};

use serde_json::Value;

use crate::{Workplace, wait_until};

/// Whether there is a NATS server here. Where there is none that is told, and in continuous integration an
/// error.
///
/// # Panics
/// In continuous integration, when there is none.
pub fn has_nats_server() -> bool {
    let here = Command::new("nats-server")
        .arg("--version")
        .output()
        .is_ok();
    assert!(
        here || std::env::var_os("CI").is_none(),
        "nats-server is missing: apt install nats-server"
    );
    if !here {
        eprintln!("SKIPPED: nats-server is missing: apt install nats-server");
    }
    here
}

/// What `agon status` says of the run in this directory, once it says anything.
pub fn status(workplace: &Workplace, run: &Path) -> Value {
    wait_until("a run with a status", || status_now(workplace, run))
}

/// What `agon status` says of the run in this directory; `None` while there is nothing to say.
pub fn status_now(workplace: &Workplace, run: &Path) -> Option<Value> {
    if !run.join("config.toml").exists() {
        return None;
    }
    let ended = workplace.run(&["status", &run.to_string_lossy(), "--json"]);
    (ended.code == Some(0)).then(|| serde_json::from_str(&ended.out).expect("one document"))
}

/// The process ids of those of a role who are present, by their names.
pub fn present(status: &Value, role: &str) -> Vec<(String, u32)> {
    let all = status["present"].as_array().expect("a list");
    let mut found: Vec<_> = all
        .iter()
        .filter(|one| one["role"] == role && one["state"] == "present")
        .map(|one| {
            let name = one["name"].as_str().expect("a name").to_owned();
            let pid = one["pid"].as_u64().expect("a number");
            (name, u32::try_from(pid).expect("a process id"))
        })
        .collect();
    found.sort();
    found
}

/// Sends a signal, as in "KILL", to a process that may be gone already.
///
/// # Panics
/// When there is no shell.
pub fn signal(pid: u32, name: &str) {
    let command = format!("kill -{name} {pid}");
    let sent = Command::new("sh").args(["-c", &command]).output();
    sent.expect("a shell");
}
