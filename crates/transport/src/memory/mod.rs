//! The in-memory backend: queues and a weight store for the tasks and threads of one process, with which their
//! contents end.

mod queue;
mod weight_store;

pub(crate) use queue::{Downstream, InFlightMessage, Queue, Upstream};
pub(crate) use weight_store::{Announced, MemoryWeightStore};
