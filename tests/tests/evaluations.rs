//! Evaluations count what they say: distinct prompts, the step that they are of, and the conditions without
//! which their numbers mean nothing.

use std::{fmt::Write as _, fs, path::Path};

use house::{Workplace, config, metrics, number, report, shared, steps, tiny_playground};
use serde_json::{Value, json};

/// `agon train` for two steps of a small real model, with five prompts of which two are held out.
fn two_held_out(workplace: &Workplace, model: &Path, run: &Path, sets: &[&str]) -> Vec<String> {
    let rows = (0..5).fold(String::new(), |mut rows, index| {
        writeln!(
            rows,
            "{{\"prompt\": \"Once upon a time number {index} there was\"}}"
        )
        .expect("a text");
        rows
    });
    let prompts = workplace.write("prompts.jsonl", rows);
    let mut words = vec![
        "train".to_owned(),
        config("stories.toml").display().to_string(),
    ];
    words.extend(["--run-dir".into(), run.display().to_string()]);
    let own = [
        format!("model.path={model:?}"),
        format!("prompts.path={prompts:?}"),
        "prompts.held_out=2".into(),
        "evaluation.prompts=64".into(),
        "learner.steps=2".into(),
        "learner.train_batch_size=4".into(),
        "actor.max_new_tokens=12".into(),
    ];
    let sets = own
        .into_iter()
        .chain(sets.iter().map(|&set| set.to_owned()));
    words.extend(sets.flat_map(|set| ["--set".to_owned(), set]));
    words
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

#[test]
fn a_held_out_prompt_counts_once() {
    let Some(model) = shared("a_held_out_prompt_counts_once", "data/models/stories260K") else {
        return;
    };
    let workplace = Workplace::new();
    let run = workplace.path("run");
    let ended = workplace
        .run(&two_held_out(&workplace, &model, &run, &[]))
        .succeeded();
    assert!(
        ended.err.contains("there are 2 distinct held-out prompts"),
        "{}",
        ended.err
    );
    let report = report(&run);
    assert_eq!(report["eval_prompts"], 2);
    // Wilson's interval of two outcomes, which is .66 wide at the least; of 64 it would be .24 at the most.
    let width = number(&report, "/win_rate_ci_high") - number(&report, "/win_rate_ci_low");
    assert!(width > 0.6, "{width}");
    let told = text(&run.join("report.md"));
    assert!(told.contains("of 2 held-out prompts"), "{told}");
    assert!(told.contains("evaluation.prompts = 64"), "{told}");

    let eval = |more: &[&str]| {
        let run = run.display().to_string();
        let words = [&["eval", &run, &run][..], more].concat();
        workplace.run(&words)
    };
    let told = eval(&["--json"]).succeeded();
    assert_eq!(told.json_lines()[0]["prompts"], 2, "{}", told.out);
    let refused = eval(&["--prompts", "3"]);
    refused
        .check(2, &["--prompts 3", "2 distinct held-out prompts"])
        .without_panic();
}

#[test]
fn conditions_stand_beside_every_evaluation_and_differences_are_said() {
    let test = "conditions_stand_beside_every_evaluation";
    let Some(model) = shared(test, "data/models/stories260K") else {
        return;
    };
    let workplace = Workplace::new();
    let other = workplace.copy_of(&model, "other");
    fs::write(
        other.join("generation_config.json"),
        r#"{"eos_token_id": [2, 7]}"#,
    )
    .expect("it is ours");
    fs::write(
        other.join("chat_template.jinja"),
        "{{ messages[0].content }}",
    )
    .expect("it is ours");
    let [one, two] = ["one", "two"].map(|name| workplace.path(name));
    let sets: [(&Path, &Path, &[&str]); 2] = [(&model, &one, &[]), (&other, &two, &[])];
    for (model, run, sets) in sets {
        workplace
            .run(&two_held_out(&workplace, model, run, sets))
            .succeeded();
    }
    let of = |run: &Path| report(run)["evaluation_conditions"].clone();
    assert_eq!(of(&one)["chat_template"], Value::Null);
    assert_eq!(of(&one)["max_new_tokens"], 12);
    // The tokenizer's own end of text stops too.
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
        let told = text(&run.join("report.md"));
        assert!(told.contains("Evaluated with stop tokens"), "{told}");
    }

    let [one, two] = [one, two].map(|run| run.display().to_string());
    let warned = ["stop_ids: ", "[1,2,7] in", "chat_template: none in"];
    let ended = workplace
        .run(&["eval", &one, &two, "--json"])
        .check(0, &warned);
    let row = ended.json_lines().remove(0);
    assert!(
        row["differences"]
            .as_array()
            .is_some_and(|all| all.len() >= 2),
        "{row:#}"
    );
    assert_eq!(row["conditions"]["max_new_tokens"], 12);
    number(&row, "/truncation_rate_a");
    let same = workplace.run(&["eval", &one, &one, "--json"]).succeeded();
    assert_eq!(same.json_lines()[0]["differences"], json!([]));

    let mut view = workplace.start(&["view", &one, &two]);
    let [out, _] = view.files();
    view.until("the address of the page", || {
        text(&out).contains('\n').then_some(())
    });
    let said = view.err();
    for part in [
        "cannot be compared",
        "[1,2,7] in two",
        "chat_template: none in one",
    ] {
        assert!(said.contains(part), "no {part:?} in {said}");
    }
    view.terminate();
    view.wait().succeeded();
}

#[test]
fn an_interrupted_run_says_of_which_step_its_evaluation_is() {
    let workplace = Workplace::new();
    let run = workplace.path("run");
    let sets = ["learner.steps=100000", "evaluation.eval_steps=50000"];
    let mut running = workplace.start(&tiny_playground(&run, &sets));
    running.until("three steps", || (steps(&run).len() >= 3).then_some(()));
    running.terminate();
    running.wait().check(5, &[]);
    let report = report(&run);
    assert_eq!(report["evaluated_at_step"], 0);
    let taken = number(&report, "/steps");
    assert!(taken >= 3.0, "{taken}");
    let told = text(&run.join("report.md"));
    assert!(!told.contains("The policy "), "{told}");
    let says = format!("of step 0, before the first of {taken} steps");
    assert!(told.contains(&says), "{told}");
}

#[test]
fn a_run_interrupted_in_its_last_evaluation_is_not_done() {
    let workplace = Workplace::new();
    let run = workplace.path("run");
    let sets = ["learner.steps=3", "evaluation.prompts=20000"];
    let mut running = workplace.start(&tiny_playground(&run, &sets));
    running.until("the last step", || (steps(&run).len() == 3).then_some(()));
    running.terminate();
    running.wait().check(5, &[]);
    assert_eq!(report(&run)["finished"], false);
    let mut resume = tiny_playground(&run, &["learner.steps=3", "evaluation.prompts=16"]);
    resume.push("--resume".into());
    workplace.run(&resume).succeeded();
    let report = report(&run);
    assert_eq!(
        (&report["finished"], &report["evaluated_at_step"]),
        (&json!(true), &json!(3))
    );
}
