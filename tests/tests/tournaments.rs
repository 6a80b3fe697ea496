//! `agon tournament`: the claims' files in smoke runs, continuation after an interruption, and mistakes.

use std::{
    fs,
    path::Path,
    time::{Duration, SystemTime},
};

use serde_json::{Value, json};
use system_tests::{
    FakeChat, FakeChatResponse, ProcessOutput, Sandbox, make_pipe, shared, workspace_root,
};

/// Tiny runs of two methods on a playground.
const TINY: &str = r#"
[tournament]
name = "tiny"
output_dir = "tournaments"
seeds = [11, 12, 13]
selection_seeds = [1]
prompts = 32
curves = ["loss"]

[settings]
playground = { hidden_size = 32, layers = 1, heads = 2, intermediate_size = 64, base_dir = "base" }
sft = { steps = 20, train_batch_size = 16 }
actor = { slots = 16, max_new_tokens = 16 }
learner = { steps = 20, train_batch_size = 16, learning_rate = 2e-3, save_steps = 5, max_staleness = 0 }
evaluation = { prompts = 32, eval_steps = 10 }
preference.judge = { kind = "gold", cycle = 1.0 }

[[method]]
name = "ipo"
settings.learner.ema_decay = 0.5
grid.learner.objective.tau = [0.05, 0.5]

[[method]]
name = "still"
settings.learner.learning_rate = 1e-12
"#;

/// Runs `agon tournament`.
fn tournament(sandbox: &Sandbox, file: &Path, more: &[&str]) -> ProcessOutput {
    let file = file.display().to_string();
    sandbox.run(&[&["tournament", &file], more].concat())
}

fn report(sandbox: &Sandbox, folder: &str) -> Value {
    let path = sandbox.path(folder).join("report.json");
    let text = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&text).expect("JSON")
}

fn list(value: &Value) -> &[Value] {
    value
        .as_array()
        .unwrap_or_else(|| panic!("not a list: {value}"))
}

fn number(value: &Value, pointer: &str) -> f64 {
    let found = value.pointer(pointer).and_then(Value::as_f64);
    found.unwrap_or_else(|| panic!("no number {pointer} in {value:#}"))
}

/// The row of this name among the policies of the first standings.
fn policy<'a>(report: &'a Value, name: &str) -> &'a Value {
    let policies = list(&report["standings"][0]["policies"]);
    let found = policies.iter().find(|policy| policy["name"] == name);
    found.unwrap_or_else(|| panic!("no {name} in {policies:?}"))
}

/// A policy that does not move answers as its reference does, with the same seeds: every meeting of the two is a tie.
#[test]
fn a_tournament_chooses_settings_and_compares_the_policies() {
    let sandbox = Sandbox::new();
    let file = sandbox.write("tiny.toml", TINY);
    let printed = tournament(&sandbox, &file, &["--jobs", "2"]).succeeded();
    let report = report(&sandbox, "tournaments/tiny");
    let still = policy(&report, "still");
    assert_eq!(number(still, "/win_rate/mean"), 0.5);
    assert!(number(still, "/kl/mean").abs() < 1e-4, "{still}");
    let ipo = policy(&report, "ipo");
    assert!(number(ipo, "/win_rate/mean") > 0.6, "{ipo}");
    assert!(number(ipo, "/kl/mean") > 0.1, "{ipo}");
    assert_eq!(number(ipo, "/win_rate/seeds"), 3.0);
    assert!(number(ipo, "/win_rate/low") < number(ipo, "/win_rate/high"));
    assert!(policy(&report, "ipo, average")["kl"].is_object());
    let mix = list(&policy(&report, "reference")["styles"]["mix"]);
    let total: f64 = mix.iter().filter_map(Value::as_f64).sum();
    assert!((total - 1.0).abs() < 1e-9, "{mix:?}");

    let candidates = list(&report["selected"][0]["candidates"]);
    let score = |label: &str| {
        let found = candidates.iter().find(|found| found["label"] == label);
        number(found.expect("a candidate"), "/score")
    };
    let best = if score("tau=0.05") >= score("tau=0.5") {
        "tau=0.05"
    } else {
        "tau=0.5"
    };
    assert_eq!(report["selected"][0]["label"], best, "{candidates:?}");

    let comparisons = list(&report["standings"][0]["comparisons"]);
    assert_eq!(comparisons.len(), 3, "of three policies: {comparisons:?}");
    let against_still = comparisons
        .iter()
        .find(|found| found["a"] == "ipo" && found["b"] == "still");
    let against_still = against_still.expect("they have met");
    // Against a policy that answers as the reference does, the meeting is the comparison with the reference.
    assert_eq!(
        number(against_still, "/win_rate/mean"),
        number(ipo, "/win_rate/mean")
    );
    let p = number(against_still, "/p");
    assert!((0.0..=1.0).contains(&p), "{p}");

    let html = fs::read_to_string(sandbox.path("tournaments/tiny/report.html")).expect("a page");
    assert!(
        html.contains("<svg") && html.contains("Row against column"),
        "{html}"
    );
    assert!(!html.contains("<script"));
    assert!(
        printed.stdout.contains("## Comparisons"),
        "{}",
        printed.stdout
    );

    // Nothing is left to do: the same report, and no run is touched.
    let run = sandbox.path("tournaments/tiny/runs/still/settings/seed-11/report.json");
    let changed = |path: &Path| -> SystemTime { fs::metadata(path).unwrap().modified().unwrap() };
    let before = changed(&run);
    let again = tournament(&sandbox, &file, &[]).succeeded();
    assert_eq!(again.stdout, printed.stdout);
    assert_eq!(changed(&run), before);

    let other = TINY.replace(
        "steps = 20, train_batch_size = 16, learning",
        "steps = 21, train_batch_size = 16, learning",
    );
    let other = sandbox.write("other.toml", other);
    tournament(&sandbox, &other, &[])
        .check(2, &["was made with other settings", "tournament.name"]);
}

