//! Terminal output: `NO_COLOR` is respected, and control characters in texts of models and files are escaped.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use playground::Bandit;
use serde_json::json;
use system_tests::{Sandbox, agon_binary, config, number, report, tiny_bandit, tool};

/// Escape sequences for colour, window title and clearing the screen, a NUL, and a right-to-left override.
const HOSTILE: &str = "\u{1b}[31mRED\u{1b}]0;title\u{7}\0\u{9b}2J\u{202e}";

/// Whether a text contains control characters or bidirectional overrides.
fn has_control_characters(text: &str) -> bool {
    let is_bidirectional = |c| ('\u{202a}'..='\u{202e}').contains(&c);
    let mut all = text.chars().filter(|c| !"\n\t".contains(*c));
    all.any(|c| c.is_control() || is_bidirectional(c))
}

/// A bandit whose second token contains control characters.
fn hostile_bandit(sandbox: &Sandbox) -> PathBuf {
    let folder = sandbox.path("hostile");
    fs::create_dir_all(&folder).expect("a folder");
    let bandit = Bandit::new(&[0.5, 0.5]).expect("probabilities");
    bandit.write_model(&folder).expect("a model");
    let file = folder.join("tokenizer.json");
    let tokenizer = fs::read_to_string(&file).expect("the file was written");
    assert!(tokenizer.contains("\"arm1\""), "{tokenizer}");
    let hostile = json!(HOSTILE).to_string();
    fs::write(&file, tokenizer.replace("\"arm1\"", &hostile)).expect("the file is writable");
    folder
}

