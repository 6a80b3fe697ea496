//! Faults around a run over a real NATS server: a bad network, a full disk in every role, a clock that steps. The run
//! goes on and loses nothing, or ends with a reason. Killed processes are in `cluster.rs`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use system_tests::{
    FaultyProxy, NatsServer, RunningProcess, Sandbox, agon_binary, config, has_nats_server, report,
    steps, tiny_bandit, tool, wait_until,
};

/// Lease of a participant: a fault that lasts longer has its messages redelivered.
const LEASE: Duration = Duration::from_secs(2);

/// A sandbox and a run directory in it; `None` if `nats-server` is not installed.
fn nats_sandbox() -> Option<(Sandbox, PathBuf)> {
    let sandbox = has_nats_server().then(Sandbox::new)?;
    let run = sandbox.path("run");
    Some((sandbox, run))
}

/// A run of the short bandit over a server.
struct FaultyRun<'a> {
    sandbox: &'a Sandbox,
    run: &'a Path,
    /// Settings of all roles.
    sets: &'a [&'a str],
}

impl FaultyRun<'_> {
    /// Arguments of one role whose server is at this address.
    fn arguments(&self, role: &str, server: &str) -> Vec<String> {
        let (url, lease) = (
            format!("transport.url=nats://{server}"),
            format!("transport.lease_seconds={}", LEASE.as_secs()),
        );
        let mut sets = vec![
            "run.name=faults",
            "transport.kind=jetstream",
            "transport.timeout_seconds=60",
            "learner.max_staleness=2",
            "learner.batch_timeout_seconds=120",
            &lease,
            &url,
        ];
        sets.extend_from_slice(self.sets);
        let mut arguments = tiny_bandit(self.run, &sets);
        arguments[0] = role.to_owned();
        arguments[1] = config("bandit.toml").display().to_string();
        if role != "learner" {
            let at = arguments
                .iter()
                .position(|argument| argument == "--run-dir");
            let at = at.expect("the arguments name a run directory");
            arguments.drain(at..at + 2);
        }
        arguments
    }

    fn start(&self, role: &str, port: u16) -> RunningProcess {
        self.sandbox
            .start(&self.arguments(role, &format!("127.0.0.1:{port}")))
    }

    fn last_step(&self) -> u64 {
        let steps = steps(self.run);
        steps
            .last()
            .and_then(|line| line["step"].as_u64())
            .unwrap_or(0)
    }

    /// Waits until the learner has done `more` further steps.
    fn wait_for_steps(&self, learner: &mut RunningProcess, more: u64) {
        let from = self.last_step();
        learner.until("more steps", || {
            (self.last_step() >= from + more).then_some(())
        });
    }

    /// Asserts that the run finished, logged every step once and conserved its data at every stage.
    fn assert_complete(&self, last: u64) {
        let report = report(self.run);
        assert_eq!(report["finished"], true, "{report:#}");
        for stage in ["actor", "preference", "learner"] {
            let counters = &report["stages"][stage];
            assert_eq!(counters["conserved"], true, "{stage}: {counters:#}");
        }
        let logged: Vec<_> = steps(self.run)
            .iter()
            .filter_map(|line| line["step"].as_u64())
            .collect();
        assert_eq!(logged, (1..=last).collect::<Vec<_>>());
    }
}

#[test]
fn a_run_survives_a_slow_server_and_half_open_connections() {
    let Some((sandbox, run)) = nats_sandbox() else {
        return;
    };
    let faulty = FaultyRun {
        sandbox: &sandbox,
        run: &run,
        sets: &["learner.steps=30"],
    };
    let server = NatsServer::start(&sandbox);
    let proxy = FaultyProxy::start(server.port());
    let mut learner = faulty.start("learner", proxy.port());
    let others = ["actor", "actor", "preference"].map(|role| faulty.start(role, proxy.port()));
    faulty.wait_for_steps(&mut learner, 5);
    proxy.delay(Duration::from_millis(5));
    faulty.wait_for_steps(&mut learner, 5);
    proxy.delay(Duration::ZERO);
    // A server that answers nothing for longer than a lease, and connections that only look open.
    server.suspend();
    std::thread::sleep(2 * LEASE);
    server.resume();
    faulty.wait_for_steps(&mut learner, 5);
    proxy.sever();
    learner.wait().succeeded().without_panic();
    for role in others {
        role.wait().succeeded().without_panic();
    }
    faulty.assert_complete(30);
}

#[test]
fn a_termination_during_an_outage_ends_every_role() {
    let Some((sandbox, run)) = nats_sandbox() else {
        return;
    };
    let faulty = FaultyRun {
        sandbox: &sandbox,
        run: &run,
        sets: &["learner.steps=100000"],
    };
    let server = NatsServer::start(&sandbox);
    let proxy = FaultyProxy::start(server.port());
    let mut learner = faulty.start("learner", proxy.port());
    let others = ["actor", "preference"].map(|role| faulty.start(role, proxy.port()));
    faulty.wait_for_steps(&mut learner, 2);
    drop(server);
    proxy.sever();
    std::thread::sleep(LEASE);
    learner.terminate();
    others.iter().for_each(RunningProcess::terminate);
    learner.wait().check(5, &[]).without_panic();
    for role in others {
        role.wait().succeeded().without_panic();
    }
    assert!(run.join("checkpoints").exists(), "the run can be resumed");
}

