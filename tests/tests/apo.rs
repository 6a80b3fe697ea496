//! Adversarial preference optimisation (APO) in a run: rounds run at their steps, each trains the next judge, and an
//! interrupted run resumes with its current judge.

use std::{fs, path::Path};

use serde_json::Value;
use system_tests::{Sandbox, number, report, steps, tiny_playground};

/// Two small APO rounds, after steps 4 and 8 of 12.
const APO: [&str; 12] = [
    "preference.judge.kind=bradley-terry",
    "preference.fit.pairs.count=60",
    "preference.fit.train_batch_size=16",
    "preference.apo.refresh_steps=4",
    "preference.apo.prompts=6",
    "preference.apo.samples=3",
    "preference.apo.wait=true",
    "preference.apo.min_accuracy=0",
    "preference.apo.max_ece=1",
    "learner.label=hard",
    "learner.save_steps=1",
    "telemetry.samples_per_step=8",
];

fn apo_run(sandbox: &Sandbox, name: &str, sets: &[&str]) -> Vec<String> {
    tiny_playground(&sandbox.path(name), &[&APO, sets].concat())
}

fn rounds(run: &Path) -> Vec<Value> {
    let rounds = report(run)["rounds"].as_array().cloned();
    rounds.expect("a report has rounds")
}

/// Step and judge version of every training pair in `samples.jsonl`.
fn judge_versions(run: &Path) -> Vec<(u64, u64)> {
    let text = fs::read_to_string(run.join("samples.jsonl")).expect("a run has samples");
    let of = |line: &str| {
        let row: Value = serde_json::from_str(line).expect("a line is JSON");
        let number = |key: &str| {
            row[key]
                .as_u64()
                .unwrap_or_else(|| panic!("no {key} in {row}"))
        };
        (number("step"), number("judge_version"))
    };
    text.lines().map(of).collect()
}

#[test]
fn rounds_run_at_their_steps_and_their_models_become_judges() {
    let sandbox = Sandbox::new();
    sandbox.run(&apo_run(&sandbox, "run", &[])).succeeded();
    let run = sandbox.path("run");
    let rounds = rounds(&run);
    let of = |key: &str| rounds.iter().map(|r| r[key].as_u64()).collect::<Vec<_>>();
    assert_eq!(
        (of("round"), of("step")),
        (vec![Some(1), Some(2)], vec![Some(4), Some(8)])
    );
    assert_eq!(of("pairs"), [Some(18), Some(18)]);
    for round in &rounds {
        assert_eq!(round["rejected"], Value::Null);
        let accuracy = number(round, "/policy/after/accuracy");
        assert!((0.0..=1.0).contains(&accuracy), "{round:#}");
    }
    for round in 1..=2 {
        let config = run.join(format!("preference/round_{round}/config.json"));
        let config = fs::read_to_string(&config).unwrap_or_else(|e| panic!("{config:?}: {e}"));
        assert!(config.contains("AgonLlamaRewardModel"), "{config}");
    }
    let judges = judge_versions(&run);
    assert!(judges.len() >= 12, "{judges:?}");
    for (step, version) in judges {
        assert_eq!(version, 1 + (step - 1) / 4, "step {step}");
    }
    let counters = &report(&run)["stages"];
    for stage in ["actor", "preference", "learner"] {
        assert_eq!(counters[stage]["conserved"], true, "{counters:#}");
        assert_eq!(number(counters, &format!("/{stage}/in_flight")), 0.0);
    }
}

#[test]
fn an_interrupted_run_resumes_with_its_judge() {
    check_resume(&Sandbox::new(), &[], "--resume");
}

#[test]
fn a_round_that_a_resumed_run_repeats_replaces_the_earlier_one() {
    let sandbox = Sandbox::new();
    let checkpoint = sandbox.path("stopped/checkpoints/step_4");
    // Saved before the round of its step.
    let resume = format!("--resume={}", checkpoint.display());
    check_resume(&sandbox, &["learner.save_total_limit=20"], &resume);
}

#[test]
fn an_interrupted_run_with_adapter_judges_resumes() {
    let sandbox = Sandbox::new();
    let adapters = [
        "model.lora_rank=4",
        "preference.fit.lora_rank=2",
        "preference.fit.lora_dropout=0.1",
    ];
    check_resume(&sandbox, &adapters, "--resume");
    let round = sandbox.path("stopped/preference/round_2");
    assert!(!round.join("model.safetensors").exists());
    let config = fs::read_to_string(round.join("adapter_config.json")).expect("PEFT's file");
    assert!(config.contains("SEQ_CLS"), "{config}");
    // The adapter names its base model.
    let rows = sandbox.write("rows.jsonl", "{\"ids\": [3, 4, 5, 6]}\n");
    let [round, rows] = [round, rows].map(|path| path.display().to_string());
    let score = ["score", "--reward", "--model", &round, "--input", &rows];
    let answers = sandbox.run(&score).succeeded().json_lines();
    assert!(
        answers[0]["score"].as_f64().is_some_and(f64::is_finite),
        "{answers:?}"
    );
    // A reward model is not accepted as a policy.
    let score = ["score", "--model", &round, "--input", &rows];
    let says = ["is a reward model", "--reward"];
    sandbox.run(&score).check(2, &says).without_panic();
}

/// Checks that a run which is interrupted, and resumed by this argument, ends with the weights and rounds of an
/// uninterrupted one.
fn check_resume(sandbox: &Sandbox, sets: &[&str], resume: &str) {
    sandbox
        .run(&apo_run(sandbox, "uninterrupted", sets))
        .succeeded();
    let arguments = apo_run(sandbox, "stopped", sets);
    let run = sandbox.path("stopped");
    let mut running = sandbox.start(&arguments);
    running.until("step 5", || {
        let last = steps(&run).last()?["step"].as_u64()?;
        (last >= 5).then_some(())
    });
    running.terminate();
    running.wait().check(5, &[]);
    let resumed = [arguments, vec![resume.to_owned()]].concat();
    sandbox.run(&resumed).succeeded();
    let uninterrupted = sandbox.path("uninterrupted");
    assert_eq!(
        report(&run)["weights_digest"],
        report(&uninterrupted)["weights_digest"]
    );
    let at = |run: &Path| {
        let rounds = rounds(run);
        rounds
            .iter()
            .map(|r| (r["round"].clone(), r["step"].clone()))
            .collect::<Vec<_>>()
    };
    assert_eq!(at(&run), at(&uninterrupted), "no round is repeated");
}

#[test]
fn a_model_that_fails_validation_is_rejected_and_the_judge_stays() {
    let sandbox = Sandbox::new();
    let strict = ["preference.apo.min_accuracy=1", "preference.apo.max_ece=0"];
    sandbox.run(&apo_run(&sandbox, "run", &strict)).succeeded();
    let run = sandbox.path("run");
    for round in rounds(&run) {
        let rejected = round["rejected"].as_str().unwrap_or_default();
        assert!(rejected.contains("held-out pairs"), "{round:#}");
    }
    assert!(
        judge_versions(&run)
            .iter()
            .all(|&(_, version)| version == 1)
    );
}
