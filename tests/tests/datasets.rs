//! Rows from files: several at once, in the forms of the field, with what is left out counted.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

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

/// The folder of cases that people met, each with a README that says what is right.
fn cases(test: &str) -> Option<PathBuf> {
    shared(test, "data/cases")
}

/// `agon COMMAND` with the cases' configuration of a model with a chat template.
fn agon(workplace: &Workplace, cases: &Path, command: &[&str], sets: &[String]) -> Ended {
    let mut words = vec![command[0].to_owned()];
    words.push(cases.join("A02/prompts.toml").display().to_string());
    words.extend(command[1..].iter().map(|word| (*word).to_owned()));
    let model = format!("model.path={:?}", cases.join("A02/chat-bos"));
    for set in std::iter::once(&model).chain(sets) {
        words.extend(["--set".into(), set.clone()]);
    }
    workplace.run(&words)
}

/// The prompts of a run of one step on these rows.
fn prompts_of(workplace: &Workplace, cases: &Path, run: &str, sets: &[String]) -> BTreeSet<String> {
    let command = ["train", "--run-dir", run];
    agon(workplace, cases, &command, sets).succeeded();
    let text = fs::read_to_string(workplace.path(run).join("samples.jsonl")).expect("samples");
    let prompt = |line: &str| {
        let row: Value = serde_json::from_str(line).expect("a line is JSON");
        row["prompt"].as_str().expect("a prompt").to_owned()
    };
    text.lines().map(prompt).collect()
}

/// The loss of one step of fine-tuning on these rows.
fn loss_of(workplace: &Workplace, cases: &Path, rows: &str) -> f64 {
    let output = workplace
        .path(&rows.replace('/', "-"))
        .display()
        .to_string();
    let sets = [
        format!("sft.path={:?}", cases.join(rows)),
        "sft.steps=1".into(),
        "sft.train_batch_size=8".into(),
    ];
    let said = agon(workplace, cases, &["sft", "--output", &output], &sets)
        .succeeded()
        .err;
    let (_, loss) = said.rsplit_once("loss=").expect("a loss is logged");
    let number = loss.split_whitespace().next().expect("a number");
    number
        .parse()
        .unwrap_or_else(|e| panic!("{e}: {number:?} in {said}"))
}

#[test]
fn dialogues_beside_a_text_prompt_are_the_prompt() {
    let Some(cases) = cases("dialogues_beside_a_text_prompt_are_the_prompt") else {
        return;
    };
    let workplace = Workplace::new();
    // As trl.data_utils.maybe_extract_prompt makes of the one what the other is: 3.98036. Bare text: 4.07527.
    let messages = loss_of(&workplace, &cases, "A02/sft-uf-asmsgs.jsonl");
    assert!((messages - 3.98036).abs() < 2e-3, "{messages}");
    let dialogues = loss_of(&workplace, &cases, "A02/sft-uf.jsonl");
    assert!(
        (dialogues - messages).abs() < 1e-6,
        "{dialogues} and {messages}"
    );
    let text = loss_of(&workplace, &cases, "A02/sft-uf-astext.jsonl");
    assert!((text - messages).abs() > 0.05, "{text} and {messages}");
}

#[test]
fn what_is_odd_about_rows_is_said() {
    let Some(cases) = cases("what_is_odd_about_rows_is_said") else {
        return;
    };
    let workplace = Workplace::new();
    let rows = [
        r#"{"prompt": "Once", "completion": " upon"}"#,
        r#"{"prompt": "Once", "completion": " "}"#,
        r#"{"prompt": "Who?", "system": "Be brief.", "completion": "Lily"}"#,
    ];
    fs::create_dir(workplace.path("rows")).expect("a folder");
    workplace.write("rows/a.jsonl", rows.join("\n"));
    workplace.write("rows/b.csv", "prompt\nOnce\n");
    workplace.write("empty.jsonl", rows[1]);
    let tune = |rows: &str| {
        let sets = [
            format!("sft.path={:?}", workplace.path(rows)),
            "sft.steps=1".into(),
            "sft.train_batch_size=2".into(),
        ];
        let output = workplace.path(&format!("tuned-{rows}"));
        let command = ["sft", "--output", &output.display().to_string()];
        agon(&workplace, &cases, &command, &sets)
    };
    let said = tune("rows").err;
    for part in [
        "examples were left out: their answers are empty",
        "2 rows are text, the first at line 1, and 1 are dialogues, the first at line 3",
        "passed_over=\"b.csv\"",
    ] {
        assert!(said.contains(part), "no {part:?} in {said}");
    }
    tune("empty.jsonl").check(
        3,
        &["all of its 1 answers are empty", "sft.completion_column"],
    );
}

