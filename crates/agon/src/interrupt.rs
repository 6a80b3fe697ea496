//! SIGTERM and SIGINT as one watch that everything long looks at.

use anyhow::Context;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

/// How many signals end the process at once, whatever it is doing.
const IMPATIENT: usize = 2;

/// A watch that turns true at the first SIGTERM or SIGINT. The second ends the process.
///
/// # Errors
/// When the system refuses to tell of signals.
pub(crate) fn on_signal() -> anyhow::Result<watch::Sender<bool>> {
    let mut term = signal(SignalKind::terminate()).context("failed to listen for SIGTERM")?;
    let mut int = signal(SignalKind::interrupt()).context("failed to listen for SIGINT")?;
    let sender = watch::Sender::new(false);
    let told = sender.clone();
    tokio::spawn(async move {
        for count in 1.. {
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
            }
            if count >= IMPATIENT {
                eprintln!("interrupted twice: leaving without saving");
                std::process::exit(130);
            }
            eprintln!("stopping: finishing what is in hand; once more to leave at once");
            told.send_replace(true);
        }
    });
    Ok(sender)
}
