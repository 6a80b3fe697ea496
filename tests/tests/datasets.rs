//! Datasets: mixes of files, common file formats and conversation formats, and reports of omitted rows.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use system_tests::{ProcessOutput, Sandbox, config, make_pipe, shared};

/// Runs `agon train` for a few steps on a small model with these prompt settings; every pair is logged as a sample.
fn train(sandbox: &Sandbox, model: &Path, run: &Path, sets: &[String]) -> ProcessOutput {
    let base = [
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
    let mut arguments = vec![
        "train".to_owned(),
        config("default.toml").display().to_string(),
        "--run-dir".into(),
        run.display().to_string(),
    ];
    for set in base.iter().chain(sets) {
        arguments.extend(["--set".into(), set.clone()]);
    }
    sandbox.run(&arguments)
}

/// Number of training pairs by the first word of their prompt.
fn prompt_counts(run: &Path) -> BTreeMap<String, usize> {
    let text = fs::read_to_string(run.join("samples.jsonl")).expect("a run has samples");
    let mut counts = BTreeMap::new();
    for line in text.lines() {
        let row: Value = serde_json::from_str(line).expect("a line is JSON");
        if row["purpose"] == "train" {
            let prompt = row["prompt"].as_str().expect("a prompt");
            let word = prompt.split_whitespace().next().unwrap_or_default();
            *counts.entry(word.to_owned()).or_default() += 1;
        }
    }
    counts
}

#[test]
fn files_are_mixed_by_weight_and_omitted_rows_are_counted() {
    let test = "files_are_mixed_by_weight_and_omitted_rows_are_counted";
    let Some(model) = shared(test, "data/models/stories260K") else {
        return;
    };
    let sandbox = Sandbox::new();
    let rows = |word: &str, count: usize| {
        (0..count).fold(String::new(), |mut rows, index| {
            writeln!(rows, "{{\"prompt\": \"{word} number {index} was\"}}").expect("a text");
            rows
        })
    };
    let long = "word ".repeat(60);
    let many = sandbox.write(
        "many.jsonl",
        rows("Tom", 40) + &rows("Tom", 5) + &format!("{{\"prompt\": \"{long}\"}}\n"),
    );
    let few = sandbox.write("few.jsonl", rows("Lily", 12));
    let mix = format!("prompts.mix=[{{ path = {many:?}, weight = 3.0 }}, {{ path = {few:?} }}]");
    let sets = |more: &[&str]| {
        let more = more.iter().map(|set| (*set).to_owned());
        [mix.clone(), "prompts.held_out=8".into()]
            .into_iter()
            .chain(more)
            .collect::<Vec<_>>()
    };
    let rejected = train(&sandbox, &model, &sandbox.path("refused"), &sets(&[]));
    rejected
        .check(3, &["many.jsonl, line 46", "too_long = \"drop\""])
        .without_panic();

    let run = sandbox.path("run");
    let dropping = sets(&["prompts.too_long=drop", "prompts.min_length=3"]);
    let log = train(&sandbox, &model, &run, &dropping).succeeded().stderr;
    for part in [
        "prompts were left out",
        "kept=40",
        "duplicates=5",
        "too_long=1",
    ] {
        assert!(log.contains(part), "no {part:?} in {log}");
    }
    let counts = prompt_counts(&run);
    let (tom, lily) = (counts["Tom"], counts["Lily"]);
    assert_eq!(tom + lily, 96, "{counts:?}");
    // Weights 3 : 1 give 72 and 24 of 96, with a standard deviation of 4.
    assert!((12..=36).contains(&lily), "{counts:?}");
}

#[test]
fn invalid_mixes_are_rejected() {
    let test = "invalid_mixes_are_rejected";
    let Some(model) = shared(test, "data/models/stories260K") else {
        return;
    };
    let sandbox = Sandbox::new();
    let rows = sandbox.write("rows.jsonl", "{\"prompt\": \"a\"}\n{\"prompt\": \"b\"}\n");
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
        let run = sandbox.path("run");
        train(&sandbox, &model, &run, &sets)
            .check(code, &[says])
            .without_panic();
    }
}

/// Folder of real-world cases, each with a README that states the expected behaviour.
fn cases(test: &str) -> Option<PathBuf> {
    shared(test, "data/cases")
}

