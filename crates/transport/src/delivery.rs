//! A message in a consumer's hands, and what the consumer owes for it: an acknowledgement, or its
//! return. Whatever is dropped without one is returned, so a consumer that panics loses nothing.

use std::fmt;

use crate::jetstream::Lease;
use crate::memory::Held;

/// A received message that is not yet acknowledged. Dropping it returns it for redelivery.
#[must_use = "a delivery that is dropped is delivered again"]
pub struct Delivery<T> {
    kind: Kind<T>,
}

enum Kind<T> {
    Memory(Held<T>),
    JetStream(T, Lease),
}

/// What is left of a [`Delivery`] whose message was taken: the right to acknowledge it. Dropping it
/// returns the message for redelivery.
#[derive(Debug)]
#[must_use = "a message whose receipt is dropped is delivered again"]
pub struct Receipt {
    kind: Box<dyn Settle>,
}

/// A delivery whose message type is forgotten; dropping it returns the message.
trait Settle: fmt::Debug + Send + Sync {
    fn acknowledge(self: Box<Self>);
}

impl<T: Send + Sync> Settle for Held<T> {
    fn acknowledge(self: Box<Self>) {
        Self::acknowledge(*self);
    }
}

impl Settle for Lease {
    fn acknowledge(self: Box<Self>) {
        Self::acknowledge(*self);
    }
}

impl<T> Delivery<T> {
    pub(crate) fn memory(held: Held<T>) -> Self {
        Self {
            kind: Kind::Memory(held),
        }
    }

    pub(crate) fn jetstream(message: T, lease: Lease) -> Self {
        Self {
            kind: Kind::JetStream(message, lease),
        }
    }

    /// The message, which stays in the stream's care.
    #[must_use]
    pub fn message(&self) -> &T {
        match &self.kind {
            Kind::Memory(held) => held.message(),
            Kind::JetStream(message, _) => message,
        }
    }

    /// How often this message has been delivered, this time included: 1 for the first.
    #[must_use]
    pub fn deliveries(&self) -> u32 {
        match &self.kind {
            Kind::Memory(held) => held.deliveries(),
            Kind::JetStream(_, lease) => lease.deliveries(),
        }
    }

    /// Whether the message was delivered as often as its stream allows and returned each time. Nobody
    /// is to work on it any more: it only waits to be noted and acknowledged.
    #[must_use]
    pub fn is_given_up(&self) -> bool {
        match &self.kind {
            Kind::Memory(held) => held.is_given_up(),
            Kind::JetStream(_, lease) => lease.is_given_up(),
        }
    }

    /// Ends the message's stay in the stream and frees its place. To be called once whatever was made
    /// of the message is stored, not before.
    pub fn acknowledge(self) {
        match self.kind {
            Kind::Memory(held) => held.acknowledge(),
            Kind::JetStream(_, lease) => lease.acknowledge(),
        }
    }

    /// Gives the message back unused: it is delivered again, before newer ones. Counts as a delivery.
    pub fn return_for_redelivery(self) {
        drop(self);
    }
}

impl<T: Clone + Send + Sync + 'static> Delivery<T> {
    /// The message by value, and the receipt that acknowledges it. A stream in memory keeps the original
    /// until then, so there this costs a clone.
    pub fn take(self) -> (T, Receipt) {
        let (message, kind): (T, Box<dyn Settle>) = match self.kind {
            Kind::Memory(held) => (held.message().clone(), Box::new(held)),
            Kind::JetStream(message, lease) => (message, Box::new(lease)),
        };
        (message, Receipt { kind })
    }
}

impl Receipt {
    /// As [`Delivery::acknowledge`].
    pub fn acknowledge(self) {
        self.kind.acknowledge();
    }

    /// As [`Delivery::return_for_redelivery`].
    pub fn return_for_redelivery(self) {
        drop(self);
    }
}

impl<T> fmt::Debug for Delivery<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let held: &dyn fmt::Debug = match &self.kind {
            Kind::Memory(held) => held,
            Kind::JetStream(_, lease) => lease,
        };
        f.debug_tuple("Delivery").field(held).finish()
    }
}
