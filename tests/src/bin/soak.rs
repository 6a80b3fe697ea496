//! Soak test: a long multi-process run with injected faults must neither lose data nor leak resources.
//!
//!     cargo build --release && cargo run --release --package system-tests --bin soak -- --minutes 30
//!
//! Every few seconds a random process (an actor, a preference service, the learner or the NATS server) is killed,
//! terminated or suspended for longer than its lease. Memory, open files, the server's store and the streams are
//! sampled throughout. At the end the run is stopped and resumed, and its counters are checked.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    thread::sleep,
    time::{Duration, Instant},
};

use clap::Parser;
use rand::{Rng, SeedableRng, seq::IndexedRandom};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;
use system_tests::{
    RunningProcess, Sandbox, has_nats_server, number, present, report, signal, status, status_now,
    steps, tiny_bandit,
};

/// Inject faults into a multi-process run and check that it neither loses data nor leaks resources.
#[derive(Parser)]
struct Arguments {
    /// Duration in minutes.
    #[arg(long, default_value_t = 30.0)]
    minutes: f64,
    /// Interval between two faults, in seconds.
    #[arg(long, default_value_t = 20.0)]
    every: f64,
    /// Seed of the sequence of faults.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// Lease of a participant, in seconds.
const LEASE_SECONDS: u64 = 3;

/// Maximum growth factor of a measurement from the first third of the time to the last.
const MAX_GROWTH: f64 = 1.25;

/// Absolute growth in bytes that is tolerated: granularity of the allocator and the file system.
const BYTES_TOLERANCE: f64 = 16.0 * 1024.0 * 1024.0;

/// A fault: a signal to a process of a role.
#[derive(Clone, Copy)]
struct Fault {
    role: &'static str,
    signal: &'static str,
}

const FAULTS: [Fault; 8] = [
    Fault {
        role: "actor",
        signal: "KILL",
    },
    Fault {
        role: "actor",
        signal: "TERM",
    },
    Fault {
        role: "actor",
        signal: "STOP",
    },
    Fault {
        role: "preference",
        signal: "KILL",
    },
    Fault {
        role: "preference",
        signal: "TERM",
    },
    Fault {
        role: "preference",
        signal: "STOP",
    },
    Fault {
        role: "learner",
        signal: "KILL",
    },
    Fault {
        role: "server",
        signal: "KILL",
    },
];

/// Time series of measurements, by name.
type Readings = BTreeMap<String, Vec<f64>>;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if !has_nats_server() {
        return ExitCode::FAILURE;
    }
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    let running = sandbox.start(&train_arguments(&run, u64::MAX >> 20, false));
    let mut soak = Soak {
        sandbox: &sandbox,
        run: run.clone(),
        running,
        random: ChaCha8Rng::seed_from_u64(arguments.seed),
        faults: BTreeMap::new(),
        readings: BTreeMap::new(),
    };
    soak.inject_faults(
        Duration::from_secs_f64(arguments.minutes * 60.0),
        Duration::from_secs_f64(arguments.every),
    );
    let Soak {
        running,
        faults,
        readings,
        ..
    } = soak;
    running.terminate();
    running
        .wait()
        .check(5, &["interrupted; saved"])
        .without_panic();
    let completed = last_step(&run);
    let last = completed + 50;
    sandbox.run(&train_arguments(&run, last, true)).succeeded();

    println!("faults: {faults:?}");
    let failures = [lost_data(&run, last), leaks(&readings)].concat();
    for failure in &failures {
        println!("FAILED: {failure}");
    }
    match failures.is_empty() {
        true => {
            println!("{last} steps: no data lost, no leaks");
            ExitCode::SUCCESS
        }
        false => ExitCode::FAILURE,
    }
}

/// Arguments of `agon train` for a bandit with three actors and two preference services.
fn train_arguments(run: &Path, last: u64, resume: bool) -> Vec<String> {
    let (lease, last) = (
        format!("transport.lease_seconds={LEASE_SECONDS}"),
        format!("learner.steps={last}"),
    );
    let sets = [
        "run.name=soak",
        "transport.kind=jetstream",
        "transport.timeout_seconds=60",
        &lease,
        "topology.actors=3",
        "topology.preference=2",
        "topology.max_restarts=1000000",
        "learner.max_staleness=2",
        "learner.save_steps=50",
        "learner.lr_scheduler_type=constant",
        "learner.batch_timeout_seconds=120",
        "telemetry.tensorboard=false",
        &last,
    ];
    let mut arguments = tiny_bandit(run, &sets);
    arguments.extend(resume.then(|| "--resume".to_owned()));
    arguments
}

struct Soak<'a> {
    sandbox: &'a Sandbox,
    run: PathBuf,
    running: RunningProcess,
    random: ChaCha8Rng,
    faults: BTreeMap<String, u64>,
    readings: Readings,
}

