//! Keeps leases on messages in flight: sends the server progress acknowledgements (`+WPI`) while a message is being
//! processed, and the final acknowledgement or rejection. If a process dies or hangs, the progress acknowledgements stop
//! and the server redelivers its messages to others.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_nats::{Client, Subject};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{MissedTickBehavior, interval};

const ACK: &[u8] = b"+ACK";
const NAK: &[u8] = b"-NAK";
/// Rejected, with redelivery after one second, so that other messages come first.
const NAK_DELAYED: &[u8] = br#"-NAK {"delay": 1000000000}"#;
const IN_PROGRESS: &[u8] = b"+WPI";
const TERMINATE: &[u8] = b"+TERM";

/// Progress acknowledgements per lease duration.
const HEARTBEATS_PER_LEASE: u32 = 4;

#[derive(Debug)]
pub(crate) struct LeaseKeeper {
    commands: mpsc::UnboundedSender<LeaseCommand>,
    next_id: AtomicU64,
}

enum LeaseCommand {
    Hold(u64, Subject),
    Settle(u64, &'static [u8]),
    Flush(oneshot::Sender<()>),
}

/// The lease of this process on a message in flight; dropping it returns the message.
#[derive(Debug)]
pub(crate) struct Lease {
    commands: mpsc::UnboundedSender<LeaseCommand>,
    id: u64,
    deliveries: u32,
    max_deliveries: u32,
    settled: bool,
}

impl LeaseKeeper {
    /// Starts the task, which ends when the keeper and all leases are dropped.
    pub(crate) fn start(client: Client, lease: Duration) -> Self {
        let (commands, inbox) = mpsc::unbounded_channel();
        tokio::spawn(run(client, lease / HEARTBEATS_PER_LEASE, inbox));
        Self {
            commands,
            next_id: AtomicU64::new(0),
        }
    }

    /// Holds the message whose acknowledgements go to `reply`.
    pub(crate) fn hold(&self, reply: Subject, deliveries: u32, max_deliveries: u32) -> Lease {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let lease = Lease {
            commands: self.commands.clone(),
            id,
            deliveries,
            max_deliveries,
            settled: false,
        };
        lease.send(LeaseCommand::Hold(id, reply));
        lease
    }

    /// Waits until all acknowledgements so far are sent.
    pub(crate) async fn flush(&self) {
        let (done, flushed) = oneshot::channel();
        if self.commands.send(LeaseCommand::Flush(done)).is_ok() {
            drop(flushed.await);
        }
    }
}

impl Lease {
    pub(crate) fn deliveries(&self) -> u32 {
        self.deliveries
    }

    pub(crate) fn exceeds_delivery_limit(&self) -> bool {
        self.deliveries > self.max_deliveries
    }

    pub(crate) fn acknowledge(self) {
        self.settle(ACK);
    }

    /// Removes a malformed message from the stream without redelivery.
    pub(crate) fn terminate(self) {
        self.settle(TERMINATE);
    }

    /// Returns the message for redelivery after a delay; queued messages come first.
    pub(crate) fn postpone(self) {
        self.settle(NAK_DELAYED);
    }

    fn settle(mut self, reply: &'static [u8]) {
        self.settled = true;
        self.send(LeaseCommand::Settle(self.id, reply));
    }

    fn send(&self, command: LeaseCommand) {
        // The task outlives all leases unless the runtime has shut down; then the lease expires on the server.
        drop(self.commands.send(command));
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if !self.settled {
            self.send(LeaseCommand::Settle(self.id, NAK));
        }
    }
}

async fn run(client: Client, period: Duration, mut inbox: mpsc::UnboundedReceiver<LeaseCommand>) {
    let mut held: HashMap<u64, Subject> = HashMap::new();
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            command = inbox.recv() => match command {
                None => return,
                Some(LeaseCommand::Hold(id, reply)) => {
                    held.insert(id, reply);
                }
                Some(LeaseCommand::Settle(id, payload)) => {
                    if let Some(reply) = held.remove(&id) {
                        publish(&client, reply, payload).await;
                    }
                }
                Some(LeaseCommand::Flush(done)) => {
                    if let Err(error) = client.flush().await {
                        tracing::debug!(%error, "acknowledgements could not be flushed");
                    }
                    if done.send(()).is_err() {
                        tracing::debug!("the flush was cancelled");
                    }
                }
            },
            _ = ticks.tick() => {
                for reply in held.values() {
                    publish(&client, reply.clone(), IN_PROGRESS).await;
                }
            }
        }
    }
}

async fn publish(client: &Client, reply: Subject, payload: &'static [u8]) {
    if let Err(error) = client.publish(reply, payload.into()).await {
        tracing::debug!(%error, "an acknowledgement could not be sent; the lease expires and the message is redelivered");
    }
}
