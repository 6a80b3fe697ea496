//! Communication between the roles: bounded streams with acknowledgement and redelivery ([`stream()`]), and
//! the [`WeightStore`], which stores and announces versioned weights.
//!
//! Promises, for every backend:
//!
//! - A stream is bounded: a message occupies its slot until it is acknowledged, so a slow consumer exerts
//!   backpressure on senders, even while all messages are in flight and the queue is empty.
//! - Delivery is at least once. A message that is dropped or returned unacknowledged is redelivered before newer
//!   ones. After `max_deliveries` of its [`StreamLimits`] it
//!   [exceeds the delivery limit](Delivery::exceeds_delivery_limit): it must only be recorded and acknowledged. Message
//!   ids make duplicates harmless.
//! - Nothing is lost silently: sent = acknowledged + queued + in flight at every moment, and [`StreamCounts`] counts
//!   each independently.
//! - What only a run's leader may say, its record and the announcements of weights, is signed with the run's key if it
//!   has one, and what is not signed is refused.
//! - Weights are complete before they are announced, and versions only increase. In memory readers share them; on a server
//!   they are a blob whose digest every reader checks.
//!
//! The backend of a [`Transport`] is this process's memory, or a NATS server, whose contents outlive every process.
//! This crate alone knows NATS. It does not know what a message means, who sends it or which prompt it belongs to.

mod delivery;
mod delta;
mod error;
mod memory;
mod nats;
mod run_key;
mod stream;
mod transport;
mod weight_store;

pub use delivery::{Delivery, Receipt};
pub use error::{Closed, ClosedBy, TransportError};
pub use nats::{
    KeptEntry, LeaderLease, Permissions, RegistryEntry, RoleAccess, RunRegistry, check_files,
};
pub use run_key::NewKey;
pub use stream::{Receiver, Sender, StreamCounts, StreamLimits, stream, stream_within};
pub use transport::Transport;
pub use weight_store::{WeightStore, WeightUpdates};
