//! Evaluation judges: several, of any kind, beside the run's judge; they change no label and no weight.

use std::{fs, path::Path};

use serde_json::{Value, json};
use system_tests::{
    Sandbox, config, has_nats_server, metrics, number, report, shared, tiny_playground,
};

const SHORT: &str = "evaluation.judge.short={kind=\"rule\",temperature=0,rules=[{kind=\"length\",min=0,max=0,weight=1.0}]}";
const CYCLING: &str = "evaluation.judge.cycling={kind=\"gold\",cycle=3.0}";
const MIXED: &str = "evaluation.judge.mixed={kind=\"ensemble\",members=[{kind=\"gold\"},\
                     {kind=\"rule\",rules=[{kind=\"ended\",weight=1.0}]}]}";

/// The names of the judges in the last evaluation of a report.
fn judges(report: &Value) -> Vec<&str> {
    let judges = report["evaluation_judges"].as_array().expect("a list");
    judges
        .iter()
        .filter_map(|judge| judge["judge"].as_str())
        .collect()
}

#[test]
fn judges_of_evaluations_are_charted_beside_the_runs_judge_and_change_no_weight() {
    let sandbox = Sandbox::new();
    let [plain, judged] = ["plain", "judged"].map(|name| sandbox.path(name));
    let steps = ["learner.steps=4", "evaluation.eval_steps=2"];
    sandbox.run(&tiny_playground(&plain, &steps)).succeeded();
    let sets = [&steps[..], &[SHORT, CYCLING, MIXED]].concat();
    sandbox.run(&tiny_playground(&judged, &sets)).succeeded();
    let (plain, report) = (report(&plain), report(&judged));
    for key in ["weights_digest", "win_rate", "gold_win_rate", "win_rate_lc"] {
        assert_eq!(report[key], plain[key], "{key}");
    }
    assert_eq!(plain["evaluation_judges"], json!([]));
    assert_eq!(judges(&report), ["cycling", "mixed", "short"]);
    // The rule prefers the shorter answer, so at equal lengths it knows nothing.
    let short = &report["evaluation_judges"][2];
    assert_eq!(
        (&short["prompts"], &short["unjudged"]),
        (&json!(16), &json!(0))
    );

    let lines = metrics(&judged);
    let evaluated = lines.iter().filter(|line| !line["eval/win_rate"].is_null());
    for line in evaluated {
        for name in ["cycling", "mixed", "short"] {
            let rate = number(line, &format!("/eval~1judge_win_rate~1{name}"));
            assert!((0.0..=1.0).contains(&rate), "{line:#}");
        }
    }
    let text = |name: &str| fs::read_to_string(judged.join(name)).expect("a report");
    let summary = text("report.md");
    assert!(summary.contains("Under the evaluation judge short, which gives no labels"));
    assert!(
        summary.contains("| gold | cycling | mixed | short | KL |"),
        "{summary}"
    );
    let chart = text("win_rate.svg");
    for name in ["gold", "cycling", "mixed", "short"] {
        assert!(chart.contains(name), "no {name:?} in the chart");
    }
    let run = judged.display().to_string();
    sandbox.run(&["report", &run]).succeeded();
    let page = text("report.html");
    assert!(
        page.contains("eval/judge_win_rate/short"),
        "no curve in the page"
    );
    let compared = sandbox.run(&["eval", &run, &run, "--json"]).succeeded();
    let row = compared.json_lines().remove(0);
    assert_eq!(row["judges"][2]["judge"], "short", "{row:#}");
}

#[test]
fn judges_of_evaluations_answer_over_jetstream() {
    if !has_nats_server() {
        return;
    }
    let sandbox = Sandbox::new();
    let [memory, jetstream] = ["memory", "jetstream"].map(|name| sandbox.path(name));
    let sets = ["learner.steps=2", SHORT];
    sandbox.run(&tiny_playground(&memory, &sets)).succeeded();
    let over = ["transport.kind=jetstream", "transport.lease_seconds=2"];
    sandbox
        .run(&tiny_playground(&jetstream, &[&sets[..], &over].concat()))
        .succeeded();
    let [memory, jetstream] = [memory, jetstream].map(|run| report(&run));
    assert_eq!(judges(&jetstream), ["short"]);
    assert_eq!(jetstream["evaluation_judges"], memory["evaluation_judges"]);
}

