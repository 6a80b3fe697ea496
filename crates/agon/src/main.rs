//! `agon`: aligns language models by online self-play.
//!
//! The binary parses the command line, builds the roles, runs and stops them, and maps errors to exit codes.
//! What an actor, a preference service or a learner does is in their own crates.

#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

#[macro_use]
mod terminal;

#[cfg(target_os = "linux")]
mod allocator;
mod assembly;
mod cli;
mod cluster;
mod exit_code;
mod logging;
mod process_tuning;
mod report;
mod run;
mod signals;
mod tournament;

use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};

use cli::{
    actor, bench, check, doctor, eval, export, fit_preference, generate, golden, learner, licenses,
    manifests, metrics, nats_config, nats_watchdog, preference, samples, score, sft, status, train,
    view,
};
use exit_code::UsageError;

/// Align language models by online self-play: actors sample pairs of completions, a judge labels which one
/// is preferred, a learner trains the policy on the labels.
///
/// First steps: `agon train configs/quickstart.toml`. --help after a command describes it.
/// Exit codes: 0 done, 1 failed, 2 bad configuration, 3 missing resource, 4 diverged, 5 interrupted and
/// saved.
#[derive(Parser)]
#[command(name = "agon", version, max_term_width = 100)]
struct AgonCommandLine {
    #[command(subcommand)]
    command: AgonCommand,
}

#[derive(Subcommand)]
enum AgonCommand {
    Train(train::Arguments),
    Learner(learner::Arguments),
    Actor(actor::Arguments),
    Preference(preference::Arguments),
    Status(status::Arguments),
    Manifests(manifests::Arguments),
    NatsConfig(nats_config::Arguments),
    Sft(sft::Arguments),
    FitPreference(fit_preference::Arguments),
    Eval(eval::Arguments),
    Generate(generate::Arguments),
    Golden(golden::Arguments),
    Score(score::Arguments),
    View(view::Arguments),
    Samples(samples::Arguments),
    Report(cli::report::Arguments),
    Metrics(metrics::Arguments),
    Licenses(licenses::Arguments),
    Check(check::Arguments),
    Doctor(doctor::Arguments),
    Export(export::Arguments),
    Tournament(cli::tournament::Arguments),
    Bench(bench::Arguments),
    NatsWatchdog(nats_watchdog::Arguments),
}

impl AgonCommand {
    /// Whether it runs roles of a run, whose files hold samples.
    fn takes_part_in_a_run(&self) -> bool {
        matches!(
            self,
            Self::Train(_)
                | Self::Learner(_)
                | Self::Actor(_)
                | Self::Preference(_)
                | Self::Tournament(_)
        )
    }
}

/// The tokio runtime for waiting; compute has threads of its own.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("agon-wait")
        .enable_all()
        .build()
        .context("failed to start the runtime")
}

fn main() -> ExitCode {
    process_tuning::apply();
    let command = AgonCommandLine::parse().command;
    if command.takes_part_in_a_run() {
        process_tuning::keep_files_private();
    }
    logging::start();
    match check_vector_mode().and_then(|()| run(command)) {
        Ok(code) => code,
        Err(error) => exit_code::report(&error),
    }
}

/// Rejects a value of `AGON_VECTORS` that names no compiled instruction set.
fn check_vector_mode() -> anyhow::Result<()> {
    let invalid = |mode| {
        UsageError(format!(
            "AGON_VECTORS is {mode:?}: it may be plain, avx2 or avx512"
        ))
    };
    Ok(kernels::vectors().map(drop).map_err(invalid)?)
}

fn run(command: AgonCommand) -> anyhow::Result<ExitCode> {
    match command {
        AgonCommand::Train(arguments) => train::run(&arguments),
        AgonCommand::Learner(arguments) => learner::run(&arguments),
        AgonCommand::Actor(arguments) => actor::run(&arguments),
        AgonCommand::Status(arguments) => status::run(&arguments),
        AgonCommand::Manifests(arguments) => manifests::run(&arguments),
        AgonCommand::NatsConfig(arguments) => nats_config::run(&arguments),
        AgonCommand::Preference(arguments) => preference::run(&arguments),
        AgonCommand::Sft(arguments) => sft::run(&arguments),
        AgonCommand::FitPreference(arguments) => fit_preference::run(&arguments),
        AgonCommand::Eval(arguments) => eval::run(&arguments),
        AgonCommand::Generate(arguments) => generate::run(&arguments),
        AgonCommand::Golden(arguments) => golden::run(&arguments),
        AgonCommand::Score(arguments) => score::run(&arguments),
        AgonCommand::View(arguments) => view::run(&arguments),
        AgonCommand::Samples(arguments) => samples::run(&arguments),
        AgonCommand::Report(arguments) => cli::report::run(&arguments),
        AgonCommand::Metrics(arguments) => metrics::run(&arguments),
        AgonCommand::Licenses(arguments) => licenses::run(&arguments),
        AgonCommand::Check(arguments) => check::run(&arguments),
        AgonCommand::Doctor(arguments) => doctor::run(&arguments),
        AgonCommand::Export(arguments) => export::run(&arguments),
        AgonCommand::Tournament(arguments) => cli::tournament::run(&arguments),
        AgonCommand::Bench(arguments) => bench::run(&arguments),
        AgonCommand::NatsWatchdog(arguments) => nats_watchdog::run(&arguments),
    }
}
