//! Multi-process runs over a real NATS server: they end with the same weights as single-process runs and survive faults
//! of any process.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    thread::sleep,
    time::Duration,
};

use serde_json::Value;
use system_tests::{
    ProcessOutput, RawNats, RunningProcess, Sandbox, config, free_port, has_nats_server, number,
    present, report, signal, status, status_now, steps, tiny_bandit, tiny_playground, wait_until,
};

/// A sandbox and a run directory in it; `None` if `nats-server` is not installed.
fn nats_sandbox() -> Option<(Sandbox, PathBuf)> {
    let sandbox = has_nats_server().then(Sandbox::new)?;
    let run = sandbox.path("run");
    Some((sandbox, run))
}

/// Arguments of `agon train` for a short bandit over JetStream, with this run name.
fn jetstream_bandit(run: &Path, name: &str, sets: &[&str]) -> Vec<String> {
    let name = format!("run.name={name}");
    let mut all = vec![
        name.as_str(),
        "transport.kind=jetstream",
        "transport.lease_seconds=2",
        "transport.timeout_seconds=60",
    ];
    all.extend_from_slice(sets);
    tiny_bandit(run, &all)
}

/// Arguments of `agon train` for a longer bandit over JetStream with three actors and two preference services.
fn long_run(run: &Path, name: &str) -> Vec<String> {
    let sets = [
        "topology.actors=3",
        "topology.preference=2",
        "topology.max_restarts=50",
        "learner.max_staleness=2",
        "learner.steps=300",
        "learner.save_steps=20",
        "learner.batch_timeout_seconds=120",
    ];
    jetstream_bandit(run, name, &sets)
}

/// Asserts that the run finished, that every stage conserved its data and that every step was logged exactly once.
fn assert_complete(run: &Path, last: u64) {
    let report = report(run);
    assert_eq!(report["finished"], true);
    for stage in ["actor", "preference", "learner"] {
        let counters = &report["stages"][stage];
        assert_eq!(counters["conserved"], true, "{stage}: {counters:#}");
        assert!(number(counters, "/received") > 0.0, "{stage}: {counters:#}");
    }
    let logged: Vec<_> = steps(run)
        .iter()
        .filter_map(|line| line["step"].as_u64())
        .collect();
    assert_eq!(logged, (1..=last).collect::<Vec<_>>());
    let log = fs::read_to_string(run.join("logs/learner.log")).unwrap_or_default();
    assert!(!log.contains("panicked"), "{log}");
    let rate = number(&report, "/win_rate");
    assert!((0.0..=1.0).contains(&rate), "{rate}");
}

fn last_step(run: &Path) -> u64 {
    steps(run)
        .last()
        .and_then(|line| line["step"].as_u64())
        .unwrap_or(0)
}

/// Waits until `more` further steps have completed.
fn wait_for_steps(running: &mut RunningProcess, run: &Path, more: u64) {
    let from = last_step(run);
    running.until("more steps", || {
        (last_step(run) >= from + more).then_some(())
    });
}

#[test]
fn a_seed_gives_the_same_weights_over_jetstream_and_in_memory() {
    let Some((sandbox, jetstream_run)) = nats_sandbox() else {
        return;
    };
    let memory_run = sandbox.path("memory");
    sandbox.run(&tiny_bandit(&memory_run, &[])).succeeded();
    sandbox
        .run(&jetstream_bandit(&jetstream_run, "same", &[]))
        .succeeded();
    let digest = |run: &Path| report(run)["weights_digest"].clone();
    assert_eq!(digest(&memory_run), digest(&jetstream_run));
    assert_complete(&jetstream_run, 100);
    let delta = sandbox.path("delta");
    let sets = ["transport.weights=delta", "transport.full_every=4"];
    sandbox
        .run(&jetstream_bandit(&delta, "delta", &sets))
        .succeeded();
    assert_eq!(digest(&memory_run), digest(&delta));
}

