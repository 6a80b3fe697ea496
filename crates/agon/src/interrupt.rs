//! SIGTERM, SIGINT and SIGHUP as one watch that everything long looks at.

use anyhow::Context;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

/// How many signals end the process at once, whatever it is doing.
const IMPATIENT: usize = 2;

/// A watch that turns true at the first SIGTERM, SIGINT or SIGHUP; the second ends the process. Under nohup a
/// SIGHUP means nothing.
///
/// # Errors
/// When the system refuses to tell of signals.
pub(crate) fn on_signal() -> anyhow::Result<watch::Sender<bool>> {
    let mut term = signal(SignalKind::terminate()).context("failed to listen for SIGTERM")?;
    let mut int = signal(SignalKind::interrupt()).context("failed to listen for SIGINT")?;
    let nohup = ignores_hangup();
    let mut hangup = signal(SignalKind::hangup()).context("failed to listen for SIGHUP")?;
    let sender = watch::Sender::new(false);
    let told = sender.clone();
    tokio::spawn(async move {
        for count in 1.. {
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
                _ = hangup.recv(), if !nohup => {}
            }
            if count >= IMPATIENT {
                note!("interrupted twice: leaving without saving");
                std::process::exit(130);
            }
            told.send_replace(true);
            note!("stopping: finishing what is in flight; once more to leave at once");
        }
    });
    Ok(sender)
}

/// Whether this process was started to outlive its terminal: SIGHUP, signal 1, is ignored.
fn ignores_hangup() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask & 1 == 1)
}

/// As [`on_signal`]; and where `with_stdin` says so, standard input's end counts as a signal: whoever started
/// this process is gone, or asks it to end.
///
/// # Errors
/// As [`on_signal`].
pub(crate) fn on_signal_or_end(with_stdin: bool) -> anyhow::Result<watch::Sender<bool>> {
    let sender = on_signal()?;
    if with_stdin {
        let told = sender.clone();
        // A thread of its own: the runtime would wait at its end for a read that may never return.
        std::thread::Builder::new()
            .name("stdin".into())
            .spawn(move || {
                drop(std::io::copy(&mut std::io::stdin(), &mut std::io::sink()));
                told.send_replace(true);
            })
            .context("failed to watch standard input")?;
    }
    Ok(sender)
}
