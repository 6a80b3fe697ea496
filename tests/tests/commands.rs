//! The commands other than `train`, checked against reference values or their documented behaviour.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use system_tests::{ProcessOutput, Sandbox, config, number, report, shared, tiny_playground};

fn text(path: &Path) -> String {
    path.display().to_string()
}

fn read(path: &Path) -> Value {
    let content = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&content).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn list(value: &Value) -> &[Value] {
    value
        .as_array()
        .unwrap_or_else(|| panic!("not a list: {value}"))
}

fn floats(value: &Value) -> Vec<f64> {
    let float = |value: &Value| {
        value
            .as_f64()
            .unwrap_or_else(|| panic!("not a number: {value}"))
    };
    list(value).iter().map(float).collect()
}

/// Runs `agon score` on `rows`.
fn score(sandbox: &Sandbox, model: &Path, rows: &[Value]) -> ProcessOutput {
    let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
    let file = sandbox.write("rows.jsonl", lines);
    sandbox.run(&["score", "--model", &text(model), "--input", &text(&file)])
}

fn log_probabilities(output: ProcessOutput) -> Vec<Vec<f64>> {
    output
        .succeeded()
        .json_lines()
        .iter()
        .map(|answer| floats(&answer["logprobs"]))
        .collect()
}

/// Runs `agon generate --json` with additional arguments.
fn generate(sandbox: &Sandbox, model: &Path, more: &[&str]) -> Vec<Value> {
    let model = text(model);
    let call = [
        "generate",
        "--json",
        "--model",
        &model,
        "--max-new-tokens",
        "24",
        "--num",
        "3",
    ];
    sandbox
        .run(&[&call, more].concat())
        .succeeded()
        .json_lines()
}

/// Token ids of every completion.
fn ids(lines: &[Value]) -> Vec<Value> {
    lines.iter().map(|line| line["ids"].clone()).collect()
}

/// Runs a tiny playground to completion.
fn finished_run(sandbox: &Sandbox) -> PathBuf {
    let run = sandbox.path("run");
    sandbox
        .run(&tiny_playground(&run, &["learner.steps=3"]))
        .succeeded();
    run
}

#[test]
fn log_probabilities_of_a_text_match_the_reference_values() {
    for (test, model) in [
        ("score_stories", "data/models/stories260K"),
        ("score_babyllama", "data/models/babyllama-tok361"),
    ] {
        let Some(model) = shared(test, model) else {
            return;
        };
        let scored = &read(&model.join("reference.json"))["scored"];
        let sandbox = Sandbox::new();
        let answers = log_probabilities(score(&sandbox, &model, &[json!({"ids": scored["ids"]})]));
        let expected = number(scored, "/sum_logprob");
        let found: f64 = answers[0].iter().sum();
        let tolerance = 1e-3 * answers[0].len() as f64;
        assert_eq!(answers[0].len() + 1, list(&scored["ids"]).len());
        assert!(
            (found - expected).abs() < tolerance,
            "{}: {found} against {expected}",
            model.display()
        );
    }
}

#[test]
fn every_supported_architecture_matches_transformers() {
    for name in [
        "random-llama3",
        "random-qwen2",
        "random-qwen3",
        "random-mistral",
    ] {
        let Some(model) = shared("score_random", &format!("data/models/{name}")) else {
            return;
        };
        let reference = read(&model.join("reference.json"));
        // Padding is on the right; only the tokens before it are scored.
        let lengths: Vec<usize> = list(&reference["attention_mask"])
            .iter()
            .map(|mask| floats(mask).iter().sum::<f64>() as usize)
            .collect();
        let rows: Vec<Value> = list(&reference["ids"])
            .iter()
            .zip(&lengths)
            .map(|(ids, &length)| json!({"ids": list(ids)[..length]}))
            .collect();
        let sandbox = Sandbox::new();
        let answers = log_probabilities(score(&sandbox, &model, &rows));
        assert_eq!(answers.len(), rows.len());
        for ((answer, expected), length) in answers
            .iter()
            .zip(list(&reference["logprobs"]))
            .zip(lengths)
        {
            assert_eq!(answer.len(), length - 1, "{name}");
            for (position, (found, expected)) in answer.iter().zip(floats(expected)).enumerate() {
                assert!(
                    (found - expected).abs() < 1e-3,
                    "{name}, {position}: {found} against {expected}"
                );
            }
        }
    }
}

