//! The two ends of a stream, whatever lies between them. Both may be cloned.

use std::num::{NonZeroU32, NonZeroUsize};
use std::sync::Arc;

use messages::wire::Message;

use crate::memory::{Downstream, Queue, Upstream};
use crate::{ClosedBy, Delivery, TransportError, jetstream};

/// How many messages a stream holds, and how often it tries to deliver one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// How many messages may be unacknowledged, queued and in hand together.
    pub capacity: NonZeroUsize,
    /// How often one message is delivered before it is [given up](Delivery::is_given_up).
    pub max_deliveries: NonZeroU32,
}

impl Limits {
    /// How often a message is delivered unless a stream says otherwise.
    pub const MAX_DELIVERIES: NonZeroU32 = NonZeroU32::new(5).expect("five is not zero");

    /// These many messages, each delivered at most [`Self::MAX_DELIVERIES`] times.
    #[must_use]
    pub fn of(capacity: NonZeroUsize) -> Self {
        Self {
            capacity,
            max_deliveries: Self::MAX_DELIVERIES,
        }
    }
}

/// Everything that has happened to a stream's messages, seen at one moment. Each number is counted by
/// itself, so `sent = acknowledged + queued + in_hand` says that nothing was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Messages taken from senders.
    pub sent: u64,
    /// Messages whose stay ended.
    pub acknowledged: u64,
    /// Messages that wait for a receiver.
    pub queued: u64,
    /// Messages delivered and not yet acknowledged.
    pub in_hand: u64,
    /// Returns to the queue: one message may be returned several times. Over JetStream: messages that
    /// are being delivered again.
    pub redelivered: u64,
    /// Messages that were delivered as often as the stream allows and returned each time. Over
    /// JetStream: those that lie among the dead letters.
    pub given_up: u64,
}

/// The end of a stream that messages enter. In memory the stream closes when the last clone is gone.
#[derive(Debug)]
pub struct Sender<T> {
    kind: SenderKind<T>,
}

#[derive(Debug)]
enum SenderKind<T> {
    Memory(Arc<Upstream<T>>),
    JetStream(Arc<jetstream::Upstream>),
}

/// The end of a stream that messages leave. Clones share the messages: each is delivered to one of
/// them at a time. In memory, when the last clone is gone the stream takes no more messages.
#[derive(Debug)]
pub struct Receiver<T> {
    kind: ReceiverKind<T>,
}

#[derive(Debug)]
enum ReceiverKind<T> {
    Memory(Arc<Downstream<T>>),
    JetStream(Arc<jetstream::Downstream<T>>),
}

