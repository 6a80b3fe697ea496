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
