//! A child process of the launcher: command, log and last lines of output.

use std::{
    collections::VecDeque,
    path::PathBuf,
    process::{ExitStatus, Stdio},
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::Context;
use telemetry::printable;
use tokio::{
    fs::File,
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    process::{self, ChildStderr, ChildStdin, Command},
};

/// Number of output lines kept to explain why a process ended.
const KEPT_LINES: usize = 5;

/// Command line of a child process.
#[derive(Debug, Clone)]
pub(crate) struct ChildCommand {
    /// Name in the run and in logs.
    pub(crate) name: String,
    /// Subcommand of this program and its arguments.
    pub(crate) arguments: Vec<String>,
    /// Log file.
    pub(crate) log: PathBuf,
}

/// A running child process.
pub(crate) struct ChildProcess {
    process: process::Child,
    /// Closing it asks the process to end.
    stdin: Option<ChildStdin>,
    status: Option<ExitStatus>,
    last_lines: Arc<Mutex<VecDeque<String>>>,
}

impl ChildProcess {
    /// Starts it. Its standard error goes to its log and, entirely for the leader, else only warnings and errors, to
    /// this process's standard error.
    pub(crate) fn start(command: &ChildCommand, leads: bool) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("failed to find this program")?;
        let mut process = Command::new(program)
            .args(&command.arguments)
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .stdout(if leads {
                Stdio::inherit()
            } else {
                Stdio::null()
            })
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("failed to start {}", command.name))?;
        let last_lines = Arc::default();
        if let Some(stderr) = process.stderr.take() {
            tokio::spawn(copy_output(
                command.clone(),
                stderr,
                leads,
                Arc::clone(&last_lines),
            ));
        }
        tracing::debug!(name = command.name, pid = process.id(), "started");
        Ok(Self {
            stdin: process.stdin.take(),
            process,
            status: None,
            last_lines,
        })
    }

    /// Process id while it runs.
    pub(crate) fn id(&self) -> Option<u32> {
        self.process.id()
    }

    /// Waits for its exit status; can be called again.
    pub(crate) async fn wait(&mut self) -> ExitStatus {
        if let Some(status) = self.status {
            return status;
        }
        let status = self.process.wait().await.unwrap_or_default();
        self.status = Some(status);
        status
    }

    /// Requests an orderly shutdown by closing its standard input.
    pub(crate) fn request_shutdown(&mut self) {
        self.stdin = None;
    }

    /// Kills it.
    pub(crate) async fn kill(&mut self) {
        if let Err(error) = self.process.kill().await {
            tracing::debug!(%error, "the process had ended already");
        }
    }

    /// Last error message of the process, or else its last line of output.
    pub(crate) fn last_message(&self) -> String {
        let last = self
            .last_lines
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let message = last.iter().rev().find(|line| line.starts_with("error: "));
        let message = message.or(last.back()).map(String::as_str);
        message.unwrap_or("no output").to_owned()
    }
}

/// Copies the standard error of a process to its log, keeps the last lines, and forwards warnings and errors.
async fn copy_output(
    command: ChildCommand,
    stderr: ChildStderr,
    leads: bool,
    last: Arc<Mutex<VecDeque<String>>>,
) {
    let mut log = File::options()
        .create(true)
        .append(true)
        .open(&command.log)
        .await;
    let mut lines = BufReader::new(stderr).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        if let Ok(log) = &mut log {
            // An unwritable log does not end a run.
            drop(log.write_all(format!("{line}\n").as_bytes()).await);
            drop(log.flush().await);
        }
        let is_problem =
            line.contains(" WARN ") || line.contains(" ERROR ") || line.starts_with("error: ");
        if leads {
            note!("{}", printable(&line));
        } else if is_problem {
            note!("{}: {}", command.name, printable(&line));
        }
        let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.len() == KEPT_LINES {
            last.pop_front();
        }
        last.push_back(line);
    }
}
