//! Evaluations: number of distinct prompts, the evaluated step, and the conditions under which results are comparable.

use std::{fmt::Write as _, fs, path::Path};

use serde_json::{Value, json};
use system_tests::{Sandbox, config, metrics, number, report, shared, steps, tiny_playground};

/// Arguments of `agon train` for two steps of a small model, with five prompts of which two are held out.
fn two_held_out(sandbox: &Sandbox, model: &Path, run: &Path, sets: &[&str]) -> Vec<String> {
    let rows = (0..5).fold(String::new(), |mut rows, index| {
        writeln!(
            rows,
            "{{\"prompt\": \"Once upon a time number {index} there was\"}}"
        )
        .expect("a text");
        rows
    });
    let prompts = sandbox.write("prompts.jsonl", rows);
    let mut arguments = vec![
        "train".to_owned(),
        config("stories.toml").display().to_string(),
    ];
    arguments.extend(["--run-dir".into(), run.display().to_string()]);
    let base = [
        format!("model.path={model:?}"),
        format!("prompts.path={prompts:?}"),
        "prompts.held_out=2".into(),
        "evaluation.prompts=64".into(),
        "learner.steps=2".into(),
        "learner.train_batch_size=4".into(),
        "actor.max_new_tokens=12".into(),
    ];
    let sets = base
        .into_iter()
        .chain(sets.iter().map(|&set| set.to_owned()));
    arguments.extend(sets.flat_map(|set| ["--set".to_owned(), set]));
    arguments
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

#[test]
fn duplicate_held_out_prompts_count_once() {
    let Some(model) = shared(
        "duplicate_held_out_prompts_count_once",
        "data/models/stories260K",
    ) else {
        return;
    };
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    let output = sandbox
        .run(&two_held_out(&sandbox, &model, &run, &[]))
        .succeeded();
    assert!(
        output
            .stderr
            .contains("there are 2 distinct held-out prompts"),
        "{}",
        output.stderr
    );
    let report = report(&run);
    assert_eq!(report["eval_prompts"], 2);
    // Wilson's interval is at least .66 wide for two outcomes and at most .24 for 64.
    let width = number(&report, "/win_rate_ci_high") - number(&report, "/win_rate_ci_low");
    assert!(width > 0.6, "{width}");
    let summary = text(&run.join("report.md"));
    assert!(summary.contains("of 2 held-out prompts"), "{summary}");
    assert!(summary.contains("evaluation.prompts = 64"), "{summary}");

    let eval = |more: &[&str]| {
        let run = run.display().to_string();
        let arguments = [&["eval", &run, &run][..], more].concat();
        sandbox.run(&arguments)
    };
    let result = eval(&["--json"]).succeeded();
    assert_eq!(result.json_lines()[0]["prompts"], 2, "{}", result.stdout);
    let rejected = eval(&["--prompts", "3"]);
    rejected
        .check(2, &["--prompts 3", "2 distinct held-out prompts"])
        .without_panic();
}

#[test]
fn evaluation_conditions_are_recorded_and_differences_reported() {
    let test = "evaluation_conditions_are_recorded_and_differences_reported";
    let Some(model) = shared(test, "data/models/stories260K") else {
        return;
    };
    let sandbox = Sandbox::new();
    let other = sandbox.copy_of(&model, "other");
    fs::write(
        other.join("generation_config.json"),
        r#"{"eos_token_id": [2, 7]}"#,
    )
    .expect("a writable copy");
    fs::write(
        other.join("chat_template.jinja"),
        "{{ messages[0].content }}",
    )
    .expect("a writable copy");
    let [one, two] = ["one", "two"].map(|name| sandbox.path(name));
    let sets: [(&Path, &Path, &[&str]); 2] = [(&model, &one, &[]), (&other, &two, &[])];
    for (model, run, sets) in sets {
        sandbox
            .run(&two_held_out(&sandbox, model, run, sets))
            .succeeded();
    }
    let of = |run: &Path| report(run)["evaluation_conditions"].clone();
    assert_eq!(of(&one)["chat_template"], Value::Null);
    assert_eq!(of(&one)["max_new_tokens"], 12);
    // The tokenizer's end-of-text token is a stop token too.
    assert_eq!(of(&two)["stop_ids"], json!([1, 2, 7]));
    assert_eq!(of(&two)["chat_template"].as_str().map(str::len), Some(16));
    for run in [&one, &two] {
        let lines = metrics(run);
        let evaluations: Vec<_> = lines
            .iter()
            .filter(|line| !line["eval/win_rate"].is_null())
            .collect();
        assert!(evaluations.len() >= 2, "{lines:#?}");
        for line in evaluations {
            assert_eq!(line["conditions"], of(run), "{line:#}");
            assert!(
                (0.0..=1.0).contains(&number(line, "/eval~1truncation_rate")),
                "{line:#}"
            );
        }
        number(&report(run), "/truncation_rate");
        let summary = text(&run.join("report.md"));
        assert!(summary.contains("Evaluated with stop tokens"), "{summary}");
    }

    let [one, two] = [one, two].map(|run| run.display().to_string());
    let warnings = ["stop_ids: ", "[1,2,7] in", "chat_template: none in"];
    let output = sandbox
        .run(&["eval", &one, &two, "--json"])
        .check(0, &warnings);
    let row = output.json_lines().remove(0);
    assert!(
        row["differences"]
            .as_array()
            .is_some_and(|all| all.len() >= 2),
        "{row:#}"
    );
    assert_eq!(row["conditions"]["max_new_tokens"], 12);
    number(&row, "/truncation_rate_a");
    let same = sandbox.run(&["eval", &one, &one, "--json"]).succeeded();
    assert_eq!(same.json_lines()[0]["differences"], json!([]));

    let mut view = sandbox.start(&["view", &one, &two]);
    let [stdout, _] = view.output_files();
    view.until("the address of the page", || {
        text(&stdout).contains('\n').then_some(())
    });
    let log = view.stderr();
    for part in [
        "cannot be compared",
        "[1,2,7] in two",
        "chat_template: none in one",
    ] {
        assert!(log.contains(part), "no {part:?} in {log}");
    }
    view.terminate();
    view.wait().succeeded();
}

#[test]
fn an_interrupted_run_reports_the_evaluated_step() {
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    let sets = ["learner.steps=100000", "evaluation.eval_steps=50000"];
    let mut running = sandbox.start(&tiny_playground(&run, &sets));
    running.until("three steps", || (steps(&run).len() >= 3).then_some(()));
    running.terminate();
    running.wait().check(5, &[]);
    let report = report(&run);
    assert_eq!(report["evaluated_at_step"], 0);
    let steps = number(&report, "/steps");
    assert!(steps >= 3.0, "{steps}");
    let summary = text(&run.join("report.md"));
    assert!(!summary.contains("The policy "), "{summary}");
    let says = format!("of step 0, before the first of {steps} steps");
    assert!(summary.contains(&says), "{summary}");
}

#[test]
fn a_run_interrupted_in_its_last_evaluation_is_unfinished() {
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    let sets = ["learner.steps=3", "evaluation.prompts=20000"];
    let mut running = sandbox.start(&tiny_playground(&run, &sets));
    running.until("the last step", || (steps(&run).len() == 3).then_some(()));
    running.terminate();
    running.wait().check(5, &[]);
    assert_eq!(report(&run)["finished"], false);
    let mut resume = tiny_playground(&run, &["learner.steps=3", "evaluation.prompts=16"]);
    resume.push("--resume".into());
    sandbox.run(&resume).succeeded();
    let report = report(&run);
    assert_eq!(
        (&report["finished"], &report["evaluated_at_step"]),
        (&json!(true), &json!(3))
    );
}
