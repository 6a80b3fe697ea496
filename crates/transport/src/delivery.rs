//! Received messages, which the consumer acknowledges or returns. A delivery that is dropped is returned, so a
//! consumer that panics loses nothing.

use std::fmt;
use std::future::ready;

use futures_util::future::BoxFuture;
use messages::wire::{self, WireMessage};

use crate::memory::InFlightMessage;
use crate::nats::HeldMessage;

/// A received message that is not yet acknowledged. Dropping it returns it for redelivery.
#[must_use = "a delivery that is dropped is delivered again"]
pub struct Delivery<T> {
    backend: DeliveryBackend<T>,
}

enum DeliveryBackend<T> {
    Memory(InFlightMessage<T>),
    JetStream(T, HeldMessage),
}

/// The acknowledgement handle of a [`Delivery`] whose message was taken. Dropping it returns the message for
/// redelivery.
#[derive(Debug)]
#[must_use = "a message whose receipt is dropped is delivered again"]
pub struct Receipt {
    settle: Box<dyn Settle>,
}

/// A type-erased delivery; dropping it returns the message.
trait Settle: fmt::Debug + Send + Sync {
    fn acknowledge(self: Box<Self>);
    /// Copies the message, whose encoding is `payload`, to the dead letters.
    fn dead_letter(self: Box<Self>, payload: Vec<u8>) -> BoxFuture<'static, ()>;
}

impl<T: Send + Sync + 'static> Settle for InFlightMessage<T> {
    fn acknowledge(self: Box<Self>) {
        Self::acknowledge(*self);
    }

    /// A message in memory is of this process, which has logged it: there is no sender to find.
    fn dead_letter(self: Box<Self>, _payload: Vec<u8>) -> BoxFuture<'static, ()> {
        Self::acknowledge(*self);
        Box::pin(ready(()))
    }
}

impl Settle for HeldMessage {
    fn acknowledge(self: Box<Self>) {
        Self::acknowledge(*self);
    }

    fn dead_letter(self: Box<Self>, payload: Vec<u8>) -> BoxFuture<'static, ()> {
        Box::pin(Self::dead_letter(*self, payload))
    }
}

impl<T> Delivery<T> {
    pub(crate) fn memory(message: InFlightMessage<T>) -> Self {
        Self {
            backend: DeliveryBackend::Memory(message),
        }
    }

    pub(crate) fn jetstream(message: T, held: HeldMessage) -> Self {
        Self {
            backend: DeliveryBackend::JetStream(message, held),
        }
    }

    /// The message, which stays in the stream.
    #[must_use]
    pub fn message(&self) -> &T {
        match &self.backend {
            DeliveryBackend::Memory(message) => message.message(),
            DeliveryBackend::JetStream(message, _) => message,
        }
    }

    /// Number of deliveries of this message, this one included.
    #[must_use]
    pub fn deliveries(&self) -> u32 {
        match &self.backend {
            DeliveryBackend::Memory(message) => message.deliveries(),
            DeliveryBackend::JetStream(_, held) => held.deliveries(),
        }
    }

    /// Whether the message exceeded the stream's delivery limit. It must not be processed, only recorded and
    /// acknowledged.
    #[must_use]
    pub fn exceeds_delivery_limit(&self) -> bool {
        match &self.backend {
            DeliveryBackend::Memory(message) => message.exceeds_delivery_limit(),
            DeliveryBackend::JetStream(_, held) => held.exceeds_delivery_limit(),
        }
    }

    /// Removes the message from the stream and frees its slot. To be called only after the results of processing
    /// are stored.
    pub fn acknowledge(self) {
        match self.backend {
            DeliveryBackend::Memory(message) => message.acknowledge(),
            DeliveryBackend::JetStream(_, held) => held.acknowledge(),
        }
    }

    /// Returns the message: it is redelivered before newer ones. Counts as a delivery.
    pub fn return_for_redelivery(self) {
        drop(self);
    }
}

impl<T: Clone + Send + Sync + 'static> Delivery<T> {
    /// The message by value, with the receipt that acknowledges it. Clones the message of a stream in memory, which
    /// keeps the original until then.
    pub fn take(self) -> (T, Receipt) {
        let (message, settle): (T, Box<dyn Settle>) = match self.backend {
            DeliveryBackend::Memory(message) => (message.message().clone(), Box::new(message)),
            DeliveryBackend::JetStream(message, held) => (message, Box::new(held)),
        };
        (message, Receipt { settle })
    }
}

impl Receipt {
    /// As [`Delivery::acknowledge`].
    pub fn acknowledge(self) {
        self.settle.acknowledge();
    }

    /// Removes an invalid message from the stream and frees its slot: over JetStream a copy goes to the run's
    /// dead-letter stream. `message` is the one of this receipt.
    pub async fn dead_letter<T: WireMessage>(self, message: &T) {
        let payload = wire::encode(message);
        self.settle.dead_letter(payload).await;
    }

    /// As [`Delivery::return_for_redelivery`].
    pub fn return_for_redelivery(self) {
        drop(self);
    }
}

impl<T> fmt::Debug for Delivery<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state: &dyn fmt::Debug = match &self.backend {
            DeliveryBackend::Memory(message) => message,
            DeliveryBackend::JetStream(_, held) => held,
        };
        f.debug_tuple("Delivery").field(state).finish()
    }
}
