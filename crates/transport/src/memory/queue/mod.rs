//! A bounded queue with acknowledgement.
//!
//! Entries and counters are in one [`QueueState`] under one lock, which is never held while waiting. Callers wait for
//! tokens in flume channels, which serve async tasks and threads alike: one free-slot token for each message that may
//! still be sent, one ready token for each queued message.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::{
    error::{Closed, ClosedBy},
    stream::{StreamCounts, StreamLimits},
};

/// The queue that senders, receivers and deliveries share.
pub(crate) struct Queue<T> {
    name: &'static str,
    limits: StreamLimits,
    /// One token per free slot.
    free_slots: flume::Receiver<()>,
    /// One token per queued message.
    ready: flume::Receiver<()>,
    state: Mutex<QueueState<T>>,
}

struct QueueState<T> {
    /// Entries by send order. Returned messages are older than undelivered ones, so the smallest key is always
    /// the next entry.
    queued: BTreeMap<u64, QueueEntry<T>>,
    in_flight: u64,
    sent: u64,
    acknowledged: u64,
    redelivered: u64,
    dead_lettered: u64,
    closed: Option<ClosedBy>,
    /// Dropped when the queue is closed, which wakes waiting senders.
    slot_tokens: Option<flume::Sender<()>>,
    /// Dropped when the queue is closed and nothing is queued or in flight, which wakes waiting receivers.
    ready_tokens: Option<flume::Sender<()>>,
}

struct QueueEntry<T> {
    /// Index in send order, from 0.
    index: u64,
    deliveries: u32,
    message: T,
}

/// A message in flight at a consumer; dropping it returns it.
pub(crate) struct InFlightMessage<T> {
    queue: Arc<Queue<T>>,
    /// `None` only once acknowledged or returned.
    entry: Option<QueueEntry<T>>,
}

/// Shared by all clones of a sender; closes the queue when the last is dropped.
#[derive(Debug)]
pub(crate) struct Upstream<T>(pub(crate) Arc<Queue<T>>);

/// Shared by all clones of a receiver; closes the queue when the last is dropped.
#[derive(Debug)]
pub(crate) struct Downstream<T>(pub(crate) Arc<Queue<T>>);

impl<T> Queue<T> {
    pub(crate) fn new(name: &'static str, limits: StreamLimits) -> Arc<Self> {
        let (slot_tokens, free_slots) = flume::unbounded();
        let (ready_tokens, ready) = flume::unbounded();
        let state = QueueState {
            queued: BTreeMap::new(),
            in_flight: 0,
            sent: 0,
            acknowledged: 0,
            redelivered: 0,
            dead_lettered: 0,
            closed: None,
            slot_tokens: Some(slot_tokens),
            ready_tokens: Some(ready_tokens),
        };
        (0..limits.capacity.get()).for_each(|_| state.release_slot());
        Arc::new(Self {
            name,
            limits,
            free_slots,
            ready,
            state: Mutex::new(state),
        })
    }

    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    pub(crate) async fn send(&self, message: T) -> Result<(), Closed> {
        self.free_slots
            .recv_async()
            .await
            .map_err(|_| self.closed_error())?;
        self.push(message).map_err(|_| self.closed_error())
    }

    /// Enqueues `message`, for a free-slot token that the caller holds; a closed queue returns it.
    fn push(&self, message: T) -> Result<(), T> {
        let mut state = self.state();
        if state.closed.is_some() {
            return Err(message);
        }
        let entry = QueueEntry {
            index: state.sent,
            deliveries: 0,
            message,
        };
        state.sent += 1;
        state.enqueue(entry);
        Ok(())
    }

    pub(crate) async fn receive(self: &Arc<Self>) -> Result<InFlightMessage<T>, Closed> {
        self.ready
            .recv_async()
            .await
            .map_err(|_| self.closed_error())?;
        Ok(self.pop())
    }