#[test]
fn an_interrupted_tournament_continues_to_the_same_report() {
    let sandbox = Sandbox::new();
    let long = TINY.replace("learner = { steps = 20", "learner = { steps = 60");
    let file = sandbox.write("tiny.toml", long);
    let name = file.display().to_string();
    let whole = tournament(&sandbox, &file, &["--dir", "whole"]).succeeded();
    let mut running = sandbox.start(&["tournament", &name, "--dir", "parts"]);
    let checkpoints = sandbox.path("parts/runs/ipo/tau=0.05/seed-1/checkpoints");
    running.until("a checkpoint", || {
        fs::read_dir(&checkpoints).ok()?.flatten().next().map(drop)
    });
    running.terminate();
    running.wait().check(5, &["the same command continues"]);
    assert!(!sandbox.path("parts/report.json").exists());
    let continued = tournament(&sandbox, &file, &["--dir", "parts"]).succeeded();
    // Seconds and memory are of this run; everything else is of the seeds.
    let results = |text: &str| {
        let end = text.find("## Training").expect("a table of times");
        text[..end].to_owned()
    };
    assert_eq!(results(&continued.stdout), results(&whole.stdout));
}

/// However early the signal, nothing fails: the run's process may not have begun yet.
#[test]
fn a_signal_at_any_time_ends_with_the_code_of_an_interruption() {
    let sandbox = Sandbox::new();
    let long = TINY.replace("learner = { steps = 20", "learner = { steps = 2000");
    let file = sandbox.write("tiny.toml", long).display().to_string();
    for delay in [0, 3, 10, 30, 100] {
        let mut running = sandbox.start(&["tournament", &file]);
        let [_, errors] = running.output_files();
        running.until("the first run", || {
            let printed = fs::read_to_string(&errors).ok()?;
            printed.contains("run started").then_some(())
        });
        std::thread::sleep(Duration::from_millis(delay));
        running.terminate();
        running.wait().check(5, &["the same command continues"]);
    }
}

