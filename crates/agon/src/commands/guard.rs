//! `agon guard`: ends the server of a run whose launcher is gone. Not for people: `agon train` starts it.
//!
//! A server of others cannot be told to end with its launcher. So this process is told, by its standard input: each
//! line names the processes that still need the server, and one without any says that the server has ended by itself.
//! When the input ends, so has the launcher. The others then leave of themselves; with the last of them goes the
//! server.

use std::{
    io,
    process::ExitCode,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

/// How long the others may take to leave.
const GRACE: Duration = Duration::from_secs(90);
/// Between two looks at who is left.
const LOOK: Duration = Duration::from_millis(200);

/// End a process once whoever started this one is gone, and all whom its standard input named last.
#[derive(clap::Args)]
#[command(hide = true)]
pub(crate) struct Arguments {
    /// The process to end.
    server: i32,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let mut others = Vec::new();
    for line in io::stdin().lines() {
        let line = line.context("failed to watch standard input")?;
        if line.is_empty() {
            return Ok(ExitCode::SUCCESS);
        }
        others = line.split(' ').filter_map(process).collect();
    }
    let gone = Instant::now();
    while gone.elapsed() < GRACE && others.iter().any(|other| test_kill_process(*other).is_ok()) {
        sleep(LOOK);
    }
    if let Some(server) = Pid::from_raw(arguments.server) {
        // One that has ended meanwhile is as good.
        kill_process(server, Signal::KILL).ok();
    }
    Ok(ExitCode::SUCCESS)
}

fn process(text: &str) -> Option<Pid> {
    Pid::from_raw(text.parse().ok()?)
}
