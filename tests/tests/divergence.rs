//! Numerical divergence: values that are not finite, or far beyond the run's past, are neither trained on, published nor
//! saved.

use std::fs;

use system_tests::{Sandbox, number, report, tiny_bandit, tiny_playground};

/// Runs a bandit for twelve steps with these settings changed, in the run directory `run`.
fn bandit(sandbox: &Sandbox, sets: &[&str]) -> system_tests::ProcessOutput {
    let sets: Vec<&str> = ["learner.steps=12"].iter().chain(sets).copied().collect();
    sandbox.run(&tiny_bandit(&sandbox.path("run"), &sets))
}

#[test]
fn batches_with_non_finite_loss_are_quarantined_and_the_run_reports_divergence() {
    let sandbox = Sandbox::new();
    let says = ["diverged", "quarantine", "lower learner.learning_rate"];
    bandit(&sandbox, &["learner.objective.tau=1e-30"])
        .check(4, &says)
        .without_panic();
    let entries = fs::read_dir(sandbox.path("run/quarantine")).expect("a quarantine");
    let names: Vec<String> = entries
        .map(|entry| {
            entry
                .expect("an entry")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    let ending_in = |end: &str| names.iter().filter(|name| name.ends_with(end)).count();
    // Three consecutive steps before each of three rollbacks, and before the run ends.
    assert_eq!(
        (ending_in(".pairs"), ending_in(".jsonl")),
        (12, 12),
        "{names:?}"
    );
    let metrics = fs::read_to_string(sandbox.path("run/metrics.jsonl")).expect("metrics");
    assert!(metrics.contains("\"nonfinite\":[\"loss\""), "{metrics}");
}

#[test]
fn non_finite_weights_are_not_published_and_cause_a_rollback() {
    let sandbox = Sandbox::new();
    let sets = [
        "learner.learning_rate=1e39",
        "learner.lr_scheduler_type=constant",
    ];
    let says = [
        "the weights are not finite",
        "rolling back to the last checkpoint",
        "diverged",
    ];
    let output = bandit(&sandbox, &sets).check(4, &says).without_panic();
    assert!(
        !output.stderr.contains("the logits of a token"),
        "an actor received them: {}",
        output.stderr
    );
}

#[test]
fn huge_weights_are_divergence_and_the_run_can_be_resumed() {
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    for rate in ["1e10", "1e4"] {
        let name = format!("run-{rate}");
        let rate = format!("learner.learning_rate={rate}");
        let sets = ["learner.steps=12", "learner.save_steps=1", &rate];
        let output = sandbox.run(&tiny_playground(&sandbox.path(&name), &sets));
        let says = [
            "far beyond the run's past",
            "rolling back to the last checkpoint",
            "diverged",
        ];
        let output = output.check(4, &says).without_panic();
        assert!(
            !output.stderr.contains("the logits of a token"),
            "{}",
            output.stderr
        );
    }
    // Whatever was saved meanwhile is usable.
    fs::rename(sandbox.path("run-1e10"), &run).expect("a run");
    let mut resume = tiny_playground(&run, &["learner.steps=12"]);
    resume.push("--resume".into());
    sandbox.run(&resume).succeeded();
    assert_eq!(report(&run)["steps"], 12);
}

#[test]
fn supervised_fine_tuning_reports_divergence() {
    let sandbox = Sandbox::new();
    let sets = ["sft.learning_rate=1e10"];
    sandbox
        .run(&tiny_playground(&sandbox.path("run"), &sets))
        .check(4, &["diverged", "lower sft.learning_rate"])
        .without_panic();
}

#[test]
fn a_finite_run_has_no_quarantine() {
    let sandbox = Sandbox::new();
    bandit(&sandbox, &[]).succeeded();
    let report = report(&sandbox.path("run"));
    assert_eq!(number(&report, "/nonfinite_steps"), 0.0);
    assert_eq!(number(&report, "/rollbacks"), 0.0);
    assert!(!sandbox.path("run/quarantine/step_0_1.pairs").exists());
}
