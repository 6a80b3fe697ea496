//! Runs that go wrong in their numbers: nothing that is not finite is trained on or published.

use std::fs;

use house::{Workplace, number, report, tiny_bandit};

/// A bandit of twelve steps with these settings changed; the run directory is `run`.
fn bandit(place: &Workplace, sets: &[&str]) -> house::Ended {
    let sets: Vec<&str> = ["learner.steps=12"].iter().chain(sets).copied().collect();
    place.run(&tiny_bandit(&place.path("run"), &sets))
}

#[test]
fn a_loss_that_is_not_finite_is_quarantined_and_in_the_end_the_run_says_that_it_diverged() {
    let place = Workplace::new();
    let says = ["diverged", "quarantine", "lower learner.learning_rate"];
    bandit(&place, &["learner.objective.tau=1e-30"])
        .check(4, &says)
        .without_panic();
    let entries = fs::read_dir(place.path("run/quarantine")).expect("a quarantine");
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
    // Three in a row before each of three returns to a checkpoint, and before the end.
    assert_eq!(
        (ending_in(".pairs"), ending_in(".jsonl")),
        (12, 12),
        "{names:?}"
    );
    let metrics = fs::read_to_string(place.path("run/metrics.jsonl")).expect("metrics");
    assert!(metrics.contains("\"nonfinite\":[\"loss\""), "{metrics}");
}

#[test]
fn weights_that_are_not_finite_are_not_published_and_the_run_goes_back() {
    let place = Workplace::new();
    let sets = [
        "learner.learning_rate=1e39",
        "learner.lr_scheduler_type=constant",
    ];
    let says = [
        "the weights are not finite",
        "going back to the last checkpoint",
        "diverged",
    ];
    let ended = bandit(&place, &sets).check(4, &says).without_panic();
    assert!(
        !ended.err.contains("the logits of a token"),
        "an actor got them: {}",
        ended.err
    );
}

#[test]
fn a_run_that_stays_finite_counts_nothing() {
    let place = Workplace::new();
    bandit(&place, &[]).succeeded();
    let report = report(&place.path("run"));
    assert_eq!(number(&report, "/nonfinite_steps"), 0.0);
    assert_eq!(number(&report, "/rollbacks"), 0.0);
    assert!(!place.path("run/quarantine/step_0_1.pairs").exists());
}
