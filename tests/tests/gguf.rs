//! A real chat model in a GGUF file, held to transformers in f32 on the dequantised weights.

use std::path::Path;

use serde_json::{Value, json};
use system_tests::{ProcessOutput, Sandbox, smollm2};

fn floats(value: &Value) -> Vec<f64> {
    serde_json::from_value(value.clone()).unwrap_or_else(|e| panic!("{e}: {value}"))
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap_or_else(|e| panic!("{e}: {value}"))
}

fn array(value: &Value) -> &[Value] {
    value.as_array().expect("a list")
}

fn score(sandbox: &Sandbox, model: &Path, rows: &[Value]) -> ProcessOutput {
    let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
    let file = sandbox.write("rows.jsonl", lines).display().to_string();
    let model = model.display().to_string();
    sandbox.run(&["score", "--model", &model, "--input", &file])
}

#[test]
fn texts_dialogues_and_log_probabilities_are_those_of_transformers() {
    let Some((model, reference)) = smollm2("gguf_values", env!("CARGO_TARGET_TMPDIR")) else {
        return;
    };
    let sandbox = Sandbox::new();
    let rows = array(&reference["rows"]);
    let texts: Vec<&Value> = array(&reference["tokenization"]).iter().collect();
    let texts: Vec<&Value> = texts.into_iter().filter(|row| row["text"] != "").collect();
    let whole = rows.iter().map(|row| {
        let both = [ids(&row["prompt_ids"]), ids(&row["completion_ids"])].concat();
        json!({"ids": both})
    });
    let dialogues = rows.iter().map(|row| {
        let answer = json!({"role": "assistant", "content": row["completion"]});
        let messages = [array(&row["messages"]), &[answer]].concat();
        json!({"messages": messages})
    });
    // A control token before a text, with which no text merges.
    let tokenised = texts
        .iter()
        .map(|row| json!({"prompt": "<|im_start|>", "completion": row["text"]}));
    let requests: Vec<Value> = whole.chain(dialogues).chain(tokenised).collect();
    let answers = score(&sandbox, &model, &requests).succeeded().json_lines();
    assert_eq!(answers.len(), requests.len());
    for (index, row) in rows.iter().enumerate() {
        let expected = floats(&row["logprobs"]);
        let prompt = ids(&row["prompt_ids"]).len();
        let of_ids = floats(&answers[index]["logprobs"])[prompt - 1..].to_vec();
        let of_messages = floats(&answers[rows.len() + index]["logprobs"]);
        // The token that closes the turn is not part of a text that is scored.
        for found in [&of_ids[..], &of_messages] {
            assert!(found.len() + 1 >= expected.len(), "row {index}");
            let differences = found.iter().zip(&expected).map(|(a, b)| (a - b).abs());
            let largest = differences.fold(0.0, f64::max);
            assert!(largest < 1e-3, "row {index}: {largest}");
        }
        let closed = ids(&row["completion_ids"]);
        let found = ids(&answers[rows.len() + index]["ids"]);
        assert_eq!(found, closed[..closed.len() - 1], "row {index}");
    }
    for (row, answer) in texts.iter().zip(&answers[2 * rows.len()..]) {
        assert_eq!(ids(&answer["ids"]), ids(&row["ids"]), "{}", row["text"]);
    }
}

#[test]
fn greedy_answers_are_those_of_transformers() {
    let Some((model, reference)) = smollm2("gguf_greedy", env!("CARGO_TARGET_TMPDIR")) else {
        return;
    };
    let rows = array(&reference["rows"]).iter();
    let rows: Vec<&Value> = rows
        .filter(|row| array(&row["messages"]).len() == 1)
        .collect();
    assert!(rows.len() > 1, "{}", rows.len());
    let model = model.display().to_string();
    let mut arguments = vec![
        "generate", "--model", &model, "--chat", "--json", "--top-k", "1", "--num", "1",
    ];
    arguments.extend(["--max-new-tokens", "48"]);
    for row in &rows {
        arguments.extend([
            "--prompt",
            row["messages"][0]["content"].as_str().expect("text"),
        ]);
    }
    let answers = Sandbox::new().run(&arguments).succeeded().json_lines();
    for (row, answer) in rows.iter().zip(&answers) {
        let found = ids(&answer["ids"]);
        let expected = ids(&row["greedy_ids"]);
        let common = expected.len().min(found.len());
        assert!(common + 1 >= expected.len(), "{answer}");
        assert_eq!(
            found[..common],
            expected[..common],
            "{}",
            answer["completion"]
        );
    }
}

