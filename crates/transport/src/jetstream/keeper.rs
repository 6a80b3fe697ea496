//! Keeps what this process holds: tells the server again and again that a message is still being worked
//! on, and at the end that it is done or given back. A process that dies or stands still tells nothing, and
//! the server gives what it held to others.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_nats::{Client, Subject};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{MissedTickBehavior, interval};

const DONE: &[u8] = b"+ACK";
const RETURNED: &[u8] = b"-NAK";
/// Returned, and not to be delivered for a second: others come first.
const POSTPONED: &[u8] = br#"-NAK {"delay": 1000000000}"#;
const WORKING: &[u8] = b"+WPI";
const NEVER: &[u8] = b"+TERM";

/// Signs of life before a lease ends.
const SIGNS: u32 = 4;

#[derive(Debug)]
pub(crate) struct Keeper {
    orders: mpsc::UnboundedSender<Order>,
    next: AtomicU64,
}

enum Order {
    Hold(u64, Subject),
    Settle(u64, &'static [u8]),
    Flush(oneshot::Sender<()>),
}

/// A message in this process's hands; dropping it gives it back.
#[derive(Debug)]
pub(crate) struct Lease {
    orders: mpsc::UnboundedSender<Order>,
    id: u64,
    deliveries: u32,
    max_deliveries: u32,
    settled: bool,
}

impl Keeper {
    /// Starts keeping; ends with the last lease.
    pub(crate) fn start(client: Client, lease: Duration) -> Self {
        let (orders, inbox) = mpsc::unbounded_channel();
        tokio::spawn(keep(client, lease / SIGNS, inbox));
        Self {
            orders,
            next: AtomicU64::new(0),
        }
    }

    /// Holds the message that is answered for at `reply`.
    pub(crate) fn hold(&self, reply: Subject, deliveries: u32, max_deliveries: u32) -> Lease {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let lease = Lease {
            orders: self.orders.clone(),
            id,
            deliveries,
            max_deliveries,
            settled: false,
        };
        lease.order(Order::Hold(id, reply));
        lease
    }

    /// Waits until every order so far is on its way.
    pub(crate) async fn flush(&self) {
        let (done, flushed) = oneshot::channel();
        if self.orders.send(Order::Flush(done)).is_ok() {
            drop(flushed.await);
        }
    }
}

impl Lease {
    pub(crate) fn deliveries(&self) -> u32 {
        self.deliveries
    }

    pub(crate) fn is_given_up(&self) -> bool {
        self.deliveries > self.max_deliveries
    }

    pub(crate) fn acknowledge(self) {
        self.settle(DONE);
    }

    /// Takes the message out of the stream unused: it cannot be read.
    pub(crate) fn terminate(self) {
        self.settle(NEVER);
    }

    /// Gives the message back for later: what waits behind it comes first.
    pub(crate) fn postpone(self) {
        self.settle(POSTPONED);
    }

    fn settle(mut self, how: &'static [u8]) {
        self.settled = true;
        self.order(Order::Settle(self.id, how));
    }

    fn order(&self, order: Order) {
        // The keeper outlives all leases unless the runtime is gone: then the server's clock decides.
        drop(self.orders.send(order));
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if !self.settled {
            self.order(Order::Settle(self.id, RETURNED));
        }
    }
}

async fn keep(client: Client, every: Duration, mut inbox: mpsc::UnboundedReceiver<Order>) {
    let mut held: HashMap<u64, Subject> = HashMap::new();
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            order = inbox.recv() => match order {
                None => return,
                Some(Order::Hold(id, reply)) => {
                    held.insert(id, reply);
                }
                Some(Order::Settle(id, how)) => {
                    if let Some(reply) = held.remove(&id) {
                        tell(&client, reply, how).await;
                    }
                }
                Some(Order::Flush(done)) => {
                    if let Err(error) = client.flush().await {
                        tracing::debug!(%error, "acknowledgements are still on their way");
                    }
                    if done.send(()).is_err() {
                        tracing::debug!("nobody waited for the acknowledgements");
                    }
                }
            },
            _ = ticks.tick() => {
                for reply in held.values() {
                    tell(&client, reply.clone(), WORKING).await;
                }
            }
        }
    }
}

async fn tell(client: &Client, reply: Subject, what: &'static [u8]) {
    if let Err(error) = client.publish(reply, what.into()).await {
        tracing::debug!(%error, "the server was not told; it gives the message to others in time");
    }
}