#[test]
fn a_completion_is_scored_given_its_prompt() {
    let Some(model) = shared("score_text", "data/models/stories260K") else {
        return;
    };
    let sandbox = Sandbox::new();
    let rows = [
        json!({"prompt": "Once upon a time", "completion": ", there was a little girl named Lily."}),
        json!({"prompt": "Once upon a time", "completion": ", there was a little boy named Tim.", "more": 1}),
    ];
    let answers = score(&sandbox, &model, &rows).succeeded().json_lines();
    assert_eq!(answers.len(), 2);
    let prompt = read(&model.join("reference.json"))["prompts"][0]["ids"].clone();
    for answer in &answers {
        let completion = list(&answer["ids"]);
        let scored = floats(&answer["logprobs"]);
        assert_eq!(scored.len(), completion.len());
        // The same tokens given as ids have the same log-probabilities.
        let sequence = json!({"ids": ([list(&prompt), completion].concat())});
        let all = log_probabilities(score(&sandbox, &model, &[sequence]));
        let tail = &all[0][all[0].len() - completion.len()..];
        for (a, b) in scored.iter().zip(tail) {
            assert!((a - b).abs() < 1e-4, "{scored:?} {tail:?}");
        }
    }
    // The first row is the greedy continuation.
    let [lily, tim] = [0, 1].map(|row| floats(&answers[row]["logprobs"]).iter().sum::<f64>());
    assert!(lily > tim, "{lily} {tim}");
}

#[test]
fn a_malformed_row_is_named_by_its_line() {
    let Some(model) = shared("score_malformed", "data/models/stories260K") else {
        return;
    };
    let sandbox = Sandbox::new();
    for (row, says) in [
        ("{\"ids\": [1, 2", "not JSON"),
        ("{\"ids\": [1]}", "at least 2"),
        ("{\"ids\": [1, 512]}", "vocabulary of 512"),
        ("{\"ids\": [1, -3]}", "not a list of token ids"),
        ("{\"prompt\": \"a\"}", "a row is either"),
        (
            "{\"prompt\": \"a\", \"completion\": 7}",
            "neither text nor messages",
        ),
    ] {
        let file = sandbox.write("rows.jsonl", format!("{{\"ids\": [1, 2]}}\n{row}\n"));
        let output = sandbox.run(&["score", "--model", &text(&model), "--input", &text(&file)]);
        output
            .check(3, &["rows.jsonl, line 2", says])
            .without_panic();
    }
}

#[test]
fn completions_are_determined_by_the_seed() {
    let Some(model) = shared("generate_seed", "data/models/stories260K") else {
        return;
    };
    let sandbox = Sandbox::new();
    let of = |seed| {
        generate(
            &sandbox,
            &model,
            &["--prompt", "Once upon a time", "--seed", seed],
        )
    };
    let first = of("7");
    assert_eq!(first, of("7"));
    assert_ne!(ids(&first), ids(&of("8")));
    let distinct: BTreeSet<String> = ids(&first).iter().map(Value::to_string).collect();
    assert!(
        distinct.len() > 1,
        "three completions of a prompt are identical: {distinct:?}"
    );
    for line in &first {
        let sum: f64 = floats(&line["logprobs"]).iter().sum();
        assert_eq!(floats(&line["logprobs"]).len(), list(&line["ids"]).len());
        assert!((sum - number(line, "/logp")).abs() < 1e-3, "{line}");
        assert!(
            ["eos", "length"].contains(&line["finish"].as_str().unwrap_or_default()),
            "{line}"
        );
    }
}

