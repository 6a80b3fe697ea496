//! What reaches a terminal: no colours where `NO_COLOR` is set, and no text of a model or a file that drives it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use house::{Workplace, agon_binary, config, number, report, tiny_bandit, tool};
use playground::Bandit;
use serde_json::json;

/// Red, a title, NUL, and the letters after it from right to left.
const HOSTILE: &str = "\u{1b}[31mRED\u{1b}]0;title\u{7}\0\u{9b}2J\u{202e}";

/// Whether a terminal or a reader obeys a character of this text.
fn drives(text: &str) -> bool {
    let is_bidirectional = |c| ('\u{202a}'..='\u{202e}').contains(&c);
    let mut all = text.chars().filter(|c| !"\n\t".contains(*c));
    all.any(|c| c.is_control() || is_bidirectional(c))
}

/// A bandit whose first arm is written in characters that drive a terminal.
fn hostile_bandit(workplace: &Workplace) -> PathBuf {
    let folder = workplace.path("hostile");
    fs::create_dir_all(&folder).expect("a folder");
    let bandit = Bandit::new(&[0.5, 0.5]).expect("probabilities");
    bandit.write_model(&folder).expect("a model");
    let file = folder.join("tokenizer.json");
    let tokenizer = fs::read_to_string(&file).expect("it was written");
    assert!(tokenizer.contains("\"arm1\""), "{tokenizer}");
    let hostile = json!(HOSTILE).to_string();
    fs::write(&file, tokenizer.replace("\"arm1\"", &hostile)).expect("it is written");
    folder
}

/// `agon` with these arguments under a terminal of its own, with `NO_COLOR` set so: all that it writes to it.
fn on_a_terminal(script: &Path, arguments: &[String], no_color: &str) -> String {
    let quoted = |word: &str| format!("'{}'", word.replace('\'', "'\\''"));
    let binary = agon_binary().display().to_string();
    let words = [binary]
        .iter()
        .chain(arguments)
        .map(|w| quoted(w))
        .collect::<Vec<_>>();
    let mut command = Command::new(script);
    command.args(["-qec", &words.join(" "), "/dev/null"]);
    command.env("NO_COLOR", no_color).env("TERM", "xterm");
    // What the program keeps goes with this folder.
    let folder = tempfile::tempdir().expect("a temporary folder");
    let ended = command.current_dir(folder.path()).output();
    let ended = ended.expect("it starts");
    String::from_utf8_lossy(&ended.stdout).into_owned()
}

#[test]
fn no_color_turns_escapes_off_in_logs_progress_and_mistakes() {
    let Some(script) = tool("no_color", &["script"]) else {
        return;
    };
    let workplace = Workplace::new();
    for (no_color, has_escapes) in [("1", false), ("", true)] {
        let run = workplace.path(&format!("run{no_color}"));
        let train = tiny_bandit(&run, &["learner.steps=3", "telemetry.page=\"\""]);
        let mistake = vec!["train".to_owned(), "--no-such-option".to_owned()];
        for arguments in [train, mistake] {
            let said = on_a_terminal(&script, &arguments, no_color);
            assert!(!said.is_empty());
            assert_eq!(
                said.contains('\u{1b}'),
                has_escapes,
                "{arguments:?}: {said:?}"
            );
        }
    }
}

#[test]
fn a_completion_is_shown_and_never_obeyed() {
    let workplace = Workplace::new();
    let model = hostile_bandit(&workplace).display().to_string();
    let shown = "\\u{1b}[31mRED\\u{1b}]0;title\\u{7}\\u{0}\\u{9b}2J\\u{202e}";
    let generate = [
        "generate", "--model", &model, "--prompt", "arm0", "--num", "20",
    ];
    let generate = [&generate[..], &["--max-new-tokens", "2"]].concat();
    let words = workplace.run(&generate).succeeded();
    assert!(
        words.out.contains(shown) && !drives(&words.out),
        "{:?}",
        words.out
    );
    let json = workplace
        .run(&[&generate[..], &["--json"]].concat())
        .succeeded();
    assert!(!drives(&json.out), "{:?}", json.out);
    let completions: Vec<String> = json
        .json_lines()
        .iter()
        .map(|line| line["completion"].as_str().expect("text").to_owned())
        .collect();
    assert!(
        completions.iter().any(|text| text.contains(HOSTILE)),
        "{completions:?}"
    );

    let asked = json!({"prompt": format!("arm0 {HOSTILE}")}).to_string();
    let other = json!({"prompt": format!("{HOSTILE} arm0")}).to_string();
    let prompts = workplace.write("prompts.jsonl", format!("{asked}\n{other}\n"));
    let run = workplace.path("run");
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
    let ended = workplace.run(&train).succeeded();
    let report = fs::read_to_string(run.join("report.md")).expect("a report");
    let samples = workplace.run(&["samples", &run_dir]).succeeded();
    let json = workplace.run(&["samples", &run_dir, "--json"]).succeeded();
    let page = workplace.run(&["report", &run_dir]).succeeded();
    let page = fs::read_to_string(page.out.trim()).expect("a page");
    for (what, text) in [
        ("the final report", &ended.out),
        ("the log", &ended.err),
        ("report.md", &report),
        ("samples", &samples.out),
        ("samples --json", &json.out),
        ("the report's page", &page),
    ] {
        assert!(!drives(text), "{what}: {text:?}");
    }
    for (what, text) in [("report.md", &report), ("samples", &samples.out)] {
        assert!(text.contains(shown), "{what}: {text}");
    }
}

#[test]
fn what_a_row_says_in_an_error_is_shown_and_never_obeyed() {
    let workplace = Workplace::new();
    let model = hostile_bandit(&workplace).display().to_string();
    let row = json!({"prompt": "arm0", "completion": [HOSTILE]}).to_string();
    let rows = workplace.write("rows.jsonl", row).display().to_string();
    let ended = workplace.run(&["score", "--model", &model, "--input", &rows]);
    let ended = ended.check(3, &["RED"]).without_panic();
    assert!(!drives(&ended.err), "{:?}", ended.err);
}

#[test]
fn a_run_whose_terminal_is_gone_goes_on_and_can_be_stopped() {
    let workplace = Workplace::new();
    let run = workplace.path("run");
    // Who reads the pipe leaves at once: whatever the run writes is an error.
    let script = "mkfifo pipe; : < pipe & exec \"$0\" \"$@\" > pipe 2>&1";
    let mut command = Command::new("sh");
    command.args(["-c", script]).arg(agon_binary());
    command.args(tiny_bandit(&run, &["learner.steps=1000000"]));
    let mut running = workplace.start_command(command);
    running.until("its first steps", || (steps_so_far(&run) > 2).then_some(()));
    running.terminate();
    running.wait().check(5, &[]);
    assert!(number(&report(&run), "/steps") > 2.0);
}

/// Lines that the journal of a run has.
fn steps_so_far(run: &Path) -> usize {
    let journal = fs::read_to_string(run.join("metrics.jsonl"));
    journal.map_or(0, |text| text.lines().count())
}