/// Files that are not the tournament's own: nothing outside is written, nothing hangs, nothing panics.
#[test]
fn a_foreign_directory_is_refused_or_repaired() {
    let sandbox = Sandbox::new();
    let file = sandbox.write("tiny.toml", TINY);
    tournament(&sandbox, &file, &[]).succeeded();
    let root = sandbox.path("tournaments/tiny");
    let victim = sandbox.write("victim", "precious");
    let replaced = |name: &str, by: &dyn Fn(&Path)| {
        let path = root.join(name);
        let kept = fs::read(&path).expect("it is there");
        fs::remove_file(&path).expect("it is there");
        by(&path);
        let output = tournament(&sandbox, &file, &[]).without_panic();
        fs::remove_file(&path).ok();
        fs::write(&path, kept).expect("a file");
        output
    };
    let link = |path: &Path| std::os::unix::fs::symlink(&victim, path).expect("a link");
    let settings = "settings/still/settings.toml";
    for name in ["tournament.lock", settings] {
        assert_ne!(replaced(name, &link).code, Some(0), "{name}");
        assert_ne!(replaced(name, &make_pipe).code, Some(0), "{name}");
    }
    assert_eq!(
        fs::read_to_string(&victim).expect("it is there"),
        "precious"
    );

    // Results that cannot be: those of meetings are made again, those of a run are refused.
    let meetings = "meetings/seed-11.json";
    let text = fs::read_to_string(root.join(meetings)).expect("meetings");
    let mut shortened: Value = serde_json::from_str(&text).expect("JSON");
    shortened["meetings"][0]["win_rates"] = json!([[null]]);
    let write = |text: String| move |path: &Path| fs::write(path, &text).expect("a file");
    replaced(meetings, &write(shortened.to_string())).succeeded();
    let run = "runs/still/settings/seed-11/report.json";
    let text = fs::read_to_string(root.join(run)).expect("a report");
    let mut changed: Value = serde_json::from_str(&text).expect("JSON");
    changed["evaluations"][0]["win_rate"]["mean"] = json!(1e308);
    changed["evaluations"][0]["kl"] = json!(-1e308);
    replaced(run, &write(changed.to_string())).succeeded();
    changed["evaluations"] = json!([]);
    replaced(run, &write(changed.to_string())).check(3, &["holds no evaluation", "remove"]);

    // A damaged policy is not replaced by an older one.
    let checkpoints = root.join("runs/still/settings/seed-11/checkpoints/step_20");
    let weights = checkpoints.join("model.safetensors");
    let mut bytes = fs::read(&weights).expect("weights");
    let last = bytes.len() - 1;
    bytes[last] ^= 0xff;
    fs::write(&weights, bytes).expect("a file");
    fs::remove_dir_all(root.join("meetings")).expect("meetings");
    tournament(&sandbox, &file, &[]).check(3, &["model.safetensors"]);
}

/// A judge that never decides gives no win rates: the tournament says so, and keeps nothing of it.
#[test]
fn a_judge_without_verdicts_is_named() {
    let sandbox = Sandbox::new();
    let server = FakeChat::start(|_, _| FakeChatResponse::completion("judge", "who knows"));
    let judge = format!(
        "judge.silent = {{ kind = \"http\", urls = [\"{}/v1\"], model = \"judge\" }}",
        server.url()
    );
    let judged = TINY
        .replace(
            "prompts = 32\ncurves",
            "judge = \"silent\"\nprompts = 8\ncurves",
        )
        .replace(
            "evaluation = { prompts = 32, eval_steps = 10 }",
            &format!("evaluation = {{ prompts = 8, eval_steps = 0, {judge} }}"),
        );
    let file = sandbox.write("judged.toml", &judged);
    let named = ["judge \"silent\"", "verdict"];
    let selection = tournament(&sandbox, &file, &[]);
    assert_ne!(selection.code, Some(0));
    for expected in named {
        assert!(selection.stderr.contains(expected), "{}", selection.stderr);
    }
    // Without a selection, the meetings say it.
    let all = judged.replace("grid.learner", "keep = \"all\"\ngrid.learner");
    let file = sandbox.write("all.toml", all);
    let meetings = tournament(&sandbox, &file, &["--dir", "all"]);
    meetings.check(3, &named);
    assert!(!sandbox.path("all/meetings/seed-11.json").exists());
}

#[test]
fn a_diverged_run_is_named_and_left_out() {
    let sandbox = Sandbox::new();
    let wild = TINY
        .replace("seeds = [11, 12, 13]", "seeds = [11, 12]")
        .replace("learning_rate = 1e-12", "learning_rate = 1e30");
    let file = sandbox.write("wild.toml", wild);
    tournament(&sandbox, &file, &[]).succeeded();
    let report = report(&sandbox, "tournaments/tiny");
    let diverged = list(&policy(&report, "still")["diverged"]);
    assert_eq!(diverged, [11, 12].map(Value::from), "{report:#}");
    assert!(policy(&report, "still")["win_rate"].is_null());
    assert!(policy(&report, "ipo")["win_rate"].is_object());
}

#[test]
fn a_failed_run_ends_the_tournament_with_its_reason() {
    let sandbox = Sandbox::new();
    let broken = TINY.replace(
        "[settings]",
        "[settings]\nmodel.chat_template = \"nowhere.jinja\"",
    );
    let file = sandbox.write("broken.toml", broken);
    let output = tournament(&sandbox, &file, &[]);
    assert!(output.stderr.contains("nowhere.jinja"), "{}", output.stderr);
    assert!(output.stderr.contains("its log is"), "{}", output.stderr);
    assert_ne!(output.code, Some(0));
}

