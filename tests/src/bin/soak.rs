//! A long run of many processes to which something happens all the time: nothing may be lost, and nothing
//! may grow.
//!
//!     cargo build --release && cargo run --release --package house --bin soak -- --minutes 30
//!
//! Every few seconds a random process is killed, asked to leave or stopped for longer than its lease: an
//! actor, a preference service, the learner, the NATS server. Memory, open files, the server's store and
//! the streams are measured all along. In the end the run is asked to stop, resumed, and its books read.

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
use house::{
    Running, Workplace, has_nats_server, number, present, report, signal, status, status_now,
    steps, tiny_bandit,
};
use rand::{Rng, SeedableRng, seq::IndexedRandom};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

/// Befall a run of many processes with faults, and see whether it loses or gathers anything.
#[derive(Parser)]
struct Arguments {
    /// How long.
    #[arg(long, default_value_t = 30.0)]
    minutes: f64,
    /// The seconds between two faults.
    #[arg(long, default_value_t = 20.0)]
    every: f64,
    /// Which faults, and when.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// After how many seconds of silence a process counts as gone.
const LEASE: u64 = 3;

/// Growth of anything beyond this, from the first third of the time to the last, is a leak.
const MOST_GROWTH: f64 = 1.25;

/// What may grow in any case before it is looked at: the allocator's and the file system's grain.
const GRAIN: f64 = 16.0 * 1024.0 * 1024.0;

/// What befalls whom.
const FAULTS: [(&str, &str); 8] = [
    ("actor", "KILL"),
    ("actor", "TERM"),
    ("actor", "STOP"),
    ("preference", "KILL"),
    ("preference", "TERM"),
    ("preference", "STOP"),
    ("learner", "KILL"),
    ("server", "KILL"),
];

/// Something that is measured all along, by its name.
type Readings = BTreeMap<String, Vec<f64>>;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if !has_nats_server() {
        return ExitCode::FAILURE;
    }
    let workplace = Workplace::new();
    let run = workplace.path("run");
    let running = workplace.start(&words(&run, u64::MAX >> 20, false));
    let mut soak = Soak {
        workplace: &workplace,
        run: run.clone(),
        running,
        random: ChaCha8Rng::seed_from_u64(arguments.seed),
        faults: BTreeMap::new(),
        readings: BTreeMap::new(),
    };
    soak.befall(
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
    let taken = step_of(&run);
    let last = taken + 50;
    workplace.run(&words(&run, last, true)).succeeded();

    println!("faults: {faults:?}");
    let wrongs = [lost(&run, last), grown(&readings)].concat();
    for wrong in &wrongs {
        println!("WRONG: {wrong}");
    }
    match wrongs.is_empty() {
        true => {
            println!("{last} steps: nothing was lost, nothing has grown");
            ExitCode::SUCCESS
        }
        false => ExitCode::FAILURE,
    }
}

/// `agon train` on a bandit of three actors and two preference services.
fn words(run: &Path, last: u64, resume: bool) -> Vec<String> {
    let (lease, last) = (
        format!("transport.lease_seconds={LEASE}"),
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
    let mut words = tiny_bandit(run, &sets);
    words.extend(resume.then(|| "--resume".to_owned()));
    words
}

struct Soak<'a> {
    workplace: &'a Workplace,
    run: PathBuf,
    running: Running,
    random: ChaCha8Rng,
    faults: BTreeMap<String, u64>,
    readings: Readings,
}

impl Soak<'_> {
    /// Lets things happen for so long, and looks on.
    fn befall(&mut self, whole: Duration, every: Duration) {
        let begun = Instant::now();
        self.goes_on();
        while begun.elapsed() < whole {
            let next = Instant::now() + every;
            let fault = *FAULTS.choose(&mut self.random).expect("there are faults");
            self.fault(fault);
            self.goes_on();
            self.measure();
            let left = next.saturating_duration_since(Instant::now());
            println!(
                "{:5.0} s  {:10} {:4}  step {}",
                begun.elapsed().as_secs_f64(),
                fault.0,
                fault.1,
                step_of(&self.run)
            );
            sleep(left);
        }
    }