/// Runs `agon` in a pseudo-terminal with this value of `NO_COLOR` and returns its output.
fn on_a_terminal(script: &Path, arguments: &[String], no_color: &str) -> String {
    let quoted = |argument: &str| format!("'{}'", argument.replace('\'', "'\\''"));
    let binary = agon_binary().display().to_string();
    let command_line = [binary]
        .iter()
        .chain(arguments)
        .map(|argument| quoted(argument))
        .collect::<Vec<_>>();
    let mut command = Command::new(script);
    command.args(["-qec", &command_line.join(" "), "/dev/null"]);
    command.env("NO_COLOR", no_color).env("TERM", "xterm");
    // Files that the program creates are removed with this folder.
    let folder = tempfile::tempdir().expect("a temporary folder");
    let output = command.current_dir(folder.path()).output();
    let output = output.expect("script starts");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn no_color_disables_escapes_in_logs_progress_and_errors() {
    let Some(script) = tool("no_color", &["script"]) else {
        return;
    };
    let sandbox = Sandbox::new();
    for (no_color, has_escapes) in [("1", false), ("", true)] {
        let run = sandbox.path(&format!("run{no_color}"));
        let train = tiny_bandit(&run, &["learner.steps=3", "telemetry.page=\"\""]);
        let invalid = vec!["train".to_owned(), "--no-such-option".to_owned()];
        for arguments in [train, invalid] {
            let text = on_a_terminal(&script, &arguments, no_color);
            assert!(!text.is_empty());
            assert_eq!(
                text.contains('\u{1b}'),
                has_escapes,
                "{arguments:?}: {text:?}"
            );
        }
    }
}

#[test]
fn control_characters_of_completions_are_escaped() {
    let sandbox = Sandbox::new();
    let model = hostile_bandit(&sandbox).display().to_string();
    let shown = "\\u{1b}[31mRED\\u{1b}]0;title\\u{7}\\u{0}\\u{9b}2J\\u{202e}";
    let generate = [
        "generate", "--model", &model, "--prompt", "arm0", "--num", "20",
    ];
    let generate = [&generate[..], &["--max-new-tokens", "2"]].concat();
    let plain = sandbox.run(&generate).succeeded();
    assert!(
        plain.stdout.contains(shown) && !has_control_characters(&plain.stdout),
        "{:?}",
        plain.stdout
    );
    let json = sandbox
        .run(&[&generate[..], &["--json"]].concat())
        .succeeded();
    assert!(!has_control_characters(&json.stdout), "{:?}", json.stdout);
    let completions: Vec<String> = json
        .json_lines()
        .iter()
        .map(|line| line["completion"].as_str().expect("text").to_owned())
        .collect();
    assert!(
        completions.iter().any(|text| text.contains(HOSTILE)),
        "{completions:?}"
    );

    let first = json!({"prompt": format!("arm0 {HOSTILE}")}).to_string();
    let second = json!({"prompt": format!("{HOSTILE} arm0")}).to_string();
    let prompts = sandbox.write("prompts.jsonl", format!("{first}\n{second}\n"));
    let run = sandbox.path("run");
    let sets = [
        format!("model.path={model:?}"),
        "prompts.kind=dataset".into(),
        format!("prompts.path={:?}", prompts.display().to_string()),
        "prompts.held_out=1".into(),
        "preference.judge.kind=rule".into(),
        "preference.judge.rules=[{kind = \"ended\", weight = 1.0}]".into(),
        "actor.max_new_tokens=3".into(),
        "actor.max_prompt_length=8".into(),
        "learner.steps=2".into(),
        "learner.train_batch_size=4".into(),
        "evaluation.prompts=1".into(),
        "telemetry.page=\"\"".into(),
        "telemetry.samples_per_step=4".into(),
    ];
    let run_dir = run.display().to_string();
    let path = config("default.toml").display().to_string();
    let mut train = vec!["train", &path, "--run-dir", &run_dir];
    train.extend(sets.iter().flat_map(|set| ["--set", set.as_str()]));
    let output = sandbox.run(&train).succeeded();
    let report = fs::read_to_string(run.join("report.md")).expect("a report");
    let samples = sandbox.run(&["samples", &run_dir]).succeeded();
    let json = sandbox.run(&["samples", &run_dir, "--json"]).succeeded();
    let page = sandbox.run(&["report", &run_dir]).succeeded();
    let page = fs::read_to_string(page.stdout.trim()).expect("a page");
    for (what, text) in [
        ("the final report", &output.stdout),
        ("the log", &output.stderr),
        ("report.md", &report),
        ("samples", &samples.stdout),
        ("samples --json", &json.stdout),
        ("the report's page", &page),
    ] {
        assert!(!has_control_characters(text), "{what}: {text:?}");
    }
    for (what, text) in [("report.md", &report), ("samples", &samples.stdout)] {
        assert!(text.contains(shown), "{what}: {text}");
    }
}

#[test]
fn control_characters_of_rows_are_escaped_in_errors() {
    let sandbox = Sandbox::new();
    let model = hostile_bandit(&sandbox).display().to_string();
    let row = json!({"prompt": "arm0", "completion": [HOSTILE]}).to_string();
    let rows = sandbox.write("rows.jsonl", row).display().to_string();
    let output = sandbox.run(&["score", "--model", &model, "--input", &rows]);
    let output = output.check(3, &["RED"]).without_panic();
    assert!(
        !has_control_characters(&output.stderr),
        "{:?}",
        output.stderr
    );
}

#[test]
fn a_run_continues_without_its_terminal_and_can_be_stopped() {
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    // The reader of the pipe exits at once, so that every write of the run fails.
    let script = "mkfifo pipe; : < pipe & exec \"$0\" \"$@\" > pipe 2>&1";
    let mut command = Command::new("sh");
    command.args(["-c", script]).arg(agon_binary());
    command.args(tiny_bandit(&run, &["learner.steps=1000000"]));
    let mut running = sandbox.start_command(command);
    running.until("its first steps", || {
        (journal_lines(&run) > 2).then_some(())
    });
    running.terminate();
    running.wait().check(5, &[]);
    assert!(number(&report(&run), "/steps") > 2.0);
}

/// Number of lines in the metrics journal of a run.
fn journal_lines(run: &Path) -> usize {
    let journal = fs::read_to_string(run.join("metrics.jsonl"));
    journal.map_or(0, |text| text.lines().count())
}
