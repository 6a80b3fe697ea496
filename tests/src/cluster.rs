//! Helpers for multi-process runs: the NATS server, the status of a run, signals.

use std::{path::Path, process::Command};

use serde_json::Value;

use crate::{Sandbox, wait_until};

/// Whether `nats-server` is installed. If not, logs that the test is skipped.
///
/// # Panics
/// If it is not installed and `CI` is set.
pub fn has_nats_server() -> bool {
    let is_installed = Command::new("nats-server")
        .arg("--version")
        .output()
        .is_ok();
    assert!(
        is_installed || std::env::var_os("CI").is_none(),
        "nats-server is missing: apt install nats-server"
    );
    if !is_installed {
        eprintln!("SKIPPED: nats-server is missing: apt install nats-server");
    }
    is_installed
}

/// Waits for `agon status --json` of a run to succeed and returns its output.
pub fn status(sandbox: &Sandbox, run: &Path) -> Value {
    wait_until("the status of a run", || status_now(sandbox, run))
}

/// Output of `agon status --json` of a run, or `None` while it has no status.
pub fn status_now(sandbox: &Sandbox, run: &Path) -> Option<Value> {
    if !run.join("config.toml").exists() {
        return None;
    }
    let output = sandbox.run(&["status", &run.to_string_lossy(), "--json"]);
    (output.code == Some(0)).then(|| serde_json::from_str(&output.stdout).expect("one document"))
}

/// Names and process ids of the participants of a role that are present, sorted by name.
pub fn present(status: &Value, role: &str) -> Vec<(String, u32)> {
    let participants = status["processes"].as_array().expect("a list");
    let mut found: Vec<_> = participants
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

/// Sends a signal, such as "KILL", to a process; ignored if the process has exited.
///
/// # Panics
/// If there is no shell.
pub fn signal(pid: u32, name: &str) {
    let command = format!("kill -{name} {pid}");
    let sent = Command::new("sh").args(["-c", &command]).output();
    sent.expect("a shell");
}
