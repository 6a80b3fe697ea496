//! `agon`: aligns language models by online self-play.
//!
//! The binary knows how to build the roles, run them side by side, stop them, and say how it went. What
//! an actor, a judge or a learner does, their crates know.

#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

#[macro_use]
mod terminal;

mod commands;
mod failure;
mod habits;
mod interrupt;
mod launch;
mod logging;
mod model_hub;
mod overview;
mod plot;
mod presence;
mod report;
mod roles;
mod world;

use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};

use commands::{
    actor, bench, check, doctor, eval, export, fit_preference, generate, golden, guard, learner,
    manifests, metrics, preference, samples, score, sft, status, train, view,
};
use failure::Misuse;

/// Align language models by online self-play: actors answer every prompt twice, a judge says which answer
/// is better, a learner moves the policy toward it.
///
/// First steps: `agon train configs/quickstart.toml`. Every command explains itself with --help.
/// Exit codes: 0 done, 1 failed, 2 bad configuration, 3 missing resource, 4 diverged, 5 interrupted and
/// saved.
#[derive(Parser)]
#[command(name = "agon", version, max_term_width = 100)]
struct CommandLine {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Train(train::Arguments),
    Learner(learner::Arguments),
    Actor(actor::Arguments),
    Preference(preference::Arguments),
    Status(status::Arguments),
    Manifests(manifests::Arguments),
    Sft(sft::Arguments),
    FitPreference(fit_preference::Arguments),
    Eval(eval::Arguments),
    Generate(generate::Arguments),
    Golden(golden::Arguments),
    Score(score::Arguments),
    View(view::Arguments),
    Samples(samples::Arguments),
    Report(commands::report::Arguments),
    Metrics(metrics::Arguments),
    Check(check::Arguments),
    Doctor(doctor::Arguments),
    Export(export::Arguments),
    Bench(bench::Arguments),
    Guard(guard::Arguments),
}

/// The runtime in which everything waits; what computes has threads of its own.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("agon-wait")
        .enable_all()
        .build()
        .context("failed to start the runtime")
}

fn main() -> ExitCode {
    habits::set();
    let command = CommandLine::parse().command;
    logging::start();
    match check_vectors().and_then(|()| run(command)) {
        Ok(code) => code,
        Err(error) => failure::report(&error),
    }
}

/// An error if the environment asks for vectors that nothing is compiled for.
fn check_vectors() -> anyhow::Result<()> {
    let misuse = |asked| {
        Misuse(format!(
            "AGON_VECTORS is {asked:?}: it may be plain, avx2 or avx512"
        ))
    };
    Ok(model::ops::vectors().map(drop).map_err(misuse)?)
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Train(arguments) => train::run(&arguments),
        Command::Learner(arguments) => learner::run(&arguments),
        Command::Actor(arguments) => actor::run(&arguments),
        Command::Status(arguments) => status::run(&arguments),
        Command::Manifests(arguments) => manifests::run(&arguments),
        Command::Preference(arguments) => preference::run(&arguments),
        Command::Sft(arguments) => sft::run(&arguments),
        Command::FitPreference(arguments) => fit_preference::run(&arguments),
        Command::Eval(arguments) => eval::run(&arguments),
        Command::Generate(arguments) => generate::run(&arguments),
        Command::Golden(arguments) => golden::run(&arguments),
        Command::Score(arguments) => score::run(&arguments),
        Command::View(arguments) => view::run(&arguments),
        Command::Samples(arguments) => samples::run(&arguments),
        Command::Report(arguments) => commands::report::run(&arguments),
        Command::Metrics(arguments) => metrics::run(&arguments),
        Command::Check(arguments) => check::run(&arguments),
        Command::Doctor(arguments) => doctor::run(&arguments),
        Command::Export(arguments) => export::run(&arguments),
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Guard(arguments) => guard::run(&arguments),
    }
}
