//! Offline and mixed runs: pairs from files, whose limit is known in closed form, which are resumed to the bit, and for
//! which no role is started that nothing needs.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use system_tests::{
    Sandbox, has_nats_server, metrics, number, report, steps, tiny_bandit, tiny_playground,
};

/// Settings of an offline run without evaluations: neither actors nor a judge are needed.
const ALONE: [&str; 2] = ["actor.mixture_coef=0", "evaluation.prompts=0"];

/// The playground's pairs, half a batch of them in each step.
const MIXED: [&str; 2] = ["pairs.playground_pairs=60", "pairs.share=0.45"];

/// A learning rate that does not depend on the number of steps.
const CONSTANT: [&str; 2] = ["learner.warmup_ratio=0", "learner.learning_rate=1e-3"];

fn owned(sets: &[&str]) -> Vec<String> {
    sets.iter().map(|&set| set.to_owned()).collect()
}

fn digest(run: &Path) -> String {
    let report = report(run);
    let digest = report["weights_digest"].as_str();
    digest.expect("a report has a digest").to_owned()
}

/// Writes rows as JSON Lines; returns the setting that names them.
fn pairs(sandbox: &Sandbox, name: &str, rows: &[Value]) -> String {
    let lines = rows.iter().map(|row| format!("{row}\n"));
    let path = sandbox.write(name, lines.collect::<String>());
    format!("pairs.path={path:?}")
}

/// A comparison of two arms of a bandit; the first is preferred with probability `p`.
fn arms(first: usize, second: usize, p: f64) -> Value {
    json!({
        "prompt": "arm0", "chosen": format!(" arm{first}"), "rejected": format!(" arm{second}"), "p": p,
    })
}

/// The policy that an offline bandit converges to: full batches of these rows, without noise.
fn offline_bandit(rows: &[Value], sets: &[&str]) -> Vec<f64> {
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    let all = [
        owned(&ALONE),
        owned(&["learner.steps=600", "pairs.label_column=p"]),
        owned(sets),
        vec![
            pairs(&sandbox, "arms.jsonl", rows),
            format!("learner.train_batch_size={}", rows.len()),
        ],
    ]
    .concat();
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    sandbox.run(&tiny_bandit(&run, &all)).succeeded();
    let report = report(&run);
    assert_eq!(report["evaluations"], json!([]));
    (0..3)
        .map(|arm| number(&report, &format!("/policy/{arm}")))
        .collect()
}

/// ref · exp(theta), normalised, for the reference of `configs/bandit.toml`.
fn tilted(theta: [f64; 3]) -> Vec<f64> {
    let weights: Vec<f64> = [0.5, 0.3, 0.2]
        .iter()
        .zip(theta)
        .map(|(p, theta)| p * theta.exp())
        .collect();
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|w| w / sum).collect()
}

#[track_caller]
fn assert_close(found: &[f64], expected: &[f64], tolerance: f64) {
    let far = |(a, b): (&f64, &f64)| (a - b).abs() > tolerance;
    let differs = found.iter().zip(expected).any(far);
    assert!(!differs, "{found:.4?} is not {expected:.4?}");
}

/// argmin over h of the sum of w (h_i - h_j - (p - 1/2)/tau)^2: the normal equations, with h_0 = 0.
fn least_squares(comparisons: &[(usize, usize, f64, usize)], tau: f64) -> [f64; 3] {
    let (mut a, mut b) = ([[0.0; 3]; 3], [0.0; 3]);
    for &(i, j, p, count) in comparisons {
        let (w, target) = (count as f64, (p - 0.5) / tau);
        a[i][i] += w;
        a[j][j] += w;
        a[i][j] -= w;
        a[j][i] -= w;
        b[i] += w * target;
        b[j] -= w * target;
    }
    let determinant = a[1][1] * a[2][2] - a[1][2] * a[2][1];
    let h1 = (b[1] * a[2][2] - b[2] * a[1][2]) / determinant;
    let h2 = (a[1][1] * b[2] - a[2][1] * b[1]) / determinant;
    [0.0, h1, h2]
}

