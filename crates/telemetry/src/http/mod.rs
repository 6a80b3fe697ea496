//! HTTP listeners of this program: the page, the exporter and the preference service.
//!
//! Every listener has the same bounds, so that a slow, silent or hostile client takes a bounded share of the process
//! and never blocks others: a number of connections, a time for the head of a request, a time for a client that does
//! not read its response, and one small buffer each way. [`AccessControl`] decides who is answered. This part does not
//! know what the routes serve.

mod access;
mod connections;
mod drain;
mod serve;
mod stream;

pub use access::{AccessControl, AccessRefusal, is_exposed, read_token};
pub use connections::ConnectionLimits;
pub use drain::drain_requests;
pub use serve::serve;
