//! The transport inside one process: queues and a shelf in memory, for async tasks and for threads
//! alike. It ends with the process; nothing here outlives a crash of the whole run.

mod queue;
mod shelf;

pub(crate) use queue::{Downstream, Held, Queue, Upstream};
pub(crate) use shelf::{Announced, Shelf};