#[test]
fn scores_of_generated_completions_match_the_reported_log_probabilities() {
    let Some(model) = shared("generate_score", "data/models/stories260K") else {
        return;
    };
    let sandbox = Sandbox::new();
    let lines = generate(&sandbox, &model, &["--prompt", "Once upon a time"]);
    let prompt = read(&model.join("reference.json"))["prompts"][0]["ids"].clone();
    let rows: Vec<Value> = lines
        .iter()
        .map(|line| json!({"ids": ([list(&prompt), list(&line["ids"])].concat())}))
        .collect();
    for (line, all) in lines
        .iter()
        .zip(log_probabilities(score(&sandbox, &model, &rows)))
    {
        let reported = floats(&line["logprobs"]);
        for (a, b) in reported.iter().zip(&all[all.len() - reported.len()..]) {
            assert!((a - b).abs() < 1e-3, "{reported:?} {all:?}");
        }
    }
}

#[test]
fn greedy_generation_matches_the_reference_continuation() {
    let Some(model) = shared("generate_greedy", "data/models/stories260K") else {
        return;
    };
    let sandbox = Sandbox::new();
    let reference = read(&model.join("reference.json"))["prompts"][0].clone();
    let greedy = ["--prompt", "Once upon a time", "--top-k", "1"];
    let lines = generate(&sandbox, &model, &greedy);
    let start = list(&reference["ids"]).len();
    let expected = &list(&reference["greedy_ids"])[start..start + 24];
    for line in lines {
        assert_eq!(list(&line["ids"]), expected);
        let text = format!(
            "Once upon a time{}",
            line["completion"].as_str().unwrap_or_default()
        );
        let expected_text = reference["greedy_text"].as_str().unwrap_or_default();
        assert!(
            expected_text.starts_with(&text),
            "{text:?} is no prefix of {expected_text:?}"
        );
    }
}

#[test]
fn mixture_endpoints_equal_the_two_models() {
    // One run gives two models with the same vocabulary: the policy and its initial weights.
    let sandbox = Sandbox::new();
    let far = ["learner.steps=8", "learner.learning_rate=1e-2"];
    let run = sandbox.path("run");
    sandbox.run(&tiny_playground(&run, &far)).succeeded();
    let (policy, base) = (
        run.join("checkpoints/step_8"),
        run.join("checkpoints/step_0"),
    );
    let prompt = ["--prompt", "my friend ana", "--seed", "5"];
    let mixed = |coefficient| {
        let reference = text(&base);
        let more = [
            "--reference",
            reference.as_str(),
            "--mixture-coef",
            coefficient,
        ];
        generate(&sandbox, &policy, &[&prompt[..], &more].concat())
    };
    let (policy_lines, base_lines) = (
        generate(&sandbox, &policy, &prompt),
        generate(&sandbox, &base, &prompt),
    );
    assert_ne!(
        ids(&policy_lines),
        ids(&base_lines),
        "the models are too similar for this test"
    );
    let (none, half, all) = (mixed("0"), mixed("0.5"), mixed("1"));
    assert_eq!(ids(&none), ids(&policy_lines));
    assert_eq!(ids(&all), ids(&base_lines));
    assert_ne!(half, none);
    for line in &all {
        let [behaviour, reference, policy] =
            ["/behaviour_logp", "/ref_logp", "/logp"].map(|key| number(line, key));
        assert!((behaviour - reference).abs() < 1e-3, "{line}");
        assert!((policy - reference).abs() > 1e-3, "{line}");
    }
    for line in &none {
        assert!(
            (number(line, "/behaviour_logp") - number(line, "/logp")).abs() < 1e-3,
            "{line}"
        );
    }
}