/// A fault: role of the process, signal, and the signal that ends it, if any.
type SignalFault = (&'static str, &'static str, Option<&'static str>);

#[test]
fn a_run_survives_killed_actors_and_judges() {
    let Some((sandbox, run)) = nats_sandbox() else {
        return;
    };
    let mut running = sandbox.start(&long_run(&run, "faults"));
    let faults: [SignalFault; 5] = [
        ("actor", "KILL", None),
        ("preference", "KILL", None),
        ("actor", "TERM", None),
        ("preference", "TERM", None),
        ("actor", "STOP", Some("CONT")),
    ];
    for (role, name, undo) in faults {
        wait_for_steps(&mut running, &run, 5);
        let process = running.until("a process of the role", || {
            present(&status(&sandbox, &run), role).pop()
        });
        signal(process.1, name);
        if let Some(undo) = undo {
            // Longer than its lease, so that its messages are redelivered to others.
            sleep(Duration::from_secs(5));
            signal(process.1, undo);
        }
        wait_for_steps(&mut running, &run, 5);
    }
    let output = running.wait().succeeded();
    assert!(output.stderr.contains("restarting it"), "{}", output.stderr);
    assert_complete(&run, 300);
}

#[test]
fn a_killed_learner_resumes_from_its_checkpoint() {
    let Some((sandbox, run)) = nats_sandbox() else {
        return;
    };
    let mut running = sandbox.start(&long_run(&run, "learner"));
    for _ in 0..2 {
        wait_for_steps(&mut running, &run, 25);
        let process = running.until("a learner", || {
            present(&status(&sandbox, &run), "learner").pop()
        });
        signal(process.1, "KILL");
        running.until("the next session", || {
            let now = status_now(&sandbox, &run)?;
            let other = present(&now, "learner").pop()?;
            (other.1 != process.1).then_some(())
        });
    }
    running.wait().succeeded();
    assert_complete(&run, 300);
    let sessions = fs::read_to_string(run.join("session")).expect("a run counts its sessions");
    assert_eq!(sessions.trim(), "2");
}

#[test]
fn a_learner_killed_while_saving_resumes_from_the_previous_checkpoint() {
    let Some((sandbox, run)) = nats_sandbox() else {
        return;
    };
    let mut arguments = long_run(&run, "saving");
    arguments.extend(["--set".into(), "learner.save_steps=2".into()]);
    let mut running = sandbox.start(&arguments);
    let checkpoints = run.join("checkpoints");
    let unfinished = || {
        let entries = fs::read_dir(&checkpoints).ok()?.flatten();
        let mut names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        names.find(|name| name.ends_with(".unfinished"))
    };
    let mut interrupted_saves = 0;
    while interrupted_saves < 2 {
        wait_for_steps(&mut running, &run, 5);
        let process = running.until("a learner", || {
            present(&status(&sandbox, &run), "learner").pop()
        });
        running.until("a checkpoint that is being written", unfinished);
        signal(process.1, "KILL");
        running.until("the exit of the learner", || {
            (!Path::new(&format!("/proc/{}", process.1)).exists()).then_some(())
        });
        // The save may have completed just before the signal.
        interrupted_saves += usize::from(unfinished().is_some());
        running.until("the next session", || {
            let now = status_now(&sandbox, &run)?;
            let other = present(&now, "learner").pop()?;
            (other.1 != process.1).then_some(())
        });
    }
    running.wait().succeeded();
    assert_complete(&run, 300);
    assert_eq!(unfinished(), None, "unfinished checkpoints are removed");
}

#[test]
fn non_finite_weights_are_not_published_and_the_run_reports_divergence() {
    let Some((sandbox, run)) = nats_sandbox() else {
        return;
    };
    let sets = [
        "topology.actors=2",
        "learner.learning_rate=1e39",
        "learner.lr_scheduler_type=constant",
    ];
    let output = sandbox.run(&jetstream_bandit(&run, "diverging", &sets));
    output.check(4, &[]).without_panic();
    let log = |name: &str| {
        let path = run.join("logs").join(format!("{name}.log"));
        fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    };
    let text = log("learner");
    for part in [
        "the weights are not finite",
        "rolling back to the last checkpoint",
        "diverged",
    ] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    // The run may end before the second one has joined.
    let actors = ["actor-0", "actor-1"].map(log);
    let joined = |text: &String| text.contains("joined the run");
    assert!(actors.iter().any(joined), "{actors:?}");
    for text in &actors {
        assert!(!text.contains("the logits of a token"), "{text}");
    }
}

#[test]
fn apo_rounds_over_jetstream_survive_a_killed_preference_service() {
    let Some((sandbox, run)) = nats_sandbox() else {
        return;
    };
    let sets = [
        "run.name=apo",
        "transport.kind=jetstream",
        "transport.lease_seconds=2",
        "transport.timeout_seconds=60",
        "topology.actors=2",
        "topology.preference=1",
        "topology.max_restarts=50",
        "learner.steps=24",
        "learner.max_staleness=1",
        "learner.save_steps=2",
        "preference.judge.kind=bradley-terry",
        "preference.fit.pairs.count=60",
        "preference.fit.train_batch_size=16",
        "preference.apo.refresh_steps=8",
        "preference.apo.prompts=6",
        "preference.apo.samples=3",
        "preference.apo.wait=true",
        "preference.apo.min_accuracy=0",
        "preference.apo.max_ece=1",
    ];
    let mut running = sandbox.start(&tiny_playground(&run, &sets));
    let process = running.until("a preference service", || {
        present(&status(&sandbox, &run), "preference").pop()
    });
    // Killed while it trains the model of the second round: its successor must repeat that round and know the first.
    let log = run.join("logs/preference-0.log");
    running.until("the second round", || {
        let text = fs::read_to_string(&log).ok()?;
        text.contains("samples round=2 step=16").then_some(())
    });
    signal(process.1, "KILL");
    let output = running.wait().succeeded();
    assert!(output.stderr.contains("restarting it"), "{}", output.stderr);
    assert_complete(&run, 24);
    let rounds = report(&run)["rounds"].as_array().cloned();
    let rounds: Vec<_> = rounds
        .expect("a report has rounds")
        .iter()
        .map(|round| (round["round"].as_u64(), round["step"].as_u64()))
        .collect();
    assert_eq!(rounds, [(Some(1), Some(8)), (Some(2), Some(16))]);
}

#[test]
fn a_run_over_jetstream_is_deterministic_when_its_learner_is_killed() {
    let Some((sandbox, jetstream_run)) = nats_sandbox() else {
        return;
    };
    let memory_run = sandbox.path("memory");
    let sets = ["learner.steps=300", "learner.save_steps=10"];
    sandbox.run(&tiny_bandit(&memory_run, &sets)).succeeded();
    let mut running = sandbox.start(&jetstream_bandit(&jetstream_run, "killed", &sets));
    wait_for_steps(&mut running, &jetstream_run, 15);
    let process = running.until("a learner", || {
        present(&status(&sandbox, &jetstream_run), "learner").pop()
    });
    signal(process.1, "KILL");
    running.wait().succeeded();
    let digest = |run: &Path| report(run)["weights_digest"].clone();
    assert_eq!(digest(&memory_run), digest(&jetstream_run));
    assert_complete(&jetstream_run, 300);
}

/// Process id of the NATS server that the launcher of a run has started.
fn server_of(run: &Path) -> u32 {
    let config = run.join("jetstream/server.conf");
    let found = Command::new("pgrep")
        .args(["-f", &config.to_string_lossy()])
        .output();
    let found = String::from_utf8(found.expect("pgrep").stdout).expect("process ids");
    found.trim().parse().expect("one process id")
}

#[test]
fn a_killed_server_is_restarted_with_its_store() {
    let Some((sandbox, run)) = nats_sandbox() else {
        return;
    };
    let mut running = sandbox.start(&long_run(&run, "server"));
    wait_for_steps(&mut running, &run, 10);
    signal(server_of(&run), "KILL");
    wait_for_steps(&mut running, &run, 10);
    running.wait().succeeded();
    assert_complete(&run, 300);
}

#[test]
fn a_server_exits_after_its_launcher_once_it_is_unused() {
    let Some((sandbox, run)) = nats_sandbox() else {
        return;
    };
    let mut running = sandbox.start(&long_run(&run, "orphans"));
    wait_for_steps(&mut running, &run, 10);
    // After a restart, the watchdog monitors the new server process.
    signal(server_of(&run), "KILL");
    wait_for_steps(&mut running, &run, 10);
    let port = fs::read_to_string(run.join("jetstream/port")).expect("a server has a port");
    let port: u16 = port.trim().parse().expect("a number");
    let listens = || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok();
    assert!(listens());
    running.kill();
    wait_until("the exit of the server", || (!listens()).then_some(()));
    // It was available until the learner had saved its state.
    let report = report(&run);
    assert_eq!(report["finished"], false, "{report:#}");
}

#[test]
fn a_terminated_run_saves_its_state_and_is_resumed() {
    let Some((sandbox, run)) = nats_sandbox() else {
        return;
    };
    let arguments = long_run(&run, "stopped");
    let mut running = sandbox.start(&arguments);
    wait_for_steps(&mut running, &run, 10);
    running.terminate();
    running
        .wait()
        .check(5, &["interrupted; saved"])
        .without_panic();
    let before = report(&run);
    assert_eq!(before["finished"], false);
    let resume: Vec<String> = arguments
        .into_iter()
        .chain(["--resume".to_owned()])
        .collect();
    sandbox.run(&resume).succeeded();
    assert_complete(&run, 300);
}

/// A NATS server for roles that are started individually.
struct TestNatsServer {
    process: std::process::Child,
    port: u16,
    url: String,
}

impl TestNatsServer {
    fn start(sandbox: &Sandbox) -> Self {
        let store = sandbox.path("store").display().to_string();
        Self::start_with(free_port(), &["-a", "127.0.0.1", "-js", "-sd", &store])
    }

    fn start_with(port: u16, arguments: &[&str]) -> Self {
        let process = Command::new("nats-server")
            .args(arguments)
            .args(["-p", &port.to_string()])
            .stderr(std::process::Stdio::null())
            .spawn()
            .expect("nats-server starts");
        wait_until("the server", || {
            std::net::TcpStream::connect(("127.0.0.1", port)).ok()
        });
        let url = format!("transport.url=nats://127.0.0.1:{port}");
        Self { process, port, url }
    }
}

impl Drop for TestNatsServer {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

/// Arguments of a single role of the run.
fn role_arguments(name: &str, run: &Path, server: &TestNatsServer, sets: &[&str]) -> Vec<String> {
    let mut all = vec![server.url.as_str()];
    all.extend_from_slice(sets);
    let mut arguments = jetstream_bandit(run, "roles", &all);
    arguments[0] = name.to_owned();
    arguments[1] = config("bandit.toml").display().to_string();
    if name == "actor" {
        let at = arguments
            .iter()
            .position(|argument| argument == "--run-dir");
        let at = at.expect("the arguments name a run directory");
        arguments.drain(at..at + 2);
    }
    arguments
}

#[test]
fn roles_join_individually_and_mismatched_ones_are_rejected() {
    let Some((sandbox, run)) = nats_sandbox() else {
        return;
    };
    let server = TestNatsServer::start(&sandbox);
    let more = [
        "learner.steps=300",
        "learner.max_staleness=2",
        "topology.actors=2",
    ];
    // A role that starts before the learner waits for it.
    let actor = sandbox.start(&role_arguments("actor", &run, &server, &more));
    let learner = sandbox.start(&role_arguments("learner", &run, &server, &more));
    wait_until("a run", || status_now(&sandbox, &run));
    let service = sandbox.start(&role_arguments("preference", &run, &server, &more));

    let second = role_arguments("learner", &sandbox.path("other"), &server, &more);
    let rejected = sandbox.run(&second).check(2, &["is alive"]);
    rejected.without_panic();
    let mismatched = [&more[..], &["actor.temperature=0.5"]].concat();
    let message = "actor.temperature is 0.5 here and 1.0 there";
    sandbox
        .run(&role_arguments("actor", &run, &server, &mismatched))
        .check(2, &[message])
        .without_panic();
    let memory = [&more[..], &["transport.kind=memory"]].concat();
    sandbox
        .run(&role_arguments("actor", &run, &server, &memory))
        .check(2, &[])
        .without_panic();

    // An actor may leave, and one that starts late takes part.
    wait_until("some steps", || (last_step(&run) > 20).then_some(()));
    let late = sandbox.start(&role_arguments("actor", &run, &server, &more));
    wait_until("two actors", || {
        (present(&status_now(&sandbox, &run)?, "actor").len() == 2).then_some(())
    });
    actor.terminate();
    actor.wait().succeeded();
    learner.wait().succeeded();
    late.wait().succeeded();
    service.wait().succeeded();
    assert_conserved(&run, 300);
    let status = sandbox.run(&["status", "--connect", &run.to_string_lossy()]);
    status
        .check(2, &["it has finished and was removed"])
        .without_panic();
}

/// Like [`assert_complete`], for a run without the logs of a launcher.
fn assert_conserved(run: &Path, last: u64) {
    let report: Value = report(run);
    assert_eq!(report["steps"], last);
    for stage in ["actor", "preference", "learner"] {
        let counters = &report["stages"][stage];
        assert_eq!(counters["conserved"], true, "{stage}: {counters:#}");
    }
}

/// The files below a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("a folder").flatten() {
        let path = entry.path();
        match path.is_dir() {
            true => found.extend(files(&path)),
            false => found.push(path),
        }
    }
    found
}

