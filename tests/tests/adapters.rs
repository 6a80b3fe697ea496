//! Adapters from the outside: PEFT's folders in and out, runs that train one, and the regulariser that may
//! stand beside any objective.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use house::{
    Ended, Workplace, column, metrics, number, report, shared, tiny_adapted, tiny_bandit,
    tiny_playground,
};
use serde_json::{Value, json};

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

/// `agon score` on these rows, with these further arguments.
fn score(workplace: &Workplace, model: &Path, rows: &[Value], more: &[&str]) -> Ended {
    let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
    let file = text(&workplace.write("rows.jsonl", lines));
    let model = text(model);
    let call = [&["score", "--model", &model, "--input", &file], more].concat();
    workplace.run(&call)
}

fn log_probabilities(ended: Ended) -> Vec<Vec<f64>> {
    let answers = ended.succeeded().json_lines();
    answers
        .iter()
        .map(|answer| floats(&answer["logprobs"]))
        .collect()
}

fn furthest(a: &[Vec<f64>], b: &[Vec<f64>]) -> f64 {
    assert_eq!(a.len(), b.len());
    let gaps = a
        .iter()
        .flatten()
        .zip(b.iter().flatten())
        .map(|(a, b)| (a - b).abs());
    gaps.fold(0.0, f64::max)
}

/// The base and the adapter that PEFT's numbers are known of.
fn fixtures(test: &str) -> Option<(PathBuf, PathBuf)> {
    let base = shared(test, "data/models/random-llama3")?;
    Some((base, shared(test, "data/models/random-llama3-lora")?))
}