/// Runs `agon COMMAND` with the configuration of a chat model from the cases.
fn agon(sandbox: &Sandbox, cases: &Path, command: &[&str], sets: &[String]) -> ProcessOutput {
    let mut arguments = vec![command[0].to_owned()];
    arguments.push(cases.join("A02/prompts.toml").display().to_string());
    arguments.extend(command[1..].iter().map(|argument| (*argument).to_owned()));
    let model = format!("model.path={:?}", cases.join("A02/chat-bos"));
    for set in std::iter::once(&model).chain(sets) {
        arguments.extend(["--set".into(), set.clone()]);
    }
    sandbox.run(&arguments)
}

/// Prompts of a one-step run with these settings.
fn prompts_of(sandbox: &Sandbox, cases: &Path, run: &str, sets: &[String]) -> BTreeSet<String> {
    let command = ["train", "--run-dir", run];
    agon(sandbox, cases, &command, sets).succeeded();
    let text = fs::read_to_string(sandbox.path(run).join("samples.jsonl")).expect("samples");
    let prompt = |line: &str| {
        let row: Value = serde_json::from_str(line).expect("a line is JSON");
        row["prompt"].as_str().expect("a prompt").to_owned()
    };
    text.lines().map(prompt).collect()
}

/// Loss of one step of supervised fine-tuning on these rows.
fn loss_of(sandbox: &Sandbox, cases: &Path, rows: &str) -> f64 {
    let output = sandbox.path(&rows.replace('/', "-")).display().to_string();
    let sets = [
        format!("sft.path={:?}", cases.join(rows)),
        "sft.steps=1".into(),
        "sft.train_batch_size=8".into(),
    ];
    let log = agon(sandbox, cases, &["sft", "--output", &output], &sets)
        .succeeded()
        .stderr;
    let (_, loss) = log.rsplit_once("loss=").expect("a loss is logged");
    let number = loss.split_whitespace().next().expect("a number");
    number
        .parse()
        .unwrap_or_else(|e| panic!("{e}: {number:?} in {log}"))
}

#[test]
fn message_columns_take_precedence_over_a_text_prompt() {
    let Some(cases) = cases("message_columns_take_precedence_over_a_text_prompt") else {
        return;
    };
    let sandbox = Sandbox::new();
    // trl.data_utils.maybe_extract_prompt converts one form to the other: loss 3.98036. Plain text: 4.07527.
    let messages = loss_of(&sandbox, &cases, "A02/sft-uf-asmsgs.jsonl");
    assert!((messages - 3.98036).abs() < 2e-3, "{messages}");
    let dialogues = loss_of(&sandbox, &cases, "A02/sft-uf.jsonl");
    assert!(
        (dialogues - messages).abs() < 1e-6,
        "{dialogues} and {messages}"
    );
    let text = loss_of(&sandbox, &cases, "A02/sft-uf-astext.jsonl");
    assert!((text - messages).abs() > 0.05, "{text} and {messages}");
}