    pub(crate) fn try_receive(self: &Arc<Self>) -> Option<InFlightMessage<T>> {
        self.ready.try_recv().ok().map(|()| self.pop())
    }

    /// Dequeues the oldest entry, for a ready token that the caller holds.
    fn pop(self: &Arc<Self>) -> InFlightMessage<T> {
        let mut state = self.state();
        let (_, mut entry) = state
            .queued
            .pop_first()
            .expect("there is an entry for every ready token");
        entry.deliveries += 1;
        if entry.deliveries == self.limits.max_deliveries.get() + 1 {
            state.dead_lettered += 1;
        }
        state.in_flight += 1;
        InFlightMessage {
            queue: Arc::clone(self),
            entry: Some(entry),
        }
    }

    fn acknowledge(&self) {
        let mut state = self.state();
        state.acknowledged += 1;
        state.remove_in_flight();
    }

    fn return_entry(&self, entry: QueueEntry<T>) {
        let mut state = self.state();
        state.in_flight -= 1;
        state.redelivered += 1;
        state.enqueue(entry);
    }

    pub(crate) fn close(&self, by: ClosedBy) {
        let mut state = self.state();
        state.closed.get_or_insert(by);
        state.slot_tokens = None;
        state.close_if_drained();
    }

    pub(crate) fn counts(&self) -> StreamCounts {
        let state = self.state();
        StreamCounts {
            sent: state.sent,
            acknowledged: state.acknowledged,
            redelivered: state.redelivered,
            dead_lettered: state.dead_lettered,
            queued: state.queued.len() as u64,
            in_flight: state.in_flight,
        }
    }

    fn closed_error(&self) -> Closed {
        let cause = self
            .state()
            .closed
            .expect("token channels close only after the queue is closed");
        Closed {
            stream: self.name,
            cause,
        }
    }

    fn state(&self) -> MutexGuard<'_, QueueState<T>> {
        self.state
            .lock()
            .expect("nothing done under this lock panics")
    }
}

impl<T> QueueState<T> {
    fn enqueue(&mut self, entry: QueueEntry<T>) {
        self.queued.insert(entry.index, entry);
        self.ready_tokens
            .as_ref()
            .and_then(|tokens| tokens.send(()).ok())
            .expect("tokens end only after the last entry, and the queue holds the receiver");
    }

    /// Removes a message that was in flight.
    fn remove_in_flight(&mut self) {
        self.in_flight -= 1;
        self.release_slot();
        self.close_if_drained();
    }

    fn release_slot(&self) {
        if let Some(tokens) = &self.slot_tokens {
            tokens.send(()).expect("the queue holds the receiver");
        }
    }

    fn close_if_drained(&mut self) {
        if self.closed.is_some() && self.queued.is_empty() && self.in_flight == 0 {
            self.ready_tokens = None;
        }
    }
}

impl<T> InFlightMessage<T> {
    pub(crate) fn message(&self) -> &T {
        &self.entry().message
    }

    pub(crate) fn deliveries(&self) -> u32 {
        self.entry().deliveries
    }

    pub(crate) fn exceeds_delivery_limit(&self) -> bool {
        self.deliveries() > self.queue.limits.max_deliveries.get()
    }

    pub(crate) fn acknowledge(mut self) {
        self.entry = None;
        self.queue.acknowledge();
    }

    fn entry(&self) -> &QueueEntry<T> {
        self.entry
            .as_ref()
            .expect("the entry is taken only when the message is consumed")
    }
}

impl<T> Drop for InFlightMessage<T> {
    fn drop(&mut self) {
        if let Some(entry) = self.entry.take() {
            self.queue.return_entry(entry);
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

impl<T> fmt::Debug for InFlightMessage<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let entry = self
            .entry
            .as_ref()
            .map(|entry| (entry.index, entry.deliveries));
        write!(f, "{} (index, deliveries) = {entry:?}", self.queue.name)
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
