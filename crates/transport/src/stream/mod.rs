//! Sender and receiver of a stream, for every backend. Both can be cloned.

use std::num::{NonZeroU32, NonZeroUsize};
use std::sync::Arc;
use std::time::Duration;

use messages::wire::WireMessage;

use crate::memory::{Downstream, Queue, Upstream};
use crate::{
    delivery::Delivery,
    error::{ClosedBy, TransportError},
    nats,
};

/// Capacity and delivery limit of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamLimits {
    /// Maximum number of unacknowledged messages, queued and in flight.
    pub capacity: NonZeroUsize,
    /// Number of deliveries after which a message [exceeds the limit](Delivery::exceeds_delivery_limit).
    pub max_deliveries: NonZeroU32,
}

impl StreamLimits {
    /// Default of `max_deliveries`.
    pub const MAX_DELIVERIES: NonZeroU32 = NonZeroU32::new(5).expect("five is not zero");

    /// Limits with this capacity and [`Self::MAX_DELIVERIES`].
    #[must_use]
    pub fn of(capacity: NonZeroUsize) -> Self {
        Self {
            capacity,
            max_deliveries: Self::MAX_DELIVERIES,
        }
    }
}

/// A consistent snapshot of a stream's counters. Each is counted independently, so that
/// `sent = acknowledged + queued + in_flight` shows that nothing was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StreamCounts {
    /// Messages accepted from senders.
    pub sent: u64,
    /// Messages acknowledged.
    pub acknowledged: u64,
    /// Messages waiting for a receiver.
    pub queued: u64,
    /// Messages delivered and not yet acknowledged.
    pub in_flight: u64,
    /// Returns to the queue; one message may be returned several times. Over JetStream: messages currently being
    /// redelivered.
    pub redelivered: u64,
    /// Messages that exceeded the delivery limit. Over JetStream: messages of this stream that the run's dead-letter
    /// stream holds, with those that were invalid or could not be decoded.
    pub dead_lettered: u64,
}

/// The sending end of a stream. In memory the stream closes when the last clone is dropped.
#[derive(Debug)]
pub struct Sender<T> {
    backend: SenderBackend<T>,
}

#[derive(Debug)]
enum SenderBackend<T> {
    Memory(Arc<Upstream<T>>),
    JetStream(Arc<nats::Upstream>),
}

/// The receiving end of a stream. Clones share the messages: each is delivered to one of them at a time. In memory
/// the stream accepts no more messages when the last clone is dropped.
#[derive(Debug)]
pub struct Receiver<T> {
    backend: ReceiverBackend<T>,
}

#[derive(Debug)]
enum ReceiverBackend<T> {
    Memory(Arc<Downstream<T>>),
    JetStream(Arc<nats::Downstream<T>>),
}

