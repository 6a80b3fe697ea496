//! The watchdog process, which stops a run's NATS server if the launcher is killed.

use std::process::Stdio;

use anyhow::Context;
use tokio::{
    io::AsyncWriteExt,
    process::{Child, ChildStdin, Command},
};

/// A process `agon nats-watchdog` for one server process. It detects the launcher's end by the end of its standard
/// input.
pub(crate) struct NatsWatchdog {
    stdin: Option<ChildStdin>,
    last_line: String,
    _process: Child,
}

impl NatsWatchdog {
    /// Starts one for the server with this process id.
    pub(crate) fn start(server: u32) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("failed to find this program")?;
        let mut process = Command::new(program)
            .args(["nats-watchdog", &server.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .context("failed to start the watchdog of the NATS server")?;
        Ok(Self {
            stdin: process.stdin.take(),
            last_line: String::new(),
            _process: process,
        })
    }

    /// Sets the processes that need the server.
    pub(crate) async fn set_users(&mut self, processes: &[u32]) {
        // An empty line ends the watchdog.
        if !processes.is_empty() {
            let ids: Vec<String> = processes.iter().map(u32::to_string).collect();
            self.send(format!("{}\n", ids.join(" "))).await;
        }
    }

    /// Ends the watchdog, since the server has ended.
    pub(crate) async fn dismiss(mut self) {
        self.send("\n".into()).await;
    }

    async fn send(&mut self, line: String) {
        if line == self.last_line {
            return;
        }
        if let Some(stdin) = &mut self.stdin
            && let Err(error) = stdin.write_all(line.as_bytes()).await
        {
            tracing::warn!(%error, "the watchdog of the NATS server has ended; if this process is killed, the server keeps running");
            self.stdin = None;
        }
        self.last_line = line;
    }
}