#[test]
fn a_clock_that_steps_does_not_disturb_a_run() {
    let Some((sandbox, run)) = nats_sandbox() else {
        return;
    };
    let Some(library) = faketime() else {
        return;
    };
    let server = NatsServer::start(&sandbox);
    let faulty = FaultyRun {
        sandbox: &sandbox,
        run: &run,
        sets: &["learner.steps=40"],
    };
    // Each process has a clock of its own, as machines do.
    let clock = |role: &str| sandbox.path(&format!("{role}.clock"));
    let start = |role: &str| {
        sandbox.write(&format!("{role}.clock"), "+0");
        let mut command = Command::new(agon_binary());
        command
            .args(faulty.arguments(role, &format!("127.0.0.1:{}", server.port())))
            .env("LD_PRELOAD", &library)
            .env("FAKETIME_TIMESTAMP_FILE", clock(role))
            .env("FAKETIME_NO_CACHE", "1")
            .env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        sandbox.start_command(command)
    };
    let mut learner = start("learner");
    let others = ["actor", "preference"].map(start);
    let step =
        |role: &str, by: &str| fs::write(clock(role), by).expect("a file in a temporary directory");
    for [learner_clock, actor_clock, preference_clock] in [
        ["+2h", "+0", "+0"],
        ["+0", "-2h", "+1d"],
        ["-1d", "+2h", "-2h"],
    ] {
        faulty.wait_for_steps(&mut learner, 10);
        step("learner", learner_clock);
        step("actor", actor_clock);
        step("preference", preference_clock);
    }
    learner.wait().succeeded().without_panic();
    for role in others {
        role.wait().succeeded().without_panic();
    }
    faulty.assert_complete(40);
}

/// Path of libfaketime; logs that the test is skipped where it is missing.
fn faketime() -> Option<PathBuf> {
    tool("a_clock_that_steps_does_not_disturb_a_run", &["faketime"])?;
    let folders = fs::read_dir("/usr/lib").expect("a system has libraries");
    let mut paths = folders
        .flatten()
        .map(|entry| entry.path().join("faketime/libfaketimeMT.so.1"));
    let found = paths.find(|path| path.exists());
    Some(found.expect("faketime comes with its library"))
}

/// Two network namespaces with a cable between them, in a user namespace; they end with this value.
struct Namespaces {
    outer: RunningProcess,
    inner: RunningProcess,
}

/// Address of the outer namespace on the cable.
const OUTER: &str = "10.77.0.1";

impl Namespaces {
    /// Makes the namespaces. `None`, with a message, where the system does not permit it: a container without
    /// privileges.
    fn new(sandbox: &Sandbox) -> Option<Self> {
        let is_permitted = Command::new("unshare")
            .args(["--map-root-user", "--net", "ip", "link", "set", "lo", "up"])
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success());
        if !is_permitted {
            eprintln!(
                "SKIPPED a_partition_is_survived: the system permits no network namespaces here"
            );
            return None;
        }
        let holder = |mut command: Command| {
            command.args(["sleep", "infinity"]);
            sandbox.start_command(command)
        };
        let mut unshare = Command::new("unshare");
        unshare.args(["--map-root-user", "--net"]);
        let outer = holder(unshare);
        wait_for_namespace(&outer, std::process::id());
        let mut unshare = enter(outer.id());
        unshare.args(["unshare", "--net"]);
        let inner = holder(unshare);
        wait_for_namespace(&inner, outer.id());
        wait_for_namespace(&inner, std::process::id());
        let namespaces = Self { outer, inner };
        let cable = format!(
            "link add outer type veth peer name inner netns {}",
            namespaces.inner.id()
        );
        ip(&namespaces.outer, "link set lo up");
        ip(&namespaces.outer, &cable);
        ip(
            &namespaces.outer,
            &format!("address add {OUTER}/24 dev outer"),
        );
        ip(&namespaces.outer, "link set outer up");
        ip(&namespaces.inner, "link set lo up");
        ip(&namespaces.inner, "address add 10.77.0.2/24 dev inner");
        ip(&namespaces.inner, "link set inner up");
        Some(namespaces)
    }

    /// Unplugs the cable, or plugs it in again.
    fn plug(&self, state: &str) {
        ip(&self.outer, &format!("link set outer {state}"));
    }
}

/// Waits until a process is in another network namespace than process `other`, and runs `sleep`.
fn wait_for_namespace(process: &RunningProcess, other: u32) {
    let namespace = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/net")).ok();
    let name = || fs::read_to_string(format!("/proc/{}/comm", process.id())).unwrap_or_default();
    wait_until("a network namespace", || {
        let is_other = namespace(process.id())? != namespace(other)?;
        (is_other && name().trim() == "sleep").then_some(())
    });
}

