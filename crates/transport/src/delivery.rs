//! A message in a consumer's hands, and what the consumer owes for it: an acknowledgement, or its
//! return. Whatever is dropped without one is returned, so a consumer that panics loses nothing.

use std::fmt;

use crate::memory::Held;

/// A received message that is not yet acknowledged. Dropping it returns it for redelivery.
#[must_use = "a delivery that is dropped is delivered again"]
pub struct Delivery<T> {
    kind: Kind<T>,
}

enum Kind<T> {
    Memory(Held<T>),
}

/// What is left of a [`Delivery`] whose message was taken: the right to acknowledge it. Dropping it
/// returns the message for redelivery.
#[derive(Debug)]
#[must_use = "a message whose receipt is dropped is delivered again"]
pub struct Receipt {
    kind: ReceiptKind,
}

#[derive(Debug)]
enum ReceiptKind {
    Memory(Box<dyn Settle>),
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

/// A message that was delivered as often as its stream allows and never acknowledged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetter<T> {
    /// The message itself.
    pub message: T,
    /// How often it was delivered.
    pub deliveries: u32,
}

impl<T> Delivery<T> {
    pub(crate) fn memory(held: Held<T>) -> Self {
        Self {
            kind: Kind::Memory(held),
        }
    }

    /// The message, which stays in the stream's care.
    #[must_use]
    pub fn message(&self) -> &T {
        match &self.kind {
            Kind::Memory(held) => held.message(),
        }
    }

    /// How often this message has been delivered, this time included: 1 for the first.
    #[must_use]
    pub fn deliveries(&self) -> u32 {
        match &self.kind {
            Kind::Memory(held) => held.deliveries(),
        }
    }

    /// Ends the message's stay in the stream and frees its place. To be called once whatever was made
    /// of the message is stored, not before.
    pub fn acknowledge(self) {
        match self.kind {
            Kind::Memory(held) => held.acknowledge(),
        }
    }

    /// Gives the message back unused: it is delivered again, before newer ones. Counts as a delivery.
    pub fn return_for_redelivery(self) {
        drop(self);
    }
}

impl<T: Clone + Send + Sync + 'static> Delivery<T> {
    /// The message by value, and the receipt that acknowledges it. The stream keeps the original until
    /// then, so this costs a clone.
    pub fn take(self) -> (T, Receipt) {
        match self.kind {
            Kind::Memory(held) => {
                let message = held.message().clone();
                (
                    message,
                    Receipt {
                        kind: ReceiptKind::Memory(Box::new(held)),
                    },
                )
            }
        }
    }
}

impl Receipt {
    /// As [`Delivery::acknowledge`].
    pub fn acknowledge(self) {
        match self.kind {
            ReceiptKind::Memory(held) => held.acknowledge(),
        }
    }

    /// As [`Delivery::return_for_redelivery`].
    pub fn return_for_redelivery(self) {
        drop(self);
    }
}

impl<T> fmt::Debug for Delivery<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Kind::Memory(held) = &self.kind;
        f.debug_tuple("Delivery").field(held).finish()
    }
}
