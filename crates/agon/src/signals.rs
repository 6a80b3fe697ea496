//! SIGTERM, SIGINT and SIGHUP as one shutdown watch.

use anyhow::Context;
use hub::CancelToken;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

/// Number of signals after which the process exits at once, without saving.
const FORCE_EXIT_SIGNALS: usize = 2;

/// A shutdown watch that turns true at the first SIGTERM, SIGINT or SIGHUP; the second signal exits the process
/// with code 130. Under nohup SIGHUP is ignored.
///
/// # Errors
/// When a signal handler cannot be installed.
pub(crate) fn on_signal() -> anyhow::Result<watch::Sender<bool>> {
    let mut term = signal(SignalKind::terminate()).context("failed to listen for SIGTERM")?;
    let mut int = signal(SignalKind::interrupt()).context("failed to listen for SIGINT")?;
    let nohup = ignores_hangup();
    let mut hangup = signal(SignalKind::hangup()).context("failed to listen for SIGHUP")?;
    let sender = watch::Sender::new(false);
    let shutdown = sender.clone();
    tokio::spawn(async move {
        for count in 1.. {
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
                _ = hangup.recv(), if !nohup => {}
            }
            if count >= FORCE_EXIT_SIGNALS {
                note!("interrupted twice: leaving without saving");
                std::process::exit(130);
            }
            shutdown.send_replace(true);
            note!("stopping: finishing what is in flight; once more to leave at once");
        }
    });
    Ok(sender)
}

/// A token for blocking work that is cancelled while `shutdown` is true.
pub(crate) fn cancel_token(shutdown: &watch::Sender<bool>) -> CancelToken {
    let shutdown = shutdown.subscribe();
    CancelToken::new(move || *shutdown.borrow())
}

/// Whether SIGHUP (signal 1) is ignored, as under nohup.
fn ignores_hangup() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask & 1 == 1)
}

/// As [`on_signal`]; with `with_stdin`, the end of standard input also requests shutdown, so that a child ends
/// with its parent process.
///
/// # Errors
/// As [`on_signal`].
pub(crate) fn on_signal_or_end(with_stdin: bool) -> anyhow::Result<watch::Sender<bool>> {
    let sender = on_signal()?;
    if with_stdin {
        let shutdown = sender.clone();
        // A separate thread: the runtime's shutdown would wait for a blocking read that may never return.
        std::thread::Builder::new()
            .name("stdin".into())
            .spawn(move || {
                drop(std::io::copy(&mut std::io::stdin(), &mut std::io::sink()));
                shutdown.send_replace(true);
            })
            .context("failed to watch standard input")?;
    }
    Ok(sender)
}
