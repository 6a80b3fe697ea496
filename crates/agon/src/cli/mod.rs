//! The commands, one a file: arguments with their help, and the command itself. Commands do not import from each other;
//! what several need is in the private modules.

mod config_args;
mod join_args;
mod model_args;
mod monitoring;

pub(crate) mod actor;
pub(crate) mod bench;
pub(crate) mod check;
pub(crate) mod doctor;
pub(crate) mod eval;
pub(crate) mod export;
pub(crate) mod fit_preference;
pub(crate) mod generate;
pub(crate) mod golden;
pub(crate) mod learner;
pub(crate) mod licenses;
pub(crate) mod manifests;
pub(crate) mod metrics;
pub(crate) mod nats_config;
pub(crate) mod nats_watchdog;
pub(crate) mod preference;
pub(crate) mod report;
pub(crate) mod samples;
pub(crate) mod score;
pub(crate) mod sft;
pub(crate) mod status;
pub(crate) mod tournament;
pub(crate) mod train;
pub(crate) mod view;
