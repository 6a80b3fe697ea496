//! A full table of file descriptors delays a save and does not end a run.

use std::{path::Path, process::Command};

use system_tests::{RunningProcess, Sandbox, report, tiny_playground};

/// Limits the number of files that a process may open, without changing its maximum.
fn limit_files(running: &RunningProcess, limit: &str) {
    let pid = running.id().to_string();
    let status = Command::new("prlimit")
        .args(["--pid", &pid, &format!("--nofile={limit}:")])
        .status();
    assert!(status.expect("prlimit").success(), "prlimit of {limit}");
}

/// Step of the newest checkpoint in the run directory; 0 without one.
fn newest_checkpoint(run: &Path) -> u64 {
    let entries = std::fs::read_dir(run.join("checkpoints"));
    let names = entries.into_iter().flatten().flatten();
    let steps = names.filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        name.strip_prefix("step_")?.parse().ok()
    });
    steps.max().unwrap_or(0)
}

#[test]
fn a_save_waits_for_a_file_descriptor() {
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    let sets = ["learner.steps=100000", "learner.save_steps=1"];
    let mut running = sandbox.start(&tiny_playground(&run, &sets));
    let [_, stderr] = running.output_files();
    let waits = || {
        let text = std::fs::read_to_string(&stderr).unwrap_or_default();
        text.matches("no file descriptor is free").count()
    };
    // A save opens many files: each wait is at another one.
    for wait in 0..8 {
        let saved = newest_checkpoint(&run);
        running.until("a further checkpoint", || {
            (newest_checkpoint(&run) > saved).then_some(())
        });
        limit_files(&running, "3");
        running.until("a wait", || (waits() > wait).then_some(()));
        limit_files(&running, "1024");
    }
    running.terminate();
    running.wait().check(5, &[]).without_panic();
    assert_eq!(report(&run)["finished"], false);
}
