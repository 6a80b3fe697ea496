//! Whether a bench has anybody to ask, for all who want to know.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::watch;
use tokio::time::Instant;

/// A time in which every circuit of the judge is open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outage {
    /// What the last failure said.
    pub reason: String,
    /// When the next question is tried; in the past when it may be now, or is at it.
    pub probe_at: Instant,
}

/// Where one generation of judges tells of its outages. What superseded ones say is not heard.
pub(super) struct OutageBoard {
    board: Arc<watch::Sender<Option<Outage>>>,
    current: Arc<AtomicU64>,
    generation: u64,
}

impl OutageBoard {
    pub(super) fn new() -> Self {
        Self {
            board: Arc::new(watch::Sender::new(None)),
            current: Arc::default(),
            generation: 0,
        }
    }

    /// The board of the next generation, which begins without an outage.
    pub(super) fn succeed(&self) -> Self {
        let generation = self.current.fetch_add(1, Ordering::AcqRel) + 1;
        self.board.send_replace(None);
        Self {
            board: Arc::clone(&self.board),
            current: Arc::clone(&self.current),
            generation,
        }
    }

    pub(super) fn current(&self) -> Option<Outage> {
        self.board.borrow().clone()
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<Option<Outage>> {
        self.board.subscribe()
    }

    /// Says whether there is an outage. `Some` when one begins (`true`) or ends (`false`) with it.
    pub(super) fn tell(&self, outage: Option<Outage>) -> Option<bool> {
        let mut turn = None;
        self.board.send_if_modified(|told| {
            let is_heard = self.current.load(Ordering::Acquire) == self.generation;
            if !is_heard || *told == outage {
                return false;
            }
            turn = (told.is_some() != outage.is_some()).then_some(outage.is_some());
            *told = outage;
            true
        });
        turn
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_is_told_once_and_only_by_the_current_generation() {
        let board = OutageBoard::new();
        let seen = board.subscribe();
        let outage = |reason: &str| {
            Some(Outage {
                reason: reason.into(),
                probe_at: Instant::now(),
            })
        };
        let first = outage("no route");
        assert_eq!(board.tell(None), None);
        assert_eq!(board.tell(first.clone()), Some(true));
        assert_eq!(board.tell(outage("still none")), None, "it goes on");
        let next = board.succeed();
        assert_eq!(*seen.borrow(), None, "a new judge has no outage yet");
        assert_eq!(board.tell(first), None);
        assert_eq!(*seen.borrow(), None, "the old one is not heard");
        assert_eq!(next.tell(outage("another")), Some(true));
        assert_eq!(next.tell(None), Some(false));
    }
}
