//! Outage status of a judge pool.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::watch;
use tokio::time::Instant;

/// A period in which every circuit breaker of the judge is open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outage {
    /// Last failure.
    pub reason: String,
    /// Time of the next probe; in the past when a probe is due or in flight.
    pub probe_at: Instant,
}

/// Publishes the outages of one generation of replicas. Superseded generations are ignored.
pub(crate) struct OutagePublisher {
    status: Arc<watch::Sender<Option<Outage>>>,
    current: Arc<AtomicU64>,
    generation: u64,
}

impl OutagePublisher {
    pub(crate) fn new() -> Self {
        Self {
            status: Arc::new(watch::Sender::new(None)),
            current: Arc::default(),
            generation: 0,
        }
    }

    /// The publisher of the next generation; clears the current outage.
    pub(crate) fn next_generation(&self) -> Self {
        let generation = self.current.fetch_add(1, Ordering::AcqRel) + 1;
        self.status.send_replace(None);
        Self {
            status: Arc::clone(&self.status),
            current: Arc::clone(&self.current),
            generation,
        }
    }

    pub(crate) fn current(&self) -> Option<Outage> {
        self.status.borrow().clone()
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Option<Outage>> {
        self.status.subscribe()
    }

    /// Publishes the status. Returns `Some(true)` when an outage begins and `Some(false)` when one ends.
    pub(crate) fn publish(&self, outage: Option<Outage>) -> Option<bool> {
        let mut change = None;
        self.status.send_if_modified(|published| {
            let is_current = self.current.load(Ordering::Acquire) == self.generation;
            if !is_current || *published == outage {
                return false;
            }
            change = (published.is_some() != outage.is_some()).then_some(outage.is_some());
            *published = outage;
            true
        });
        change
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_is_published_once_and_only_by_the_current_generation() {
        let publisher = OutagePublisher::new();
        let status = publisher.subscribe();
        let outage = |reason: &str| {
            Some(Outage {
                reason: reason.into(),
                probe_at: Instant::now(),
            })
        };
        let first = outage("no route");
        assert_eq!(publisher.publish(None), None);
        assert_eq!(publisher.publish(first.clone()), Some(true));
        assert_eq!(
            publisher.publish(outage("still none")),
            None,
            "it continues"
        );
        let next = publisher.next_generation();
        assert_eq!(*status.borrow(), None, "a new judge has no outage yet");
        assert_eq!(publisher.publish(first), None);
        assert_eq!(
            *status.borrow(),
            None,
            "the superseded generation is ignored"
        );
        assert_eq!(next.publish(outage("another")), Some(true));
        assert_eq!(next.publish(None), Some(false));
    }
}
