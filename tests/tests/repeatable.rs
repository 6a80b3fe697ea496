//! A strictly on-policy run of one process is decided by its seed, bit for bit, and stays so when it is
//! stopped or killed and resumed.

use std::path::Path;

use house::{Workplace, report, steps, tiny_adapted, tiny_bandit, tiny_playground};
use serde_json::Value;

/// One of the small worlds, as arguments.
type World = fn(&Path, &[&str]) -> Vec<String>;

const WORLDS: [(World, u64); 3] = [
    (tiny_bandit, 100),
    (tiny_playground, 12),
    (tiny_adapted, 12),
];

fn digest(run: &Path) -> String {
    let report = report(run);
    let digest = report["weights_digest"].as_str();
    digest
        .unwrap_or_else(|| panic!("no weights_digest in {report:#}"))
        .to_owned()
}

/// The digest that a run of this seed ends with, and its losses.
fn whole(workplace: &Workplace, name: &str, world: World, sets: &[&str]) -> (String, Vec<Value>) {
    let run = workplace.path(name);
    workplace.run(&world(&run, sets)).succeeded();
    (digest(&run), losses(&run))
}

fn losses(run: &Path) -> Vec<Value> {
    steps(run).iter().map(|line| line["loss"].clone()).collect()
}

/// That the journal tells of every step from 1 to `last`, each once and in order.
#[track_caller]
fn every_step_once(run: &Path, last: u64) {
    let told: Vec<u64> = steps(run)
        .iter()
        .filter_map(|line| line["step"].as_u64())
        .collect();
    assert_eq!(told, (1..=last).collect::<Vec<_>>());
}

fn reached(run: &Path, step: u64) -> Option<()> {
    let last = steps(run).last()?["step"].as_u64()?;
    (last >= step).then_some(())
}

fn resume(mut arguments: Vec<String>) -> Vec<String> {
    arguments.push("--resume".into());
    arguments
}

#[test]
fn a_seed_repeats_and_another_differs() {
    let workplace = Workplace::new();
    for (number, (world, last)) in WORLDS.into_iter().enumerate() {
        let name = |run| format!("{run}-{number}");
        let first = whole(&workplace, &name("first"), world, &["run.seed=3"]);
        let again = whole(&workplace, &name("again"), world, &["run.seed=3"]);
        let other = whole(&workplace, &name("other"), world, &["run.seed=4"]);
        assert_eq!(first, again);
        assert_ne!(first.0, other.0);
        assert_eq!(first.1.len() as u64, last);
        every_step_once(&workplace.path(&name("first")), last);
    }
}

#[test]
fn a_run_that_is_stopped_and_resumed_ends_where_it_would_have() {
    let workplace = Workplace::new();
    for (number, (world, last)) in WORLDS.into_iter().enumerate() {
        let expected = whole(&workplace, &format!("whole-{number}"), world, &[]);
        let run = workplace.path(&format!("stopped-{number}"));
        let arguments = world(&run, &[]);
        let mut running = workplace.start(&arguments);
        running.until("a third of the steps", || reached(&run, last / 3));
        running.terminate();
        let ended = running
            .wait()
            .check(5, &["stopping", "interrupted; saved"])
            .without_panic();
        let before = report(&run);
        assert_eq!(before["finished"], false, "{}", ended.err);
        let stopped_at = before["steps"].as_u64().expect("a report counts steps");
        assert!(
            (last / 3..last).contains(&stopped_at),
            "it stopped after {stopped_at} of {last} steps"
        );
        let last_line = format!("aligning {stopped_at}/{last} (");
        assert!(ended.err.contains(&last_line), "{}", ended.err);

        workplace.run(&resume(arguments)).succeeded();
        assert_eq!((digest(&run), losses(&run)), expected);
        every_step_once(&run, last);
        assert_eq!(report(&run)["finished"], true);
    }
}

#[test]
fn a_run_that_is_killed_goes_on_from_its_last_checkpoint() {
    let workplace = Workplace::new();
    for (number, (world, last)) in WORLDS.into_iter().enumerate() {
        let expected = whole(&workplace, &format!("whole-{number}"), world, &[]);
        let run = workplace.path(&format!("killed-{number}"));
        let arguments = world(&run, &["learner.save_steps=3"]);
        let mut running = workplace.start(&arguments);
        running.until("a checkpoint and a step after it", || {
            let saved =
                run.join("checkpoints/step_3").exists() || run.join("checkpoints/step_6").exists();
            saved.then(|| reached(&run, 4)).flatten()
        });
        running.kill();
        workplace.run(&resume(arguments)).succeeded();
        assert_eq!((digest(&run), losses(&run)), expected);
        every_step_once(&run, last);
    }
}

#[test]
fn stopping_again_and_again_changes_nothing() {
    let workplace = Workplace::new();
    let expected = whole(&workplace, "whole", tiny_bandit, &[]);
    let run = workplace.path("stopped");
    let arguments = tiny_bandit(&run, &[]);
    for (times, step) in [1, 15, 30, 45].into_iter().enumerate() {
        let call = if times == 0 {
            arguments.clone()
        } else {
            resume(arguments.clone())
        };
        let mut running = workplace.start(&call);
        running.until("a few steps", || reached(&run, step));
        running.terminate();
        running.wait().check(5, &[]);
    }
    workplace.run(&resume(arguments)).succeeded();
    assert_eq!((digest(&run), losses(&run)), expected);
    every_step_once(&run, 100);
}

#[test]
fn resuming_a_finished_run_with_more_steps_goes_on() {
    let workplace = Workplace::new();
    let run = workplace.path("run");
    workplace
        .run(&tiny_bandit(&run, &["learner.steps=5"]))
        .succeeded();
    every_step_once(&run, 5);
    workplace
        .run(&resume(tiny_bandit(&run, &["learner.steps=9"])))
        .succeeded();
    every_step_once(&run, 9);
    assert_eq!(report(&run)["steps"], 9);
}
