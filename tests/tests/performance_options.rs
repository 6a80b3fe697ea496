//! Performance options: reduced precision with its error bound, gradient checkpointing, SIMD instruction sets, and
//! `agon bench`.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use system_tests::{ProcessOutput, Sandbox, agon_binary, column, report, shared, tiny_playground};

/// Values of `AGON_VECTORS`; the empty one selects the widest instruction set of the machine.
const INSTRUCTION_SETS: [&str; 4] = ["plain", "avx2", "avx512", ""];

/// Runs `agon` with `AGON_VECTORS`.
fn with_vectors(sandbox: &Sandbox, vectors: &str, arguments: &[&str]) -> ProcessOutput {
    let mut command = Command::new(agon_binary());
    command.args(arguments).env("AGON_VECTORS", vectors);
    sandbox.start_command(command).wait()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().expect("a list")
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

fn logprobs(answer: &Value) -> Vec<f64> {
    let logprobs = answer["logprobs"].as_array().expect("log-probabilities");
    logprobs.iter().filter_map(Value::as_f64).collect()
}

#[test]
fn sampling_falls_back_to_f32_when_the_quantisation_error_exceeds_its_bound() {
    let sandbox = Sandbox::new();
    let run = |name: &str, sets: &[&str]| {
        let run = sandbox.path(name);
        let output = sandbox.run(&tiny_playground(&run, sets)).succeeded();
        (column(&run, "mismatch/logp_abs_diff"), output.stderr)
    };
    let unbounded = ["actor.precision=int8", "actor.max_quantization_error=0"];
    let (gaps, log) = run("unbounded", &unbounded);
    assert!(gaps.iter().all(|&gap| gap > 1e-4), "{gaps:?}");
    assert!(!log.contains("actor.max_quantization_error"), "{log}");
    // Version 0 exceeds the bound, and all later versions are sampled in f32.
    let strict = ["actor.precision=int8", "actor.max_quantization_error=1e-6"];
    let (gaps, log) = run("strict", &strict);
    assert!(gaps[0] > 1e-4, "{gaps:?}");
    assert!(gaps[1..].iter().all(|&gap| gap < 1e-5), "{gaps:?}");
    let warnings = log.matches("actor.max_quantization_error").count();
    assert_eq!(warnings, 1, "{log}");
    let (gaps, log) = run("f32", &["actor.max_quantization_error=1e-6"]);
    assert!(gaps.iter().all(|&gap| gap < 1e-5), "{gaps:?}");
    assert!(!log.contains("actor.max_quantization_error"), "{log}");
}

#[test]
fn gradient_checkpointing_does_not_change_the_weights() {
    let sandbox = Sandbox::new();
    let digest = |sets: &[&str]| {
        let run = sandbox.path(&format!("run-{}", sets.len()));
        sandbox.run(&tiny_playground(&run, sets)).succeeded();
        report(&run)["weights_digest"].clone()
    };
    let expected = digest(&[]);
    assert!(expected.is_string());
    assert_eq!(expected, digest(&["learner.gradient_checkpointing=true"]));
}

#[test]
fn every_instruction_set_gives_the_reference_log_probabilities() {
    let Some(model) = shared("vectors", "data/models/stories260K") else {
        return;
    };
    let reference = std::fs::read(model.join("reference.json")).expect("a reference");
    let reference: Value = serde_json::from_slice(&reference).expect("the reference is JSON");
    let scored = &reference["scored"];
    let sandbox = Sandbox::new();
    let rows = sandbox.write("rows.jsonl", json!({"ids": scored["ids"]}).to_string());
    let (model, rows) = (text(&model), text(&rows));
    for vectors in INSTRUCTION_SETS {
        let arguments = ["score", "--model", &model, "--input", &rows];
        let output = with_vectors(&sandbox, vectors, &arguments).succeeded();
        let found = logprobs(&output.json_lines()[0]);
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
        let completions = with_vectors(&sandbox, vectors, &arguments)
            .succeeded()
            .json_lines();
        let sequence = |line: &Value| {
            let ids = [list(&reference["prompts"][0]["ids"]), list(&line["ids"])].concat();
            json!({ "ids": ids }).to_string()
        };
        let rows: Vec<String> = completions.iter().map(sequence).collect();
        let rows = text(&sandbox.write("completions.jsonl", rows.join("\n")));
        let arguments = ["score", "--model", &model, "--input", &rows];
        let scores = with_vectors(&sandbox, "plain", &arguments)
            .succeeded()
            .json_lines();
        for (line, score) in completions.iter().zip(&scores) {
            let (reported, all) = (logprobs(line), logprobs(score));
            for (a, b) in reported.iter().zip(&all[all.len() - reported.len()..]) {
                assert!((a - b).abs() < 1e-3, "{vectors}: {reported:?} {all:?}");
            }
        }
        assert_eq!((completions.len(), scores.len()), (2, 2));
    }
}

#[test]
fn unknown_instruction_sets_are_rejected() {
    let sandbox = Sandbox::new();
    with_vectors(&sandbox, "sse9", &["doctor"]).check(2, &["AGON_VECTORS", "sse9", "avx2"]);
}

#[test]
fn reduced_precision_of_the_cpus_kernels_is_refused_on_other_devices() {
    let sandbox = Sandbox::new();
    for (part, precision, device) in [
        ("rollout", "int8", "cuda"),
        ("rollout", "bf16", "metal"),
        ("learner", "bf16", "cuda:1"),
    ] {
        let arguments = ["bench", part, "--model", "nowhere", "--device", device];
        let output = sandbox.run(&[&arguments[..], &["--precision", precision]].concat());
        let refusal =
            format!("--precision {precision} is for the CPU; on {device} use --dtype bf16");
        output.check(2, &[&refusal]);
    }
}

#[test]
fn every_bench_reports_its_measurements() {
    let Some(model) = shared("benches", "data/models/stories260K") else {
        return;
    };
    let (sandbox, model) = (Sandbox::new(), text(&model));
    let bench = |part: &str, more: &[&str]| -> Value {
        let arguments = [&["bench", part, "--model", &model, "--json"], more].concat();
        sandbox.run(&arguments).succeeded().json_lines().remove(0)
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
    for more in [
        &["--precision", "f32"][..],
        &["--precision", "bf16"],
        &["--file-pairs"],
    ] {
        let report = bench("learner", &[&small[..], more].concat());
        assert_eq!(report["file_pairs"], more.contains(&"--file-pairs"));
        positive(
            &report,
            &["tokens_per_second", "roofline_share", "peak_gib"],
        );
        positive(&report["seconds"], &["forward", "backward", "optimizer"]);
    }
    for part in ["rollout", "learner"] {
        let on_device = ["--device", "cpu", "--dtype", "bf16"];
        let report = bench(part, &[&small[..], &on_device].concat());
        positive(
            &report,
            &["tokens_per_second", "roofline_share", "machine_gflops"],
        );
        let placement = ["device", "dtype", "precision"].map(|key| report[key].as_str());
        assert_eq!(placement, [Some("cpu"), Some("bf16"), Some("f32")]);
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