/// Before the first use nothing is unpacked, and `agon check` knows all that does not need the weights.
#[test]
fn a_file_is_checked_before_it_is_unpacked() {
    let Some((model, _)) = smollm2("gguf_check", env!("CARGO_TARGET_TMPDIR")) else {
        return;
    };
    let sandbox = Sandbox::new();
    let prompts = "{\"prompt\": \"Who are you?\"}\n{\"prompt\": \"Say hello.\"}\n";
    let prompts = sandbox.write("prompts.jsonl", prompts);
    let template = sandbox.write("broken.jinja", "{% for m in messages %}{{ m.content }}");
    let check = |further: &[String]| {
        let mut command = std::process::Command::new(system_tests::agon_binary());
        command.env("XDG_CACHE_HOME", sandbox.path("cache"));
        command
            .arg("check")
            .arg(system_tests::config("default.toml"));
        let sets = [
            format!("model.path={:?}", model.display().to_string()),
            "prompts={kind=\"dataset\",path=\"prompts.jsonl\",held_out=1,chat=true}".into(),
            "preference.judge={kind=\"rule\",rules=[{kind=\"length\",min=0,max=4,weight=1.0}]}"
                .into(),
        ];
        for set in sets.iter().chain(further) {
            command.args(["--set", set]);
        }
        sandbox.start_command(command).wait()
    };
    let known = [
        "will be unpacked into",
        "Llama of 30 blocks of width 576",
        "memory: about",
        "held-out prompts: 1 distinct ones",
    ];
    check(&[]).check(0, &known).without_panic();
    check(&["actor.max_prompt_length=9000".into()])
        .check(2, &["exceed the model's 8192 positions"])
        .without_panic();
    let template = format!("model.chat_template={:?}", template.display().to_string());
    check(&[template])
        .check(3, &["model.chat_template", "broken.jinja"])
        .without_panic();
    assert!(
        prompts.exists() && !sandbox.path("cache").exists(),
        "it wrote nothing"
    );
    let model = model.display().to_string();
    let sizes = "--batch 1 --prompt 2 --new-tokens 2 --mixture-coef 0 --seconds 0.1";
    let bench = ["bench", "rollout", "--model", &model].into_iter();
    let bench: Vec<&str> = bench.chain(sizes.split(' ')).collect();
    let measured = sandbox.run(&bench).succeeded();
    assert!(measured.stdout.contains("tokens_per_second"));
}

/// An adapter on the model: trained, interrupted, resumed to the same weights, exported and read back.
#[test]
fn an_adapter_is_trained_resumed_and_exported() {
    let Some((model, _)) = smollm2("gguf_adapter", env!("CARGO_TARGET_TMPDIR")) else {
        return;
    };
    let sandbox = Sandbox::new();
    let prompts: String = [
        "Name a colour.",
        "Say hello.",
        "What is two plus two?",
        "Who are you?",
    ]
    .map(|text| {
        format!(
            "{}\n",
            json!({"prompt": [{"role": "user", "content": text}]})
        )
    })
    .concat();
    let prompts = sandbox.write("prompts.jsonl", prompts);
    let model = model.display().to_string();
    let sets = [
        format!("model.path={model:?}"),
        "model.lora_rank=4".into(),
        "prompts.kind=dataset".into(),
        format!("prompts.path={:?}", prompts.display().to_string()),
        "prompts.held_out=1".into(),
        "preference.judge={kind=\"rule\",rules=[{kind=\"length\",min=0,max=4,weight=1.0}]}".into(),
        "actor.max_new_tokens=6".into(),
        "actor.max_prompt_length=64".into(),
        "actor.slots=4".into(),
        "learner.train_batch_size=2".into(),
        "learner.max_staleness=0".into(),
        "learner.save_steps=1".into(),
        "evaluation.prompts=1".into(),
        "telemetry.page=\"\"".into(),
    ];
    let train = |run: &str, steps: u64, resume: &[&str]| {
        let directory = sandbox.path(run);
        let config = system_tests::config("default.toml").display().to_string();
        let run = directory.display().to_string();
        let steps = format!("learner.steps={steps}");
        let mut arguments = vec!["train", &config, "--run-dir", &run, "--set", &steps];
        arguments.extend(sets.iter().flat_map(|set| ["--set", set.as_str()]));
        arguments.extend(resume);
        sandbox.run(&arguments).succeeded();
        system_tests::report(&directory)["weights_digest"].clone()
    };
    let whole = train("whole", 3, &[]);
    train("parts", 2, &[]);
    assert_eq!(train("parts", 3, &["--resume"]), whole);
    let run = sandbox.path("whole").display().to_string();
    sandbox
        .run(&["export", "--run", &run, "--output", "adapter"])
        .succeeded();
    let exported =
        std::fs::read(sandbox.path("adapter/adapter_config.json")).expect("PEFT's configuration");
    let exported: Value = serde_json::from_slice(&exported).expect("JSON");
    assert_eq!(exported["base_model_name_or_path"], model);
    let row = [json!({"prompt": "Hello", "completion": " there"})];
    let read = score(&sandbox, &sandbox.path("adapter"), &row)
        .succeeded()
        .json_lines();
    let base = score(&sandbox, Path::new(&model), &row)
        .succeeded()
        .json_lines();
    let [read, base] = [read, base].map(|lines| floats(&lines[0]["logprobs"]));
    assert!(
        read.iter().all(|value| value.is_finite()) && read != base,
        "{read:?}"
    );
}