#[test]
fn eval_compares_a_run_with_its_initial_weights() {
    let sandbox = Sandbox::new();
    let run = finished_run(&sandbox);
    let base = text(&run.join("checkpoints/step_0"));
    let call = ["eval", &text(&run), &base, "--prompts", "16", "--json"];
    let row = sandbox.run(&call).succeeded().json_lines().remove(0);
    let [low, rate, high] =
        ["/win_rate_ci_low", "/win_rate", "/win_rate_ci_high"].map(|key| number(&row, key));
    assert!(
        0.0 <= low && low <= rate && rate <= high && high <= 1.0,
        "{row}"
    );
    assert!(low < high, "{row}");
    assert_eq!(
        number(&row, "/prompts") + number(&row, "/abstained"),
        16.0,
        "{row}"
    );
    let text = sandbox.run(&call[..5]).succeeded();
    assert!(text.stdout.contains("is preferred to"), "{}", text.stdout);
    // Without a run there is no configuration of prompts and judge.
    sandbox
        .run(&["eval", &base, &base])
        .check(2, &["--config"])
        .without_panic();
}

#[test]
fn check_prints_an_equivalent_configuration_and_starts_nothing() {
    for name in ["default.toml", "quickstart.toml", "bandit.toml"] {
        let sandbox = Sandbox::new();
        let sets = ["--set", "learner.steps=7"];
        let first = sandbox
            .run(&[&["check", &text(&config(name))], &sets[..]].concat())
            .succeeded();
        assert!(first.stdout.contains("steps = 7"), "{}", first.stdout);
        let file = sandbox.write("resolved.toml", &first.stdout);
        let second = sandbox.run(&["check", &text(&file)]).succeeded();
        assert_eq!(first.stdout, second.stdout, "{name}");
        assert_eq!(first.stderr, second.stderr, "{name}");
        assert!(!sandbox.path("runs").exists(), "{name}: a run was started");
    }
}

#[test]
fn doctor_reports_no_failure() {
    let sandbox = Sandbox::new();
    let output = sandbox.run(&["doctor"]).succeeded();
    let passed =
        |line: &str| ["ok", "warn"].contains(&line.split_whitespace().next().unwrap_or_default());
    assert!(
        output.stdout.lines().count() > 3 && output.stdout.lines().all(passed),
        "{}",
        output.stdout
    );
}

#[test]
fn an_exported_policy_is_a_plain_model_folder() {
    let sandbox = Sandbox::new();
    let run = finished_run(&sandbox);
    let exported = sandbox.path("exported");
    let call = ["export", "--run", &text(&run), "--output", &text(&exported)];
    let output = sandbox.run(&call).succeeded();
    let digest = output.stdout.split_whitespace().next().unwrap_or_default();
    assert_eq!(
        Some(digest),
        report(&run)["weights_digest"].as_str(),
        "{}",
        output.stdout
    );
    let rows = [
        json!({"ids": [1, 20, 30, 40, 50]}),
        json!({"prompt": "my friend ana", "completion": " went"}),
    ];
    let of_run = score(&sandbox, &run.join("checkpoints/step_3"), &rows).succeeded();
    assert_eq!(
        score(&sandbox, &exported, &rows).succeeded().stdout,
        of_run.stdout
    );
    let names: BTreeSet<String> = fs::read_dir(&exported)
        .expect("the file was written")
        .map(|entry| {
            entry
                .expect("a directory entry")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    assert!(
        !names.contains("optimizer.safetensors") && !names.contains("state.json"),
        "{names:?}"
    );
    sandbox
        .run(&call)
        .check(2, &["--force", "--output"])
        .without_panic();
}

#[test]
fn every_command_has_help_with_an_example() {
    let sandbox = Sandbox::new();
    for command in [
        "train",
        "sft",
        "eval",
        "generate",
        "score",
        "check",
        "doctor",
        "export",
        "tournament",
    ] {
        let output = sandbox.run(&[command, "--help"]).succeeded();
        assert!(
            output.stdout.contains("Example: ")
                && output.stdout.contains(&format!("agon {command}")),
            "{}",
            output.stdout
        );
    }
    let output = sandbox.run(&["--help"]).succeeded();
    assert!(
        output.stdout.contains("5 interrupted and saved")
            || output.stdout.contains("5 interrupted"),
        "{}",
        output.stdout
    );
}