#[test]
fn no_answer_stands_in_a_prompt() {
    let Some(cases) = cases("no_answer_stands_in_a_prompt") else {
        return;
    };
    let workplace = Workplace::new();
    let runs = [
        ("A08/msgs.jsonl", "messages"),
        ("A08/msgs.jsonl", "prompt"),
        ("A08/uf-prompts.jsonl", "messages"),
        ("A08/uf-prompts.jsonl", "prompt"),
        ("A08/convs.jsonl", "conversations"),
        ("A28/convs.jsonl", "prompt"),
    ];
    for (index, (rows, column)) in runs.into_iter().enumerate() {
        let sets = [
            format!("prompts.path={:?}", cases.join(rows)),
            format!("prompts.prompt_column={column}"),
        ];
        let prompts = prompts_of(&workplace, &cases, &format!("run-{index}"), &sets);
        for prompt in prompts {
            assert!(
                prompt.starts_with("[user] hi ") && prompt.ends_with("\n[assistant]"),
                "{prompt:?} of {rows} by {column}"
            );
            assert_eq!(prompt.matches("[assistant]").count(), 1, "{prompt:?}");
        }
    }
}

#[test]
fn pairs_that_teach_nothing_are_refused_or_counted() {
    let Some(cases) = cases("pairs_that_teach_nothing_are_refused_or_counted") else {
        return;
    };
    let workplace = Workplace::new();
    let fit = |rows: &str, run: &str| {
        let sets = [
            "preference.fit.pairs.kind=dataset".into(),
            format!("preference.fit.pairs.path={:?}", cases.join(rows)),
            "preference.fit.train_batch_size=8".into(),
        ];
        agon(
            &workplace,
            &cases,
            &["fit-preference", "--run-dir", run],
            &sets,
        )
    };
    for (rows, says) in [
        (
            "A15/pf-lastuser.jsonl",
            "pf-lastuser.jsonl, line 1: column \"chosen\": the last turn is the user's",
        ),
        (
            "A30/pf-noassistant.jsonl",
            "line 1: column \"chosen\": the last turn is the user's",
        ),
        (
            "A27/pf-allsame.jsonl",
            "0 pairs are left of 40: 40 with two equal responses",
        ),
    ] {
        fit(rows, "refused").check(3, &[says]).without_panic();
    }

    let said = fit("A27/pf-same.jsonl", "same").succeeded();
    assert!(
        said.out.contains("left out: 20 with two equal responses"),
        "{}",
        said.out
    );
    // Ten prompts, four times each: the pairs of one of them are held out, all four.
    let said = fit("A27/pf-dup.jsonl", "dup").succeeded();
    assert!(said.out.contains("Fitted to 36 pairs"), "{}", said.out);
    assert!(
        said.out.contains("27 repeat an earlier one"),
        "{}",
        said.out
    );
    assert!(said.out.contains("| on 4 held-out pairs"), "{}", said.out);

    // As examples they are read by the same reader, in less time.
    for rows in [
        "A28/pf-sharegpt-tool.jsonl",
        "A28/pf-orca.jsonl",
        "A28/pf-alpaca.jsonl",
        "A02/pf-uf.parquet",
    ] {
        assert!(loss_of(&workplace, &cases, rows).is_finite());
    }
}

#[test]
fn files_are_read_as_people_have_them() {
    let Some(cases) = cases("files_are_read_as_people_have_them") else {
        return;
    };
    let workplace = Workplace::new();
    let path = |rows: &str| [format!("prompts.path={:?}", cases.join(rows))];
    let read = [
        "A19/bom.json",
        "A19/bom.jsonl",
        "A20/nan.jsonl",
        "A21/wrapped-dict.json",
        "A30/misnamed.jsonl",
        "A31/pqdir",
        "A31/pqdir/train-*.parquet",
    ];
    for (index, rows) in read.into_iter().enumerate() {
        let prompts = prompts_of(&workplace, &cases, &format!("run-{index}"), &path(rows));
        assert!(!prompts.is_empty(), "{rows}");
    }
    for (rows, says) in [
        (
            "A21/trailing.json",
            "trailing.json, line 3, column 1: not JSON: trailing comma",
        ),
        (
            "A30/nullrow.parquet",
            "the value of column \"prompt\" is null",
        ),
        (
            "A30/enc-brotli.parquet",
            "compressed by brotli, which is not built in: write it with",
        ),
        ("A31/*.parquet", "no file matches the glob"),
    ] {
        agon(
            &workplace,
            &cases,
            &["train", "--run-dir", "refused"],
            &path(rows),
        )
        .check(3, &[says])
        .without_panic();
    }
    let model = cases.join("A02/chat-bos").display().to_string();
    let ids = cases.join("A19/ids-bom.jsonl").display().to_string();
    workplace
        .run(&["score", "--model", &model, "--input", &ids])
        .succeeded();
}
