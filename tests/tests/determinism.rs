//! Determinism: the weights of a strictly on-policy single-process run depend only on its seed, bit for bit, even if it
//! is interrupted or killed and resumed.

use std::path::Path;

use serde_json::Value;
use system_tests::{
    Sandbox, column, config, report, steps, tiny_adapted, tiny_bandit, tiny_playground,
};

/// Arguments of one of the tiny runs.
type TinyRun = fn(&Path, &[&str]) -> Vec<String>;

/// Each tiny run with its number of steps.
const TINY_RUNS: [(TinyRun, u64); 3] = [
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

/// Runs to completion and returns the digest of the weights and the losses.
fn run_to_completion(
    sandbox: &Sandbox,
    name: &str,
    tiny_run: TinyRun,
    sets: &[&str],
) -> (String, Vec<Value>) {
    let run = sandbox.path(name);
    sandbox.run(&tiny_run(&run, sets)).succeeded();
    (digest(&run), losses(&run))
}

fn losses(run: &Path) -> Vec<Value> {
    steps(run).iter().map(|line| line["loss"].clone()).collect()
}

/// Asserts that the metrics journal has every step from 1 to `last` exactly once and in order.
#[track_caller]
fn assert_every_step_once(run: &Path, last: u64) {
    let logged: Vec<u64> = steps(run)
        .iter()
        .filter_map(|line| line["step"].as_u64())
        .collect();
    assert_eq!(logged, (1..=last).collect::<Vec<_>>());
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
fn a_run_is_determined_by_its_seed() {
    let sandbox = Sandbox::new();
    for (number, (tiny_run, last)) in TINY_RUNS.into_iter().enumerate() {
        let name = |run| format!("{run}-{number}");
        let first = run_to_completion(&sandbox, &name("first"), tiny_run, &["run.seed=3"]);
        let second = run_to_completion(&sandbox, &name("second"), tiny_run, &["run.seed=3"]);
        let other = run_to_completion(&sandbox, &name("other"), tiny_run, &["run.seed=4"]);
        assert_eq!(first, second);
        assert_ne!(first.0, other.0);
        assert_eq!(first.1.len() as u64, last);
        assert_every_step_once(&sandbox.path(&name("first")), last);
    }
}

#[test]
fn an_interrupted_and_resumed_run_ends_with_the_same_weights() {
    let sandbox = Sandbox::new();
    for (number, (tiny_run, last)) in TINY_RUNS.into_iter().enumerate() {
        let expected =
            run_to_completion(&sandbox, &format!("uninterrupted-{number}"), tiny_run, &[]);
        let run = sandbox.path(&format!("stopped-{number}"));
        let arguments = tiny_run(&run, &[]);
        let mut running = sandbox.start(&arguments);
        running.until("a third of the steps", || reached(&run, last / 3));
        running.terminate();
        let output = running
            .wait()
            .check(5, &["stopping", "interrupted; saved"])
            .without_panic();
        let before = report(&run);
        assert_eq!(before["finished"], false, "{}", output.stderr);
        let stopped_at = before["steps"].as_u64().expect("a report counts steps");
        assert!(
            (last / 3..last).contains(&stopped_at),
            "it stopped after {stopped_at} of {last} steps"
        );
        let last_line = format!("aligning {stopped_at}/{last} (");
        assert!(output.stderr.contains(&last_line), "{}", output.stderr);

        sandbox.run(&resume(arguments)).succeeded();
        assert_eq!((digest(&run), losses(&run)), expected);
        assert_every_step_once(&run, last);
        assert_eq!(report(&run)["finished"], true);
    }
}

#[test]
fn a_killed_run_resumes_from_its_last_checkpoint() {
    let sandbox = Sandbox::new();
    for (number, (tiny_run, last)) in TINY_RUNS.into_iter().enumerate() {
        let expected =
            run_to_completion(&sandbox, &format!("uninterrupted-{number}"), tiny_run, &[]);
        let run = sandbox.path(&format!("killed-{number}"));
        let arguments = tiny_run(&run, &["learner.save_steps=3"]);
        let mut running = sandbox.start(&arguments);
        running.until("a checkpoint and a step after it", || {
            let saved =
                run.join("checkpoints/step_3").exists() || run.join("checkpoints/step_6").exists();
            saved.then(|| reached(&run, 4)).flatten()
        });
        running.kill();
        sandbox.run(&resume(arguments)).succeeded();
        assert_eq!((digest(&run), losses(&run)), expected);
        assert_every_step_once(&run, last);
    }
}

#[test]
fn repeated_interruptions_do_not_change_the_weights() {
    let sandbox = Sandbox::new();
    let expected = run_to_completion(&sandbox, "uninterrupted", tiny_bandit, &[]);
    let run = sandbox.path("stopped");
    let arguments = tiny_bandit(&run, &[]);
    for (times, step) in [1, 15, 30, 45].into_iter().enumerate() {
        let call = if times == 0 {
            arguments.clone()
        } else {
            resume(arguments.clone())
        };
        let mut running = sandbox.start(&call);
        running.until("a few steps", || reached(&run, step));
        running.terminate();
        running.wait().check(5, &[]);
    }
    sandbox.run(&resume(arguments)).succeeded();
    assert_eq!((digest(&run), losses(&run)), expected);
    assert_every_step_once(&run, 100);
}

#[test]
fn a_finished_run_can_be_resumed_with_more_steps() {
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    sandbox
        .run(&tiny_bandit(&run, &["learner.steps=5"]))
        .succeeded();
    assert_every_step_once(&run, 5);
    sandbox
        .run(&resume(tiny_bandit(&run, &["learner.steps=9"])))
        .succeeded();
    assert_every_step_once(&run, 9);
    assert_eq!(report(&run)["steps"], 9);
}

/// Four completions per prompt, of which a random pair is trained on if the judge is decided enough.
#[test]
fn selected_and_weighted_labels_are_the_same_after_an_interruption() {
    let sandbox = Sandbox::new();
    let selected: TinyRun = |run, sets| {
        let own = [
            "actor.num_generations=4",
            "actor.temperature=1.2",
            "learner.pair_selection=random",
            "learner.min_margin=0.05",
            "learner.off_policy=truncate",
        ];
        tiny_playground(run, &[&own, sets].concat())
    };
    let expected = run_to_completion(&sandbox, "uninterrupted", selected, &[]);
    let run = sandbox.path("stopped");
    let mut running = sandbox.start(&selected(&run, &[]));
    running.until("a third of the steps", || reached(&run, 4));
    running.terminate();
    running.wait().check(5, &[]).without_panic();
    sandbox.run(&resume(selected(&run, &[]))).succeeded();
    assert_eq!((digest(&run), losses(&run)), expected);
    let dropped = report(&run)["stages"]["learner"]["dropped"].clone();
    assert!(dropped["no_signal"].as_u64() > Some(0), "{dropped}");
    let ess = column(&run, "off_policy/ess");
    assert!(ess.iter().all(|ess| (0.0..0.999).contains(ess)), "{ess:?}");
    let others = ["learner.pair_selection=all", "learner.off_policy=none"];
    for (number, other) in others.into_iter().enumerate() {
        let name = format!("other-{number}");
        assert_ne!(
            run_to_completion(&sandbox, &name, selected, &[other]).0,
            expected.0
        );
    }
}

/// The second epoch's prompts are drawn by the signals of the first.
#[test]
fn a_curriculum_continues_where_it_was() {
    let sandbox = Sandbox::new();
    let model = sandbox.path("model");
    std::fs::create_dir_all(&model).expect("a folder");
    let bandit = playground::Bandit::new(&[0.5, 0.5]).expect("probabilities");
    bandit.write_model(&model).expect("a model");
    let prompts: String = (0..8)
        .map(|bits: u32| {
            let arms = (0..3).map(|bit| format!("arm{}", bits >> bit & 1));
            serde_json::json!({"prompt": arms.collect::<Vec<_>>().join(" ")}).to_string() + "\n"
        })
        .collect();
    let prompts = sandbox.write("prompts.jsonl", prompts);
    let train = |name: &str, more: &[&str], flags: &[&str]| {
        let sets = [
            format!("model.path={model:?}"),
            "prompts.kind=dataset".into(),
            format!("prompts.path={prompts:?}"),
            "prompts.held_out=1".into(),
            "preference.judge.kind=rule".into(),
            "preference.judge.rules=[{kind = \"keyword\", words = [\"arm0\"], weight = 1.0}]"
                .into(),
            "actor.max_new_tokens=3".into(),
            "actor.max_prompt_length=8".into(),
            "learner.steps=9".into(),
            "learner.train_batch_size=4".into(),
            "learner.max_staleness=0".into(),
            "learner.warmup_ratio=0".into(),
            "evaluation.prompts=1".into(),
            "telemetry.page=\"\"".into(),
        ];
        let run = sandbox.path(name);
        let (config, folder) = (config("default.toml"), run.display().to_string());
        let mut arguments = vec!["train".to_owned(), config.display().to_string()];
        arguments.extend(["--run-dir".to_owned(), folder]);
        let sets = sets
            .into_iter()
            .chain(more.iter().map(|&set| set.to_owned()));
        arguments.extend(sets.flat_map(|set| ["--set".to_owned(), set]));
        arguments.extend(flags.iter().map(|&flag| flag.to_owned()));
        sandbox.run(&arguments).succeeded();
        (digest(&run), losses(&run))
    };
    let signal = "prompts.curriculum=signal";
    let expected = train("uninterrupted", &[signal], &[]);
    train("resumed", &[signal, "learner.steps=4"], &[]);
    assert_eq!(train("resumed", &[signal], &["--resume"]), expected);
    let without = train("without", &[], &[]);
    assert_eq!(without.1[0], expected.1[0], "the first epoch is in order");
    assert_ne!(without.0, expected.0);
}
