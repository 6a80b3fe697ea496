//! The two ends of a stream. Both may be cloned, and either may be used by an async task or by a
//! compute thread: every wait has an async and a blocking form.

use std::num::{NonZeroU32, NonZeroUsize};
use std::sync::Arc;
use std::time::Duration;

use messages::wire::Message;

use crate::memory::{Downstream, Queue, Upstream};
use crate::{Closed, ClosedBy, DeadLetter, Delivery, Unsent};

/// How many messages a stream holds, and how often it tries to deliver one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// How many messages may be unacknowledged, queued and in hand together. As many dead letters are
    /// kept besides.
    pub capacity: NonZeroUsize,
    /// How often one message is delivered before it becomes a dead letter.
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
/// itself, so `sent = acknowledged + dead + queued + in_hand` says that nothing was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Messages taken from senders.
    pub sent: u64,
    /// Messages whose stay ended well.
    pub acknowledged: u64,
    /// Returns to the queue: one message may be returned several times.
    pub redelivered: u64,
    /// Messages that became dead letters.
    pub dead: u64,
    /// Dead letters that nobody fetched before newer ones needed their room; part of `dead`.
    pub discarded: u64,
    /// Messages that wait for a receiver.
    pub queued: u64,
    /// Messages delivered and not yet acknowledged.
    pub in_hand: u64,
}

/// The end of a stream that messages enter. The stream closes when the last clone is gone.
#[derive(Debug)]
pub struct Sender<T> {
    kind: SenderKind<T>,
}

#[derive(Debug)]
enum SenderKind<T> {
    Memory(Arc<Upstream<T>>),
}

/// The end of a stream that messages leave. Clones share the messages: each is delivered to one of
/// them at a time. When the last clone is gone the stream takes no more messages.
#[derive(Debug)]
pub struct Receiver<T> {
    kind: ReceiverKind<T>,
}

#[derive(Debug)]
enum ReceiverKind<T> {
    Memory(Arc<Downstream<T>>),
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
    /// Sends `message`, waiting while every place is taken by an unacknowledged one. A call that is
    /// cancelled while it waits has sent nothing.
    ///
    /// # Errors
    /// When the stream is closed, before the call or during it; the message was not sent.
    pub async fn send(&self, message: T) -> Result<(), Closed> {
        self.memory().send(message).await
    }

    /// As [`Self::send`], for compute threads: blocks the thread.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn send_blocking(&self, message: T) -> Result<(), Closed> {
        self.memory().send_blocking(message)
    }

    /// Sends `message` if there is a place for it now.
    ///
    /// # Errors
    /// When there is none or the stream is closed; the message comes back.
    pub fn try_send(&self, message: T) -> Result<(), Unsent<T>> {
        self.memory().try_send(message)
    }

    /// Ends the stream for all its senders. What was sent is still delivered, and redelivered, until
    /// all of it is settled.
    pub fn close(&self) {
        self.memory().close(ClosedBy::Senders);
    }
}

impl<T: Message + Clone + Send + Sync + 'static> Receiver<T> {
    /// The next message: the oldest that is queued, returned ones included. A call that is cancelled
    /// while it waits has taken nothing.
    ///
    /// # Errors
    /// When the stream is closed and all that was sent is settled. While any message is in another
    /// receiver's hands the call waits, since that message may come back.
    pub async fn receive(&self) -> Result<Delivery<T>, Closed> {
        self.memory().receive().await.map(Delivery::memory)
    }

    /// As [`Self::receive`], for compute threads: blocks the thread.
    ///
    /// # Errors
    /// As [`Self::receive`].
    pub fn receive_blocking(&self) -> Result<Delivery<T>, Closed> {
        self.memory().receive_blocking().map(Delivery::memory)
    }

    /// As [`Self::receive_blocking`], but gives up with `None` after `timeout`. In async code, put a
    /// timeout around [`Self::receive`] instead.
    ///
    /// # Errors
    /// As [`Self::receive`].
    pub fn receive_timeout(&self, timeout: Duration) -> Result<Option<Delivery<T>>, Closed> {
        Ok(self
            .memory()
            .receive_timeout(timeout)?
            .map(Delivery::memory))
    }

    /// The next message if one is queued now; `None` also when the stream has ended.
    pub fn try_receive(&self) -> Option<Delivery<T>> {
        self.memory().try_receive().map(Delivery::memory)
    }

    /// The messages that were given up since the last call, oldest first; each is handed out once. Of
    /// those nobody fetches, the newest `capacity` are kept.
    #[must_use = "a dead letter is handed out once"]
    pub fn dead_letters(&self) -> Vec<DeadLetter<T>> {
        self.memory().take_dead_letters()
    }
}

impl<T> Sender<T> {
    fn memory(&self) -> &Arc<Queue<T>> {
        match &self.kind {
            SenderKind::Memory(upstream) => &upstream.0,
        }
    }
}

impl<T> Receiver<T> {
    fn memory(&self) -> &Arc<Queue<T>> {
        match &self.kind {
            ReceiverKind::Memory(downstream) => &downstream.0,
        }
    }
}

/// What both ends can tell about their stream, for metrics.
macro_rules! gauges {
    ($($end:ident),*) => {
        $(impl<T> $end<T> {
            /// The stream's name.
            #[must_use]
            pub fn name(&self) -> &'static str {
                self.memory().name()
            }

            /// How many messages may be unacknowledged.
            #[must_use]
            pub fn capacity(&self) -> usize {
                self.memory().limits().capacity.get()
            }

            /// How many messages wait for a receiver.
            #[must_use]
            pub fn depth(&self) -> u64 {
                self.counts().queued
            }

            /// How many messages are delivered and not yet acknowledged.
            #[must_use]
            pub fn in_hand(&self) -> u64 {
                self.counts().in_hand
            }

            /// All counts, at one moment.
            #[must_use]
            pub fn counts(&self) -> Counts {
                self.memory().counts()
            }
        })*
    };
}

gauges!(Sender, Receiver);

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        let SenderKind::Memory(upstream) = &self.kind;
        Self {
            kind: SenderKind::Memory(Arc::clone(upstream)),
        }
    }
}

impl<T> Clone for Receiver<T> {
    fn clone(&self) -> Self {
        let ReceiverKind::Memory(downstream) = &self.kind;
        Self {
            kind: ReceiverKind::Memory(Arc::clone(downstream)),
        }
    }
}

#[cfg(test)]
mod tests;