/// A stream in memory of at most `capacity` unacknowledged messages. `name` appears in errors and logs.
///
/// # Panics
/// When `capacity` is zero.
#[must_use]
pub fn stream<T>(name: &'static str, capacity: usize) -> (Sender<T>, Receiver<T>)
where
    T: WireMessage + Clone + Send + Sync + 'static,
{
    let capacity = NonZeroUsize::new(capacity).expect("a stream has room for at least one message");
    stream_within(name, StreamLimits::of(capacity))
}

/// A stream in memory with the given limits. `name` appears in errors and logs.
#[must_use]
pub fn stream_within<T>(name: &'static str, limits: StreamLimits) -> (Sender<T>, Receiver<T>)
where
    T: WireMessage + Clone + Send + Sync + 'static,
{
    let queue = Queue::new(name, limits);
    let upstream = SenderBackend::Memory(Arc::new(Upstream(Arc::clone(&queue))));
    let downstream = ReceiverBackend::Memory(Arc::new(Downstream(queue)));
    (
        Sender { backend: upstream },
        Receiver {
            backend: downstream,
        },
    )
}

impl<T: WireMessage + Clone + Send + Sync + 'static> Sender<T> {
    pub(crate) fn over_jetstream(upstream: Arc<nats::Upstream>) -> Self {
        Self {
            backend: SenderBackend::JetStream(upstream),
        }
    }

    /// Sends `message` and returns once it is stored; waits while the stream is full. Cancel-safe in memory. Over
    /// JetStream a cancelled call may have sent it; sending it again stores it once.
    ///
    /// # Errors
    /// When the stream is or becomes closed, or the server does not answer; the message was not sent, as far as
    /// known.
    pub async fn send(&self, message: T) -> Result<(), TransportError> {
        match &self.backend {
            SenderBackend::Memory(upstream) => Ok(upstream.0.send(message).await?),
            SenderBackend::JetStream(upstream) => upstream.send(&message).await,
        }
    }

    /// Closes a stream in memory for all its senders. Messages already sent are still delivered and redelivered
    /// until acknowledged. No effect over JetStream, where a stream outlives its senders.
    pub fn close(&self) {
        if let SenderBackend::Memory(upstream) = &self.backend {
            upstream.0.close(ClosedBy::Senders);
        }
    }
}

impl<T: WireMessage + Clone + Send + Sync + 'static> Receiver<T> {
    pub(crate) fn over_jetstream(downstream: Arc<nats::Downstream<T>>) -> Self {
        Self {
            backend: ReceiverBackend::JetStream(downstream),
        }
    }

    /// Receives the oldest queued message, returned ones included. Cancel-safe.
    ///
    /// # Errors
    /// When the stream is closed and everything sent is acknowledged: while any message is in flight at another
    /// receiver the call waits, since that message may be returned. Over JetStream, when the server does not
    /// answer.
    pub async fn receive(&self) -> Result<Delivery<T>, TransportError> {
        match &self.backend {
            ReceiverBackend::Memory(downstream) => {
                Ok(Delivery::memory(downstream.0.receive().await?))
            }
            ReceiverBackend::JetStream(downstream) => downstream.receive().await,
        }
    }

    /// Receives a message if one is available; `None` also when the stream is closed.
    pub fn try_receive(&self) -> Option<Delivery<T>> {
        match &self.backend {
            ReceiverBackend::Memory(downstream) => downstream.0.try_receive().map(Delivery::memory),
            ReceiverBackend::JetStream(downstream) => downstream.try_receive(),
        }
    }

    /// Redelivers orphaned messages: those that a killed server restored but considers delivered. To be called
    /// periodically from one process of a run; orphans found in two successive calls are redelivered. There are
    /// none in memory. Returns whether anything was redelivered.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn reclaim(&self) -> Result<bool, TransportError> {
        match &self.backend {
            ReceiverBackend::Memory(_) => Ok(false),
            ReceiverBackend::JetStream(downstream) => downstream.reclaim().await,
        }
    }

    /// Sets the number of messages fetched per request over JetStream.
    pub fn prefetch(&self, messages: usize) {
        if let ReceiverBackend::JetStream(downstream) = &self.backend {
            downstream.prefetch(messages);
        }
    }
}

/// Accessors of both ends.
macro_rules! accessors {
    ($($end:ident, $backend:ident);*) => {
        $(impl<T> $end<T> {
            /// Name of the stream.
            #[must_use]
            pub fn name(&self) -> &'static str {
                match &self.backend {
                    $backend::Memory(end) => end.0.name(),
                    $backend::JetStream(end) => end.name(),
                }
            }

            /// Time in which the server was away so far, in all outages together; none in memory. A deadline for
            /// progress does not count it.
            #[must_use]
            pub fn outage_time(&self) -> Duration {
                match &self.backend {
                    $backend::Memory(_) => Duration::ZERO,
                    $backend::JetStream(end) => end.outage_time(),
                }
            }

            /// Snapshot of the counters.
            ///
            /// # Errors
            /// When the server does not answer.
            pub async fn counts(&self) -> Result<StreamCounts, TransportError> {
                match &self.backend {
                    $backend::Memory(end) => Ok(end.0.counts()),
                    $backend::JetStream(end) => end.counts().await,
                }
            }
        })*
    };
}

accessors!(Sender, SenderBackend; Receiver, ReceiverBackend);

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        let backend = match &self.backend {
            SenderBackend::Memory(upstream) => SenderBackend::Memory(Arc::clone(upstream)),
            SenderBackend::JetStream(upstream) => SenderBackend::JetStream(Arc::clone(upstream)),
        };
        Self { backend }
    }
}

impl<T> Clone for Receiver<T> {
    fn clone(&self) -> Self {
        let backend = match &self.backend {
            ReceiverBackend::Memory(downstream) => ReceiverBackend::Memory(Arc::clone(downstream)),
            ReceiverBackend::JetStream(downstream) => {
                ReceiverBackend::JetStream(Arc::clone(downstream))
            }
        };
        Self { backend }
    }
}

#[cfg(test)]
mod tests;
