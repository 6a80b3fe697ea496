//! LoRA adapters: PEFT folders as input and output, runs that train an adapter, and the GANPO regulariser with every
//! objective.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use system_tests::{
    ProcessOutput, Sandbox, column, metrics, number, report, shared, tiny_adapted, tiny_bandit,
    tiny_playground,
};

fn text(path: &Path) -> String {
    path.display().to_string()
}

fn read(path: &Path) -> Value {
    let content = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&content).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn floats(value: &Value) -> Vec<f64> {
    serde_json::from_value(value.clone()).unwrap_or_else(|e| panic!("{e}: {value}"))
}

fn names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let name = |entry: std::io::Result<fs::DirEntry>| entry.expect("an entry").file_name();
    entries
        .map(|entry| name(entry).to_string_lossy().into_owned())
        .collect()
}

/// Runs `agon score` on `rows` with additional arguments.
fn score(sandbox: &Sandbox, model: &Path, rows: &[Value], more: &[&str]) -> ProcessOutput {
    let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
    let file = text(&sandbox.write("rows.jsonl", lines));
    let model = text(model);
    let call = [&["score", "--model", &model, "--input", &file], more].concat();
    sandbox.run(&call)
}

fn log_probabilities(output: ProcessOutput) -> Vec<Vec<f64>> {
    let answers = output.succeeded().json_lines();
    answers
        .iter()
        .map(|answer| floats(&answer["logprobs"]))
        .collect()
}

fn max_difference(a: &[Vec<f64>], b: &[Vec<f64>]) -> f64 {
    assert_eq!(a.len(), b.len());
    let differences = a
        .iter()
        .flatten()
        .zip(b.iter().flatten())
        .map(|(a, b)| (a - b).abs());
    differences.fold(0.0, f64::max)
}

/// The base model and the adapter with reference values computed by PEFT.
fn fixtures(test: &str) -> Option<(PathBuf, PathBuf)> {
    let base = shared(test, "data/models/random-llama3")?;
    Some((base, shared(test, "data/models/random-llama3-lora")?))
}

#[test]
fn adapter_log_probabilities_match_peft() {
    let Some((base, adapter)) = fixtures("score_adapter") else {
        return;
    };
    let reference = read(&adapter.join("reference.json"));
    let rows: Vec<Vec<u64>> = serde_json::from_value(reference["ids"].clone()).expect("ids");
    let masks: Vec<Vec<usize>> =
        serde_json::from_value(reference["attention_mask"].clone()).expect("masks");
    let lengths: Vec<usize> = masks.iter().map(|mask| mask.iter().sum()).collect();
    let requests: Vec<Value> = rows
        .iter()
        .zip(&lengths)
        .map(|(ids, &length)| json!({"ids": ids[..length]}))
        .collect();
    let expected: Vec<Vec<f64>> = (0..rows.len())
        .map(|row| floats(&reference["logprobs"][row])[..lengths[row] - 1].to_vec())
        .collect();
    let sandbox = Sandbox::new();
    let with = ["--adapter", &text(&adapter)];
    let actual = log_probabilities(score(&sandbox, &base, &requests, &with));
    assert!(max_difference(&actual, &expected) < 1e-3);
    let without = log_probabilities(score(&sandbox, &base, &requests, &[]));
    assert!(
        max_difference(&without, &expected) > 1e-2,
        "the adapter has no effect"
    );
}

/// PEFT writes `"task_type": null` when `get_peft_model` was not told one.
#[test]
fn an_adapter_that_names_no_task_is_scored_as_a_language_model() {
    let Some((base, adapter)) = fixtures("score_adapter_without_task") else {
        return;
    };
    let sandbox = Sandbox::new();
    let folder = sandbox.path("adapter");
    fs::create_dir(&folder).expect("a folder in the sandbox");
    fs::copy(
        adapter.join("adapter_model.safetensors"),
        folder.join("adapter_model.safetensors"),
    )
    .expect("the adapter's weights");
    let mut config = read(&adapter.join("adapter_config.json"));
    config["task_type"] = Value::Null;
    config["base_model_name_or_path"] = text(&base).into();
    fs::write(folder.join("adapter_config.json"), config.to_string()).expect("its configuration");
    let alone = log_probabilities(score(&sandbox, &folder, &rows(), &[]));
    let beside = log_probabilities(score(
        &sandbox,
        &base,
        &rows(),
        &["--adapter", &text(&adapter)],
    ));
    assert_eq!(alone, beside);
}