#[test]
fn mistakes_are_reported_before_any_run() {
    let sandbox = Sandbox::new();
    for (change, fragments) in [
        (
            ("seeds = [11, 12, 13]", "seeds = [1]"),
            &["tournament.selection_seeds", "[1]"][..],
        ),
        (
            ("name = \"tiny\"", "nam = \"tiny\""),
            &["unknown field `nam`", "line"],
        ),
        (
            ("tau = [0.05, 0.5]", "tau = [0.0, -1.0]"),
            &["2 mistakes", "method ipo (tau=-1.0): learner.objective.tau"],
        ),
        (
            ("prompts = 32\ncurves", "judge = \"human\"\ncurves"),
            &["tournament.judge = \"human\" is no judge"],
        ),
    ] {
        let file = sandbox.write("bad.toml", TINY.replace(change.0, change.1));
        tournament(&sandbox, &file, &[]).check(2, fragments);
    }
    let file = sandbox.write("tiny.toml", TINY);
    tournament(&sandbox, &file, &["--jobs", "0"]).check(2, &["--jobs 0"]);
    tournament(&sandbox, &sandbox.path("none.toml"), &[]).check(3, &["none.toml"]);
    let counted = tournament(&sandbox, &file, &["--dry-run"]).succeeded();
    assert!(
        counted
            .stdout
            .contains("2 runs to choose settings and 6 final runs"),
        "{}",
        counted.stdout
    );
    assert!(!sandbox.path("tournaments").exists());
}

/// Prepares a chat model, pairs and two preference models as docs/real-model.md does; `false` without the shared data.
fn prepare_chat_model(sandbox: &Sandbox) -> bool {
    let Some(model) = shared("every_claim_has_a_smoke_run", "data/cases/A02/chat-bos") else {
        return false;
    };
    std::os::unix::fs::symlink(model, sandbox.path("model")).expect("a link");
    for (file, word) in [
        ("pairs-a", "red"),
        ("pairs-b", "blue"),
        ("held-out", "green"),
    ] {
        let row = |index: usize| {
            let hh = |answer: &str| format!("\n\nHuman: {word} {index}\n\nAssistant: {answer}");
            json!({"chosen": hh("yes"), "rejected": hh("no")}).to_string() + "\n"
        };
        let rows: String = (0..24).map(row).collect();
        sandbox.write(&format!("{file}.jsonl"), &rows);
        if file == "pairs-a" {
            sandbox.write("prompts.jsonl", &rows);
        }
    }
    for (judge, pairs) in [("judge", "pairs-a"), ("independent", "pairs-b")] {
        let config = workspace_root().join("configs/smollm2.toml");
        sandbox
            .run(&[
                "fit-preference",
                config.to_str().expect("a path"),
                "--run-dir",
                &format!("runs/smollm2-{judge}"),
                "--set",
                "model.path=model",
                "--set",
                &format!("preference.fit.pairs.path={pairs}.jsonl"),
            ])
            .succeeded();
    }
    true
}

/// Every file of `configs/claims` runs through, with tiny models that learn nothing.
#[test]
fn every_claim_has_a_smoke_run() {
    let sandbox = Sandbox::new();
    let folder = workspace_root().join("configs/claims");
    let mut files: Vec<_> = fs::read_dir(folder)
        .expect("the folder")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    files.sort();
    assert!(files.len() >= 11, "{files:?}");
    let has_chat_model = prepare_chat_model(&sandbox);
    for file in files {
        let of_chat_model = ["smollm2.toml", "apo-hh.toml"];
        if !has_chat_model && of_chat_model.iter().any(|name| file.ends_with(name)) {
            continue;
        }
        let counts = tournament(&sandbox, &file, &["--dry-run"]).succeeded();
        assert!(counts.stdout.contains("final runs"), "{}", counts.stdout);
        tournament(
            &sandbox,
            &file,
            &["--smoke", "--jobs", "2", "--dir", "smoke"],
        )
        .succeeded();
        let report = report(&sandbox, "smoke");
        for standings in list(&report["standings"]) {
            for policy in list(&standings["policies"]) {
                let is_reference = policy["name"] == "reference";
                assert!(
                    is_reference || policy["win_rate"].is_object(),
                    "{}: {policy}",
                    file.display()
                );
                assert_eq!(
                    policy["diverged"],
                    Value::Array(Vec::new()),
                    "{}: {policy}",
                    file.display()
                );
            }
        }
        fs::remove_dir_all(sandbox.path("smoke")).expect("it is there");
    }
}