#[test]
fn offline_ipo_converges_to_the_weighted_least_squares_solution() {
    // A cycle, compared unequally often.
    let comparisons = [(0, 1, 0.8, 8), (1, 2, 0.9, 1), (2, 0, 0.7, 1)];
    let rows: Vec<Value> = comparisons
        .iter()
        .flat_map(|&(i, j, p, count)| vec![arms(i, j, p); count])
        .collect();
    let found = offline_bandit(&rows, &["learner.objective.tau=0.5"]);
    let expected = tilted(least_squares(&comparisons, 0.5));
    assert_close(&found, &expected, 0.005);
    // The Borda solution of equal weights is another one.
    let equal = comparisons.map(|(i, j, p, _)| (i, j, p, 1));
    let borda = tilted(least_squares(&equal, 0.5));
    assert!((borda[0] - expected[0]).abs() > 0.05, "{borda:?}");
}

#[test]
fn offline_dpo_recovers_the_log_odds_of_a_bradley_terry_preference() {
    // Hard labels in the proportions of strengths 4 : 2 : 1.
    let counts = [(0, 1, 10, 5), (0, 2, 12, 3), (1, 2, 10, 5)];
    let rows: Vec<Value> = counts
        .iter()
        .flat_map(|&(i, j, wins, losses)| {
            let mut rows = vec![arms(i, j, 1.0); wins];
            rows.extend(vec![arms(j, i, 1.0); losses]);
            rows
        })
        .collect();
    let sets = ["learner.objective.kind=dpo", "learner.objective.beta=0.5"];
    let found = offline_bandit(&rows, &sets);
    let strengths = [4f64, 2.0, 1.0].map(|strength| strength.ln() / 0.5);
    assert_close(&found, &tilted(strengths), 0.005);
}