    fn fault(&mut self, (role, name): (&str, &str)) {
        let who = match role {
            "server" => vec![server_of(&self.run)],
            _ => {
                let (workplace, run) = (self.workplace, &self.run);
                self.running.until("somebody to befall", || {
                    let pids: Vec<_> = present(&status(workplace, run), role)
                        .into_iter()
                        .map(|(_, pid)| pid)
                        .collect();
                    (!pids.is_empty()).then_some(pids)
                })
            }
        };
        let who = who[self.random.random_range(0..who.len())];
        signal(who, name);
        if name == "STOP" {
            sleep(Duration::from_secs(2 * LEASE));
            signal(who, "CONT");
        }
        *self.faults.entry(format!("{role} {name}")).or_default() += 1;
    }

    /// Waits until some more steps are taken.
    fn goes_on(&mut self) {
        let (run, from) = (&self.run, step_of(&self.run));
        self.running
            .until("more steps", || (step_of(run) > from + 5).then_some(()));
    }

    /// Reads everything that could grow.
    fn measure(&mut self) {
        let Some(now) = status_now(self.workplace, &self.run) else {
            return;
        };
        let mut read =
            |name: String, value: f64| self.readings.entry(name).or_default().push(value);
        for role in ["learner", "actor", "preference"] {
            let of: Vec<_> = present(&now, role)
                .into_iter()
                .map(|(_, pid)| pid)
                .collect();
            let most = |of_one: fn(u32) -> f64| of.iter().copied().map(of_one).fold(0.0, f64::max);
            read(format!("{role}: bytes of memory"), most(memory));
            read(format!("{role}: open files"), most(open_files));
        }
        let server = server_of(&self.run);
        read("server: bytes of memory".into(), memory(server));
        read("server: open files".into(), open_files(server));
        read(
            "server: bytes of store".into(),
            size(&self.run.join("jetstream")),
        );
        read(
            "bytes of checkpoints".into(),
            size(&self.run.join("checkpoints")),
        );
        for stream in now["streams"].as_array().expect("a list") {
            let name = stream["name"].as_str().expect("a name");
            let waiting = number(stream, "/queued") + number(stream, "/in_hand");
            read(format!("{name}: messages"), waiting);
        }
    }
}

/// What is wrong with the books of a finished run.
fn lost(run: &Path, last: u64) -> Vec<String> {
    let mut wrongs = Vec::new();
    let report: Value = report(run);
    if report["finished"] != true {
        wrongs.push("the run has not finished".into());
    }
    for station in ["actor", "preference", "learner"] {
        let books = &report["stations"][station];
        println!("{station}: {books}");
        if books["conserved"] != true {
            wrongs.push(format!("{station} lost something: {books}"));
        }
    }
    let told: Vec<_> = steps(run)
        .iter()
        .filter_map(|line| line["step"].as_u64())
        .collect();
    if told != (1..=last).collect::<Vec<_>>() {
        wrongs.push("a step was taken twice or never".into());
    }
    wrongs
}

/// What has grown from the first third of the time to the last.
fn grown(readings: &Readings) -> Vec<String> {
    let mut wrongs = Vec::new();
    for (name, values) in readings {
        let third = values.len().div_ceil(3);
        let (first, last) = (
            median(&values[..third]),
            median(&values[values.len() - third..]),
        );
        println!("{name}: {first:.0} at first, {last:.0} at last");
        let grain = if name.contains("bytes") { GRAIN } else { 64.0 };
        if last > first * MOST_GROWTH + grain {
            wrongs.push(format!("{name} has grown from {first:.0} to {last:.0}"));
        }
    }
    wrongs
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(0.0)
}

/// The last step that the journal's end tells of.
fn step_of(run: &Path) -> u64 {
    const END: u64 = 64 * 1024;
    let Ok(mut file) = fs::File::open(run.join("metrics.jsonl")) else {
        return 0;
    };
    let length = file.metadata().map_or(0, |data| data.len());
    let mut text = Vec::new();
    let read = file
        .seek(SeekFrom::Start(length.saturating_sub(END)))
        .and_then(|_| file.read_to_end(&mut text));
    read.expect("the journal can be read");
    let rows = String::from_utf8_lossy(&text);
    let mut rows = rows.lines().rev();
    let last = rows.find_map(|row| serde_json::from_str::<Value>(row).ok()?["step"].as_u64());
    last.unwrap_or(0)
}

fn server_of(run: &Path) -> u32 {
    let config = run.join("jetstream/server.conf");
    house::wait_until("the server's process", || {
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