impl Soak<'_> {
    /// Injects a fault every `every` for `duration` and takes measurements.
    fn inject_faults(&mut self, duration: Duration, every: Duration) {
        let started = Instant::now();
        self.wait_for_steps();
        while started.elapsed() < duration {
            let next = Instant::now() + every;
            let fault = *FAULTS.choose(&mut self.random).expect("there are faults");
            self.inject(fault);
            self.wait_for_steps();
            self.measure();
            let left = next.saturating_duration_since(Instant::now());
            println!(
                "{:5.0} s  {:10} {:4}  step {}",
                started.elapsed().as_secs_f64(),
                fault.role,
                fault.signal,
                last_step(&self.run)
            );
            sleep(left);
        }
    }

    fn inject(&mut self, fault: Fault) {
        let candidates = match fault.role {
            "server" => vec![server_of(&self.run)],
            role => {
                let (sandbox, run) = (self.sandbox, &self.run);
                self.running.until("a process of the role", || {
                    let pids: Vec<_> = present(&status(sandbox, run), role)
                        .into_iter()
                        .map(|(_, pid)| pid)
                        .collect();
                    (!pids.is_empty()).then_some(pids)
                })
            }
        };
        let pid = candidates[self.random.random_range(0..candidates.len())];
        signal(pid, fault.signal);
        if fault.signal == "STOP" {
            sleep(Duration::from_secs(2 * LEASE_SECONDS));
            signal(pid, "CONT");
        }
        *self
            .faults
            .entry(format!("{} {}", fault.role, fault.signal))
            .or_default() += 1;
    }

    /// Waits until a few more steps have completed.
    fn wait_for_steps(&mut self) {
        let (run, from) = (&self.run, last_step(&self.run));
        self.running
            .until("more steps", || (last_step(run) > from + 5).then_some(()));
    }

    /// Samples every quantity that could leak.
    fn measure(&mut self) {
        let Some(now) = status_now(self.sandbox, &self.run) else {
            return;
        };
        let mut record =
            |name: String, value: f64| self.readings.entry(name).or_default().push(value);
        for role in ["learner", "actor", "preference"] {
            let pids: Vec<_> = present(&now, role)
                .into_iter()
                .map(|(_, pid)| pid)
                .collect();
            let largest =
                |measure: fn(u32) -> f64| pids.iter().copied().map(measure).fold(0.0, f64::max);
            record(format!("{role}: bytes of memory"), largest(memory));
            record(format!("{role}: open files"), largest(open_files));
        }
        let server = server_of(&self.run);
        record("server: bytes of memory".into(), memory(server));
        record("server: open files".into(), open_files(server));
        record(
            "server: bytes of store".into(),
            size(&self.run.join("jetstream")),
        );
        record(
            "bytes of checkpoints".into(),
            size(&self.run.join("checkpoints")),
        );
        for stream in now["streams"].as_array().expect("a list") {
            let name = stream["name"].as_str().expect("a name");
            let waiting = number(stream, "/queued") + number(stream, "/in_flight");
            record(format!("{name}: messages"), waiting);
        }
    }
}

/// Conservation errors of a finished run.
fn lost_data(run: &Path, last: u64) -> Vec<String> {
    let mut failures = Vec::new();
    let report: Value = report(run);
    if report["finished"] != true {
        failures.push("the run has not finished".into());
    }
    for stage in ["actor", "preference", "learner"] {
        let counters = &report["stages"][stage];
        println!("{stage}: {counters}");
        if counters["conserved"] != true {
            failures.push(format!("{stage} lost something: {counters}"));
        }
    }
    let logged: Vec<_> = steps(run)
        .iter()
        .filter_map(|line| line["step"].as_u64())
        .collect();
    if logged != (1..=last).collect::<Vec<_>>() {
        failures.push("a step is missing or was repeated".into());
    }
    failures
}

/// Measurements that have grown from the first third of the time to the last.
fn leaks(readings: &Readings) -> Vec<String> {
    let mut failures = Vec::new();
    for (name, values) in readings {
        let third = values.len().div_ceil(3);
        let (first, last) = (
            median(&values[..third]),
            median(&values[values.len() - third..]),
        );
        println!("{name}: {first:.0} at first, {last:.0} at last");
        let tolerance = if name.contains("bytes") {
            BYTES_TOLERANCE
        } else {
            64.0
        };
        if last > first * MAX_GROWTH + tolerance {
            failures.push(format!("{name} has grown from {first:.0} to {last:.0}"));
        }
    }
    failures
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
}

/// The last step in the metrics journal, read from its end.
fn last_step(run: &Path) -> u64 {
    const TAIL_BYTES: u64 = 64 * 1024;
    let Ok(mut file) = fs::File::open(run.join("metrics.jsonl")) else {
        return 0;
    };
    let length = file.metadata().map_or(0, |data| data.len());
    let mut text = Vec::new();
    let read = file
        .seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))
        .and_then(|_| file.read_to_end(&mut text));
    read.expect("the journal can be read");
    let rows = String::from_utf8_lossy(&text);
    let mut rows = rows.lines().rev();
    let last = rows.find_map(|row| serde_json::from_str::<Value>(row).ok()?["step"].as_u64());
    last.unwrap_or(0)
}

fn server_of(run: &Path) -> u32 {
    let config = run.join("jetstream/server.conf");
    system_tests::wait_until("the server's process", || {
        let found = Command::new("pgrep")
            .args(["-f", &config.to_string_lossy()])
            .output();
        let found = String::from_utf8(found.expect("pgrep").stdout).expect("process ids");
        found.trim().parse().ok()
    })
}

/// The resident memory of a process, in bytes.
fn memory(pid: u32) -> f64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kibibytes = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<f64>().ok());
    kibibytes.unwrap_or(0.0) * 1024.0
}

fn open_files(pid: u32) -> f64 {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0.0, |entries| entries.count() as f64)
}

/// The bytes of all files below a folder.
fn size(folder: &Path) -> f64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => size(&entry.path()),
            _ => entry.metadata().map_or(0.0, |data| data.len() as f64),
        })
        .sum()
}