/// Digests of the weights of a run of twelve steps, and of one of five that is resumed.
fn whole_and_resumed(sets: &[&str]) -> ([String; 2], [PathBuf; 2], Sandbox) {
    let sandbox = Sandbox::new();
    let sets = [sets, &CONSTANT].concat();
    let [whole, resumed] = ["whole", "resumed"].map(|name| sandbox.path(name));
    sandbox.run(&tiny_playground(&whole, &sets)).succeeded();
    let five = [sets.as_slice(), &["learner.steps=5"]].concat();
    sandbox.run(&tiny_playground(&resumed, &five)).succeeded();
    assert_ne!(digest(&whole), digest(&resumed));
    let mut arguments = tiny_playground(&resumed, &sets);
    arguments.push("--resume".into());
    sandbox.run(&arguments).succeeded();
    let losses = |run: &Path| {
        let lines = steps(run);
        lines
            .iter()
            .map(|line| line["loss"].clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(losses(&whole), losses(&resumed));
    (
        [digest(&whole), digest(&resumed)],
        [whole, resumed],
        sandbox,
    )
}

fn stage(run: &Path, name: &str, count: &str) -> u64 {
    let stage = &report(run)["stages"][name];
    assert_eq!(stage["conserved"], true, "{stage}");
    stage[count].as_u64().expect("a count")
}

#[test]
fn an_offline_run_is_resumed_to_the_bit_and_starts_the_learner_alone() {
    let sets = [
        &ALONE[..],
        &["pairs.playground_pairs=60", "learner.objective.kind=dpo"],
    ]
    .concat();
    let ([whole, resumed], [run, again], _sandbox) = whole_and_resumed(&sets);
    assert_eq!(whole, resumed);
    for run in [&run, &again] {
        let report = report(run);
        assert_eq!(report["pairs"], report["pairs_from_files"]);
        let stages = report["stages"].as_object().expect("stages");
        assert_eq!(stages.keys().collect::<Vec<_>>(), ["learner"]);
        assert_eq!(stage(run, "learner", "received"), 96);
        assert_eq!(stage(run, "learner", "emitted"), 96);
        assert!(run.join("reference_logprobs.bin").exists());
        let markdown = fs::read_to_string(run.join("report.md")).expect("a report");
        assert!(markdown.contains("evaluation.prompts is 0"), "{markdown}");
    }
    let last = steps(&run).pop().expect("a step");
    assert_eq!(last["pairs/from_files"], 8.0);
    assert_eq!(last["epoch"], 1.6);
    assert_eq!(last["mismatch/ess"], Value::Null, "nothing was sampled");
    assert!(last["rewards/margins"].as_f64() > Some(0.0), "{last}");
}

#[test]
fn a_mixed_run_is_resumed_to_the_bit() {
    let sets = [
        &MIXED[..],
        &["learner.objective.kind=rpo", "learner.objective.eta=0.1"],
    ]
    .concat();
    let ([whole, resumed], [run, again], _sandbox) = whole_and_resumed(&sets);
    assert_eq!(whole, resumed);
    // 12 · 8 · .45 = 43.2.
    for run in [&run, &again] {
        assert_eq!(report(run)["pairs_from_files"], 43);
        assert_eq!(report(run)["pairs"], 96);
    }
    let from_files: Vec<f64> = steps(&run)
        .iter()
        .filter_map(|line| line["pairs/from_files"].as_f64())
        .collect();
    assert_eq!(&from_files[..6], [3.0, 4.0, 3.0, 4.0, 4.0, 3.0]);
    assert!(stage(&run, "actor", "emitted") >= 53);
}

#[test]
fn the_judge_labels_every_pair_once() {
    let sets = [
        &ALONE[..],
        &["pairs.playground_pairs=40", "pairs.label=judge"],
    ]
    .concat();
    let ([whole, resumed], [run, _], _sandbox) = whole_and_resumed(&sets);
    assert_eq!(whole, resumed);
    // 96 pairs are two passes and 16 pairs of the third.
    let judged = stage(&run, "preference", "received");
    assert!((1..=40).contains(&judged), "{judged}");
    assert_eq!(stage(&run, "preference", "emitted"), judged);
    assert_eq!(stage(&run, "learner", "emitted"), 96);
    assert_eq!(report(&run)["stages"].get("actor"), None);
}

#[test]
fn passes_end_a_run_which_is_finished_then() {
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    let more = [
        "pairs.playground_pairs=60",
        "pairs.epochs=2",
        "learner.steps=1000",
    ];
    let sets = [&ALONE[..], &more].concat();
    let mut arguments = tiny_playground(&run, &sets);
    let output = sandbox.run(&arguments).succeeded();
    assert!(
        output
            .stderr
            .contains("pairs.epochs ends the run before learner.steps")
    );
    let taken = number(&report(&run), "/steps");
    // At most 60 pairs: equal ones were left out.
    assert!(taken <= 15.0 && taken > 5.0, "{taken}");
    let passes = steps(&run).pop().expect("a step")["epoch"].as_f64();
    assert!(passes >= Some(2.0), "{passes:?}");
    let before = metrics(&run).len();
    arguments.push("--resume".into());
    let output = sandbox.run(&arguments).succeeded();
    assert!(
        output.stderr.contains("nothing is left to do"),
        "{}",
        output.stderr
    );
    assert_eq!(metrics(&run).len(), before);
}

#[test]
fn a_shutdown_ends_an_offline_run_after_its_step() {
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    let more = ["pairs.playground_pairs=60", "learner.steps=1000000"];
    let sets = [&ALONE[..], &more].concat();
    let mut running = sandbox.start(&tiny_playground(&run, &sets));
    running.until("steps", || (steps(&run).len() > 3).then_some(()));
    running.terminate();
    running
        .wait()
        .check(5, &["interrupted; saved"])
        .without_panic();
    assert_eq!(report(&run)["finished"], false);
}

#[test]
fn pairs_that_cannot_be_used_are_named_with_the_remedy() {
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    let good = arms(1, 2, 0.5);
    let label = "pairs.label_column=p";
    for (name, rows, more, expected) in [
        (
            "label.jsonl",
            vec![good.clone(), arms(1, 2, 1.5)],
            label,
            "label.jsonl, line 2: column \"p\" is 1.5",
        ),
        (
            "column.jsonl",
            vec![good.clone()],
            "pairs.label_column=q",
            "set pairs.label_column",
        ),
        (
            "equal.jsonl",
            vec![arms(1, 1, 1.0)],
            label,
            "1 have two equal ones",
        ),
        (
            "token.jsonl",
            vec![json!({"prompt": "arm0", "chosen": " arm9", "rejected": " arm1", "p": 1})],
            label,
            "token.jsonl, line 1",
        ),
        (
            "long.jsonl",
            vec![
                json!({"prompt": "arm0 ".repeat(20), "chosen": " arm1", "rejected": " arm2", "p": 1}),
            ],
            label,
            "pairs.too_long = \"drop\"",
        ),
    ] {
        let path = pairs(&sandbox, name, &rows);
        let sets = [&ALONE[..], &[&path, more]].concat();
        let mut arguments = tiny_bandit(&run, &sets);
        let output = sandbox
            .run(&arguments)
            .check(3, &[expected, "pairs.path"])
            .without_panic();
        assert!(!run.exists(), "nothing is left behind: {}", output.stderr);
        // `agon check` says the same.
        arguments[0] = "check".into();
        arguments
            .retain(|argument| argument != "--run-dir" && *argument != run.display().to_string());
        sandbox.run(&arguments).check(3, &[expected]);
    }
}

#[test]
fn a_run_without_actors_is_not_refused_for_their_settings() {
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    // The playground's pairs are sampled with actor.max_new_tokens.
    let long = ["actor.max_prompt_length=100000", "learner.steps=2"];
    let sets = [&ALONE[..], &long, &["pairs.playground_pairs=60"]].concat();
    let output = sandbox.run(&tiny_playground(&run, &sets)).succeeded();
    assert!(output.stderr.contains("actors=0"), "{}", output.stderr);
    let evaluation = ["evaluation.prompts=4", "actor.max_new_tokens=100000"];
    let evaluated = [&sets[..], &evaluation].concat();
    let other = sandbox.path("other");
    sandbox
        .run(&tiny_playground(&other, &evaluated))
        .check(2, &["exceed the model's"]);
}

#[test]
fn a_judge_that_gives_no_pair_a_label_ends_the_run_at_once() {
    let sandbox = Sandbox::new();
    let path = pairs(
        &sandbox,
        "arms.jsonl",
        &[arms(0, 1, 0.75), arms(1, 2, 0.75)],
    );
    let certain = ["pairs.label=judge", "learner.min_margin=0.5", &path];
    let sets = [&ALONE[..], &certain].concat();
    let expected = [
        "the judge matrix gave none of the 2 pairs of",
        "arms.jsonl a label that is trained on; dropped meanwhile: ",
        "no_signal (the last: every |p - 1/2| is below learner.min_margin)",
    ];
    let output = sandbox.run(&tiny_bandit(&sandbox.path("run"), &sets));
    output.check(1, &expected).without_panic();
}

#[test]
fn a_file_that_changed_between_sessions_is_refused() {
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    let mut rows = vec![arms(0, 1, 0.75), arms(1, 2, 0.75)];
    let path = pairs(&sandbox, "arms.jsonl", &rows);
    let sets = |steps: &'static str| [&ALONE[..], &["pairs.label_column=p", steps, &path]].concat();
    sandbox
        .run(&tiny_bandit(&run, &sets("learner.steps=3")))
        .succeeded();
    rows[1] = arms(1, 2, 0.25);
    pairs(&sandbox, "arms.jsonl", &rows);
    let mut arguments = tiny_bandit(&run, &sets("learner.steps=6"));
    arguments.push("--resume".into());
    sandbox.run(&arguments).check(
        2,
        &[
            "rows of the pairs (pairs.path = ",
            "arms.jsonl) was",
            "--accept-changes",
        ],
    );
    arguments.push("--accept-changes".into());
    let output = sandbox.run(&arguments).succeeded();
    let discarded = "the file is of another reference, other pairs";
    assert!(output.stderr.contains(discarded), "{}", output.stderr);
}

#[test]
fn offline_runs_over_jetstream_have_the_weights_of_those_in_memory() {
    if !has_nats_server() {
        return;
    }
    let sandbox = Sandbox::new();
    let rows = [
        arms(0, 1, 0.9),
        arms(1, 2, 0.8),
        arms(2, 0, 0.7),
        arms(1, 0, 0.2),
    ];
    let path = pairs(&sandbox, "arms.jsonl", &rows);
    for label in ["pairs.label=file", "pairs.label=judge"] {
        let of = |name: String, more: &[&str]| {
            let run = sandbox.path(&name);
            let small = ["learner.steps=20", "learner.train_batch_size=3"];
            let sets = [&ALONE[..], &small, &[&path, label], more].concat();
            sandbox.run(&tiny_bandit(&run, &sets)).succeeded();
            run
        };
        let memory = of(format!("memory-{label}"), &[]);
        let name = format!("run.name=offline-{}", label.len());
        let cluster = of(
            format!("cluster-{label}"),
            &[
                &name,
                "transport.kind=jetstream",
                "transport.lease_seconds=2",
            ],
        );
        assert_eq!(digest(&memory), digest(&cluster), "{label}");
        assert_eq!(stage(&cluster, "learner", "emitted"), 60);
        let judged = if label.ends_with("judge") { 4 } else { 0 };
        assert_eq!(stage(&cluster, "preference", "received"), judged);
        assert_eq!(stage(&cluster, "actor", "received"), 0);
        let logs = fs::read_dir(cluster.join("logs")).expect("logs");
        let names: Vec<String> = logs
            .map(|log| {
                log.expect("a log")
                    .file_name()
                    .to_string_lossy()
                    .into_owned()
            })
            .collect();
        assert!(
            !names.iter().any(|name| name.starts_with("actor")),
            "{names:?}"
        );
    }
}
