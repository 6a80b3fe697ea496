//! Help and exit codes of the command line. This test also makes `cargo test --workspace` build the program, which the
//! system tests run.

use std::process::{Command, Output};

fn agon(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_agon"));
    command
        .args(arguments)
        .output()
        .expect("the program starts")
}

#[test]
fn help_names_every_command_and_every_exit_code() {
    let help = String::from_utf8(agon(&["--help"]).stdout).expect("text");
    let commands = [
        "train", "sft", "eval", "generate", "score", "view", "samples", "report", "metrics",
        "check", "doctor", "export",
    ];
    let codes = [
        "2 bad configuration",
        "3 missing resource",
        "4 diverged",
        "5 interrupted",
    ];
    for expected in commands.iter().chain(&codes) {
        let text = help.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(text.contains(expected), "{expected:?} is not in\n{help}");
    }
}

#[test]
fn help_of_every_command_has_an_example() {
    for command in [
        "train", "sft", "eval", "generate", "score", "view", "samples", "report", "check", "export",
    ] {
        let help = String::from_utf8(agon(&[command, "--help"]).stdout).expect("text");
        assert!(
            help.contains(&format!("agon {command} ")),
            "{command} shows no example:\n{help}"
        );
    }
}

#[test]
fn a_missing_or_unknown_command_exits_with_2() {
    assert_eq!(agon(&[]).status.code(), Some(2));
    assert_eq!(agon(&["align"]).status.code(), Some(2));
}
