//! A full table of file descriptors delays a save and does not end a run.

use std::process::Command;

use system_tests::{RunningProcess, Sandbox, report, tiny_playground};

/// Limits the number of files that a process may open, without changing its maximum.
fn limit_files(running: &RunningProcess, limit: &str) {
    let pid = running.id().to_string();
    let status = Command::new("prlimit")
        .args(["--pid", &pid, &format!("--nofile={limit}:")])
        .status();
    assert!(status.expect("prlimit").success(), "prlimit of {limit}");
}

#[test]
fn a_save_waits_for_a_file_descriptor() {
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    let sets = ["learner.steps=100000", "learner.save_steps=1"];
    let mut running = sandbox.start(&tiny_playground(&run, &sets));
    let [_, stderr] = running.output_files();
    let text = move || std::fs::read_to_string(&stderr).unwrap_or_default();
    running.until("a first checkpoint", || {
        run.join("checkpoints/step_2").exists().then_some(())
    });
    limit_files(&running, "3");
    running.until("a wait", || {
        text().contains("no file descriptor is free").then_some(())
    });
    limit_files(&running, "1024");
    running.terminate();
    running.wait().check(5, &[]).without_panic();
    assert_eq!(report(&run)["finished"], false);
}
