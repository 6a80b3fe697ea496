//! Full disks and unread output: a full disk during a save loses only the checkpoint that is being written, and one
//! behind the log, or a log that nobody reads, nothing.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use system_tests::{
    RunningProcess, Sandbox, agon_binary, number, report, steps, tiny_bandit, tiny_playground,
};

/// Maximum file size in KiB: enough for metrics and logs, too small for the weights.
const LIMIT_KIB: u32 = 48;

/// Path and content of every file under `folder`.
fn contents(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
        let path = entry.expect("a directory entry").path();
        if path.is_dir() {
            found.extend(contents(&path));
        } else {
            let content = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            found.insert(path, content);
        }
    }
    found
}

/// An `agon` command with a limit on file sizes. SIGXFSZ is ignored, so that writes fail with an error as on a full
/// disk.
fn limited(arguments: &[String]) -> Command {
    let mut command = Command::new("bash");
    let script = format!("ulimit -f {LIMIT_KIB}; trap '' XFSZ; exec \"$0\" \"$@\"");
    command
        .arg("-c")
        .arg(script)
        .arg(agon_binary())
        .args(arguments);
    command
}

#[test]
fn a_failed_save_leaves_earlier_checkpoints_unchanged() {
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    sandbox
        .run(&tiny_playground(&run, &["learner.steps=2"]))
        .succeeded();
    let checkpoints = run.join("checkpoints");
    let weights = checkpoints.join("step_2/model.safetensors");
    let size = fs::metadata(&weights)
        .unwrap_or_else(|e| panic!("{}: {e}", weights.display()))
        .len();
    assert!(
        size > 1024 * u64::from(LIMIT_KIB),
        "weights of {size} bytes fit the limit"
    );
    let before = contents(&checkpoints);

    let mut more = tiny_playground(&run, &["learner.steps=6", "learner.save_steps=2"]);
    more.push("--resume".into());
    let output = sandbox.start_command(limited(&more)).wait().without_panic();
    let says = [
        "checkpoint",
        "step_4",
        "model.safetensors",
        "earlier checkpoints are untouched",
    ];
    output.check(1, &says);
    // Unchanged byte for byte, without unfinished files.
    let lineage = checkpoints.join("lineage.json");
    let without_lineage = |mut contents: BTreeMap<PathBuf, Vec<u8>>| {
        contents.remove(&lineage);
        contents
    };
    let (before, now) = (
        without_lineage(before),
        without_lineage(contents(&checkpoints)),
    );
    assert!(before == now, "the checkpoints changed");
    let names: Vec<_> = fs::read_dir(&checkpoints)
        .expect("the folder exists")
        .map(|entry| entry.expect("a directory entry").file_name())
        .filter(|name| !name.to_string_lossy().starts_with("step_") && name != "lineage.json")
        .collect();
    assert!(names.is_empty(), "left behind: {names:?}");

    sandbox.run(&more).succeeded();
    assert_eq!(report(&run)["steps"], 6);
    assert!(checkpoints.join("step_6/model.safetensors").exists());
}

/// Starts a bandit through this shell script, which has the program and its arguments as `$0` and `$@`.
fn through_shell(sandbox: &Sandbox, script: &str, sets: &[&str]) -> RunningProcess {
    let mut command = Command::new("sh");
    command.args(["-c", script]).arg(agon_binary());
    command.args(tiny_bandit(&sandbox.path("run"), sets));
    sandbox.start_command(command)
}

#[test]
fn a_full_disk_behind_the_log_takes_nothing_from_a_run() {
    let sandbox = Sandbox::new();
    let script = "exec \"$0\" \"$@\" > /dev/full 2>&1";
    through_shell(&sandbox, script, &["learner.steps=5"])
        .wait()
        .check(0, &[]);
    assert_eq!(report(&sandbox.path("run"))["finished"], true);
}

#[test]
fn a_log_that_nobody_reads_stops_nothing() {
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    // The pipe is open and full, and nobody reads it.
    let script = "mkfifo pipe; exec 3<> pipe; head -c 65536 /dev/zero >&3; exec \"$0\" \"$@\" 2>&3";
    let mut running = through_shell(&sandbox, script, &["learner.steps=1000000"]);
    running.until("its first steps", || (steps(&run).len() > 2).then_some(()));
    running.terminate();
    running.wait().check(5, &[]);
    assert!(number(&report(&run), "/steps") > 2.0);
}
