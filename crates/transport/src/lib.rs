//! What lies between the roles: bounded streams with acknowledgement and redelivery, made by
//! [`stream()`], and the [`WeightsShelf`], where finished weights lie and are announced.
//!
//! What is promised, whatever kind of transport is behind it:
//!
//! - A stream is bounded: a message keeps its place until it is acknowledged, so a slow consumer is
//!   felt by whoever sends, even while the messages are in its hands and the queue is empty.
//! - Delivery is at least once. A message that is dropped or returned unacknowledged is delivered
//!   again, before newer ones, until it has been delivered as often as [`Limits`] allow; then it is a
//!   [`DeadLetter`]. Ids in the messages make a second delivery harmless.
//! - Nothing is lost silently: sent = acknowledged + dead + queued + in hand, at every moment, and
//!   [`Counts`] counts each by itself.
//! - Weights are complete before they are announced, versions only grow, and digests are checked when
//!   weights are laid down and again when they are taken.
//!
//! Streams and shelf live in this process's memory and end with it. They do not know what a message
//! means, who sends it or which prompt it belongs to.

mod delivery;
mod error;
mod memory;
mod shelf;
mod stream;

pub use delivery::{DeadLetter, Delivery, Receipt};
pub use error::{Closed, ClosedBy, TransportError, Unsent};
pub use shelf::{Announcements, WeightsShelf};
pub use stream::{Counts, Limits, Receiver, Sender, stream, stream_within};
