//! What methods are for, reached: short runs on one small playground, with bounds that a wrong sign, label or
//! term misses. Seeds are fixed, so that what is found is found again.

use std::{
    path::{Path, PathBuf},
    sync::OnceLock,
};

use house::{Workplace, column, config, number, report};
use playground::{held_out_post, held_out_seed};
use serde_json::{Value, json};

/// A small world, and a learning rate that arrives in few steps.
const WORLD: [&str; 18] = [
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

/// Golden answers that are scored before and after.
const GOLDEN: u64 = 64;

/// `agon COMMAND` of the quickstart in the small world, with these settings changed.
fn quickstart(command: &str, sets: &[String]) -> Vec<String> {
    let mut words = vec![
        command.to_owned(),
        config("quickstart.toml").display().to_string(),
    ];
    let world = WORLD.iter().map(|&set| set.to_owned());
    let sets = world.chain(sets.iter().cloned());
    words.extend(sets.flat_map(|set| ["--set".to_owned(), set]));
    words
}

/// The one base of these tests, made by the first that needs it.
struct Base {
    workplace: Workplace,
    folder: PathBuf,
}

fn base() -> &'static Base {
    static BASE: OnceLock<Base> = OnceLock::new();
    BASE.get_or_init(|| {
        let workplace = Workplace::new();
        let made = workplace.run(&quickstart("sft", &[base_dir(&workplace)]));
        let folder = PathBuf::from(made.succeeded().out.trim());
        Base { workplace, folder }
    })
}

fn base_dir(workplace: &Workplace) -> String {
    format!("playground.base_dir={:?}", workplace.path("bases"))
}

/// The run directory and the report of a run from the base, with these settings changed.
fn align(workplace: &Workplace, name: &str, sets: &[&str]) -> (PathBuf, Value) {
    let run = workplace.path(name);
    let mut all = vec![base_dir(&base().workplace)];
    all.extend(sets.iter().map(|&set| set.to_owned()));
    let mut words = quickstart("train", &all);
    words.extend(["--run-dir".to_owned(), run.display().to_string()]);
    workplace.run(&words).succeeded();
    let report = report(&run);
    eprintln!(
        "{name}: win rate {}, KL {}",
        report["win_rate"], report["kl"]
    );
    (run, report)
}

#[test]
fn a_short_quickstart_beats_its_reference() {
    let workplace = Workplace::new();
    let (_, report) = align(&workplace, "quickstart", &[]);
    let low = number(&report, "/win_rate_ci_low");
    assert!(low > 0.6, "{low}");
    assert_eq!(
        report["win_rate"], report["gold_win_rate"],
        "the judge is gold"
    );
    assert_eq!(report["eval_prompts"], 256);
}

/// Mean log-probability of golden answers to held-out posts under the model in `folder`, in nats an answer.
fn golden(workplace: &Workplace, folder: &Path) -> f64 {
    let rows = (0..GOLDEN).map(|index| {
        let post = held_out_post(0, index);
        let ids = [post.prompt_ids(), post.golden(held_out_seed(0, index))].concat();
        format!("{}\n", json!({"ids": ids}))
    });
    let rows = workplace.write("golden.jsonl", rows.collect::<String>());
    let [folder, rows] = [folder, &rows].map(|path| path.display().to_string());
    let scored = workplace.run(&["score", "--model", &folder, "--input", &rows]);
    let scored = scored.succeeded().json_lines();
    let of = |(index, row): (u64, &Value)| -> f64 {
        let prompt = held_out_post(0, index).prompt_ids().len();
        let all = row["logprobs"].as_array().expect("a list").iter();
        // Entry t is of token t + 1.
        all.skip(prompt - 1).filter_map(Value::as_f64).sum()
    };
    (0..).zip(&scored).map(of).sum::<f64>() / GOLDEN as f64
}

#[test]
fn rpo_holds_up_golden_answers_while_it_learns_preferences() {
    let workplace = Workplace::new();
    let before = golden(&workplace, &base().folder);
    let after = |name: &str, sets: &[&str]| {
        let (run, report) = align(&workplace, name, sets);
        let low = number(&report, "/win_rate_ci_low");
        assert!(low > 0.5, "{name}: {low}");
        golden(&workplace, &run.join("checkpoints/step_20"))
    };
    let rpo = after("rpo", &["learner.objective={ kind = \"rpo\", eta = 0.5 }"]);
    let dpo = after("dpo", &["learner.objective={ kind = \"dpo\" }"]);
    eprintln!("golden answers: {before:.2} before, {rpo:.2} by RPO, {dpo:.2} by DPO");
    assert!(rpo > before && rpo > dpo + 1.0, "{before} {rpo} {dpo}");
}

#[test]
fn a_round_of_apo_prefers_golden_answers_and_keeps_what_people_said() {
    let workplace = Workplace::new();
    let (_, report) = align(
        &workplace,
        "apo",
        &[
            "preference.judge.kind=bradley-terry",
            "preference.fit.pairs.count=400",
            "preference.fit.train_batch_size=32",
            "preference.apo.refresh_steps=10",
            "preference.apo.max_rounds=1",
            "preference.apo.prompts=64",
            "preference.apo.samples=2",
            "preference.apo.wait=true",
            "preference.apo.min_accuracy=0",
            "preference.apo.max_ece=1",
            "learner.label=hard",
        ],
    );
    let round = &report["rounds"][0];
    let of = |key: &str| number(round, key);
    let (before, after) = (of("/golden_wins/before"), of("/golden_wins/after"));
    let kept = of("/held_out/after/accuracy") - of("/held_out/before/accuracy");
    eprintln!(
        "golden answers preferred: {before:.3}, then {after:.3}; accuracy moved by {kept:.3}"
    );
    assert!(after > before + 0.05, "{round:#}");
    assert!(kept > -0.1, "{round:#}");
}

/// The generator's loss against the discriminators, mean of the last steps of a run with this weight on it.
fn generator_loss(workplace: &Workplace, lambda: &str) -> f64 {
    let sets = [
        "learner.objective={ kind = \"dpo\" }".to_owned(),
        format!("learner.ganpo.lambda={lambda}"),
        "learner.ganpo.heads=2".into(),
        "learner.ganpo.layers=1".into(),
        "learner.steps=40".into(),
    ];
    let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
    let (run, _) = align(workplace, &format!("ganpo-{lambda}"), &sets);
    let losses = column(&run, "ganpo/g_loss");
    let last = &losses[losses.len() - 10..];
    last.iter().sum::<f64>() / last.len() as f64
}

#[test]
fn ganpo_brings_hidden_states_to_where_discriminators_take_them_for_the_references() {
    let workplace = Workplace::new();
    // With next to no weight the discriminators learn and the policy does not feel them.
    let [unfelt, felt] = ["1e-9", "20"].map(|lambda| generator_loss(&workplace, lambda));
    eprintln!("the generator's loss: {unfelt:.3} unfelt, {felt:.3} felt");
    assert!(felt < unfelt - 0.05, "{unfelt} {felt}");
}
