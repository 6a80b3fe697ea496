//! Prompts from files: several at once, in the forms of the field, with what is left out counted.

use std::{collections::BTreeMap, fmt::Write as _, fs, path::Path};

use house::{Ended, Workplace, config, shared};
use serde_json::Value;

/// `agon train` for a few steps on a small real model, with these prompts; every pair is written down.
fn train(workplace: &Workplace, model: &Path, run: &Path, sets: &[String]) -> Ended {
    let own = [
        format!("model.path={model:?}"),
        "prompts.kind=dataset".into(),
        "actor.max_prompt_length=24".into(),
        "actor.max_new_tokens=4".into(),
        "preference.judge.kind=rule".into(),
        "preference.judge.rules=[{ kind = \"length\", min = 1, max = 2, weight = 1.0 }]".into(),
        "learner.steps=6".into(),
        "learner.train_batch_size=16".into(),
        "learner.learning_rate=1e-6".into(),
        "evaluation.prompts=4".into(),
        "evaluation.eval_steps=0".into(),
        "telemetry.samples_per_step=16".into(),
    ];
    let mut words = vec![
        "train".to_owned(),
        config("default.toml").display().to_string(),
        "--run-dir".into(),
        run.display().to_string(),
    ];
    for set in own.iter().chain(sets) {
        words.extend(["--set".into(), set.clone()]);
    }
    workplace.run(&words)
}

/// How often each prompt was trained on, by its first word.
fn asked(run: &Path) -> BTreeMap<String, usize> {
    let text = fs::read_to_string(run.join("samples.jsonl")).expect("a run has samples");
    let mut asked = BTreeMap::new();
    for line in text.lines() {
        let row: Value = serde_json::from_str(line).expect("a line is JSON");
        if row["purpose"] == "train" {
            let prompt = row["prompt"].as_str().expect("a prompt");
            let word = prompt.split_whitespace().next().unwrap_or_default();
            *asked.entry(word.to_owned()).or_default() += 1;
        }
    }
    asked
}

#[test]
fn files_are_mixed_by_weight_and_what_is_left_out_is_counted() {
    let test = "files_are_mixed_by_weight";
    let Some(model) = shared(test, "data/models/stories260K") else {
        return;
    };
    let workplace = Workplace::new();
    let rows = |word: &str, count: usize| {
        (0..count).fold(String::new(), |mut rows, index| {
            writeln!(rows, "{{\"prompt\": \"{word} number {index} was\"}}").expect("a text");
            rows
        })
    };
    let long = "word ".repeat(60);
    let many = workplace.write(
        "many.jsonl",
        rows("Tom", 40) + &rows("Tom", 5) + &format!("{{\"prompt\": \"{long}\"}}\n"),
    );
    let few = workplace.write("few.jsonl", rows("Lily", 12));
    let mix = format!("prompts.mix=[{{ path = {many:?}, weight = 3.0 }}, {{ path = {few:?} }}]");
    let sets = |more: &[&str]| {
        let more = more.iter().map(|set| (*set).to_owned());
        [mix.clone(), "prompts.held_out=8".into()]
            .into_iter()
            .chain(more)
            .collect::<Vec<_>>()
    };
    let refused = train(&workplace, &model, &workplace.path("refused"), &sets(&[]));
    refused
        .check(3, &["many.jsonl, line 46", "too_long = \"drop\""])
        .without_panic();

    let run = workplace.path("run");
    let dropping = sets(&["prompts.too_long=drop", "prompts.min_length=3"]);
    let said = train(&workplace, &model, &run, &dropping).succeeded().err;
    for part in [
        "prompts were left out",
        "kept=40",
        "duplicates=5",
        "too_long=1",
    ] {
        assert!(said.contains(part), "no {part:?} in {said}");
    }
    let asked = asked(&run);
    let (tom, lily) = (asked["Tom"], asked["Lily"]);
    assert_eq!(tom + lily, 96, "{asked:?}");
    // Three to one: 72 and 24 of 96, with a deviation of 4.
    assert!((12..=36).contains(&lily), "{asked:?}");
}

#[test]
fn mixes_that_say_nothing_are_refused() {
    let test = "mixes_that_say_nothing_are_refused";
    let Some(model) = shared(test, "data/models/stories260K") else {
        return;
    };
    let workplace = Workplace::new();
    let rows = workplace.write("rows.jsonl", "{\"prompt\": \"a\"}\n{\"prompt\": \"b\"}\n");
    let cases = [
        (
            vec![format!("prompts.mix=[{{ path = {rows:?}, weight = 0.0 }}]")],
            2,
            "prompts.mix",
        ),
        (
            vec![
                format!("prompts.path={rows:?}"),
                format!("prompts.mix=[{{ path = {rows:?} }}]"),
            ],
            2,
            "not both",
        ),
        (
            vec![format!("prompts.mix=[{{ path = {rows:?}, wieght = 1.0 }}]")],
            2,
            "wieght",
        ),
        (
            vec![format!("prompts.path={rows:?}")],
            3,
            "prompts.held_out = 128",
        ),
        (
            vec![
                format!("prompts.path={rows:?}"),
                "prompts.min_length=9".into(),
            ],
            3,
            "2 are too short",
        ),
    ];
    for (sets, code, says) in cases {
        let run = workplace.path("run");
        train(&workplace, &model, &run, &sets)
            .check(code, &[says])
            .without_panic();
    }
}
