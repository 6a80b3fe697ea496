//! What is said of speed, and that no vectors change what a model says: with each kind of them, lower ones
//! asked for, the known numbers come out.

use std::path::Path;
use std::process::Command;

use house::{Ended, Workplace, agon_binary, column, report, shared, tiny_playground};
use serde_json::{Value, json};

/// Every kind, the widest that the machine has last.
const VECTORS: [&str; 4] = ["plain", "avx2", "avx512", ""];

fn with_vectors(workplace: &Workplace, vectors: &str, arguments: &[&str]) -> Ended {
    let mut command = Command::new(agon_binary());
    command.args(arguments).env("AGON_VECTORS", vectors);
    workplace.start_command(command).wait()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().expect("a list")
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

fn logprobs(answer: &Value) -> Vec<f64> {
    let numbers = answer["logprobs"].as_array().expect("log-probabilities");
    numbers.iter().filter_map(Value::as_f64).collect()
}

#[test]
fn coarse_numbers_that_lead_too_far_are_left_for_f32() {
    let workplace = Workplace::new();
    let run = |name: &str, sets: &[&str]| {
        let run = workplace.path(name);
        let ended = workplace.run(&tiny_playground(&run, sets)).succeeded();
        (column(&run, "mismatch/logp_abs_diff"), ended.err)
    };
    let coarse = ["actor.precision=int8", "actor.max_drift=0"];
    let (gaps, told) = run("coarse", &coarse);
    assert!(gaps.iter().all(|&gap| gap > 1e-4), "{gaps:?}");
    assert!(!told.contains("actor.max_drift"), "{told}");
    // Version 0 is looked at, and everything after it is written in f32.
    let strict = ["actor.precision=int8", "actor.max_drift=1e-6"];
    let (gaps, told) = run("strict", &strict);
    assert!(gaps[0] > 1e-4, "{gaps:?}");
    assert!(gaps[1..].iter().all(|&gap| gap < 1e-5), "{gaps:?}");
    let warnings = told.matches("actor.max_drift").count();
    assert_eq!(warnings, 1, "{told}");
    let (gaps, told) = run("f32", &["actor.max_drift=1e-6"]);
    assert!(gaps.iter().all(|&gap| gap < 1e-5), "{gaps:?}");
    assert!(!told.contains("actor.max_drift"), "{told}");
}

#[test]
fn checkpointing_ends_with_the_same_weights() {
    let workplace = Workplace::new();
    let digest = |sets: &[&str]| {
        let run = workplace.path(&format!("run-{}", sets.len()));
        workplace.run(&tiny_playground(&run, sets)).succeeded();
        report(&run)["weights_digest"].clone()
    };
    let kept = digest(&[]);
    assert!(kept.is_string());
    assert_eq!(kept, digest(&["learner.gradient_checkpointing=true"]));
}

#[test]
fn every_kind_of_vectors_gives_the_known_log_probabilities() {
    let Some(model) = shared("vectors", "data/models/stories260K") else {
        return;
    };
    let reference = std::fs::read(model.join("reference.json")).expect("a reference");
    let reference: Value = serde_json::from_slice(&reference).expect("the reference is JSON");
    let scored = &reference["scored"];
    let workplace = Workplace::new();
    let rows = workplace.write("rows.jsonl", json!({"ids": scored["ids"]}).to_string());
    let (model, rows) = (text(&model), text(&rows));
    for vectors in VECTORS {
        let arguments = ["score", "--model", &model, "--input", &rows];
        let ended = with_vectors(&workplace, vectors, &arguments).succeeded();
        let found = logprobs(&ended.json_lines()[0]);
        let sum: f64 = found.iter().sum();
        let expected = scored["sum_logprob"].as_f64().expect("a sum");
        assert!(
            (sum - expected).abs() < 1e-3 * found.len() as f64,
            "{vectors}: {sum}"
        );
        let arguments = [
            "generate",
            "--model",
            &model,
            "--prompt",
            "Once upon a time",
            "--num",
            "2",
            "--seed",
            "7",
            "--max-new-tokens",
            "40",
            "--json",
        ];
        let written = with_vectors(&workplace, vectors, &arguments)
            .succeeded()
            .json_lines();
        let whole = |line: &Value| {
            let ids = [list(&reference["prompts"][0]["ids"]), list(&line["ids"])].concat();
            json!({ "ids": ids }).to_string()
        };
        let rows: Vec<String> = written.iter().map(whole).collect();
        let rows = text(&workplace.write("written.jsonl", rows.join("\n")));
        let arguments = ["score", "--model", &model, "--input", &rows];
        let again = with_vectors(&workplace, "plain", &arguments)
            .succeeded()
            .json_lines();
        for (line, again) in written.iter().zip(&again) {
            let (told, all) = (logprobs(line), logprobs(again));
            for (a, b) in told.iter().zip(&all[all.len() - told.len()..]) {
                assert!((a - b).abs() < 1e-3, "{vectors}: {told:?} {all:?}");
            }
        }
        assert_eq!((written.len(), again.len()), (2, 2));
    }
}

#[test]
fn vectors_that_there_are_not_are_refused() {
    let workplace = Workplace::new();
    with_vectors(&workplace, "sse9", &["doctor"]).check(2, &["AGON_VECTORS", "sse9", "avx2"]);
}

#[test]
fn every_bench_tells_what_it_measured() {
    let Some(model) = shared("benches", "data/models/stories260K") else {
        return;
    };
    let (workplace, model) = (Workplace::new(), text(&model));
    let bench = |part: &str, more: &[&str]| -> Value {
        let arguments = [&["bench", part, "--model", &model, "--json"], more].concat();
        workplace.run(&arguments).succeeded().json_lines().remove(0)
    };
    let small = [
        "--seconds",
        "0.1",
        "--batch",
        "4",
        "--prompt",
        "4",
        "--new-tokens",
        "8",
    ];
    let positive = |report: &Value, keys: &[&str]| {
        for key in keys {
            let number = report[key].as_f64().unwrap_or(f64::NAN);
            assert!(number.is_finite() && number > 0.0, "{key} in {report}");
        }
    };
    for precision in ["f32", "bf16", "int8"] {
        let report = bench(
            "rollout",
            &[&small[..], &["--precision", precision]].concat(),
        );
        positive(
            &report,
            &["tokens_per_second", "roofline_share", "peak_gib"],
        );
        assert_eq!(report["precision"], precision);
    }
    for precision in ["f32", "bf16"] {
        let report = bench(
            "learner",
            &[&small[..], &["--precision", precision]].concat(),
        );
        positive(
            &report,
            &["tokens_per_second", "roofline_share", "peak_gib"],
        );
        positive(&report["seconds"], &["forward", "backward", "optimizer"]);
    }
    let run = [
        "--steps",
        "4",
        "--batch",
        "4",
        "--prompt",
        "4",
        "--new-tokens",
        "8",
    ];
    let report = bench("train", &run);
    positive(&report, &["pairs_per_second", "roofline_share", "peak_gib"]);
    assert!(
        report["mean_length"].as_f64().unwrap_or(9.0) <= 8.0,
        "{report}"
    );
}
