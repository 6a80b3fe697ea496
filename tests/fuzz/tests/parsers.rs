//! Mutants of valid inputs to every parser, in a process of its own with a limit on its memory. None may end in a
//! panic, hang, or be refused without a message that names the culprit.
//!
//! The mutants are the same in every run; `cargo run --package fuzz` tries others.

use std::process::Command;

use system_tests::Sandbox;

/// Limit on the address space of a process, in KiB: several times what the largest valid input takes.
const MEMORY_KIB: u64 = 6 << 20;

/// The fuzzer with a limit on its memory; arguments can be appended.
fn limited_fuzz() -> Command {
    let mut command = Command::new("bash");
    let script = format!("ulimit -c 0 -v {MEMORY_KIB}; exec \"$0\" \"$@\"");
    command
        .arg("-c")
        .arg(script)
        .arg(env!("CARGO_BIN_EXE_fuzz"));
    command
}

/// Feeds this number of mutants to a target of the bin `fuzz`.
#[track_caller]
fn fuzz(target: &str, inputs: u32) {
    let sandbox = Sandbox::new();
    let mut command = limited_fuzz();
    command.args([target, "--inputs", &inputs.to_string()]);
    let output = sandbox.start_command(command).wait();
    let last = output.stdout.lines().last().unwrap_or_default();
    assert!(
        output.code == Some(0) && last.starts_with("done "),
        "{target}: code {:?} at input {last}:\n{}",
        output.code,
        output.stderr
    );
    for outcome in ["accepted", "refused"] {
        let none = format!("{outcome}=0 ");
        assert!(
            !last.contains(&none),
            "{target}: the mutants are all alike: {last}"
        );
    }
}

#[test]
fn messages_are_refused_or_kept() {
    fuzz("messages", 3000);
}

#[test]
fn configurations_are_refused_or_resolved() {
    fuzz("settings", 500);
}

#[test]
fn models_in_gguf_files_are_refused_or_loaded() {
    fuzz("gguf", 1500);
}

#[test]
fn data_sets_are_refused_or_read() {
    fuzz("dataset", 1000);
}

#[test]
fn templates_are_refused_or_rendered() {
    fuzz("jinja", 3000);
}

#[test]
fn model_folders_are_refused_or_opened() {
    fuzz("model", 600);
    fuzz("adapter", 200);
    fuzz("reward", 200);
}

#[test]
fn run_directories_are_refused_or_viewed() {
    fuzz("run-view", 100);
}

#[test]
fn replies_of_judges_are_verdicts_or_abstentions() {
    let sandbox = Sandbox::new();
    let mut command = limited_fuzz();
    command.args(["verdict", "--inputs", "500"]);
    sandbox.start_command(command).wait().succeeded();
}