#[test]
fn a_judge_of_evaluations_that_is_away_costs_its_verdicts_only() {
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    let away = "evaluation.judge.away={kind=\"http\",urls=[\"http://127.0.0.1:9/v1\"],model=\"m\"}";
    let sets = [
        "learner.steps=1",
        "preference.timeout_seconds=0.2",
        "preference.max_retries=1",
        "preference.retry_base_ms=1",
        "preference.circuit_failures=1",
        "preference.circuit_probe_seconds=0.1",
        away,
        SHORT,
    ];
    let output = sandbox.run(&tiny_playground(&run, &sets)).succeeded();
    assert!(
        output
            .stderr
            .contains("an evaluation judge gave no verdict"),
        "{}",
        output.stderr
    );
    let report = report(&run);
    assert_eq!(judges(&report), ["away", "short"]);
    let away = &report["evaluation_judges"][0];
    assert_eq!(
        (&away["prompts"], &away["win_rate"]),
        (&json!(0), &Value::Null)
    );
    let summary = fs::read_to_string(run.join("report.md")).expect("a report");
    let expected = "judge away, which gives no labels: without a verdict on any of 16 prompts";
    assert!(summary.contains(expected), "{summary}");
}

#[test]
fn mistakes_in_judges_of_evaluations_are_named_before_the_run() {
    let sandbox = Sandbox::new();
    let config = config("default.toml").display().to_string();
    let check = |set: &str| sandbox.run(&["check", &config, "--set", set]);
    check("evaluation.judge={kind=\"http\"}")
        .check(2, &["evaluation.judge.http.urls: name at least one URL"]);
    check("evaluation.judge.a={kind=\"encoder\",path=\"/nowhere\"}")
        .check(3, &["evaluation.judge.a", "/nowhere"]);
    let pattern = "{kind=\"regex\",pattern=\"(\",weight=1.0}";
    let rule = format!("evaluation.judge.a={{kind=\"rule\",rules=[{pattern}]}}");
    check(&rule).check(2, &["evaluation.judge.a", "pattern"]);
    check(SHORT).check(0, &["evaluation judge short: rule"]);
    let unused = [
        "check",
        &config,
        "--set",
        SHORT,
        "--set",
        "evaluation.prompts=0",
    ];
    let unused = sandbox.run(&unused);
    unused.check(
        0,
        &["evaluation.judge: evaluation.prompts = 0 turns evaluations off"],
    );
}

/// Arguments of `agon eval` of the model with itself: greedy, with a rule for short answers.
fn eval(model: &Path, b: &Path, more: &[&str]) -> Vec<String> {
    let rules = "preference.judge.rules=[{kind=\"length\",min=0,max=3,weight=1.0}]";
    let config = config("stories.toml").display().to_string();
    let mut arguments: Vec<String> = ["eval", &model.to_string_lossy(), &b.to_string_lossy()]
        .map(str::to_owned)
        .into();
    let settings = [
        "--config",
        &config,
        "--set",
        "actor.max_new_tokens=8",
        "--set",
        rules,
    ];
    arguments.extend(settings.iter().chain(more).map(|&text| text.to_owned()));
    arguments
}

fn json_lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let lines = text
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"));
    lines.collect()
}

