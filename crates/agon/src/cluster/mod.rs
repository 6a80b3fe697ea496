//! Multi-process runs: the leader, the processes that join it, their membership and status, and the launcher.

mod join;
pub(crate) mod launch;
mod lead;
pub(crate) mod membership;
mod model_files;
pub(crate) mod server_users;
mod session;
pub(crate) mod status;

pub(crate) use join::{join_actor, join_preference};
pub(crate) use lead::lead;
pub(crate) use session::{ClusterSession, ProcessNames};
