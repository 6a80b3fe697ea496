//! Effect of each method: short runs on one small playground, with bounds that a wrong sign, label or loss term would
//! violate. Seeds are fixed, so results are reproducible.

use std::{
    path::{Path, PathBuf},
    sync::OnceLock,
};

use playground::{held_out_post, held_out_seed};
use serde_json::{Value, json};
use system_tests::{Sandbox, column, config, number, report};

/// A small playground, and a learning rate that shows an effect in few steps.
const SMALL_PLAYGROUND: [&str; 18] = [
    "playground.hidden_size=48",
    "playground.layers=1",
    "playground.heads=4",
    "playground.intermediate_size=128",
    "sft.steps=150",
    "sft.train_batch_size=32",
    "actor.slots=64",
    "actor.max_new_tokens=28",
    "learner.steps=20",
    "learner.train_batch_size=32",
    "learner.learning_rate=2e-3",
    "learner.lr_scheduler_type=linear",
    "learner.max_staleness=0",
    "learner.save_steps=0",
    "evaluation.eval_steps=0",
    "evaluation.prompts=256",
    "telemetry.logging_steps=1000",
    "telemetry.samples_per_step=0",
];

/// Number of golden answers that are scored.
const GOLDEN_COUNT: u64 = 64;

/// Arguments of `agon COMMAND` with the quickstart on the small playground and these settings changed.
fn quickstart(command: &str, sets: &[String]) -> Vec<String> {
    let mut arguments = vec![
        command.to_owned(),
        config("quickstart.toml").display().to_string(),
    ];
    let base = SMALL_PLAYGROUND.iter().map(|&set| set.to_owned());
    let sets = base.chain(sets.iter().cloned());
    arguments.extend(sets.flat_map(|set| ["--set".to_owned(), set]));
    arguments
}

/// The base model of these tests, trained once.
struct BaseModel {
    sandbox: Sandbox,
    folder: PathBuf,
}

fn base() -> &'static BaseModel {
    static BASE: OnceLock<BaseModel> = OnceLock::new();
    BASE.get_or_init(|| {
        let sandbox = Sandbox::new();
        let made = sandbox.run(&quickstart("sft", &[base_dir(&sandbox)]));
        let folder = PathBuf::from(made.succeeded().stdout.trim());
        BaseModel { sandbox, folder }
    })
}

fn base_dir(sandbox: &Sandbox) -> String {
    format!("playground.base_dir={:?}", sandbox.path("bases"))
}

/// Aligns the base model with these settings changed; returns the run directory and the report.
fn align(sandbox: &Sandbox, name: &str, sets: &[&str]) -> (PathBuf, Value) {
    let run = sandbox.path(name);
    let mut all = vec![base_dir(&base().sandbox)];
    all.extend(sets.iter().map(|&set| set.to_owned()));
    let mut arguments = quickstart("train", &all);
    arguments.extend(["--run-dir".to_owned(), run.display().to_string()]);
    sandbox.run(&arguments).succeeded();
    let report = report(&run);
    eprintln!(
        "{name}: win rate {}, KL {}",
        report["win_rate"], report["kl"]
    );
    (run, report)
}

#[test]
fn a_short_quickstart_beats_its_reference() {
    let sandbox = Sandbox::new();
    let (_, report) = align(&sandbox, "quickstart", &[]);
    let low = number(&report, "/win_rate_ci_low");
    assert!(low > 0.6, "{low}");
    assert_eq!(
        report["win_rate"], report["gold_win_rate"],
        "the judge is the gold preference"
    );
    assert_eq!(report["eval_prompts"], 256);
}

/// Mean log-probability of golden answers to held-out posts under the model in `folder`, in nats per answer.
fn golden_logp(sandbox: &Sandbox, folder: &Path) -> f64 {
    let rows = (0..GOLDEN_COUNT).map(|index| {
        let post = held_out_post(0, index);
        let ids = [post.prompt_ids(), post.golden(held_out_seed(0, index))].concat();
        format!("{}\n", json!({"ids": ids}))
    });
    let rows = sandbox.write("golden.jsonl", rows.collect::<String>());
    let [folder, rows] = [folder, &rows].map(|path| path.display().to_string());
    let scored = sandbox.run(&["score", "--model", &folder, "--input", &rows]);
    let scored = scored.succeeded().json_lines();
    let answer_logp = |(index, row): (u64, &Value)| -> f64 {
        let prompt = held_out_post(0, index).prompt_ids().len();
        let all = row["logprobs"].as_array().expect("a list").iter();
        // Entry t belongs to token t + 1.
        all.skip(prompt - 1).filter_map(Value::as_f64).sum()
    };
    (0..).zip(&scored).map(answer_logp).sum::<f64>() / GOLDEN_COUNT as f64
}