#[test]
fn the_started_server_is_for_the_runs_processes_only() {
    let Some((sandbox, run)) = nats_sandbox() else {
        return;
    };
    let mut running = sandbox.start(&long_run(&run, "own"));
    wait_for_steps(&mut running, &run, 5);
    let port = fs::read_to_string(run.join("jetstream/port")).expect("a server has a port");
    let refused = RawNats::connect(port.trim().parse().expect("a number"));
    let refused = refused.expect_err("a client without a key");
    assert!(refused.contains("Authorization Violation"), "{refused}");
    let keys = run.join("jetstream/keys");
    let mode = |path: &Path| fs::metadata(path).expect("it exists").permissions().mode() & 0o777;
    for folder in [&run, &run.join("logs"), &keys] {
        assert_eq!(mode(folder), 0o700, "{}", folder.display());
    }
    let seeds: Vec<String> = files(&keys)
        .iter()
        .inspect(|path| assert_eq!(mode(path), 0o600, "{}", path.display()))
        .map(|path| fs::read_to_string(path).expect("a key"))
        .filter(|key| key.starts_with('S'))
        .collect();
    assert_eq!(seeds.len(), 5, "four users and the run");
    let holds_seed = |bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes);
        seeds.iter().any(|seed| text.contains(seed.as_str()))
    };
    let status = status(&sandbox, &run);
    assert!(!holds_seed(status.to_string().as_bytes()));
    for role in ["learner", "actor", "preference"] {
        for (name, pid) in present(&status, role) {
            let arguments = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            assert!(!holds_seed(&arguments), "{name}");
        }
    }
    running.terminate();
    let output = running.wait().check(5, &[]);
    assert!(!holds_seed(output.stderr.as_bytes()) && !holds_seed(output.stdout.as_bytes()));
    let others = files(&run);
    for path in others.iter().filter(|path| !path.starts_with(&keys)) {
        let content = fs::read(path).expect("a file of the run");
        assert!(!holds_seed(&content), "{}", path.display());
    }
}