#[test]
fn alpaca_evals_instructions_are_answered_in_its_form_and_read_back() {
    let test = "alpaca_evals_instructions_are_answered_in_its_form_and_read_back";
    let Some(model) = shared(test, "data/models/stories260K") else {
        return;
    };
    let sandbox = Sandbox::new();
    let instructions = json!([
        {"dataset": "helpful_base", "instruction": "Once upon a time"},
        {"dataset": "koala", "instruction": "The cat sat"},
    ]);
    let questions = sandbox.write("eval.json", instructions.to_string());
    let questions = questions.display().to_string();
    let out = sandbox.path("out");
    let folder = out.display().to_string();
    let output = sandbox
        .run(&eval(
            &model,
            &model,
            &["--questions", &questions, "--answers", &folder, "--json"],
        ))
        .succeeded();
    let result = output.json_lines().remove(0);
    assert_eq!(result["prompts"], 2, "{result:#}");
    number(&result, "/win_rate_lc");
    let read = |name: &str| -> Value {
        let text = fs::read_to_string(out.join(name)).expect("a file");
        serde_json::from_str(&text).expect("JSON")
    };
    let outputs = read("stories260K-a.json");
    let row = &outputs[1];
    assert_eq!(row["instruction"], "The cat sat");
    assert_eq!(
        (&row["dataset"], &row["generator"]),
        (&json!("koala"), &json!("stories260K-a"))
    );
    assert!(
        row["output"].is_string() && row["truncated"].is_boolean(),
        "{row:#}"
    );
    assert_eq!(
        (&row["max_new_tokens"], &row["chat_template"]),
        (&json!(8), &Value::Null)
    );
    assert!(row["stop_ids"].is_array(), "{row:#}");
    let annotations = read("annotations.json");
    for row in annotations.as_array().expect("a list") {
        assert!(row["output_2"].is_string());
        let preference = number(row, "/preference");
        assert!((1.0..=2.0).contains(&preference), "{row:#}");
    }
    // The file of B's answers in place of B.
    let given = out.join("stories260K-b.json");
    let again = sandbox.run(&eval(&model, &given, &["--json"])).succeeded();
    let again = again.json_lines().remove(0);
    assert_eq!(again["b"], "stories260K-b");
    assert_eq!(again["win_rate"], result["win_rate"]);
    sandbox
        .run(&eval(
            &model,
            &given,
            &[
                "--questions",
                &sandbox
                    .write("other.json", "[{\"instruction\": \"x\"}]")
                    .display()
                    .to_string(),
            ],
        ))
        .check(
            3,
            &["stories260K-b.json: it has no answer of stories260K-b to the question x"],
        );
}

#[test]
fn mt_benchs_turns_are_answered_and_judged_in_its_form() {
    let test = "mt_benchs_turns_are_answered_and_judged_in_its_form";
    let Some(model) = shared(test, "data/models/stories260K") else {
        return;
    };
    let sandbox = Sandbox::new();
    let rows = "{\"question_id\": 81, \"category\": \"writing\", \"turns\": [\"Once upon\", \"Then\"]}\n\
                {\"question_id\": 82, \"category\": \"math\", \"turns\": [\"The cat\"]}\n";
    let questions = sandbox.write("question.jsonl", rows).display().to_string();
    let template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:";
    let template = sandbox.write("chat.jinja", template);
    let template = format!("model.chat_template={template:?}");
    let out = sandbox.path("out");
    let folder = out.display().to_string();
    let files = ["--questions", &questions, "--answers", &folder, "--json"];
    let no_template = sandbox.run(&eval(&model, &model, &files));
    no_template.check(
        2,
        &["question 81 has several turns, which need a chat template"],
    );
    let with_template = [&files[..], &["--set", &template]].concat();
    let output = sandbox
        .run(&eval(&model, &model, &with_template))
        .succeeded();
    let result = &output.json_lines()[0];
    assert_eq!(result["prompts"], 3, "two turns and one");
    assert_eq!(result["independent"], 2, "two questions");
    let answers = json_lines(&out.join("model_answer/stories260K-a.jsonl"));
    assert_eq!(answers[0]["question_id"], 81);
    assert_eq!(
        answers[0]["choices"][0]["turns"].as_array().map(Vec::len),
        Some(2)
    );
    assert_eq!(answers[0]["chat_template"].as_str().map(str::len), Some(16));
    assert_eq!(answers[1]["model_id"], "stories260K-a");
    let judgements = json_lines(&out.join("model_judgment/rule_pair.jsonl"));
    let turns: Vec<_> = judgements
        .iter()
        .map(|row| (&row["question_id"], &row["turn"]))
        .collect();
    assert_eq!(
        turns,
        [
            (&json!(81), &json!(1)),
            (&json!(81), &json!(2)),
            (&json!(82), &json!(1))
        ]
    );
    for row in &judgements {
        let winner = row["g1_winner"].as_str().expect("a winner");
        assert!(["model_1", "model_2", "tie"].contains(&winner), "{row:#}");
        assert_eq!(row["g1_winner"], row["g2_winner"], "a rule knows no order");
    }
    let given = out.join("model_answer/stories260K-b.jsonl");
    let again = ["--questions", &questions, "--json", "--set", &template];
    let again = sandbox.run(&eval(&model, &given, &again)).succeeded();
    assert_eq!(
        again.json_lines()[0]["win_rate"],
        output.json_lines()[0]["win_rate"]
    );
}
