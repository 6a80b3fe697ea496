//! Metrics on runs whose values are known exactly.

use std::path::{Path, PathBuf};

use serde_json::Value;
use system_tests::{Sandbox, metrics, number, report, steps, tiny_bandit, tiny_playground};

/// One arm beats the two others, so that the policy moves far from its reference.
const ONE_SIDED: [&str; 5] = [
    "preference.judge.matrix=[[0.5, 0.9, 0.9], [0.1, 0.5, 0.5], [0.1, 0.5, 0.5]]",
    "learner.objective.tau=0.2",
    "learner.steps=200",
    "learner.train_batch_size=64",
    "evaluation.prompts=512",
];
const REFERENCE: [f64; 3] = [0.5, 0.3, 0.2];

/// Final policy of a run, from its report.
fn policy(report: &Value) -> [f64; 3] {
    [0, 1, 2].map(|arm| number(report, &format!("/policy/{arm}")))
}

/// E[log π/ref] over arms drawn from `distribution`; the KL divergence if that is π.
fn expected_log_ratio(distribution: [f64; 3], policy: [f64; 3]) -> f64 {
    let arms = distribution.iter().zip(policy.iter().zip(REFERENCE));
    arms.map(|(q, (p, r))| q * (p / r).ln()).sum()
}

/// `policy` sampled at this temperature.
fn tempered(policy: [f64; 3], temperature: f64) -> [f64; 3] {
    let weights = policy.map(|p| p.powf(1.0 / temperature));
    let total: f64 = weights.iter().sum();
    weights.map(|weight| weight / total)
}

/// All values of a metric of a run, in order.
fn values(run: &Path, name: &str) -> Vec<f64> {
    let rows = metrics(run);
    rows.iter().filter_map(|row| row[name].as_f64()).collect()
}

fn run(sandbox: &Sandbox, name: &str, sets: &[&str]) -> (PathBuf, Value) {
    let run = sandbox.path(name);
    let sets = [&ONE_SIDED[..], sets].concat();
    sandbox.run(&tiny_bandit(&run, &sets)).succeeded();
    let report = report(&run);
    (run, report)
}

#[test]
fn the_kl_of_an_evaluation_is_independent_of_the_sampling_temperature() {
    let sandbox = Sandbox::new();
    for temperature in [0.5, 2.0] {
        let set = format!("actor.temperature={temperature}");
        let (run, report) = run(&sandbox, &format!("t{temperature}"), &[&set]);
        let policy = policy(&report);
        let exact = expected_log_ratio(policy, policy);
        let biased = expected_log_ratio(tempered(policy, temperature), policy);
        assert!((biased - exact).abs() > 0.1, "{policy:?}: {biased} {exact}");
        let actual = *values(&run, "eval/kl").last().expect("an evaluation");
        // The standard error of the mean of 512 samples is about .03.
        assert!((actual - exact).abs() < 0.08, "{actual} for {exact}");
        assert!(
            values(&run, "objective/kl").is_empty(),
            "the samples are not from the policy"
        );
    }
}

#[test]
fn the_kl_of_training_includes_identical_pairs() {
    let sandbox = Sandbox::new();
    let (run, report) = run(&sandbox, "on-policy", &[]);
    let policy = policy(&report);
    let exact = expected_log_ratio(policy, policy);
    let last = |name: &str| {
        let all = values(&run, name);
        assert_eq!(all.len(), 200, "{name} is logged at every step");
        all[150..].iter().sum::<f64>() / 50.0
    };
    let actual = last("objective/kl");
    assert!((actual - exact).abs() < 0.03, "{actual} for {exact}");
    // The log-ratio of pairs with two different arms is biased.
    let of_pairs = last("objective/log_ratio");
    assert!((of_pairs - exact).abs() > 0.2, "{of_pairs} for {exact}");
}

/// The numbers under a key of a row of `samples.jsonl`.
fn numbers(row: &Value, key: &str) -> Vec<f64> {
    let values = row[key].as_array().expect("a list").iter();
    values.map(|x| x.as_f64().expect("a number")).collect()
}

/// Without a mixture actors compute log ref of one training prompt a version; of the others the samples have the
/// learner's. Before the first step it is log π of the actor.
#[test]
fn a_policy_that_samples_alone_records_little_log_ref() {
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    let sets = ["actor.mixture_coef=0.0", "telemetry.samples_per_step=4"];
    sandbox.run(&tiny_playground(&run, &sets)).succeeded();
    let mut recorded = 0;
    for row in &steps(&run) {
        assert!(row["mismatch/kl"].is_number(), "{row}");
        assert!(row["objective/kl"].is_number(), "{row}");
        let deviation = row["mismatch/ref_logp_abs_diff"].as_f64();
        assert!(deviation.is_none_or(|d| d < 1e-5), "{row}");
        recorded += usize::from(deviation.is_some());
    }
    assert!(recorded >= 6, "of 12 steps {recorded}");
    assert!(!values(&run, "eval/kl").is_empty());
    let samples = std::fs::read_to_string(run.join("samples.jsonl")).expect("samples");
    let samples: Vec<Value> = samples
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    assert_eq!(samples.len(), 4 * 12);
    let (mut of_start, mut moved) = (0, 0);
    for row in &samples {
        let (logp, ref_logp) = (numbers(row, "sum_logp"), numbers(row, "sum_ref_logp"));
        assert_eq!((logp.len(), ref_logp.len()), (2, 2));
        let differs = |(a, b): (&f64, &f64)| (a - b).abs() > 1e-3;
        let different = logp.iter().zip(&ref_logp).filter(|&(a, b)| differs((a, b)));
        match row["version"].as_u64() {
            Some(0) => {
                assert_eq!(different.count(), 0, "{row}");
                of_start += 1;
            }
            _ => moved += different.count(),
        }
    }
    assert!(of_start >= 4 && moved > 40, "{of_start} {moved}");
}

#[test]
fn every_step_logs_the_actor_learner_mismatch_and_the_judge_scores() {
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    let sets = [
        "learner.max_staleness=1",
        "preference.judge.kind=rule",
        "preference.judge.rules=[{ kind = \"length\", min = 40, max = 60, weight = 1.0 }]",
    ];
    sandbox.run(&tiny_playground(&run, &sets)).succeeded();
    let steps = steps(&run);
    assert_eq!(steps.len(), 12);
    for row in &steps {
        for name in [
            "mismatch/kl",
            "mismatch/k3_kl",
            "mismatch/logp_abs_diff",
            "mismatch/ess",
            "mismatch/ref_logp_abs_diff",
            "objective/log_ratio",
            "objective/scores",
            "objective/scores_margin",
            "grad_clipped_share",
        ] {
            assert!(row[name].is_number(), "{name} in {row}");
        }
        // The score is the number of words short of forty, negated.
        assert!(
            row["objective/scores"].as_f64().is_some_and(|s| s < 0.0),
            "{row}"
        );
        assert!(
            row["mismatch/ref_logp_abs_diff"]
                .as_f64()
                .is_some_and(|d| d < 1e-5),
            "{row}"
        );
        // Not estimated: the samples are from the mixture.
        assert!(row["objective/kl"].is_null(), "{row}");
    }
    // The policy equals its reference at the first step.
    assert_eq!(steps[0]["objective/log_ratio"], 0.0);
    assert_eq!(steps[0]["rewards/margins"], 0.0);
}
