//! Outage status of a judge pool.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::watch;
use tokio::time::Instant;

/// A period in which no replica of the judge can be asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outage {
    /// Cause for which requests are kept back.
    pub cause: OutageCause,
    /// Last failure.
    pub reason: String,
    /// Time of the next request; in the past when one is due or in flight.
    pub probe_at: Instant,
}

/// Cause of an [`Outage`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutageCause {
    /// Every circuit breaker is open.
    CircuitOpen,
    /// Every replica without an open circuit breaker has asked for a pause: "too many requests".
    Paused,
}

/// Cause of the outage before and after a change; `None` where there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OutageChange {
    pub(crate) before: Option<OutageCause>,
    pub(crate) after: Option<OutageCause>,
}

impl Outage {
    /// Name of a wait for its end.
    #[must_use]
    pub fn wait_reason(&self) -> &'static str {
        self.cause.wait_reason()
    }

    /// Whether a wait with this name is for the end of an outage.
    #[must_use]
    pub fn is_waited_for(reason: &str) -> bool {
        let causes = [OutageCause::CircuitOpen, OutageCause::Paused];
        causes.iter().any(|cause| cause.wait_reason() == reason)
    }
}

impl OutageCause {
    fn wait_reason(self) -> &'static str {
        match self {
            Self::CircuitOpen => "a judge: every circuit is open",
            Self::Paused => "a judge: its rate limit",
        }
    }
}

impl fmt::Display for Outage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.cause {
            OutageCause::CircuitOpen => "every circuit breaker of the judge is open",
            OutageCause::Paused => "the judge asks for a pause",
        };
        write!(f, "{what} ({})", self.reason)
    }
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

    /// Publishes the status. Returns the change when an outage begins or ends, or its cause changes.
    pub(crate) fn publish(&self, outage: Option<Outage>) -> Option<OutageChange> {
        let mut change = None;
        self.status.send_if_modified(|published| {
            let is_current = self.current.load(Ordering::Acquire) == self.generation;
            if !is_current || *published == outage {
                return false;
            }
            let cause = |outage: &Option<Outage>| outage.as_ref().map(|outage| outage.cause);
            let (before, after) = (cause(published), cause(&outage));
            change = (before != after).then_some(OutageChange { before, after });
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
        let outage = |cause, reason: &str| {
            Some(Outage {
                cause,
                reason: reason.into(),
                probe_at: Instant::now(),
            })
        };
        let change = |before, after| Some(OutageChange { before, after });
        let [open, paused] = [OutageCause::CircuitOpen, OutageCause::Paused].map(Some);
        let open_outage = |reason| outage(OutageCause::CircuitOpen, reason);
        let first = open_outage("no route");
        assert_eq!(publisher.publish(None), None);
        assert_eq!(publisher.publish(first.clone()), change(None, open));
        assert_eq!(
            publisher.publish(open_outage("still none")),
            None,
            "it continues"
        );
        let asked = outage(OutageCause::Paused, "429");
        assert_eq!(publisher.publish(asked), change(open, paused));
        let next = publisher.next_generation();
        assert_eq!(*status.borrow(), None, "a new judge has no outage yet");
        assert_eq!(publisher.publish(first), None);
        assert_eq!(
            *status.borrow(),
            None,
            "the superseded generation is ignored"
        );
        assert_eq!(next.publish(open_outage("another")), change(None, open));
        assert_eq!(next.publish(None), change(open, None));
    }
}
