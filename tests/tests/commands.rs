//! The commands beside `train`, each against numbers from elsewhere or against its own promise.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use house::{Ended, Workplace, config, number, report, shared, tiny_playground};
use serde_json::{Value, json};

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

/// `agon score` on these rows.
fn score(workplace: &Workplace, model: &Path, rows: &[Value]) -> Ended {
    let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
    let file = workplace.write("rows.jsonl", lines);
    workplace.run(&["score", "--model", &text(model), "--input", &text(&file)])
}

fn log_probabilities(ended: Ended) -> Vec<Vec<f64>> {
    ended
        .succeeded()
        .json_lines()
        .iter()
        .map(|answer| floats(&answer["logprobs"]))
        .collect()
}

/// `agon generate --json` with these further arguments.
fn generate(workplace: &Workplace, model: &Path, more: &[&str]) -> Vec<Value> {
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
    workplace
        .run(&[&call, more].concat())
        .succeeded()
        .json_lines()
}

/// The ids of every completion.
fn ids(lines: &[Value]) -> Vec<Value> {
    lines.iter().map(|line| line["ids"].clone()).collect()
}

/// A run of a tiny playground that has ended, in `workplace`.
fn finished_run(workplace: &Workplace) -> PathBuf {
    let run = workplace.path("run");
    workplace
        .run(&tiny_playground(&run, &["learner.steps=3"]))
        .succeeded();
    run
}

#[test]
fn a_real_model_gives_a_real_text_its_known_log_probability() {
    for (test, model) in [
        ("score_stories", "data/models/stories260K"),
        ("score_babyllama", "data/models/babyllama-tok361"),
    ] {
        let Some(model) = shared(test, model) else {
            return;
        };
        let scored = &read(&model.join("reference.json"))["scored"];
        let workplace = Workplace::new();
        let answers =
            log_probabilities(score(&workplace, &model, &[json!({"ids": scored["ids"]})]));
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
fn every_supported_architecture_scores_as_transformers_does() {
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
        // Padding stands on the right, and what is before it is scored alone.
        let lengths: Vec<usize> = list(&reference["attention_mask"])
            .iter()
            .map(|mask| floats(mask).iter().sum::<f64>() as usize)
            .collect();
        let rows: Vec<Value> = list(&reference["ids"])
            .iter()
            .zip(&lengths)
            .map(|(ids, &length)| json!({"ids": list(ids)[..length]}))
            .collect();
        let workplace = Workplace::new();
        let answers = log_probabilities(score(&workplace, &model, &rows));
        assert_eq!(answers.len(), rows.len());
        for ((answer, expected), length) in answers
            .iter()
            .zip(list(&reference["logprobs"]))
            .zip(lengths)
        {
            assert_eq!(answer.len(), length - 1, "{name}");
            for (place, (found, expected)) in answer.iter().zip(floats(expected)).enumerate() {
                assert!(
                    (found - expected).abs() < 1e-3,
                    "{name}, {place}: {found} against {expected}"
                );
            }
        }
    }
}

#[test]
fn a_completion_is_scored_after_its_prompt() {
    let Some(model) = shared("score_text", "data/models/stories260K") else {
        return;
    };
    let workplace = Workplace::new();
    let rows = [
        json!({"prompt": "Once upon a time", "completion": ", there was a little girl named Lily."}),
        json!({"prompt": "Once upon a time", "completion": ", there was a little boy named Tim.", "more": 1}),
    ];
    let answers = score(&workplace, &model, &rows).succeeded().json_lines();
    assert_eq!(answers.len(), 2);
    let prompt = read(&model.join("reference.json"))["prompts"][0]["ids"].clone();
    for answer in &answers {
        let completion = list(&answer["ids"]);
        let scored = floats(&answer["logprobs"]);
        assert_eq!(scored.len(), completion.len());
        // The same tokens as one row of ids have the same log-probabilities.
        let whole = json!({"ids": ([list(&prompt), completion].concat())});
        let all = log_probabilities(score(&workplace, &model, &[whole]));
        let tail = &all[0][all[0].len() - completion.len()..];
        for (a, b) in scored.iter().zip(tail) {
            assert!((a - b).abs() < 1e-4, "{scored:?} {tail:?}");
        }
    }
    // The greedy continuation of the reference is Lily's.
    let [lily, tim] = [0, 1].map(|row| floats(&answers[row]["logprobs"]).iter().sum::<f64>());
    assert!(lily > tim, "{lily} {tim}");
}

#[test]
fn a_malformed_row_is_named_by_its_line() {
    let Some(model) = shared("score_malformed", "data/models/stories260K") else {
        return;
    };
    let workplace = Workplace::new();
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
        let file = workplace.write("rows.jsonl", format!("{{\"ids\": [1, 2]}}\n{row}\n"));
        let ended = workplace.run(&["score", "--model", &text(&model), "--input", &text(&file)]);
        ended
            .check(3, &["rows.jsonl, line 2", says])
            .without_panic();
    }
}

