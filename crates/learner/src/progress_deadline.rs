//! The deadline of a wait for progress.

use std::{pin::pin, time::Duration};

use messages::wire::WireMessage;
use tokio::time::{Instant, timeout_at};
use transport::Sender;

use crate::error::LearnerError;

/// Deadline of a wait for progress, not counting server outages: an outage extends it by its length and does not restart
/// it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ProgressDeadline {
    started: Instant,
    /// Total time for which the server had been unreachable by then.
    outage: Duration,
}

impl ProgressDeadline {
    /// A wait that begins now, `outage` being the total time for which the server has been unreachable so far.
    pub(crate) fn start(outage: Duration) -> Self {
        let started = Instant::now();
        Self { started, outage }
    }

    /// Time at which the wait has lasted `allowed`, `outage` being the total time for which the server has been unreachable by now.
    pub(crate) fn after(&self, allowed: Duration, outage: Duration) -> Instant {
        self.started + allowed + outage.saturating_sub(self.outage)
    }
}

/// Sends a message, waiting for room in its stream as long as `allowed`, without the time in which the server is unreachable.
/// `what` names the message in the error.
///
/// # Errors
/// If the stream is closed or stays full.
pub(crate) async fn send_in_time<T: WireMessage + Clone + Send + Sync + 'static>(
    sender: &Sender<T>,
    message: T,
    what: &'static str,
    allowed: Duration,
) -> Result<(), LearnerError> {
    let wait = ProgressDeadline::start(sender.outage_time());
    let mut sending = pin!(sender.send(message));
    loop {
        let deadline = wait.after(allowed, sender.outage_time());
        match timeout_at(deadline, &mut sending).await {
            Ok(sent) => return Ok(sent?),
            // The server was unreachable meanwhile.
            Err(_) if wait.after(allowed, sender.outage_time()) > Instant::now() => {}
            Err(_) => {
                let seconds = allowed.as_secs();
                return Err(LearnerError::NoRoom { what, seconds });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_deadline_moves_by_the_outages_of_the_wait_alone() {
        let seconds = Duration::from_secs;
        let started = Instant::now();
        let deadline = ProgressDeadline::start(seconds(7));
        let after = |away| deadline.after(seconds(60), seconds(away)) - started;
        assert_eq!(after(7), seconds(60));
        assert_eq!(after(9), seconds(62));
        tokio::time::advance(seconds(50)).await;
        assert_eq!(after(9), seconds(62), "progress alone starts it again");
    }
}