/// A stream in memory for `capacity` unacknowledged messages. `name` appears in errors and logs.
///
/// # Panics
/// When `capacity` is zero: such a stream could never take a message.
#[must_use]
pub fn stream<T>(name: &'static str, capacity: usize) -> (Sender<T>, Receiver<T>)
where
    T: Message + Clone + Send + Sync + 'static,
{
    let capacity = NonZeroUsize::new(capacity).expect("a stream has room for at least one message");
    stream_within(name, Limits::of(capacity))
}

/// A stream in memory within the given limits. `name` appears in errors and logs.
#[must_use]
pub fn stream_within<T>(name: &'static str, limits: Limits) -> (Sender<T>, Receiver<T>)
where
    T: Message + Clone + Send + Sync + 'static,
{
    let queue = Queue::new(name, limits);
    let upstream = SenderKind::Memory(Arc::new(Upstream(Arc::clone(&queue))));
    let downstream = ReceiverKind::Memory(Arc::new(Downstream(queue)));
    (Sender { kind: upstream }, Receiver { kind: downstream })
}

impl<T: Message + Clone + Send + Sync + 'static> Sender<T> {
    pub(crate) fn over_jetstream(upstream: Arc<jetstream::Upstream>) -> Self {
        Self {
            kind: SenderKind::JetStream(upstream),
        }
    }

    /// Sends `message` and returns once it is stored, waiting while every place is taken by an
    /// unacknowledged one. In memory, a call that is cancelled while it waits has sent nothing; over
    /// JetStream it may have, and sending the same message again stores it once.
    ///
    /// # Errors
    /// When the stream is closed, before the call or during it, or the server cannot be had; the message
    /// was not sent, as far as is known.
    pub async fn send(&self, message: T) -> Result<(), TransportError> {
        match &self.kind {
            SenderKind::Memory(upstream) => Ok(upstream.0.send(message).await?),
            SenderKind::JetStream(upstream) => upstream.send(&message).await,
        }
    }

    /// Ends a stream in memory for all its senders. What was sent is still delivered, and redelivered,
    /// until all of it is settled. A stream over JetStream outlives its senders and is not closed.
    pub fn close(&self) {
        if let SenderKind::Memory(upstream) = &self.kind {
            upstream.0.close(ClosedBy::Senders);
        }
    }
}

impl<T: Message + Clone + Send + Sync + 'static> Receiver<T> {
    pub(crate) fn over_jetstream(downstream: Arc<jetstream::Downstream<T>>) -> Self {
        Self {
            kind: ReceiverKind::JetStream(downstream),
        }
    }

    /// The next message: the oldest that is queued, returned ones included. A call that is cancelled
    /// while it waits has lost nothing.
    ///
    /// # Errors
    /// When the stream is closed and all that was sent is settled: while any message is in another
    /// receiver's hands the call waits, since that message may come back. Over JetStream, when the server
    /// cannot be had.
    pub async fn receive(&self) -> Result<Delivery<T>, TransportError> {
        match &self.kind {
            ReceiverKind::Memory(downstream) => Ok(Delivery::memory(downstream.0.receive().await?)),
            ReceiverKind::JetStream(downstream) => downstream.receive().await,
        }
    }

    /// The next message if one is here now; `None` also when the stream has ended.
    pub fn try_receive(&self) -> Option<Delivery<T>> {
        match &self.kind {
            ReceiverKind::Memory(downstream) => downstream.0.try_receive().map(Delivery::memory),
            ReceiverKind::JetStream(downstream) => downstream.try_receive(),
        }
    }

    /// Has delivered again what a server that was killed came back with, keeps, and would deliver to nobody.
    /// Call it now and then, from one process of a run: what is found twice in a row is reclaimed. In
    /// memory nothing is ever stranded. Says whether anything was.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn reclaim(&self) -> Result<bool, TransportError> {
        match &self.kind {
            ReceiverKind::Memory(_) => Ok(false),
            ReceiverKind::JetStream(downstream) => downstream.reclaim().await,
        }
    }

    /// Says that up to `messages` could be taken at once from here on: over JetStream so many are fetched
    /// together.
    pub fn prefetch(&self, messages: usize) {
        if let ReceiverKind::JetStream(downstream) = &self.kind {
            downstream.prefetch(messages);
        }
    }
}

/// What both ends can tell about their stream.
macro_rules! gauges {
    ($($end:ident, $kind:ident);*) => {
        $(impl<T> $end<T> {
            /// The stream's name.
            #[must_use]
            pub fn name(&self) -> &'static str {
                match &self.kind {
                    $kind::Memory(end) => end.0.name(),
                    $kind::JetStream(end) => end.name(),
                }
            }

            /// All counts, at one moment.
            ///
            /// # Errors
            /// When the server does not answer.
            pub async fn counts(&self) -> Result<Counts, TransportError> {
                match &self.kind {
                    $kind::Memory(end) => Ok(end.0.counts()),
                    $kind::JetStream(end) => end.counts().await,
                }
            }
        })*
    };
}

gauges!(Sender, SenderKind; Receiver, ReceiverKind);

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        let kind = match &self.kind {
            SenderKind::Memory(upstream) => SenderKind::Memory(Arc::clone(upstream)),
            SenderKind::JetStream(upstream) => SenderKind::JetStream(Arc::clone(upstream)),
        };
        Self { kind }
    }
}

impl<T> Clone for Receiver<T> {
    fn clone(&self) -> Self {
        let kind = match &self.kind {
            ReceiverKind::Memory(downstream) => ReceiverKind::Memory(Arc::clone(downstream)),
            ReceiverKind::JetStream(downstream) => ReceiverKind::JetStream(Arc::clone(downstream)),
        };
        Self { kind }
    }
}

#[cfg(test)]
mod tests;
