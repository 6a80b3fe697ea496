//! One command a file: its arguments with their help, and what it does.

pub(crate) mod actor;
pub(crate) mod bench;
pub(crate) mod check;
mod configuration;
pub(crate) mod doctor;
pub(crate) mod eval;
pub(crate) mod export;
pub(crate) mod fit_preference;
pub(crate) mod generate;
pub(crate) mod golden;
pub(crate) mod guard;
pub(crate) mod learner;
pub(crate) mod manifests;
mod membership;
pub(crate) mod metrics;
pub(crate) mod preference;
pub(crate) mod report;
pub(crate) mod samples;
pub(crate) mod score;
pub(crate) mod sft;
pub(crate) mod status;
pub(crate) mod train;
pub(crate) mod view;
