//! Fuzzing of the parsers of everything that comes from outside, in this process.
//!
//!     cargo run --package fuzz -- jinja --inputs 100000
//!     cargo run --package fuzz -- jinja --first 57 --inputs 1
//!
//! Every input is a mutant of a valid one, determined by target, seed and index. It is accepted, or refused with a
//! message that names the culprit; it neither panics nor takes long. Before each input its index is printed, so that
//! one that ends the process (an overflow of the stack, memory beyond a limit) is known. `tests/parsers.rs` runs every
//! target with a limit on memory.

mod targets;

use std::{
    any::Any,
    io::{self, Write},
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use clap::Parser;
use system_tests::Mutator;
use tempfile::TempDir;

use targets::{Outcome, TARGETS, Target};

/// Time for one input, far above that of any: an input that exceeds it hangs.
const DEADLINE: Duration = Duration::from_secs(60);

/// Longest acceptable message in bytes.
const MAX_MESSAGE_BYTES: usize = 64 << 10;

/// Fuzz a parser with mutants of valid inputs.
#[derive(Parser)]
struct Arguments {
    /// The target; without it their names are printed.
    target: Option<String>,
    /// Seed of the mutations.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Index of the first input.
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Number of inputs.
    #[arg(long, default_value_t = 1000)]
    inputs: u64,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let Some(name) = &arguments.target else {
        TARGETS
            .iter()
            .for_each(|target| println!("{}", target.name));
        return ExitCode::SUCCESS;
    };
    let Some(target) = TARGETS.iter().find(|target| target.name == name) else {
        eprintln!("error: there is no target {name:?}");
        return ExitCode::from(2);
    };
    // Inputs are parsed on threads of the program, whose stacks are smaller than the main thread's.
    thread::scope(|scope| {
        let running = scope.spawn(|| fuzz(target, &arguments));
        running.join().unwrap_or(ExitCode::FAILURE)
    })
}

/// Number of inputs by outcome.
#[derive(Default)]
struct Tally {
    accepted: u64,
    refused: u64,
    violations: u64,
}

fn fuzz(target: &Target, arguments: &Arguments) -> ExitCode {
    let scratch = TempDir::new().expect("a temporary directory");
    let mut input = (target.prepare)(scratch.path());
    let started = watch();
    let clock = Instant::now();
    let mut tally = Tally::default();
    for index in arguments.first..arguments.first + arguments.inputs {
        println!("{index}");
        io::stdout().flush().expect("standard output is open");
        started.store(1 + clock.elapsed().as_millis() as u64, Ordering::Relaxed);
        let mut mutator = Mutator::new(target.name, arguments.seed, index);
        let outcome = catch_unwind(AssertUnwindSafe(|| input(&mut mutator)));
        let outcome = outcome.unwrap_or_else(|panic| Outcome::Violation(panic_message(&*panic)));
        match violation(outcome, &mut tally) {
            None => {}
            Some(violation) => {
                tally.violations += 1;
                let (name, seed) = (target.name, arguments.seed);
                eprintln!("VIOLATION {name} --seed {seed} --first {index} --inputs 1: {violation}");
            }
        }
    }
    started.store(0, Ordering::Relaxed);
    let Tally {
        accepted,
        refused,
        violations,
    } = tally;
    println!("done accepted={accepted} refused={refused} violations={violations}");
    match violations {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

/// Starts a thread that ends the process when an input exceeds its time. Returns the time at which the current input
/// was started, in milliseconds since this call; 0: none is running.
fn watch() -> Arc<AtomicU64> {
    let started = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&started);
    let clock = Instant::now();
    thread::spawn(move || {
        loop {
            thread::sleep(Duration::from_secs(1));
            let since = seen.load(Ordering::Relaxed);
            let elapsed = (clock.elapsed().as_millis() as u64).saturating_sub(since);
            if since > 0 && elapsed > DEADLINE.as_millis() as u64 {
                eprintln!("VIOLATION: the input hangs");
                std::process::exit(1);
            }
        }
    });
    started
}

/// Counts an outcome; what is wrong with it, if anything is.
fn violation(outcome: Outcome, tally: &mut Tally) -> Option<String> {
    match outcome {
        Outcome::Accepted => {
            tally.accepted += 1;
            None
        }
        Outcome::Violation(reason) => Some(reason),
        Outcome::Refused { message, culprit } => {
            tally.refused += 1;
            if message.len() > MAX_MESSAGE_BYTES {
                return Some(format!("a message of {} bytes", message.len()));
            }
            let is_named = culprit.iter().any(|name| message.contains(name.as_str()));
            (!is_named).then(|| format!("the message names none of {culprit:?}: {message}"))
        }
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    format!("it panicked: {}", text.unwrap_or("without a message"))
}
