//! Metrics of a process and of a learner step: names, values, and the Prometheus exporter.

pub(crate) mod declaration;
pub(crate) mod exporter;
pub(crate) mod measurements;
pub(crate) mod reference;
pub(crate) mod registry;
pub(crate) mod stage;
pub(crate) mod table;
pub(crate) mod waits;