#[test]
fn rpo_raises_the_likelihood_of_golden_answers() {
    let sandbox = Sandbox::new();
    let before = golden_logp(&sandbox, &base().folder);
    let after = |name: &str, sets: &[&str]| {
        let (run, report) = align(&sandbox, name, sets);
        let low = number(&report, "/win_rate_ci_low");
        assert!(low > 0.5, "{name}: {low}");
        golden_logp(&sandbox, &run.join("checkpoints/step_20"))
    };
    let rpo = after("rpo", &["learner.objective={ kind = \"rpo\", eta = 0.5 }"]);
    let dpo = after("dpo", &["learner.objective={ kind = \"dpo\" }"]);
    eprintln!(
        "log-probability of golden answers: {before:.2} before, {rpo:.2} with RPO, {dpo:.2} with DPO"
    );
    assert!(rpo > before && rpo > dpo + 1.0, "{before} {rpo} {dpo}");
}

/// Rounds of APO every ten steps on a fitted judge.
const APO: [&str; 10] = [
    "preference.judge.kind=bradley-terry",
    "preference.fit.pairs.count=400",
    "preference.fit.train_batch_size=32",
    "preference.apo.refresh_steps=10",
    "preference.apo.prompts=64",
    "preference.apo.samples=2",
    "preference.apo.wait=true",
    "preference.apo.min_accuracy=0",
    "preference.apo.max_ece=1",
    "learner.label=hard",
];

#[test]
fn an_apo_round_prefers_golden_answers_and_keeps_its_held_out_accuracy() {
    let sandbox = Sandbox::new();
    let (_, report) = align(
        &sandbox,
        "apo",
        &[&APO[..], &["preference.apo.max_rounds=1"]].concat(),
    );
    let round = &report["rounds"][0];
    let of = |key: &str| number(round, key);
    let (before, after) = (of("/golden_wins/before"), of("/golden_wins/after"));
    let accuracy_change = of("/held_out/after/accuracy") - of("/held_out/before/accuracy");
    eprintln!(
        "golden answers preferred: {before:.3}, then {after:.3}; accuracy change {accuracy_change:.3}"
    );
    assert!(after > before + 0.05, "{round:#}");
    assert!(accuracy_change > -0.1, "{round:#}");
}

/// Verdicts on samples of the first round are pairs of the second, with the tokens that were sampled from.
#[test]
fn a_later_apo_round_trains_on_the_verdicts_of_people() {
    let sandbox = Sandbox::new();
    let sets = |steps: &'static str| [&APO[..], &["telemetry.samples_per_step=8", steps]].concat();
    let (run, report) = align(&sandbox, "verdicts", &sets("learner.steps=12"));
    assert_eq!(report["rounds"][0]["human_verdicts"], 0);
    let samples = std::fs::read_to_string(run.join("samples.jsonl")).expect("samples");
    let pair = |line: &str| {
        let row: Value = serde_json::from_str(line).expect("a row");
        let prompt = row["encoded_prompt"]
            .as_str()
            .expect("a text with special tokens");
        let post = row["prompt"].as_str().expect("a post");
        assert_eq!(prompt, format!("<bos> {post} <sep>"));
        let [chosen, rejected] = [0, 1].map(|index| &row["completions"][index]);
        format!(
            "{}\n",
            json!({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        )
    };
    let pairs: String = samples.lines().take(8).map(pair).collect();
    std::fs::write(run.join("annotated_pairs.jsonl"), pairs).expect("written");
    let mut arguments = quickstart("train", &[base_dir(&base().sandbox)]);
    let more = sets("learner.steps=24");
    arguments.extend(
        more.iter()
            .flat_map(|set| ["--set".to_owned(), (*set).to_owned()]),
    );
    let resume = [
        "--run-dir",
        &run.display().to_string(),
        "--resume",
        "--accept-changes",
    ];
    arguments.extend(resume.map(str::to_owned));
    sandbox.run(&arguments).succeeded();
    let rounds = &system_tests::report(&run)["rounds"];
    assert_eq!(rounds[1]["human_verdicts"], 8, "{rounds:#}");
}

/// Generator loss, averaged over the last ten steps of a run with this GANPO weight.
fn generator_loss(sandbox: &Sandbox, lambda: &str) -> f64 {
    let sets = [
        "learner.objective={ kind = \"dpo\" }".to_owned(),
        format!("learner.ganpo.lambda={lambda}"),
        "learner.ganpo.heads=2".into(),
        "learner.ganpo.layers=1".into(),
        "learner.steps=40".into(),
    ];
    let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
    let (run, _) = align(sandbox, &format!("ganpo-{lambda}"), &sets);
    let losses = column(&run, "ganpo/g_loss");
    let last = &losses[losses.len() - 10..];
    last.iter().sum::<f64>() / last.len() as f64
}

#[test]
fn ganpo_moves_hidden_states_towards_those_of_the_reference() {
    let sandbox = Sandbox::new();
    // With a negligible weight the discriminators train without affecting the policy.
    let [inactive, active] = ["1e-9", "20"].map(|lambda| generator_loss(&sandbox, lambda));
    eprintln!("generator loss: {inactive:.3} with negligible weight, {active:.3} with weight 20");
    assert!(active < inactive - 0.05, "{inactive} {active}");
}
