//! The adversarial game inside a run: rounds are played at their steps, each leaves a model that judges from
//! then on, and a run that is stopped goes on with the judge it had.

use std::{fs, path::Path};

use house::{Workplace, number, report, steps, tiny_playground};
use serde_json::Value;

/// Two rounds of a small game, after steps 4 and 8 of 12.
const GAME: [&str; 12] = [
    "preference.judge.kind=bradley-terry",
    "preference.fit.pairs.count=60",
    "preference.fit.train_batch_size=16",
    "preference.apo.refresh_steps=4",
    "preference.apo.prompts=6",
    "preference.apo.samples=3",
    "preference.apo.wait=true",
    "preference.apo.min_accuracy=0",
    "preference.apo.max_ece=1",
    "learner.label=hard",
    "learner.save_steps=1",
    "telemetry.samples_per_step=8",
];

fn game(workplace: &Workplace, name: &str, sets: &[&str]) -> Vec<String> {
    tiny_playground(&workplace.path(name), &[&GAME, sets].concat())
}

fn rounds(run: &Path) -> Vec<Value> {
    let rounds = report(run)["rounds"].as_array().cloned();
    rounds.expect("a report has rounds")
}

/// Of every trained pair in `samples.jsonl`, its step and the version of the judge that labelled it.
fn judges(run: &Path) -> Vec<(u64, u64)> {
    let text = fs::read_to_string(run.join("samples.jsonl")).expect("a run has samples");
    let of = |line: &str| {
        let row: Value = serde_json::from_str(line).expect("a line is JSON");
        let number = |key: &str| {
            row[key]
                .as_u64()
                .unwrap_or_else(|| panic!("no {key} in {row}"))
        };
        (number("step"), number("judge_version"))
    };
    text.lines().map(of).collect()
}

#[test]
fn rounds_are_played_at_their_steps_and_their_models_judge() {
    let workplace = Workplace::new();
    workplace.run(&game(&workplace, "run", &[])).succeeded();
    let run = workplace.path("run");
    let rounds = rounds(&run);
    let of = |key: &str| rounds.iter().map(|r| r[key].as_u64()).collect::<Vec<_>>();
    assert_eq!(
        (of("round"), of("step")),
        (vec![Some(1), Some(2)], vec![Some(4), Some(8)])
    );
    assert_eq!(of("pairs"), [Some(18), Some(18)]);
    for round in &rounds {
        assert_eq!(round["refused"], Value::Null);
        let accuracy = number(round, "/policy/after/accuracy");
        assert!((0.0..=1.0).contains(&accuracy), "{round:#}");
    }
    for round in 1..=2 {
        let config = run.join(format!("preference/round_{round}/config.json"));
        let config = fs::read_to_string(&config).unwrap_or_else(|e| panic!("{config:?}: {e}"));
        assert!(config.contains("AgonLlamaRewardModel"), "{config}");
    }
    let judges = judges(&run);
    assert!(judges.len() >= 12, "{judges:?}");
    for (step, version) in judges {
        assert_eq!(version, 1 + (step - 1) / 4, "step {step}");
    }
    let books = &report(&run)["stations"];
    for station in ["actor", "preference", "learner"] {
        assert_eq!(books[station]["conserved"], true, "{books:#}");
        assert_eq!(number(books, &format!("/{station}/in_hand")), 0.0);
    }
}

#[test]
fn a_game_that_is_stopped_goes_on_with_the_judge_it_had() {
    goes_on_after_a_stop(&Workplace::new(), &[]);
}

#[test]
fn a_game_of_adapters_beside_one_trunk_goes_on_too() {
    let workplace = Workplace::new();
    let beside = [
        "model.lora_rank=4",
        "preference.fit.lora_rank=2",
        "preference.fit.lora_dropout=0.1",
    ];
    goes_on_after_a_stop(&workplace, &beside);
    let round = workplace.path("stopped/preference/round_2");
    assert!(!round.join("model.safetensors").exists());
    let config = fs::read_to_string(round.join("adapter_config.json")).expect("PEFT's file");
    assert!(config.contains("SEQ_CLS"), "{config}");
    // It finds its base.
    let rows = workplace.write("rows.jsonl", "{\"ids\": [3, 4, 5, 6]}\n");
    let [round, rows] = [round, rows].map(|path| path.display().to_string());
    let score = ["score", "--reward", "--model", &round, "--input", &rows];
    let answers = workplace.run(&score).succeeded().json_lines();
    assert!(
        answers[0]["score"].as_f64().is_some_and(f64::is_finite),
        "{answers:?}"
    );
    // It is no policy.
    let score = ["score", "--model", &round, "--input", &rows];
    let says = ["is a reward model", "--reward"];
    workplace.run(&score).check(2, &says).without_panic();
}

/// Plays a game with these settings to its end, and once more with a stop in between.
fn goes_on_after_a_stop(workplace: &Workplace, sets: &[&str]) {
    workplace.run(&game(workplace, "whole", sets)).succeeded();
    let arguments = game(workplace, "stopped", sets);
    let run = workplace.path("stopped");
    let mut running = workplace.start(&arguments);
    running.until("step 5", || {
        let last = steps(&run).last()?["step"].as_u64()?;
        (last >= 5).then_some(())
    });
    running.terminate();
    running.wait().check(5, &[]);
    let resumed = [arguments, vec!["--resume".to_owned()]].concat();
    workplace.run(&resumed).succeeded();
    let whole = workplace.path("whole");
    assert_eq!(
        report(&run)["weights_digest"],
        report(&whole)["weights_digest"]
    );
    let at = |run: &Path| {
        let rounds = rounds(run);
        rounds
            .iter()
            .map(|r| (r["round"].clone(), r["step"].clone()))
            .collect::<Vec<_>>()
    };
    assert_eq!(at(&run), at(&whole), "no round is played twice");
}

#[test]
fn a_model_beyond_its_bounds_is_refused_and_the_first_one_judges_on() {
    let workplace = Workplace::new();
    let strict = ["preference.apo.min_accuracy=1", "preference.apo.max_ece=0"];
    workplace.run(&game(&workplace, "run", &strict)).succeeded();
    let run = workplace.path("run");
    for round in rounds(&run) {
        let refused = round["refused"].as_str().unwrap_or_default();
        assert!(refused.contains("held-out pairs"), "{round:#}");
    }
    assert!(judges(&run).iter().all(|&(_, version)| version == 1));
}
