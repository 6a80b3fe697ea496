//! What lies between the roles: bounded streams with acknowledgement and redelivery, made by
//! [`stream()`], and the [`WeightsShelf`], where finished weights lie and are announced.
//!
//! What is promised, whatever kind of transport is behind it:
//!
//! - A stream is bounded: a message keeps its place until it is acknowledged, so a slow consumer is
//!   felt by whoever sends, even while the messages are in its hands and the queue is empty.
//! - Delivery is at least once. A message that is dropped or returned unacknowledged is delivered
//!   again, before newer ones. Once it has been delivered as often as [`Limits`] allow it is
//!   [given up](Delivery::is_given_up), and only to be noted. Ids in the messages make a second delivery
//!   harmless.
//! - Nothing is lost silently: sent = acknowledged + queued + in hand, at every moment, and [`Counts`]
//!   counts each by itself.
//! - Weights are complete before they are announced, versions only grow, and digests are checked when
//!   weights are laid down and again when they are taken.
//!
//! A [`Hub`] is where they lie: in this process's memory, with which they end, or on a NATS server, where
//! they outlive every process. This crate alone knows NATS. It does not know what a message means, who
//! sends it or which prompt it belongs to.

mod delivery;
mod delta;
mod error;
mod hub;
mod jetstream;
mod memory;
mod shelf;
mod stream;

pub use delivery::{Delivery, Receipt};
pub use error::{Closed, ClosedBy, TransportError};
pub use hub::Hub;
pub use jetstream::{Claim, Entry, Register, check_files};
pub use shelf::{Announcements, WeightsShelf};
pub use stream::{Counts, Limits, Receiver, Sender, stream, stream_within};
