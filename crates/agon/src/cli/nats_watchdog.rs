//! `agon nats-watchdog`: ends a run's NATS server when its launcher has died. Internal: `agon train` starts it.
//!
//! A NATS server does not end with its parent process. This process detects the launcher's death by the end of its
//! standard input. Each line of the input lists the ids of the processes that still need the server; an empty line
//! means that the server has ended by itself. At the end of the input, the processes listed last have time to exit,
//! then the server is killed.

use std::{
    io,
    process::ExitCode,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

use crate::cluster::launch::PROCESS_EXIT_GRACE;

/// Interval between two checks of the other processes.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// Kill a NATS server once standard input has ended and the processes it listed have exited.
#[derive(clap::Args)]
#[command(hide = true)]
pub(crate) struct Arguments {
    /// Process id of the server.
    server: i32,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let mut others = Vec::new();
    for line in io::stdin().lines() {
        let line = line.context("failed to watch standard input")?;
        if line.is_empty() {
            return Ok(ExitCode::SUCCESS);
        }
        others = line.split(' ').filter_map(process_id).collect();
    }
    let started = Instant::now();
    let is_alive = |process: &Pid| test_kill_process(*process).is_ok();
    while started.elapsed() < PROCESS_EXIT_GRACE && others.iter().any(is_alive) {
        sleep(POLL_INTERVAL);
    }
    if let Some(server) = Pid::from_raw(arguments.server) {
        // It may have ended meanwhile.
        kill_process(server, Signal::KILL).ok();
    }
    Ok(ExitCode::SUCCESS)
}

fn process_id(text: &str) -> Option<Pid> {
    Pid::from_raw(text.parse().ok()?)
}