#[test]
fn an_adapter_scores_as_peft_does() {
    let Some((base, adapter)) = fixtures("score_adapter") else {
        return;
    };
    let reference = read(&adapter.join("reference.json"));
    let rows: Vec<Vec<u64>> = serde_json::from_value(reference["ids"].clone()).expect("ids");
    let masks: Vec<Vec<usize>> =
        serde_json::from_value(reference["attention_mask"].clone()).expect("masks");
    let lengths: Vec<usize> = masks.iter().map(|mask| mask.iter().sum()).collect();
    let asked: Vec<Value> = rows
        .iter()
        .zip(&lengths)
        .map(|(ids, &length)| json!({"ids": ids[..length]}))
        .collect();
    let expected: Vec<Vec<f64>> = (0..rows.len())
        .map(|row| floats(&reference["logprobs"][row])[..lengths[row] - 1].to_vec())
        .collect();
    let workplace = Workplace::new();
    let with = ["--adapter", &text(&adapter)];
    let found = log_probabilities(score(&workplace, &base, &asked, &with));
    assert!(furthest(&found, &expected) < 1e-3);
    let alone = log_probabilities(score(&workplace, &base, &asked, &[]));
    assert!(
        furthest(&alone, &expected) > 1e-2,
        "the adapter makes no difference"
    );
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
fn a_run_trains_the_adapter_alone_and_its_checkpoint_is_pefts_folder() {
    let workplace = Workplace::new();
    let run = workplace.path("run");
    let sets = [
        "learner.learning_rate=1e-2",
        "model.lora_dropout=0.0",
        "learner.ganpo.lambda=0.0",
    ];
    workplace.run(&tiny_adapted(&run, &sets)).succeeded();
    let checkpoint = run.join("checkpoints/step_12");
    let expected = [
        "adapter_config.json",
        "adapter_model.safetensors",
        "in_hand.pairs",
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

    // What travels is the adapter: seven modules of one block, rank 4, and no more.
    let sent = metrics(&run);
    let told = column(&run, "mismatch/logp_abs_diff");
    assert!(told.iter().all(|&gap| gap < 1e-3), "{told:?}");
    assert!(!sent.is_empty());
    let tensors = fs::metadata(checkpoint.join("adapter_model.safetensors"))
        .expect("a file")
        .len();
    let whole = fs::metadata(base.join("model.safetensors"))
        .expect("a file")
        .len();
    assert!(tensors * 2 < whole, "{tensors} of {whole} bytes");

    // At the start it is the reference; then it moves away from it, while the reference stays.
    let kl = column(&run, "objective/log_ratio");
    assert!(kl[0].abs() < 1e-4, "{kl:?}");
    assert!(kl[11].abs() > 1e-3, "{kl:?}");
    let of_base = log_probabilities(score(&workplace, &base, &rows(), &[]));
    let of_run = log_probabilities(score(&workplace, &checkpoint, &rows(), &[]));
    assert!(furthest(&of_run, &of_base) > 1e-3);
    let with = ["--adapter", &text(&checkpoint)];
    let beside = log_probabilities(score(&workplace, &base, &rows(), &with));
    assert_eq!(beside, of_run);

    mixes_both_ends(&workplace, &base, &checkpoint);
    exports_both_ways(&workplace, &run, &of_run);
    begins_where_another_ended(&workplace, &checkpoint, &of_run);
}

/// Generation beside an adapter: its base is the reference, and both ends of the mixture are the two.
fn mixes_both_ends(workplace: &Workplace, base: &Path, adapter: &Path) {
    let (base, adapter) = (text(base), text(adapter));
    let written = |model: &str, more: &[&str]| -> Vec<Value> {
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
        workplace.run(&call.concat()).succeeded().json_lines()
    };
    let ids = |lines: &[Value]| -> Vec<Value> { lines.iter().map(|l| l["ids"].clone()).collect() };
    let mixed = |m: &str| written(&base, &["--adapter", &adapter, "--mixture-coef", m]);
    let (policy, reference) = (mixed("0"), mixed("1"));
    assert_eq!(ids(&policy), ids(&written(&adapter, &[])));
    assert_eq!(ids(&reference), ids(&written(&base, &[])));
    assert_ne!(
        ids(&policy),
        ids(&reference),
        "the models are too near to tell anything"
    );
    for (lines, drawn_from) in [(policy, "/logp"), (reference, "/ref_logp")] {
        for line in &lines {
            let gap = number(line, "/behaviour_logp") - number(line, drawn_from);
            assert!(gap.abs() < 1e-3, "{line}");
            assert!(
                (number(line, "/logp") - number(line, "/ref_logp")).abs() > 1e-3,
                "{line}"
            );
        }
    }
}

/// The adapter by itself, and merged into a plain model; both say what the run's policy says.
fn exports_both_ways(workplace: &Workplace, run: &Path, of_run: &[Vec<f64>]) {
    let call = |to: &Path, more: &[&str]| {
        let (run, to) = (text(run), text(to));
        let call = [&["export", "--run", &run, "--output", &to], more].concat();
        workplace.run(&call)
    };
    let (adapter, merged) = (workplace.path("adapter"), workplace.path("merged"));
    call(&adapter, &[]).succeeded();
    let expected = [
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(names(&adapter), expected.map(str::to_owned).into());
    assert_eq!(
        log_probabilities(score(workplace, &adapter, &rows(), &[])),
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
    let found = log_probabilities(score(workplace, &merged, &rows(), &[]));
    assert!(furthest(&found, of_run) < 1e-4);
    call(&workplace.path("bf16"), &["--dtype", "bf16"]).check(2, &["--dtype needs --merge"]);
    // Over a former model nothing of it stays.
    call(&merged, &["--force"]).succeeded();
    assert_eq!(names(&merged), names(&adapter));
}

/// A second run that starts from the first one's adapter.
fn begins_where_another_ended(workplace: &Workplace, adapter: &Path, of_run: &[Vec<f64>]) {
    let run = workplace.path("second");
    let from = format!("model.adapter={adapter:?}");
    let sets = [
        from.as_str(),
        "learner.steps=1",
        "learner.learning_rate=1e-9",
    ];
    workplace.run(&tiny_adapted(&run, &sets)).succeeded();
    let checkpoint = run.join("checkpoints/step_1");
    let found = log_probabilities(score(workplace, &checkpoint, &rows(), &[]));
    assert!(furthest(&found, of_run) < 1e-4);
    // The reference is the base without it.
    assert!(column(&run, "objective/log_ratio")[0].abs() > 1e-3);
    let wrong = [from.as_str(), "model.lora_rank=3"];
    workplace
        .run(&tiny_adapted(&workplace.path("third"), &wrong))
        .check(2, &["model.lora_rank = 3", "has r = 4"])
        .without_panic();
}

#[test]
fn adapters_that_do_not_fit_are_refused_by_name() {
    let workplace = Workplace::new();
    let unknown = ["model.target_modules=[\"q_proj\", \"query\"]"];
    workplace
        .run(&tiny_adapted(&workplace.path("unknown"), &unknown))
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
    workplace
        .run(&tiny_adapted(&workplace.path("foreign"), &[&from]))
        .check(3, &["lora_A.weight", "was made for \"../random-llama3\""])
        .without_panic();
    let copy = workplace.copy_of(&adapter, "dora");
    let mut config = read(&copy.join("adapter_config.json"));
    config["use_dora"] = json!(true);
    fs::write(copy.join("adapter_config.json"), config.to_string()).expect("a writable copy");
    let dora = format!("model.adapter={copy:?}");
    workplace
        .run(&tiny_adapted(&workplace.path("dora-run"), &[&dora]))
        .check(
            3,
            &["adapter_config.json", "use_dora = true is not supported"],
        )
        .without_panic();
}

#[test]
fn discriminators_that_are_not_felt_change_no_bit_of_the_policy() {
    let workplace = Workplace::new();
    let digest = |name: &str, sets: &[&str]| {
        let run = workplace.path(name);
        workplace.run(&tiny_playground(&run, sets)).succeeded();
        (report(&run)["weights_digest"].clone(), run)
    };
    let (plain, without) = digest("plain", &[]);
    let ganpo = ["learner.ganpo.lambda=1.0", "learner.ganpo.heads=2"];
    let warming = [&ganpo[..], &["learner.ganpo.warmup_steps=100"]].concat();
    let (unfelt, run) = digest("unfelt", &warming);
    assert_eq!(unfelt, plain);
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
    let (felt, run) = digest("felt", &frozen);
    assert_ne!(felt, plain);
    let (total, pair, term) = (
        column(&run, "loss"),
        column(&run, "loss/ipo"),
        column(&run, "loss/ganpo"),
    );
    for step in 0..12 {
        assert!((total[step] - pair[step] - term[step]).abs() < 1e-3 * (1.0 + total[step].abs()));
        assert!((0.2..2.0).contains(&term[step]), "{term:?}");
    }
    let told = column(&run, "ganpo/d_loss");
    assert!(told[..6].iter().all(|loss| loss.is_finite()), "{told:?}");
    assert!(told[6..].iter().all(|loss| loss.is_nan()), "{told:?}");
    assert!(run.join("checkpoints/step_12/ganpo.safetensors").exists());
}

#[test]
fn every_pair_objective_takes_the_regulariser() {
    let workplace = Workplace::new();
    for kind in ["ipo", "dpo", "slic", "rpo"] {
        let run = workplace.path(kind);
        let objective = format!("learner.objective.kind={kind}");
        let sets = [objective.as_str(), "learner.steps=2"];
        workplace.run(&tiny_adapted(&run, &sets)).succeeded();
        let terms = column(&run, "ganpo/g_loss");
        assert!(
            terms.iter().all(|term| (0.2..2.0).contains(term)),
            "{kind}: {terms:?}"
        );
    }
}

#[test]
fn a_run_without_discriminators_does_not_resume_with_them() {
    let workplace = Workplace::new();
    let run = workplace.path("run");
    workplace
        .run(&tiny_bandit(&run, &["learner.steps=2"]))
        .succeeded();
    let mut resumed = tiny_bandit(&run, &["learner.steps=3", "learner.ganpo.lambda=1.0"]);
    resumed.push("--resume".into());
    workplace
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
