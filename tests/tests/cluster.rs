//! Runs of many processes over a real NATS server: they end where a run in one process ends, and go on
//! whatever befalls one of them.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread::sleep,
    time::Duration,
};

use house::{
    Running, Workplace, config, has_nats_server, number, present, report, signal, status,
    status_now, steps, tiny_bandit, tiny_playground, wait_until,
};
use serde_json::Value;

/// A place for a run over a NATS server, and the run's directory in it; `None` where there is no such server.
fn opened() -> Option<(Workplace, PathBuf)> {
    let workplace = has_nats_server().then(Workplace::new)?;
    let run = workplace.path("run");
    Some((workplace, run))
}

/// A short bandit over JetStream, with a name of its own.
fn over_jetstream(run: &Path, name: &str, sets: &[&str]) -> Vec<String> {
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

/// Several of each role, long enough that something can happen to them.
fn long(run: &Path, name: &str) -> Vec<String> {
    let sets = [
        "topology.actors=3",
        "topology.preference=2",
        "topology.max_restarts=50",
        "learner.max_staleness=2",
        "learner.steps=300",
        "learner.save_steps=20",
        "learner.batch_timeout_seconds=120",
    ];
    over_jetstream(run, name, &sets)
}

/// That nothing was lost at any station, and every step was taken once.
fn is_whole(run: &Path, last: u64) {
    let report = report(run);
    assert_eq!(report["finished"], true);
    for station in ["actor", "preference", "learner"] {
        let books = &report["stations"][station];
        assert_eq!(books["conserved"], true, "{station}: {books:#}");
        assert!(number(books, "/taken") > 0.0, "{station}: {books:#}");
    }
    let told: Vec<_> = steps(run)
        .iter()
        .filter_map(|line| line["step"].as_u64())
        .collect();
    assert_eq!(told, (1..=last).collect::<Vec<_>>());
    let ended = fs::read_to_string(run.join("logs/learner.log")).unwrap_or_default();
    assert!(!ended.contains("panicked"), "{ended}");
    let rate = number(&report, "/win_rate");
    assert!((0.0..=1.0).contains(&rate), "{rate}");
}

fn step_of(run: &Path) -> u64 {
    steps(run)
        .last()
        .and_then(|line| line["step"].as_u64())
        .unwrap_or(0)
}

/// Waits until some more steps are taken.
fn goes_on(running: &mut Running, run: &Path, more: u64) {
    let from = step_of(run);
    running.until("some more steps", || {
        (step_of(run) >= from + more).then_some(())
    });
}

#[test]
fn a_seed_ends_over_jetstream_where_it_ends_in_memory() {
    let Some((workplace, there)) = opened() else {
        return;
    };
    let here = workplace.path("here");
    workplace.run(&tiny_bandit(&here, &[])).succeeded();
    workplace
        .run(&over_jetstream(&there, "same", &[]))
        .succeeded();
    let digest = |run: &Path| report(run)["weights_digest"].clone();
    assert_eq!(digest(&here), digest(&there));
    is_whole(&there, 100);
    let delta = workplace.path("delta");
    let sets = ["transport.weights=delta", "transport.full_every=4"];
    workplace
        .run(&over_jetstream(&delta, "delta", &sets))
        .succeeded();
    assert_eq!(digest(&here), digest(&delta));
}

/// What befalls a run: who, which signal, and which that takes it back.
type Fault = (&'static str, &'static str, Option<&'static str>);

#[test]
fn a_run_goes_on_whatever_befalls_its_actors_and_judges() {
    let Some((workplace, run)) = opened() else {
        return;
    };
    let mut running = workplace.start(&long(&run, "faults"));
    let faults: [Fault; 5] = [
        ("actor", "KILL", None),
        ("preference", "KILL", None),
        ("actor", "TERM", None),
        ("preference", "TERM", None),
        ("actor", "STOP", Some("CONT")),
    ];
    for (role, name, back) in faults {
        goes_on(&mut running, &run, 5);
        let who = running.until("somebody to befall", || {
            present(&status(&workplace, &run), role).pop()
        });
        signal(who.1, name);
        if let Some(back) = back {
            // Longer than its lease: what it held goes to others meanwhile.
            sleep(Duration::from_secs(5));
            signal(who.1, back);
        }
        goes_on(&mut running, &run, 5);
    }
    let ended = running.wait().succeeded();
    assert!(ended.err.contains("it is started again"), "{}", ended.err);
    is_whole(&run, 300);
}

#[test]
fn a_learner_that_is_killed_goes_on_from_its_checkpoint() {
    let Some((workplace, run)) = opened() else {
        return;
    };
    let mut running = workplace.start(&long(&run, "learner"));
    for _ in 0..2 {
        goes_on(&mut running, &run, 25);
        let who = running.until("a learner", || {
            present(&status(&workplace, &run), "learner").pop()
        });
        signal(who.1, "KILL");
        running.until("the next session", || {
            let now = status_now(&workplace, &run)?;
            let other = present(&now, "learner").pop()?;
            (other.1 != who.1).then_some(())
        });
    }
    running.wait().succeeded();
    is_whole(&run, 300);
    let sessions = fs::read_to_string(run.join("session")).expect("a run counts its sessions");
    assert_eq!(sessions.trim(), "2");
}

#[test]
fn a_learner_that_is_killed_while_it_saves_goes_on_from_the_checkpoint_before() {
    let Some((workplace, run)) = opened() else {
        return;
    };
    let mut arguments = long(&run, "saving");
    arguments.extend(["--set".into(), "learner.save_steps=2".into()]);
    let mut running = workplace.start(&arguments);
    let checkpoints = run.join("checkpoints");
    let unfinished = || {
        let entries = fs::read_dir(&checkpoints).ok()?.flatten();
        let mut names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        names.find(|name| name.ends_with(".unfinished"))
    };
    let mut torn = 0;
    while torn < 2 {
        goes_on(&mut running, &run, 5);
        let who = running.until("a learner", || {
            present(&status(&workplace, &run), "learner").pop()
        });
        running.until("a checkpoint that is being written", unfinished);
        signal(who.1, "KILL");
        running.until("the end of the learner", || {
            (!Path::new(&format!("/proc/{}", who.1)).exists()).then_some(())
        });
        // It may have been done a moment before.
        torn += usize::from(unfinished().is_some());
        running.until("the next session", || {
            let now = status_now(&workplace, &run)?;
            let other = present(&now, "learner").pop()?;
            (other.1 != who.1).then_some(())
        });
    }
    running.wait().succeeded();
    is_whole(&run, 300);
    assert_eq!(unfinished(), None, "what was not finished is cleared away");
}

#[test]
fn weights_that_are_not_finite_reach_no_actor_and_the_run_says_that_it_diverged() {
    let Some((workplace, run)) = opened() else {
        return;
    };
    let sets = [
        "topology.actors=2",
        "learner.learning_rate=1e39",
        "learner.lr_scheduler_type=constant",
    ];
    let ended = workplace.run(&over_jetstream(&run, "diverging", &sets));
    ended.check(4, &[]).without_panic();
    let log = |name: &str| {
        let path = run.join("logs").join(format!("{name}.log"));
        fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    };
    let said = log("learner");
    for part in [
        "the weights are not finite",
        "going back to the last checkpoint",
        "diverged",
    ] {
        assert!(said.contains(part), "no {part:?} in {said}");
    }
    for name in ["actor-0", "actor-1"] {
        let said = log(name);
        assert!(said.contains("joined the run"), "{said}");
        assert!(!said.contains("the logits of a token"), "{said}");
    }
}

#[test]
fn the_game_is_played_over_jetstream_though_its_service_is_killed() {
    let Some((workplace, run)) = opened() else {
        return;
    };
    let sets = [
        "run.name=game",
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
    let mut running = workplace.start(&tiny_playground(&run, &sets));
    let who = running.until("a preference service", || {
        present(&status(&workplace, &run), "preference").pop()
    });
    // While it fits the second round's model: its successor has to play that round, and to know the first.
    let log = run.join("logs/preference-0.log");
    running.until("the second round", || {
        let said = fs::read_to_string(&log).ok()?;
        said.contains("samples round=2 step=16").then_some(())
    });
    signal(who.1, "KILL");
    let ended = running.wait().succeeded();
    assert!(ended.err.contains("it is started again"), "{}", ended.err);
    is_whole(&run, 24);
    let rounds = report(&run)["rounds"].as_array().cloned();
    let rounds: Vec<_> = rounds
        .expect("a report has rounds")
        .iter()
        .map(|round| (round["round"].as_u64(), round["step"].as_u64()))
        .collect();
    assert_eq!(rounds, [(Some(1), Some(8)), (Some(2), Some(16))]);
}

#[test]
fn a_seed_repeats_over_jetstream_when_its_learner_is_killed() {
    let Some((workplace, there)) = opened() else {
        return;
    };
    let here = workplace.path("here");
    let sets = ["learner.steps=300", "learner.save_steps=10"];
    workplace.run(&tiny_bandit(&here, &sets)).succeeded();
    let mut running = workplace.start(&over_jetstream(&there, "killed", &sets));
    goes_on(&mut running, &there, 15);
    let who = running.until("a learner", || {
        present(&status(&workplace, &there), "learner").pop()
    });
    signal(who.1, "KILL");
    running.wait().succeeded();
    let digest = |run: &Path| report(run)["weights_digest"].clone();
    assert_eq!(digest(&here), digest(&there));
    is_whole(&there, 300);
}

/// The process of the server that the launcher of a run has started.
fn server_of(run: &Path) -> u32 {
    let config = run.join("jetstream/server.conf");
    let found = Command::new("pgrep")
        .args(["-f", &config.to_string_lossy()])
        .output();
    let found = String::from_utf8(found.expect("pgrep").stdout).expect("process ids");
    found.trim().parse().expect("one process id")
}

#[test]
fn a_server_that_is_killed_is_started_again_with_its_store() {
    let Some((workplace, run)) = opened() else {
        return;
    };
    let mut running = workplace.start(&long(&run, "server"));
    goes_on(&mut running, &run, 10);
    signal(server_of(&run), "KILL");
    goes_on(&mut running, &run, 10);
    running.wait().succeeded();
    is_whole(&run, 300);
}

#[test]
fn a_server_ends_with_its_launcher_once_nobody_needs_it() {
    let Some((workplace, run)) = opened() else {
        return;
    };
    let mut running = workplace.start(&long(&run, "orphans"));
    goes_on(&mut running, &run, 10);
    // The guard of a server that was started again holds the new one.
    signal(server_of(&run), "KILL");
    goes_on(&mut running, &run, 10);
    let port = fs::read_to_string(run.join("jetstream/port")).expect("a server has a port");
    let port: u16 = port.trim().parse().expect("a number");
    let listens = || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok();
    assert!(listens());
    running.kill();
    wait_until("the end of the server", || (!listens()).then_some(()));
    // It was there until the learner had saved and left.
    let report = report(&run);
    assert_eq!(report["finished"], false, "{report:#}");
}

#[test]
fn a_run_that_is_asked_to_stop_saves_and_is_resumed() {
    let Some((workplace, run)) = opened() else {
        return;
    };
    let arguments = long(&run, "stopped");
    let mut running = workplace.start(&arguments);
    goes_on(&mut running, &run, 10);
    running.terminate();
    running
        .wait()
        .check(5, &["interrupted; saved"])
        .without_panic();
    let before = report(&run);
    assert_eq!(before["finished"], false);
    let again: Vec<String> = arguments
        .into_iter()
        .chain(["--resume".to_owned()])
        .collect();
    workplace.run(&again).succeeded();
    is_whole(&run, 300);
}

/// A server of the test's own, for roles that are started one by one.
struct Server {
    process: std::process::Child,
    url: String,
}

impl Server {
    fn start(workplace: &Workplace) -> Self {
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = free.local_addr().expect("it has an address").port();
        drop(free);
        let store = workplace.path("store").display().to_string();
        let process = Command::new("nats-server")
            .args([
                "-a",
                "127.0.0.1",
                "-p",
                &port.to_string(),
                "-js",
                "-sd",
                &store,
            ])
            .stderr(std::process::Stdio::null())
            .spawn()
            .expect("it starts");
        wait_until("the server", || {
            std::net::TcpStream::connect(("127.0.0.1", port)).ok()
        });
        let url = format!("transport.url=nats://127.0.0.1:{port}");
        Self { process, url }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

/// One role of the run, as arguments.
fn role(name: &str, run: &Path, server: &Server, sets: &[&str]) -> Vec<String> {
    let mut all = vec![server.url.as_str()];
    all.extend_from_slice(sets);
    let mut arguments = over_jetstream(run, "roles", &all);
    arguments[0] = name.to_owned();
    arguments[1] = config("bandit.toml").display().to_string();
    if name == "actor" {
        let at = arguments.iter().position(|word| word == "--run-dir");
        let at = at.expect("a run directory is named");
        arguments.drain(at..at + 2);
    }
    arguments
}

#[test]
fn roles_join_one_by_one_and_who_does_not_belong_is_refused() {
    let Some((workplace, run)) = opened() else {
        return;
    };
    let server = Server::start(&workplace);
    let more = [
        "learner.steps=300",
        "learner.max_staleness=2",
        "topology.actors=2",
    ];
    // Who comes before the learner waits for it.
    let actor = workplace.start(&role("actor", &run, &server, &more));
    let learner = workplace.start(&role("learner", &run, &server, &more));
    wait_until("a run", || status_now(&workplace, &run));
    let service = workplace.start(&role("preference", &run, &server, &more));

    let second = role("learner", &workplace.path("other"), &server, &more);
    let refused = workplace.run(&second).check(2, &["is alive"]);
    refused.without_panic();
    let strange = [&more[..], &["actor.temperature=0.5"]].concat();
    let said = "actor.temperature is 0.5 here and 1.0 there";
    workplace
        .run(&role("actor", &run, &server, &strange))
        .check(2, &[said])
        .without_panic();
    let memory = [&more[..], &["transport.kind=memory"]].concat();
    workplace
        .run(&role("actor", &run, &server, &memory))
        .check(2, &[])
        .without_panic();

    // One that leaves is not missed, and one that comes late takes part.
    wait_until("some steps", || (step_of(&run) > 20).then_some(()));
    let late = workplace.start(&role("actor", &run, &server, &more));
    wait_until("three actors' worth of processes", || {
        (present(&status_now(&workplace, &run)?, "actor").len() == 2).then_some(())
    });
    actor.terminate();
    actor.wait().succeeded();
    learner.wait().succeeded();
    late.wait().succeeded();
    service.wait().succeeded();
    is_whole_alone(&run, 300);
    let gone = workplace.run(&["status", &run.to_string_lossy()]);
    gone.check(2, &["cleared away"]).without_panic();
}

/// As [`is_whole`], for a run without a launcher's logs.
fn is_whole_alone(run: &Path, last: u64) {
    let report: Value = report(run);
    assert_eq!(report["steps"], last);
    for station in ["actor", "preference", "learner"] {
        let books = &report["stations"][station];
        assert_eq!(books["conserved"], true, "{station}: {books:#}");
    }
}
