//! Support code of the system tests.
//!
//! The tests run the built program in a [`Sandbox`] and check its output, its files and its exit code. This crate finds
//! the program, starts it, waits for it with a timeout and reads the files of a run. It does not depend on the
//! program's internals.

mod binary;
mod browser;
mod cluster;
mod fake_chat;
mod fake_hub;
mod faulty_proxy;
mod http;
mod licences;
mod mutator;
mod nats_server;
mod process_output;
mod raw_nats;
mod run_files;
mod sandbox;
mod shared;
mod smollm2;
mod tiny_runs;
mod tools;

pub use binary::agon_binary;
pub use browser::{Browser, Screen};
pub use cluster::{has_nats_server, present, signal, status, status_now};
pub use fake_chat::{FakeChat, FakeChatRequest, FakeChatResponse};
pub use fake_hub::{
    COMMIT as HUB_COMMIT, FakeHub, HubLies, REPOSITORY as HUB_REPOSITORY, agon_with_hub,
    run_with_hub,
};
pub use faulty_proxy::FaultyProxy;
pub use http::http;
pub use licences::{dependencies, is_satisfied, third_party_notices};
pub use mutator::Mutator;
pub use nats_server::{NatsServer, free_port};
pub use process_output::ProcessOutput;
pub use raw_nats::RawNats;
pub use run_files::{column, metrics, number, report, steps};
pub use sandbox::{RunningProcess, Sandbox, make_pipe, wait_until, workspace_root};
pub use shared::shared;
pub use smollm2::smollm2;
pub use tiny_runs::{config, tiny_adapted, tiny_bandit, tiny_playground};
pub use tools::tool;
