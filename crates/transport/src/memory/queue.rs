//! One bounded queue with acknowledgement.
//!
//! The letters and all counts lie in one ledger under one lock that is never held while waiting.
//! Waiting is for tokens, which flume hands to async tasks and to threads alike: one `place` for every
//! letter that may still be posted, one `ticket` for every letter that lies queued.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::{Closed, ClosedBy, Counts, Limits};

/// The queue that senders, receivers and deliveries share.
pub(crate) struct Queue<T> {
    name: &'static str,
    limits: Limits,
    /// One token for every free place.
    places: flume::Receiver<()>,
    /// One token for every queued letter.
    tickets: flume::Receiver<()>,
    ledger: Mutex<Ledger<T>>,
}

struct Ledger<T> {
    /// By the order of sending. What is returned is older than all that was never delivered, so the
    /// smallest key is the next letter in either case.
    queued: BTreeMap<u64, Letter<T>>,
    in_hand: u64,
    sent: u64,
    acknowledged: u64,
    redelivered: u64,
    given_up: u64,
    closed: Option<ClosedBy>,
    /// Gone once the queue is closed, which wakes whoever waits for a place.
    free_places: Option<flume::Sender<()>>,
    /// Gone once the queue is closed and nothing is queued or in hand, which wakes whoever waits for a
    /// letter.
    new_tickets: Option<flume::Sender<()>>,
}

struct Letter<T> {
    /// Its place in the order of sending, from 0.
    number: u64,
    deliveries: u32,
    message: T,
}

/// A letter in a consumer's hands; dropping it returns it.
pub(crate) struct Held<T> {
    queue: Arc<Queue<T>>,
    /// None only once acknowledged or returned.
    letter: Option<Letter<T>>,
}

/// What all clones of a sender share: when the last is gone the queue is closed.
#[derive(Debug)]
pub(crate) struct Upstream<T>(pub(crate) Arc<Queue<T>>);

/// What all clones of a receiver share: when the last is gone the queue is closed.
#[derive(Debug)]
pub(crate) struct Downstream<T>(pub(crate) Arc<Queue<T>>);

impl<T> Queue<T> {
    pub(crate) fn new(name: &'static str, limits: Limits) -> Arc<Self> {
        let (free_places, places) = flume::unbounded();
        let (new_tickets, tickets) = flume::unbounded();
        let ledger = Ledger {
            queued: BTreeMap::new(),
            in_hand: 0,
            sent: 0,
            acknowledged: 0,
            redelivered: 0,
            given_up: 0,
            closed: None,
            free_places: Some(free_places),
            new_tickets: Some(new_tickets),
        };
        (0..limits.capacity.get()).for_each(|_| ledger.free_a_place());
        Arc::new(Self {
            name,
            limits,
            places,
            tickets,
            ledger: Mutex::new(ledger),
        })
    }

    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    pub(crate) async fn send(&self, message: T) -> Result<(), Closed> {
        self.places.recv_async().await.map_err(|_| self.ended())?;
        self.post(message).map_err(|_| self.ended())
    }

    /// Posts `message` into a place that the caller has taken; a closed queue gives it back.
    fn post(&self, message: T) -> Result<(), T> {
        let mut ledger = self.ledger();
        if ledger.closed.is_some() {
            return Err(message);
        }
        let letter = Letter {
            number: ledger.sent,
            deliveries: 0,
            message,
        };
        ledger.sent += 1;
        ledger.enqueue(letter);
        Ok(())
    }

    pub(crate) async fn receive(self: &Arc<Self>) -> Result<Held<T>, Closed> {
        self.tickets.recv_async().await.map_err(|_| self.ended())?;
        Ok(self.hand_out())
    }

    pub(crate) fn try_receive(self: &Arc<Self>) -> Option<Held<T>> {
        self.tickets.try_recv().ok().map(|()| self.hand_out())
    }