/// A server with the configuration and the keys that `agon nats-config` wrote.
struct GuardedServer {
    sandbox: Sandbox,
    run: PathBuf,
    /// Folder of the keys.
    keys: String,
    server: TestNatsServer,
}

impl GuardedServer {
    fn start() -> Option<Self> {
        let (sandbox, run) = nats_sandbox()?;
        let (keys, port) = (sandbox.path("nats").display().to_string(), free_port());
        let generate = nats_config(&keys, &format!("nats://127.0.0.1:{port}"));
        let printed = sandbox.run(&generate).succeeded().stdout;
        for expected in ["agon actor ", "actor.nk"] {
            assert!(printed.contains(expected), "{printed}");
        }
        sandbox
            .run(&generate)
            .check(2, &["exists already"])
            .without_panic();
        let config = format!("{keys}/nats-server.conf");
        let server = TestNatsServer::start_with(port, &["-c", &config]);
        Some(Self {
            sandbox,
            run,
            keys,
            server,
        })
    }

    /// Settings with the server's key of `role` and the run key in `run_key`.
    fn keys(&self, role: &str, run_key: &str) -> [String; 2] {
        [("nkey", format!("{role}.nk")), ("run_key", run_key.into())]
            .map(|(setting, file)| format!("transport.{setting}_path={}/{file}", self.keys))
    }

