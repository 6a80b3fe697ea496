//! A reference that moves and the average of the policy's weights: evaluated, exported, resumed to the bit, and the same
//! over JetStream and in memory.

use std::path::Path;

use serde_json::{Value, json};
use system_tests::{
    Sandbox, has_nats_server, metrics, number, report, steps, tiny_adapted, tiny_bandit,
    tiny_playground,
};

/// Arguments of one of the tiny runs.
type TinyRun = fn(&Path, &[&str]) -> Vec<String>;

const AVERAGE: &str = "learner.ema_decay=0.8";
const EVERY: [&str; 2] = ["reference.kind=every", "reference.every_steps=5"];
const EMA: [&str; 2] = ["reference.kind=ema", "reference.decay=0.7"];

/// What a run computed: its weights, losses and evaluations, those of the average and of the current reference
/// included.
fn outcome(run: &Path) -> Value {
    let report = report(run);
    let losses: Vec<Value> = steps(run).iter().map(|line| line["loss"].clone()).collect();
    json!([report["weights_digest"], losses, report["evaluations"]])
}

/// Asserts that the last evaluation of a run has all comparisons, by their names.
#[track_caller]
fn assert_evaluated(run: &Path, reference_version: u64) {
    let report = report(run);
    let last = &report["evaluations"][report["evaluations"].as_array().map_or(0, Vec::len) - 1];
    assert_eq!(last["reference_version"], reference_version, "{last:#}");
    for comparison in ["average", "current_reference"] {
        let rate = number(last, &format!("/{comparison}/win_rate/mean"));
        assert!((0.0..=1.0).contains(&rate), "{last:#}");
        assert_eq!(last[comparison]["prompts"], last["prompts"], "{last:#}");
        assert_eq!(report[comparison], last[comparison]);
    }
    if report["judge"]["kind"] == "matrix" {
        // The policy's distance from where it began, and from the reference that follows it, but is not itself.
        let (start, current) = (number(last, "/kl"), number(last, "/current_reference/kl"));
        assert!(start > 2.0 * current, "{start} {current}");
        assert!(current != 0.0, "the policy was compared with itself");
    }
    let lines = metrics(run);
    let line = lines.iter().rev().find(|line| !line["eval/kl"].is_null());
    let line = line.expect("an evaluation");
    for name in [
        "average_win_rate",
        "average_kl",
        "current_reference_win_rate",
    ] {
        number(line, &format!("/eval~1{name}"));
    }
    let text = std::fs::read_to_string(run.join("report.md")).expect("a report");
    for part in [
        "the reference of the start",
        "The moving average of its weights (learner.ema_decay = 0.8)",
        &format!("the current reference, of step {reference_version}"),
    ] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
}

#[test]
fn an_interrupted_run_continues_with_its_reference_and_its_average() {
    let sandbox = Sandbox::new();
    let runs: [(TinyRun, u64, [&str; 2], u64); 3] = [
        // It is copied at the last step too, after which it is the policy.
        (tiny_bandit, 100, EVERY, 95),
        (tiny_playground, 12, EMA, 12),
        (tiny_adapted, 12, EVERY, 10),
    ];
    for (number, (tiny_run, last, rule, version)) in runs.into_iter().enumerate() {
        let more = [
            AVERAGE,
            "actor.mixture_coef=0.25",
            "evaluation.eval_steps=4",
        ];
        let sets = [&more[..], &rule].concat();
        let whole = sandbox.path(&format!("whole-{number}"));
        sandbox.run(&tiny_run(&whole, &sets)).succeeded();
        assert_evaluated(&whole, version);

        let run = sandbox.path(&format!("stopped-{number}"));
        let mut arguments = tiny_run(&run, &sets);
        let mut running = sandbox.start(&arguments);
        running.until("half of the steps", || {
            let reached = steps(&run).last()?["step"].as_u64()?;
            (reached >= last / 2).then_some(())
        });
        running.terminate();
        running.wait().check(5, &["interrupted; saved"]);
        arguments.push("--resume".into());
        sandbox.run(&arguments).succeeded();
        assert_eq!(outcome(&run), outcome(&whole), "{rule:?}");
    }
}

#[test]
fn actors_get_the_reference_and_the_average_over_jetstream_too() {
    if !has_nats_server() {
        return;
    }
    let sandbox = Sandbox::new();
    let (memory, jetstream) = (sandbox.path("memory"), sandbox.path("jetstream"));
    let sets = [&[AVERAGE, "actor.mixture_coef=0.25"], &EMA[..]].concat();
    sandbox.run(&tiny_bandit(&memory, &sets)).succeeded();
    let over = [
        "run.name=moving",
        "transport.kind=jetstream",
        "transport.lease_seconds=2",
        "transport.timeout_seconds=60",
        "transport.weights=delta",
    ];
    let sets = [&sets[..], &over].concat();
    sandbox.run(&tiny_bandit(&jetstream, &sets)).succeeded();
    assert_eq!(outcome(&memory), outcome(&jetstream));
    assert_evaluated(&jetstream, 100);
}

#[test]
fn the_average_is_exported_and_compared() {
    let sandbox = Sandbox::new();
    let run = sandbox.path("run");
    sandbox.run(&tiny_playground(&run, &[AVERAGE])).succeeded();
    let report = report(&run);
    assert_eq!(report["reference_version"], Value::Null);
    assert_eq!(report["current_reference"], Value::Null);
    number(&report, "/average/win_rate/mean");
    let run = run.display().to_string();
    let output = |name: &str, more: &[&str]| {
        let folder = sandbox.path(name).display().to_string();
        let arguments = [&["export", "--run", &run, "--output", &folder], more].concat();
        sandbox.run(&arguments).succeeded().stdout
    };
    let digest = |text: &str| text.split(' ').next().map(str::to_owned);
    let (last, average) = (output("last", &[]), output("average", &["--average"]));
    assert_ne!(digest(&last), digest(&average));
    let average = sandbox.path("average").display().to_string();
    let compared = sandbox.run(&["eval", "--json", &run, &average, "--average"]);
    let row = compared.succeeded().json_lines().remove(0);
    assert_eq!(row["average"], true, "{row:#}");
    let refused = sandbox.run(&["eval", "--json", &average, &run, "--average"]);
    refused
        .check(2, &["holds no moving average", "learner.ema_decay"])
        .without_panic();
}