    /// The oldest queued letter, for a ticket that the caller has taken.
    fn hand_out(self: &Arc<Self>) -> Held<T> {
        let mut ledger = self.ledger();
        let (_, mut letter) = ledger
            .queued
            .pop_first()
            .expect("there is a queued letter for every ticket");
        letter.deliveries += 1;
        if letter.deliveries == self.limits.max_deliveries.get() + 1 {
            ledger.given_up += 1;
        }
        ledger.in_hand += 1;
        Held {
            queue: Arc::clone(self),
            letter: Some(letter),
        }
    }

    fn acknowledge(&self) {
        let mut ledger = self.ledger();
        ledger.acknowledged += 1;
        ledger.leave_hand();
    }

    fn take_back(&self, letter: Letter<T>) {
        let mut ledger = self.ledger();
        ledger.in_hand -= 1;
        ledger.redelivered += 1;
        ledger.enqueue(letter);
    }

    pub(crate) fn close(&self, by: ClosedBy) {
        let mut ledger = self.ledger();
        ledger.closed.get_or_insert(by);
        ledger.free_places = None;
        ledger.end_if_settled();
    }

    pub(crate) fn counts(&self) -> Counts {
        let ledger = self.ledger();
        Counts {
            sent: ledger.sent,
            acknowledged: ledger.acknowledged,
            redelivered: ledger.redelivered,
            given_up: ledger.given_up,
            queued: ledger.queued.len() as u64,
            in_hand: ledger.in_hand,
        }
    }

    fn ended(&self) -> Closed {
        let cause = self
            .ledger()
            .closed
            .expect("tokens run out only after the queue is closed");
        Closed {
            stream: self.name,
            cause,
        }
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger<T>> {
        self.ledger
            .lock()
            .expect("nothing done under this lock panics")
    }
}

impl<T> Ledger<T> {
    fn enqueue(&mut self, letter: Letter<T>) {
        self.queued.insert(letter.number, letter);
        self.new_tickets
            .as_ref()
            .and_then(|tickets| tickets.send(()).ok())
            .expect("tickets end only after the last letter, and the queue holds their other end");
    }

    /// Counts a letter out of a consumer's hands and out of the queue.
    fn leave_hand(&mut self) {
        self.in_hand -= 1;
        self.free_a_place();
        self.end_if_settled();
    }

    fn free_a_place(&self) {
        if let Some(places) = &self.free_places {
            places.send(()).expect("the queue holds the other end");
        }
    }

    fn end_if_settled(&mut self) {
        if self.closed.is_some() && self.queued.is_empty() && self.in_hand == 0 {
            self.new_tickets = None;
        }
    }
}

impl<T> Held<T> {
    pub(crate) fn message(&self) -> &T {
        &self.letter().message
    }

    pub(crate) fn deliveries(&self) -> u32 {
        self.letter().deliveries
    }

    pub(crate) fn is_given_up(&self) -> bool {
        self.deliveries() > self.queue.limits.max_deliveries.get()
    }

    pub(crate) fn acknowledge(mut self) {
        self.letter = None;
        self.queue.acknowledge();
    }

    fn letter(&self) -> &Letter<T> {
        self.letter
            .as_ref()
            .expect("a letter leaves only with the hand that held it")
    }
}

impl<T> Drop for Held<T> {
    fn drop(&mut self) {
        if let Some(letter) = self.letter.take() {
            self.queue.take_back(letter);
        }
    }
}

impl<T> Drop for Upstream<T> {
    fn drop(&mut self) {
        self.0.close(ClosedBy::Senders);
    }
}

impl<T> Drop for Downstream<T> {
    fn drop(&mut self) {
        self.0.close(ClosedBy::Receivers);
    }
}

impl<T> fmt::Debug for Held<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letter = self
            .letter
            .as_ref()
            .map(|letter| (letter.number, letter.deliveries));
        write!(f, "{} (number, deliveries) = {letter:?}", self.queue.name)
    }
}

impl<T> fmt::Debug for Queue<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple(self.name)
            .field(&self.limits)
            .field(&self.counts())
            .finish()
    }
}

#[cfg(test)]
mod tests;