    fn arguments(&self, role: &str, keys: &[String; 2]) -> Vec<String> {
        let sets = [
            "learner.steps=60",
            "learner.max_staleness=2",
            &keys[0],
            &keys[1],
        ];
        role_arguments(role, &self.run, &self.server, &sets)
    }

    /// `agon status` with the key for it, and these further arguments.
    fn status(&self, more: &[&str]) -> ProcessOutput {
        let (config, [key, _]) = (
            config("bandit.toml").display().to_string(),
            self.keys("view", ""),
        );
        let arguments = [
            "status",
            &config,
            "--json",
            "--set",
            "run.name=roles",
            "--set",
            "transport.kind=jetstream",
            "--set",
            &self.server.url,
            "--set",
            &key,
        ];
        self.sandbox.run(&[&arguments[..], more].concat())
    }
}

/// Arguments that generate a server's configuration and keys in `folder`.
fn nats_config(folder: &str, url: &str) -> Vec<String> {
    let config = config("bandit.toml").display().to_string();
    let url = format!("transport.url={url}");
    [
        "nats-config",
        &config,
        "--directory",
        folder,
        "--set",
        "run.name=roles",
        "--set",
        "transport.kind=jetstream",
        "--set",
        &url,
    ]
    .map(str::to_owned)
    .to_vec()
}