/// A command that runs another, appended to it, in the namespaces of a process.
fn enter(pid: u32) -> Command {
    let mut command = Command::new("nsenter");
    command.args([
        "--preserve-credentials",
        "--user",
        "--net",
        "--target",
        &pid.to_string(),
    ]);
    command
}

/// Runs `ip` in the network namespace of a process.
fn ip(process: &RunningProcess, arguments: &str) {
    let mut command = enter(process.id());
    command.arg("ip").args(arguments.split(' '));
    let output = command.output().expect("util-linux is installed");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments}: {error}");
}

#[test]
fn a_partition_is_survived() {
    let Some((sandbox, run)) = nats_sandbox() else {
        return;
    };
    let Some(namespaces) = Namespaces::new(&sandbox) else {
        return;
    };
    let faulty = FaultyRun {
        sandbox: &sandbox,
        run: &run,
        sets: &["learner.steps=40"],
    };
    let mut server = enter(namespaces.outer.id());
    let store = sandbox.path("store");
    server
        .args(["nats-server", "-a", OUTER, "-p", "4222", "-js", "-sd"])
        .arg(&store);
    let _server = sandbox.start_command(server);
    let start = |role: &str, at: &RunningProcess| {
        let mut command = enter(at.id());
        command.arg(agon_binary());
        command.args(faulty.arguments(role, &format!("{OUTER}:4222")));
        sandbox.start_command(command)
    };
    let mut learner = start("learner", &namespaces.outer);
    // The only actor is on the other side: meanwhile there is no progress, however fast the machine.
    let others = [
        start("preference", &namespaces.outer),
        start("actor", &namespaces.inner),
    ];
    faulty.wait_for_steps(&mut learner, 10);
    namespaces.plug("down");
    std::thread::sleep(2 * LEASE);
    namespaces.plug("up");
    learner.wait().succeeded().without_panic();
    for role in others {
        role.wait().succeeded().without_panic();
    }
    faulty.assert_complete(40);
}

/// A command that runs `program` with `folder` on a file system with these options. `None`, with a message, where the
/// system does not permit mounts in a user namespace.
fn on_small_disk(test: &str, folder: &Path, options: &str, program: &Path) -> Option<Command> {
    fs::create_dir_all(folder).expect("a folder in a temporary directory");
    let mount = format!("mount -t tmpfs -o {options} tmpfs \"$TMPDIR\"");
    let namespace = |script: String| {
        let mut command = Command::new("unshare");
        command
            .args(["--map-root-user", "--mount", "bash", "-c", &script])
            .env("TMPDIR", folder);
        command
    };
    let is_permitted = namespace(mount.clone()).stderr(Stdio::null()).status();
    if !is_permitted.is_ok_and(|status| status.success()) {
        eprintln!("SKIPPED {test}: the system permits no mounts in a user namespace here");
        return None;
    }
    let mut command = namespace(format!("{mount} && exec \"$0\" \"$@\""));
    command.arg(program);
    Some(command)
}

#[test]
fn a_full_disk_ends_a_role_with_its_reason_and_not_the_run() {
    let Some((sandbox, run)) = nats_sandbox() else {
        return;
    };
    let folder = sandbox.path("full");
    let test = "a_full_disk_ends_a_role_with_its_reason_and_not_the_run";
    let server = NatsServer::start(&sandbox);
    let faulty = FaultyRun {
        sandbox: &sandbox,
        run: &run,
        sets: &["learner.steps=30"],
    };
    let learner = faulty.start("learner", server.port());
    for role in ["actor", "preference"] {
        let Some(mut command) = on_small_disk(test, &folder, "size=4k,nr_inodes=2", agon_binary())
        else {
            return;
        };
        command.args(faulty.arguments(role, &format!("127.0.0.1:{}", server.port())));
        let output = sandbox.start_command(command).wait().without_panic();
        output.check(1, &["do not fit into", "full", "TMPDIR"]);
    }
    let others = ["actor", "preference"].map(|role| faulty.start(role, server.port()));
    learner.wait().succeeded();
    for role in others {
        role.wait().succeeded();
    }
    faulty.assert_complete(30);
}

#[test]
fn a_server_with_a_full_store_is_given_up_by_name() {
    let Some((sandbox, run)) = nats_sandbox() else {
        return;
    };
    let test = "a_server_with_a_full_store_is_given_up_by_name";
    let store = sandbox.path("store");
    let nats = Path::new("nats-server");
    let Some(server) = on_small_disk(test, &store, "size=1m", nats) else {
        return;
    };
    let server = NatsServer::start_with(&sandbox, server);
    let faulty = FaultyRun {
        sandbox: &sandbox,
        run: &run,
        sets: &[
            "learner.steps=100000",
            "learner.save_steps=10",
            "transport.max_outage_seconds=3",
            "transport.timeout_seconds=3",
        ],
    };
    let roles = ["learner", "actor", "preference"].map(|role| faulty.start(role, server.port()));
    let address = format!("127.0.0.1:{}", server.port());
    for role in roles {
        // An actor's failure begins with the actor's name.
        role.wait()
            .check(1, &["error: ", "failed to ", &address])
            .without_panic();
    }
    assert!(run.join("checkpoints").exists(), "the run can be resumed");
}
