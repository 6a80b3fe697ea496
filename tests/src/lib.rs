//! Tests of the whole house: what they share.
//!
//! The tests run the program as its users do, in a [`Workplace`] of their own, and look at what it says,
//! leaves behind and ends with. This part finds the program, starts it, waits for it with a deadline,
//! and reads its records. It knows nothing of what is inside the program.

mod binary;
mod browser;
mod cluster;
mod ended;
mod http;
mod hub;
mod records;
mod shared;
mod tools;
mod workplace;
mod worlds;

pub use binary::agon_binary;
pub use browser::{Browser, Screen};
pub use cluster::{has_nats_server, present, signal, status, status_now};
pub use ended::Ended;
pub use http::http;
pub use hub::{
    COMMIT as HUB_COMMIT, FakeHub, REPOSITORY as HUB_REPOSITORY, agon_at_hub, run_at_hub,
};
pub use records::{column, metrics, number, report, steps};
pub use shared::shared;
pub use tools::tool;
pub use workplace::{Running, Workplace, wait_until, workspace_root};
pub use worlds::{config, tiny_adapted, tiny_bandit, tiny_playground};