#[test]
fn generated_permissions_let_each_role_work() {
    let Some(guarded) = GuardedServer::start() else {
        return;
    };
    let start = |role: &str, run_key: &str| {
        let keys = guarded.keys(role, run_key);
        guarded.sandbox.start(&guarded.arguments(role, &keys))
    };
    let learner = start("learner", "run.key");
    wait_until("the status", || {
        (guarded.status(&[]).code == Some(0)).then_some(())
    });
    let others = ["actor", "preference"].map(|role| start(role, "run.pub"));
    learner.wait().succeeded();
    for other in others {
        let output = other.wait().succeeded();
        assert!(
            !output.stderr.contains("Permissions Violation"),
            "{}",
            output.stderr
        );
    }
    assert_conserved(&guarded.run, 60);
}

#[test]
fn only_the_learners_keys_lead() {
    let Some(guarded) = GuardedServer::start() else {
        return;
    };
    let (sandbox, run) = (&guarded.sandbox, &guarded.run);
    let _learner =
        sandbox.start(&guarded.arguments("learner", &guarded.keys("learner", "run.key")));
    wait_until("a run", || {
        (guarded.status(&[]).code == Some(0)).then_some(())
    });
    // An actor's key does not lead, with whatever run key; and the learner's run key is needed to sign.
    let other = sandbox.path("other").display().to_string();
    let forger = guarded.arguments("learner", &guarded.keys("actor", "run.key"));
    let forger: Vec<String> = forger
        .into_iter()
        .map(|argument| match argument == run.to_string_lossy() {
            true => other.clone(),
            false => argument,
        })
        .collect();
    sandbox
        .run(&forger)
        .check(3, &["Permissions Violation"])
        .without_panic();
    let unsigned = guarded.arguments("learner", &guarded.keys("learner", "run.pub"));
    sandbox
        .run(&unsigned)
        .check(3, &["run.pub", "seed"])
        .without_panic();
    // Without a key nobody gets in, and what other keys signed is refused.
    let stranger = role_arguments("actor", run, &guarded.server, &[]);
    sandbox
        .run(&stranger)
        .check(3, &["authorization violation"])
        .without_panic();
    let foreign = sandbox.path("foreign").display().to_string();
    sandbox
        .run(&nats_config(&foreign, "nats://127.0.0.1:4222"))
        .succeeded();
    let mut misled = guarded.keys("actor", "run.pub");
    misled[1] = format!("transport.run_key_path={foreign}/run.pub");
    sandbox
        .run(&guarded.arguments("actor", &misled))
        .check(2, &["its signature is not of this run's key"])
        .without_panic();
    guarded
        .status(&["--remove"])
        .check(3, &["Permissions Violation"])
        .without_panic();
}