const ROWS: [&str; 2] = [
    r#"{"ids": [1, 20, 30, 40, 50]}"#,
    r#"{"prompt": "my friend ana", "completion": " went"}"#,
];

fn rows() -> Vec<Value> {
    ROWS.iter()
        .map(|row| serde_json::from_str(row).expect("a row"))
        .collect()
}

#[test]
fn a_run_trains_only_the_adapter_and_writes_peft_checkpoints() {
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    let sets = [
        "learner.learning_rate=1e-2",
        "model.lora_dropout=0.0",
        "learner.ganpo.lambda=0.0",
    ];
    sandbox.run(&tiny_adapted(&run, &sets)).succeeded();
    let checkpoint = run.join("checkpoints/step_12");
    let expected = [
        "adapter_config.json",
        "adapter_model.safetensors",
        "buffered.pairs",
        "checksums.json",
        "optimizer.safetensors",
        "state.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(names(&checkpoint), expected.map(str::to_owned).into());
    let config = read(&checkpoint.join("adapter_config.json"));
    assert_eq!(
        (&config["peft_type"], &config["r"]),
        (&json!("LORA"), &json!(4))
    );
    let base = PathBuf::from(config["base_model_name_or_path"].as_str().expect("a path"));

    // Only the adapter is published: seven modules of one layer, rank 4.
    let lines = metrics(&run);
    let mismatch = column(&run, "mismatch/logp_abs_diff");
    assert!(mismatch.iter().all(|&gap| gap < 1e-3), "{mismatch:?}");
    assert!(!lines.is_empty());
    let tensors = fs::metadata(checkpoint.join("adapter_model.safetensors"))
        .expect("a file")
        .len();
    let full = fs::metadata(base.join("model.safetensors"))
        .expect("a file")
        .len();
    assert!(tensors * 2 < full, "{tensors} of {full} bytes");

    // The policy starts as the reference and then moves away from it.
    let kl = column(&run, "objective/log_ratio");
    assert!(kl[0].abs() < 1e-4, "{kl:?}");
    assert!(kl[11].abs() > 1e-3, "{kl:?}");
    let of_base = log_probabilities(score(&sandbox, &base, &rows(), &[]));
    let of_run = log_probabilities(score(&sandbox, &checkpoint, &rows(), &[]));
    assert!(max_difference(&of_run, &of_base) > 1e-3);
    let with = ["--adapter", &text(&checkpoint)];
    let with_base = log_probabilities(score(&sandbox, &base, &rows(), &with));
    assert_eq!(with_base, of_run);

    check_mixture_endpoints(&sandbox, &base, &checkpoint);
    check_exports(&sandbox, &run, &of_run);
    check_initial_adapter(&sandbox, &checkpoint, &of_run);
}

/// Generation with an adapter: its base is the reference, and the mixture endpoints equal policy and reference.
fn check_mixture_endpoints(sandbox: &Sandbox, base: &Path, adapter: &Path) {
    let (base, adapter) = (text(base), text(adapter));
    let generate = |model: &str, more: &[&str]| -> Vec<Value> {
        let call = [
            "generate",
            "--json",
            "--prompt",
            "my friend ana",
            "--seed",
            "5",
        ];
        let call = [
            &call[..],
            &["--max-new-tokens", "12", "--num", "6", "--model", model],
            more,
        ];
        sandbox.run(&call.concat()).succeeded().json_lines()
    };
    let ids = |lines: &[Value]| -> Vec<Value> { lines.iter().map(|l| l["ids"].clone()).collect() };
    let mixed = |m: &str| generate(&base, &["--adapter", &adapter, "--mixture-coef", m]);
    let (policy, reference) = (mixed("0"), mixed("1"));
    assert_eq!(ids(&policy), ids(&generate(&adapter, &[])));
    assert_eq!(ids(&reference), ids(&generate(&base, &[])));
    assert_ne!(
        ids(&policy),
        ids(&reference),
        "the models are too similar for this test"
    );
    for (lines, distribution) in [(policy, "/logp"), (reference, "/ref_logp")] {
        for line in &lines {
            let gap = number(line, "/behaviour_logp") - number(line, distribution);
            assert!(gap.abs() < 1e-3, "{line}");
            assert!(
                (number(line, "/logp") - number(line, "/ref_logp")).abs() > 1e-3,
                "{line}"
            );
        }
    }
}

/// Exports of the adapter alone and of the merged model; both give the log-probabilities of the run's policy.
fn check_exports(sandbox: &Sandbox, run: &Path, of_run: &[Vec<f64>]) {
    let call = |to: &Path, more: &[&str]| {
        let (run, to) = (text(run), text(to));
        let call = [&["export", "--run", &run, "--output", &to], more].concat();
        sandbox.run(&call)
    };
    let (adapter, merged) = (sandbox.path("adapter"), sandbox.path("merged"));
    call(&adapter, &[]).succeeded();
    let expected = [
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(names(&adapter), expected.map(str::to_owned).into());
    assert_eq!(
        log_probabilities(score(sandbox, &adapter, &rows(), &[])),
        of_run
    );
    call(&merged, &["--merge"]).succeeded();
    let expected = [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(names(&merged), expected.map(str::to_owned).into());
    let actual = log_probabilities(score(sandbox, &merged, &rows(), &[]));
    assert!(max_difference(&actual, of_run) < 1e-4);
    call(&sandbox.path("bf16"), &["--dtype", "bf16"]).check(2, &["--dtype needs --merge"]);
    // `--force` replaces the previous folder completely.
    call(&merged, &["--force"]).succeeded();
    assert_eq!(names(&merged), names(&adapter));
}

/// A second run that starts from the adapter of the first.
fn check_initial_adapter(sandbox: &Sandbox, adapter: &Path, of_run: &[Vec<f64>]) {
    let run = sandbox.path("second");
    let from = format!("model.adapter={adapter:?}");
    let sets = [
        from.as_str(),
        "learner.steps=1",
        "learner.learning_rate=1e-9",
    ];
    sandbox.run(&tiny_adapted(&run, &sets)).succeeded();
    let checkpoint = run.join("checkpoints/step_1");
    let actual = log_probabilities(score(sandbox, &checkpoint, &rows(), &[]));
    assert!(max_difference(&actual, of_run) < 1e-4);
    // The reference is the base without the adapter.
    assert!(column(&run, "objective/log_ratio")[0].abs() > 1e-3);
    let wrong = [from.as_str(), "model.lora_rank=3"];
    sandbox
        .run(&tiny_adapted(&sandbox.path("third"), &wrong))
        .check(2, &["model.lora_rank = 3", "has r = 4"])
        .without_panic();
}

#[test]
fn mismatched_adapters_are_rejected() {
    let sandbox = Sandbox::new();
    let unknown = ["model.target_modules=[\"q_proj\", \"query\"]"];
    sandbox
        .run(&tiny_adapted(&sandbox.path("unknown"), &unknown))
        .check(
            2,
            &[
                "model.target_modules",
                "\"query\"",
                "q_proj, k_proj, v_proj",
            ],
        )
        .without_panic();
    let Some((_, adapter)) = fixtures("adapter_of_another_base") else {
        return;
    };
    let from = format!("model.adapter={adapter:?}");
    sandbox
        .run(&tiny_adapted(&sandbox.path("foreign"), &[&from]))
        .check(3, &["lora_A.weight", "was made for \"../random-llama3\""])
        .without_panic();
    let copy = sandbox.copy_of(&adapter, "dora");
    let mut config = read(&copy.join("adapter_config.json"));
    config["use_dora"] = json!(true);
    fs::write(copy.join("adapter_config.json"), config.to_string()).expect("a writable copy");
    let dora = format!("model.adapter={copy:?}");
    sandbox
        .run(&tiny_adapted(&sandbox.path("dora-run"), &[&dora]))
        .check(
            3,
            &["adapter_config.json", "use_dora = true is not supported"],
        )
        .without_panic();
}

#[test]
fn discriminators_do_not_change_the_policy_while_the_generator_term_is_off() {
    let sandbox = Sandbox::new();
    let digest = |name: &str, sets: &[&str]| {
        let run = sandbox.path(name);
        sandbox.run(&tiny_playground(&run, sets)).succeeded();
        (report(&run)["weights_digest"].clone(), run)
    };
    let (plain, without) = digest("plain", &[]);
    let ganpo = ["learner.ganpo.lambda=1.0", "learner.ganpo.heads=2"];
    let warmup = [&ganpo[..], &["learner.ganpo.warmup_steps=100"]].concat();
    let (inactive, run) = digest("inactive", &warmup);
    assert_eq!(inactive, plain);
    assert!(
        column(&run, "ganpo/d_loss")
            .iter()
            .all(|loss| (0.2..1.2).contains(loss))
    );
    assert!(column(&run, "loss/ganpo").iter().all(|term| term.is_nan()));
    assert!(
        column(&without, "ganpo/d_loss")
            .iter()
            .all(|loss| loss.is_nan())
    );

    let frozen = [&ganpo[..], &["learner.ganpo.freeze_after=6"]].concat();
    let (active, run) = digest("active", &frozen);
    assert_ne!(active, plain);
    let (total, pair, term) = (
        column(&run, "loss"),
        column(&run, "loss/ipo"),
        column(&run, "loss/ganpo"),
    );
    for step in 0..12 {
        assert!((total[step] - pair[step] - term[step]).abs() < 1e-3 * (1.0 + total[step].abs()));
        assert!((0.2..2.0).contains(&term[step]), "{term:?}");
    }
    let d_loss = column(&run, "ganpo/d_loss");
    assert!(
        d_loss[..6].iter().all(|loss| loss.is_finite()),
        "{d_loss:?}"
    );
    assert!(d_loss[6..].iter().all(|loss| loss.is_nan()), "{d_loss:?}");
    assert!(run.join("checkpoints/step_12/ganpo.safetensors").exists());
}

#[test]
fn every_pairwise_objective_supports_the_regulariser() {
    let sandbox = Sandbox::new();
    for kind in ["ipo", "dpo", "slic", "rpo"] {
        let run = sandbox.path(kind);
        let objective = format!("learner.objective.kind={kind}");
        let sets = [objective.as_str(), "learner.steps=2"];
        sandbox.run(&tiny_adapted(&run, &sets)).succeeded();
        let terms = column(&run, "ganpo/g_loss");
        assert!(
            terms.iter().all(|term| (0.2..2.0).contains(term)),
            "{kind}: {terms:?}"
        );
    }
}

#[test]
fn a_run_without_discriminators_cannot_be_resumed_with_them() {
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    sandbox
        .run(&tiny_bandit(&run, &["learner.steps=2"]))
        .succeeded();
    let mut resumed = tiny_bandit(&run, &["learner.steps=3", "learner.ganpo.lambda=1.0"]);
    resumed.push("--resume".into());
    sandbox
        .run(&resumed)
        .check(
            3,
            &[
                "cannot be resumed",
                "ganpo.safetensors",
                "learner.ganpo.lambda",
            ],
        )
        .without_panic();
    assert_eq!(number(&report(&run), "/steps"), 2.0);
}