#[test]
fn texts_of_a_human_and_an_assistant_are_dialogues_with_chat() {
    let Some(cases) = cases("texts_of_a_human_and_an_assistant_are_dialogues_with_chat") else {
        return;
    };
    let sandbox = Sandbox::new();
    let (mut texts, mut messages) = (String::new(), String::new());
    for index in 0..12 {
        let hh = |answer: &str| format!("\n\nHuman: question {index}\n\nAssistant: {answer}");
        writeln!(
            texts,
            "{}",
            json!({"chosen": hh("yes"), "rejected": hh("no")})
        )
        .expect("a row");
        let row = json!({
            "prompt": [{"role": "user", "content": format!("question {index}")}],
            "chosen": [{"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        });
        writeln!(messages, "{row}").expect("a row");
    }
    let parted = "\n\nHuman: question\n\nAssistant: yes\n\nHuman: sure?\n\nAssistant: yes";
    let parted = json!({"chosen": parted, "rejected": "\n\nHuman: question\n\nAssistant: no"});
    let texts = sandbox.write("texts.jsonl", format!("{texts}{parted}\n"));
    let messages = sandbox.write("messages.jsonl", messages);
    let fit = |pairs: &Path, run: &str, chat: bool| {
        let sets = [
            "preference.fit.pairs.kind=dataset".into(),
            format!("preference.fit.pairs.path={pairs:?}"),
            format!("preference.fit.pairs.chat={chat}"),
            "preference.fit.train_batch_size=8".into(),
        ];
        let command = ["fit-preference", "--run-dir", run];
        agon(&sandbox, &cases, &command, &sets).succeeded()
    };
    // The same models to the last bit, from the same tokens.
    let weights = |run: &str| fs::read(sandbox.path(run).join("model/model.safetensors"));
    let read_as_messages = fit(&messages, "messages", false);
    let read_as_turns = fit(&texts, "turns", true);
    assert_eq!(
        weights("messages").expect("a model"),
        weights("turns").expect("a model")
    );
    let left_out = "left out: 1 with further turns in a response";
    assert!(
        read_as_turns.stdout.contains(left_out),
        "{}",
        read_as_turns.stdout
    );
    // Continued as they stand, with a warning.
    let warning = "with preference.fit.pairs.chat = true they are dialogues";
    let read_as_text = fit(&texts, "text", false);
    assert!(
        read_as_text.stderr.contains(warning),
        "{}",
        read_as_text.stderr
    );
    assert_ne!(
        weights("messages").expect("a model"),
        weights("text").expect("a model")
    );
    for fitted in [read_as_messages, read_as_turns] {
        assert!(!fitted.stderr.contains(warning), "{}", fitted.stderr);
    }
    let sets = [
        format!("prompts.path={texts:?}"),
        "prompts.chat=true".into(),
    ];
    for prompt in prompts_of(&sandbox, &cases, "run", &sets) {
        assert!(prompt.starts_with("[user] question"), "{prompt:?}");
        assert!(prompt.ends_with("\n[assistant]"), "{prompt:?}");
    }
}

#[test]
fn irregular_rows_are_reported() {
    let Some(cases) = cases("irregular_rows_are_reported") else {
        return;
    };
    let sandbox = Sandbox::new();
    let rows = [
        r#"{"prompt": "Once", "completion": " upon"}"#,
        r#"{"prompt": "Once", "completion": " "}"#,
        r#"{"prompt": "Who?", "system": "Be brief.", "completion": "Lily"}"#,
    ];
    fs::create_dir(sandbox.path("rows")).expect("a folder");
    sandbox.write("rows/a.jsonl", rows.join("\n"));
    sandbox.write("rows/b.csv", "prompt\nOnce\n");
    sandbox.write("empty.jsonl", rows[1]);
    let tune = |rows: &str| {
        let sets = [
            format!("sft.path={:?}", sandbox.path(rows)),
            "sft.steps=1".into(),
            "sft.train_batch_size=2".into(),
        ];
        let output = sandbox.path(&format!("tuned-{rows}"));
        let command = ["sft", "--output", &output.display().to_string()];
        agon(&sandbox, &cases, &command, &sets)
    };
    let log = tune("rows").stderr;
    for part in [
        "examples were left out: their answers are empty",
        "2 rows are text, the first at line 1, and 1 are dialogues, the first at line 3",
        "skipped=\"b.csv\"",
    ] {
        assert!(log.contains(part), "no {part:?} in {log}");
    }
    tune("empty.jsonl").check(
        3,
        &["all of its 1 answers are empty", "sft.completion_column"],
    );
}

#[test]
fn prompts_do_not_contain_the_answer() {
    let Some(cases) = cases("prompts_do_not_contain_the_answer") else {
        return;
    };
    let sandbox = Sandbox::new();
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
        let prompts = prompts_of(&sandbox, &cases, &format!("run-{index}"), &sets);
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
fn uninformative_pairs_are_rejected_or_counted() {
    let Some(cases) = cases("uninformative_pairs_are_rejected_or_counted") else {
        return;
    };
    let sandbox = Sandbox::new();
    let fit = |rows: &str, run: &str| {
        let sets = [
            "preference.fit.pairs.kind=dataset".into(),
            format!("preference.fit.pairs.path={:?}", cases.join(rows)),
            "preference.fit.train_batch_size=8".into(),
        ];
        agon(
            &sandbox,
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
            "and 0 of 40 are left: 40 with two equal responses",
        ),
    ] {
        fit(rows, "refused").check(3, &[says]).without_panic();
    }

    let fitted = fit("A27/pf-same.jsonl", "same").succeeded();
    assert!(
        fitted
            .stdout
            .contains("left out: 20 with two equal responses"),
        "{}",
        fitted.stdout
    );
    // Ten prompts, four times each: all four pairs of one prompt are held out.
    let fitted = fit("A27/pf-dup.jsonl", "dup").succeeded();
    assert!(
        fitted.stdout.contains("Trained on 36 pairs"),
        "{}",
        fitted.stdout
    );
    assert!(
        fitted.stdout.contains("27 repeat an earlier one"),
        "{}",
        fitted.stdout
    );
    assert!(
        fitted.stdout.contains("| on 4 held-out pairs"),
        "{}",
        fitted.stdout
    );

    // The same reader loads them as fine-tuning examples, in less time.
    for rows in [
        "A28/pf-sharegpt-tool.jsonl",
        "A28/pf-orca.jsonl",
        "A28/pf-alpaca.jsonl",
        "A02/pf-uf.parquet",
    ] {
        assert!(loss_of(&sandbox, &cases, rows).is_finite());
    }
}

#[test]
fn common_file_formats_are_read() {
    let Some(cases) = cases("common_file_formats_are_read") else {
        return;
    };
    let sandbox = Sandbox::new();
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
        let prompts = prompts_of(&sandbox, &cases, &format!("run-{index}"), &path(rows));
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
            "compressed with brotli, which is not supported: write it with",
        ),
        ("A31/*.parquet", "no file matches the glob"),
    ] {
        agon(
            &sandbox,
            &cases,
            &["train", "--run-dir", "refused"],
            &path(rows),
        )
        .check(3, &[says])
        .without_panic();
    }
    let model = cases.join("A02/chat-bos").display().to_string();
    let ids = cases.join("A19/ids-bom.jsonl").display().to_string();
    sandbox
        .run(&["score", "--model", &model, "--input", &ids])
        .succeeded();
}

#[test]
fn hostile_files_are_refused_with_the_limit() {
    let Some(cases) = cases("hostile_files_are_refused_with_the_limit") else {
        return;
    };
    let sandbox = Sandbox::new();
    let pipe = sandbox.path("pipe.jsonl");
    make_pipe(&pipe);
    symlink("/dev/zero", sandbox.path("zero.jsonl")).expect("a link");
    // Four bytes for each 128 KiB of white space.
    let mut bomb = vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x38];
    for block in 0..2500 {
        bomb.extend([0x02 | u8::from(block == 2499), 0x00, 0x10, b' ']);
    }
    sandbox.write("bomb.jsonl.zst", bomb);
    sandbox.write(
        "rows.jsonl",
        "{\"prompt\": \"a\", \"completion\": \"b\"}\n".repeat(9),
    );
    let long = format!("{{\"prompt\": \"{}\"}}", "a".repeat(17 << 20));
    sandbox.write("long.jsonl", long);
    for (rows, set, says) in [
        ("pipe.jsonl", "", "it is a named pipe, not a regular file"),
        ("zero.jsonl", "", "it is a device, not a regular file"),
        (
            "bomb.jsonl.zst",
            "",
            "expands to more than 200 times its size",
        ),
        (
            "long.jsonl",
            "",
            "line 1: the row is longer than 16777216 bytes",
        ),
        (
            "rows.jsonl",
            "max_rows=8",
            "more than 8 rows, the maximum of",
        ),
        (
            "rows.jsonl",
            "max_file_bytes=99",
            "more than 99 bytes, the maximum of",
        ),
    ] {
        for (section, command) in [
            ("prompts", &["train", "--run-dir", "refused"][..]),
            ("sft", &["sft", "--output", "refused"]),
        ] {
            // White space takes a while to expand.
            if rows.starts_with("bomb") && section == "sft" {
                continue;
            }
            let mut sets = vec![format!("{section}.path={:?}", sandbox.path(rows))];
            sets.extend((!set.is_empty()).then(|| format!("{section}.{set}")));
            let named = (!set.is_empty())
                .then(|| format!("{section}.{}", set.split('=').next().unwrap_or_default()));
            agon(&sandbox, &cases, command, &sets)
                .check(3, &[says, rows, named.as_deref().unwrap_or("")])
                .without_panic();
        }
    }
}
