//! Dynamic batching: pairs are taken as they come and held until there are enough of them, or the
//! first has waited long enough.
//!
//! Whatever is held when this is dropped goes back to its stream.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use messages::Pair;
use telemetry::{StationCounters, Waits};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use transport::{Delivery, Receipt, Receiver};

use crate::panel::questions;

/// When a batch is complete.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BatchLimits {
    /// The comparisons of a batch, both orders counted; one pair may have more.
    pub max_batch: usize,
    /// How long the first pair of a batch waits for others.
    pub max_wait: Duration,
    /// Whether the judge is, so that evaluations ask it once.
    pub is_antisymmetric: bool,
}

/// The pairs in the service's hands, oldest first.
pub(crate) struct Intake {
    pairs: Receiver<Pair>,
    limits: BatchLimits,
    counters: Arc<StationCounters>,
    held: VecDeque<Held>,
    /// The sum over `held`.
    questions: usize,
}

/// A pair that was taken and is not yet acknowledged.
pub(crate) struct Held {
    pub pair: Arc<Pair>,
    pub receipt: Receipt,
    pub arrived: Instant,
    questions: usize,
}

impl Intake {
    pub(crate) fn new(
        pairs: Receiver<Pair>,
        limits: BatchLimits,
        counters: Arc<StationCounters>,
    ) -> Self {
        Self {
            pairs,
            limits,
            counters,
            held: VecDeque::new(),
            questions: 0,
        }
    }

    /// Takes pairs until a batch is complete. It takes no more once `shutdown` is true or its sender is
    /// gone, or when the stream has ended; nothing is held then only if there is nothing left to do.
    pub(crate) async fn collect(&mut self, shutdown: &mut watch::Receiver<bool>, waits: &Waits) {
        let _wait = waits.enter("pairs");
        while self.questions < self.limits.max_batch || self.held.is_empty() {
            let deadline = self
                .held
                .front()
                .map(|held| held.arrived + self.limits.max_wait);
            tokio::select! {
                biased;
                () = stopped(shutdown) => return,
                // Before the deadline: pairs that are there already cost no more waiting.
                received = self.pairs.receive() => match received {
                    Ok(delivery) => self.take(delivery),
                    Err(_ended) => return,
                },
                () = reached(deadline) => return,
            }
        }
    }

    /// The oldest pairs whose comparisons fit into a batch, at least one of those that are held. They
    /// stay in hand until they are [let go](Self::pop).
    pub(crate) fn batch(&self) -> impl Iterator<Item = &Held> {
        let mut questions = 0;
        let fits = |held: &&Held| {
            questions += held.questions;
            questions <= self.limits.max_batch
        };
        let count = self.held.iter().take_while(fits).count();
        self.held.iter().take(count.max(1))
    }

    /// Hands out the oldest pair. It counts as held until [`Self::count`].
    pub(crate) fn pop(&mut self) -> Option<Held> {
        let held = self.held.pop_front()?;
        self.questions -= held.questions;
        Some(held)
    }

    /// Counts what is in hand.
    pub(crate) fn count(&self) {
        self.counters.set_in_hand(self.held.len() as u64);
    }

    /// The pairs whose every delivery ended without a label.
    pub(crate) fn given_up(&self) -> Vec<transport::DeadLetter<Pair>> {
        self.pairs.dead_letters()
    }

    fn take(&mut self, delivery: Delivery<Pair>) {
        // A pair that comes again has been counted when it came first.
        if delivery.deliveries() == 1 {
            self.counters.taken(1);
        }
        let (pair, receipt) = delivery.take();
        let questions = questions(&pair, self.limits.is_antisymmetric);
        self.questions += questions;
        self.held.push_back(Held {
            pair: Arc::new(pair),
            receipt,
            arrived: Instant::now(),
            questions,
        });
        self.count();
    }
}

/// Waits until the caller asks to stop. A caller that is gone asks for it too.
async fn stopped(shutdown: &mut watch::Receiver<bool>) {
    drop(shutdown.wait_for(|stop| *stop).await);
}

/// Waits until `deadline`; without one, for ever.
async fn reached(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
