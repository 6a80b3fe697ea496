//! One process of a run: its command, its log, its last words.

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

/// Lines that are remembered for whoever asks why a process ended.
const LAST: usize = 5;

/// How a process is started.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    /// Its name in the run, in logs and in what is said of it.
    pub(super) name: String,
    /// The command and its arguments, for this program.
    pub(super) arguments: Vec<String>,
    /// Where its log goes.
    pub(super) log: PathBuf,
}

/// A process that was started.
pub(super) struct Child {
    process: process::Child,
    /// It ends when this is dropped.
    stdin: Option<ChildStdin>,
    ended: Option<ExitStatus>,
    last: Arc<Mutex<VecDeque<String>>>,
}

impl Child {
    /// Starts it. What it says goes to its log; all of it to standard error too when it leads, else only
    /// warnings and errors.
    pub(super) fn start(plan: &Plan, leads: bool) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("failed to find this program")?;
        let mut process = Command::new(program)
            .args(&plan.arguments)
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
            .with_context(|| format!("failed to start {}", plan.name))?;
        let last = Arc::default();
        if let Some(stderr) = process.stderr.take() {
            tokio::spawn(collect(plan.clone(), stderr, leads, Arc::clone(&last)));
        }
        tracing::debug!(name = plan.name, pid = process.id(), "started");
        Ok(Self {
            stdin: process.stdin.take(),
            process,
            ended: None,
            last,
        })
    }

    /// Its process id, while it lives.
    pub(super) fn id(&self) -> Option<u32> {
        self.process.id()
    }

    /// Waits until it has ended; may be asked again.
    pub(super) async fn ended(&mut self) -> ExitStatus {
        if let Some(status) = self.ended {
            return status;
        }
        let status = self.process.wait().await.unwrap_or_default();
        self.ended = Some(status);
        status
    }

    /// Asks it to finish what it has in hand, save and leave.
    pub(super) fn ask_to_end(&mut self) {
        self.stdin = None;
    }

    pub(super) async fn kill(&mut self) {
        if let Err(error) = self.process.kill().await {
            tracing::debug!(%error, "the process had ended already");
        }
    }

    /// What it said last.
    pub(super) fn last_words(&self) -> String {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let words = last.iter().rev().find(|line| line.starts_with("error: "));
        let words = words.or(last.back()).map(String::as_str);
        words.unwrap_or("it said nothing").to_owned()
    }
}

/// Writes what a process says into its log, remembers the last of it, and passes on what matters.
async fn collect(plan: Plan, stderr: ChildStderr, leads: bool, last: Arc<Mutex<VecDeque<String>>>) {
    let mut log = File::options()
        .create(true)
        .append(true)
        .open(&plan.log)
        .await;
    let mut lines = BufReader::new(stderr).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        if let Ok(log) = &mut log {
            // A log that cannot be written does not end a run.
            drop(log.write_all(format!("{line}\n").as_bytes()).await);
            drop(log.flush().await);
        }
        let matters =
            line.contains(" WARN ") || line.contains(" ERROR ") || line.starts_with("error: ");
        if leads {
            note!("{}", printable(&line));
        } else if matters {
            note!("{}: {}", plan.name, printable(&line));
        }
        let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.len() == LAST {
            last.pop_front();
        }
        last.push_back(line);
    }
}
