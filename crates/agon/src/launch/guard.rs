//! The process that ends a run's NATS server when the launcher dies and cannot do it.

use std::process::Stdio;

use anyhow::Context;
use tokio::{
    io::AsyncWriteExt,
    process::{Child, ChildStdin, Command},
};

/// `agon guard` over one process of a server. It reads the end of this process from the end of its standard input.
pub(super) struct Guard {
    tell: Option<ChildStdin>,
    told: String,
    _process: Child,
}

impl Guard {
    /// Starts one over the server with this process id.
    pub(super) fn start(server: u32) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("failed to find this program")?;
        let mut process = Command::new(program)
            .args(["guard", &server.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .context("failed to start the guard of the NATS server")?;
        Ok(Self {
            tell: process.stdin.take(),
            told: String::new(),
            _process: process,
        })
    }

    /// Says which processes need the server.
    pub(super) async fn needed_by(&mut self, processes: &[u32]) {
        // An empty line would dismiss it.
        if !processes.is_empty() {
            let ids: Vec<String> = processes.iter().map(u32::to_string).collect();
            self.tell(format!("{}\n", ids.join(" "))).await;
        }
    }

    /// Says that the server has ended: there is nothing to guard.
    pub(super) async fn dismiss(mut self) {
        self.tell("\n".into()).await;
    }

    async fn tell(&mut self, line: String) {
        if line == self.told {
            return;
        }
        if let Some(tell) = &mut self.tell
            && let Err(error) = tell.write_all(line.as_bytes()).await
        {
            tracing::warn!(%error, "the guard of the NATS server is gone: should this process be killed, the server stays");
            self.tell = None;
        }
        self.told = line;
    }
}