#[test]
fn a_record_on_the_server_writes_no_file_outside_the_models_folder() {
    let Some((sandbox, run)) = nats_sandbox() else {
        return;
    };
    let server = TestNatsServer::start(&sandbox);
    let learner = sandbox.start(&role_arguments("learner", &run, &server, &[]));
    let (stream, subject) = ("KV_agon-roles-registry", "$KV.agon-roles-registry.run");
    wait_until("a run", || status_now(&sandbox, &run));
    let mut client = RawNats::connect(server.port).expect("it lets everyone in");
    let honest = client.last(stream, subject);
    // Killed, or it would write its own record again.
    drop(learner);
    let text = String::from_utf8(honest[1..].to_vec()).expect("a record");
    let record: Value = serde_json::from_str(&text).expect("a record");
    let victim = sandbox.path("victim.json");
    let names = [
        "../victim.json".to_owned(),
        victim.display().to_string(),
        "..".to_owned(),
        ".bashrc".to_owned(),
        "a\u{1b}[2J.json".to_owned(),
    ];
    for name in names {
        let mut forged = record.clone();
        forged["model"][0]["name"] = Value::from(name.as_str());
        client.publish(subject, &[&[0], forged.to_string().as_bytes()].concat());
        let output = sandbox.run(&role_arguments("actor", &run, &server, &[]));
        let output = output.without_panic();
        assert!(
            [Some(1), Some(2)].contains(&output.code),
            "{}",
            output.stderr
        );
        assert!(
            output.stderr.contains("record"),
            "{name}: {}",
            output.stderr
        );
        assert!(!output.stderr.contains('\u{1b}'), "{name}");
        assert!(!victim.exists(), "{name}");
    }
    // A file that is larger than the record says is not read.
    let mut forged = record.clone();
    forged["model"][0]["bytes"] = Value::from(1);
    forged["settings"] = Value::from(record["settings"].as_str().expect("settings"));
    client.publish(subject, &[&[0], forged.to_string().as_bytes()].concat());
    sandbox
        .run(&role_arguments("actor", &run, &server, &[]))
        .check(1, &["more than the 1 bytes"])
        .without_panic();
}

#[test]
fn secrets_in_urls_are_refused_and_not_repeated() {
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    let config = config("bandit.toml").display().to_string();
    let cases: [(&[&str], &str); 4] = [
        (
            &[
                "transport.kind=jetstream",
                "transport.url=nats://ann:SESAME@127.0.0.1:1",
            ],
            "transport.password_path",
        ),
        (
            &[
                "transport.kind=jetstream",
                "transport.url=nats://ann:SES%41ME@127.0.0.1:1",
            ],
            "transport.password_path",
        ),
        (
            &[
                "preference.judge.kind=http",
                "preference.judge.urls=[\"http://ann:SESAME@127.0.0.1/v1\"]",
            ],
            "preference.judge.api_key_path",
        ),
        (
            &[
                "preference.judge.kind=service",
                "preference.judge.urls=[\"http://127.0.0.1/?k=SESAME\"]",
            ],
            "preference.judge.token_path",
        ),
    ];
    for (sets, remedy) in cases {
        for command in ["train", "check"] {
            let mut arguments = vec![command, config.as_str()];
            let run = run.display().to_string();
            if command == "train" {
                arguments.extend(["--run-dir", &run]);
            }
            arguments.extend(sets.iter().flat_map(|set| ["--set", *set]));
            let output = sandbox.run(&arguments).check(2, &[]).without_panic();
            let text = output.stdout + &output.stderr;
            assert!(text.contains(remedy), "{text}");
            assert!(
                !text.contains("SESAME") && !text.contains("SES%41ME"),
                "{text}"
            );
        }
    }
    assert!(!run.exists());
}

#[test]
fn a_server_that_cannot_carry_a_run_is_named_at_once_and_one_that_is_away_may_come_back() {
    let Some((sandbox, run)) = nats_sandbox() else {
        return;
    };
    let plain = TestNatsServer::start_with(free_port(), &["-a", "127.0.0.1"]);
    for role in ["actor", "learner"] {
        let started = std::time::Instant::now();
        sandbox
            .run(&role_arguments(role, &run, &plain, &[]))
            .check(3, &["without JetStream", "-js"])
            .without_panic();
        assert!(started.elapsed() < Duration::from_secs(30), "at once");
    }
    let away = format!("transport.url=nats://127.0.0.1:{}", free_port());
    // Not a code that keeps a supervisor from starting it again.
    sandbox
        .run(&role_arguments(
            "actor",
            &run,
            &plain,
            &[&away, "transport.timeout_seconds=1"],
        ))
        .check(1, &["failed to connect to NATS"])
        .without_panic();
}