#[test]
fn a_seed_repeats_its_completions_and_another_gives_others() {
    let Some(model) = shared("generate_seed", "data/models/stories260K") else {
        return;
    };
    let workplace = Workplace::new();
    let of = |seed| {
        generate(
            &workplace,
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
        "three completions of a prompt are one: {distinct:?}"
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
fn what_was_generated_scores_as_it_was_told() {
    let Some(model) = shared("generate_score", "data/models/stories260K") else {
        return;
    };
    let workplace = Workplace::new();
    let lines = generate(&workplace, &model, &["--prompt", "Once upon a time"]);
    let prompt = read(&model.join("reference.json"))["prompts"][0]["ids"].clone();
    let rows: Vec<Value> = lines
        .iter()
        .map(|line| json!({"ids": ([list(&prompt), list(&line["ids"])].concat())}))
        .collect();
    for (line, all) in lines
        .iter()
        .zip(log_probabilities(score(&workplace, &model, &rows)))
    {
        let told = floats(&line["logprobs"]);
        for (a, b) in told.iter().zip(&all[all.len() - told.len()..]) {
            assert!((a - b).abs() < 1e-3, "{told:?} {all:?}");
        }
    }
}

#[test]
fn greedy_generation_is_the_known_continuation() {
    let Some(model) = shared("generate_greedy", "data/models/stories260K") else {
        return;
    };
    let workplace = Workplace::new();
    let known = read(&model.join("reference.json"))["prompts"][0].clone();
    let greedy = ["--prompt", "Once upon a time", "--top-k", "1"];
    let lines = generate(&workplace, &model, &greedy);
    let start = list(&known["ids"]).len();
    let expected = &list(&known["greedy_ids"])[start..start + 24];
    for line in lines {
        assert_eq!(list(&line["ids"]), expected);
        let whole = format!(
            "Once upon a time{}",
            line["completion"].as_str().unwrap_or_default()
        );
        let known = known["greedy_text"].as_str().unwrap_or_default();
        assert!(
            known.starts_with(&whole),
            "{whole:?} does not begin {known:?}"
        );
    }
}

#[test]
fn both_ends_of_the_mixture_are_the_two_models() {
    // One run gives two models over the same words: the policy and the base it began from.
    let workplace = Workplace::new();
    let far = ["learner.steps=8", "learner.learning_rate=1e-2"];
    let run = workplace.path("run");
    workplace.run(&tiny_playground(&run, &far)).succeeded();
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
        generate(&workplace, &policy, &[&prompt[..], &more].concat())
    };
    let (alone, other) = (
        generate(&workplace, &policy, &prompt),
        generate(&workplace, &base, &prompt),
    );
    assert_ne!(
        ids(&alone),
        ids(&other),
        "the models are too near to tell anything"
    );
    let (none, half, all) = (mixed("0"), mixed("0.5"), mixed("1"));
    assert_eq!(ids(&none), ids(&alone));
    assert_eq!(ids(&all), ids(&other));
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
fn a_run_is_compared_with_its_own_beginning() {
    let workplace = Workplace::new();
    let run = finished_run(&workplace);
    let base = text(&run.join("checkpoints/step_0"));
    let call = ["eval", &text(&run), &base, "--prompts", "16", "--json"];
    let row = workplace.run(&call).succeeded().json_lines().remove(0);
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
    let words = workplace.run(&call[..5]).succeeded();
    assert!(words.out.contains("is preferred to"), "{}", words.out);
    // Without a run nothing says which prompts, which judge.
    workplace
        .run(&["eval", &base, &base])
        .check(2, &["--config"])
        .without_panic();
}

#[test]
fn check_prints_a_configuration_that_means_the_same_and_starts_nothing() {
    for name in ["default.toml", "quickstart.toml", "bandit.toml"] {
        let workplace = Workplace::new();
        let sets = ["--set", "learner.steps=7"];
        let first = workplace
            .run(&[&["check", &text(&config(name))], &sets[..]].concat())
            .succeeded();
        assert!(first.out.contains("steps = 7"), "{}", first.out);
        let file = workplace.write("resolved.toml", &first.out);
        let second = workplace.run(&["check", &text(&file)]).succeeded();
        assert_eq!(first.out, second.out, "{name}");
        assert_eq!(first.err, second.err, "{name}");
        assert!(
            !workplace.path("runs").exists(),
            "{name}: something was started"
        );
    }
}

#[test]
fn doctor_finds_this_machine_able() {
    let workplace = Workplace::new();
    let ended = workplace.run(&["doctor"]).succeeded();
    let fit =
        |line: &str| ["ok", "warn"].contains(&line.split_whitespace().next().unwrap_or_default());
    assert!(
        ended.out.lines().count() > 3 && ended.out.lines().all(fit),
        "{}",
        ended.out
    );
}

#[test]
fn an_exported_policy_is_a_model_like_any_other() {
    let workplace = Workplace::new();
    let run = finished_run(&workplace);
    let exported = workplace.path("exported");
    let call = ["export", "--run", &text(&run), "--output", &text(&exported)];
    let ended = workplace.run(&call).succeeded();
    let digest = ended.out.split_whitespace().next().unwrap_or_default();
    assert_eq!(
        Some(digest),
        report(&run)["weights_digest"].as_str(),
        "{}",
        ended.out
    );
    let rows = [
        json!({"ids": [1, 20, 30, 40, 50]}),
        json!({"prompt": "my friend ana", "completion": " went"}),
    ];
    let of_run = score(&workplace, &run.join("checkpoints/step_3"), &rows).succeeded();
    assert_eq!(
        score(&workplace, &exported, &rows).succeeded().out,
        of_run.out
    );
    let names: BTreeSet<String> = fs::read_dir(&exported)
        .expect("it was written")
        .map(|entry| {
            entry
                .expect("an entry of a folder")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    assert!(
        !names.contains("optimizer.safetensors") && !names.contains("state.json"),
        "{names:?}"
    );
    workplace
        .run(&call)
        .check(2, &["--force", "--output"])
        .without_panic();
}

#[test]
fn every_command_explains_itself() {
    let workplace = Workplace::new();
    for command in [
        "train", "sft", "eval", "generate", "score", "check", "doctor", "export",
    ] {
        let ended = workplace.run(&[command, "--help"]).succeeded();
        assert!(
            ended.out.contains("Example: ") && ended.out.contains(&format!("agon {command}")),
            "{}",
            ended.out
        );
    }
    let ended = workplace.run(&["--help"]).succeeded();
    assert!(
        ended.out.contains("5 interrupted and saved") || ended.out.contains("5 interrupted"),
        "{}",
        ended.out
    );
}
