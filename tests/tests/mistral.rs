//! The program built with mistral.rs: completions equal to those of Agon's own sampler, judging, runs with a mistral.rs
//! actor, golden answers, and load errors.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use system_tests::{RunningProcess, Sandbox, column, config, http, report, shared, steps};

/// Tolerance per token of the log-probabilities of the two engines.
const TOLERANCE: f64 = 1e-3;

/// A prompt, and its tokens in the vocabulary of the story model.
const TOM: &str = "Tom and his dog";
const TOM_IDS: [u32; 7] = [1, 274, 287, 269, 345, 400, 428];

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// A copy of the story model with a chat template.
fn stories(test: &str, sandbox: &Sandbox) -> Option<PathBuf> {
    let folder = sandbox.copy_of(&shared(test, "data/models/stories260K")?, "stories");
    let path = folder.join("tokenizer_config.json");
    let mut tokenizer = read(&path);
    tokenizer["chat_template"] =
        "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}".into();
    fs::write(&path, tokenizer.to_string()).expect("the file was copied");
    Some(folder)
}

fn read(path: &Path) -> Value {
    let content = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&content).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A copy of the model in `folder` with flatter distributions: its final norm is scaled by 0.8.
fn flattened(sandbox: &Sandbox, folder: &Path) -> PathBuf {
    let other = sandbox.copy_of(folder, "flattened");
    let path = other.join("model.safetensors");
    let mut bytes = fs::read(&path).expect("the file was copied");
    let length = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).expect("a header");
    let norm = &header["model.norm.weight"];
    assert_eq!(norm["dtype"], "F32");
    let offset =
        |i: usize| 8 + length + norm["data_offsets"][i].as_u64().expect("an offset") as usize;
    for bytes in bytes[offset(0)..offset(1)].chunks_exact_mut(4) {
        let value = f32::from_le_bytes((&*bytes).try_into().expect("four bytes"));
        bytes.copy_from_slice(&(value * 0.8).to_le_bytes());
    }
    fs::write(&path, bytes).expect("the file was copied");
    other
}

/// Runs `agon generate` with this engine and returns one line per completion.
fn generate(
    sandbox: &Sandbox,
    engine: &str,
    model: &Path,
    reference: &Path,
    more: &[&str],
) -> Vec<Value> {
    let (model, reference) = (text(model), text(reference));
    let call = [
        &[
            "generate",
            "--json",
            "--engine",
            engine,
            "--model",
            &model,
            "--reference",
            &reference,
            "--prompt",
            "Once upon a time",
            "--prompt",
            TOM,
            "--num",
            "3",
            "--seed",
            "11",
            "--max-new-tokens",
            "40",
        ],
        more,
    ];
    sandbox
        .run(&call.concat())
        .succeeded()
        .without_panic()
        .json_lines()
}

fn sum(line: &Value, key: &str) -> f64 {
    line[key]
        .as_f64()
        .unwrap_or_else(|| panic!("{key}: {line}"))
}

fn floats(value: &Value) -> Vec<f64> {
    serde_json::from_value(value.clone()).unwrap_or_else(|e| panic!("{e}: {value}"))
}

/// Asserts that two sums over the tokens of a completion differ by rounding only.
#[track_caller]
fn assert_close(line: &Value, a: f64, b: f64) {
    let tokens = line["ids"].as_array().expect("ids").len() as f64;
    assert!((a - b).abs() < TOLERANCE * tokens, "{a} is not {b}: {line}");
}

#[test]
fn completions_equal_those_of_the_own_sampler() {
    let sandbox = Sandbox::new();
    let Some(model) = stories("mistral_generate", &sandbox) else {
        return;
    };
    let reference = flattened(&sandbox, &model);
    let truncated = ["--top-k", "20", "--top-p", "0.9", "--temperature", "0.8"];
    let greedy = ["--top-k", "1"];
    for more in [
        &["--mixture-coef", "0"][..],
        &["--mixture-coef", "0.5"],
        &["--mixture-coef", "1"],
        &[&["--mixture-coef", "0.3"][..], &truncated].concat(),
        &[&["--mixture-coef", "0.125"][..], &greedy].concat(),
    ] {
        let of = |engine| generate(&sandbox, engine, &model, &reference, more);
        let (own, actual) = (of("own"), of("mistral"));
        assert_eq!(own.len(), actual.len());
        for (own, actual) in own.iter().zip(&actual) {
            for key in ["prompt", "completion", "ids", "finish"] {
                assert_eq!(own[key], actual[key], "{key} with {more:?}");
            }
            for key in ["logp", "ref_logp", "behaviour_logp"] {
                assert_close(actual, sum(actual, key), sum(own, key));
            }
            let tokens = floats(&actual["logprobs"]).into_iter();
            for (a, b) in tokens.zip(floats(&own["logprobs"])) {
                assert!((a - b).abs() < TOLERANCE, "{a} is not {b} with {more:?}");
            }
        }
    }
}

#[test]
fn every_architecture_samples_the_same_completions() {
    let sandbox = Sandbox::new();
    for name in [
        "random-llama3",
        "random-mistral",
        "random-qwen2",
        "random-qwen3",
    ] {
        let Some(model) = shared("mistral_architectures", &format!("data/models/{name}")) else {
            return;
        };
        let of = |engine| generate(&sandbox, engine, &model, &model, &[]);
        for (own, actual) in of("own").iter().zip(&of("mistral")) {
            assert_eq!(own["ids"], actual["ids"], "{name}");
            assert_close(actual, sum(actual, "logp"), sum(own, "logp"));
        }
    }
}

#[test]
fn mixture_endpoints_equal_policy_and_reference() {
    let sandbox = Sandbox::new();
    let Some(model) = stories("mistral_ends", &sandbox) else {
        return;
    };
    let reference = flattened(&sandbox, &model);
    for (mixture, distribution) in [("0", "logp"), ("1", "ref_logp")] {
        let more = ["--mixture-coef", mixture];
        let actual = generate(&sandbox, "mistral", &model, &reference, &more);
        let mut difference = 0.0f64;
        for line in &actual {
            let (behaviour, expected) = (sum(line, "behaviour_logp"), sum(line, distribution));
            assert!((behaviour - expected).abs() < 1e-4, "{line}");
            difference = difference.max((sum(line, "logp") - sum(line, "ref_logp")).abs());
        }
        assert!(difference > 0.1, "policy and reference are the same");
        // The recorded log-probabilities equal those of the models without a KV cache.
        let actual = actual.iter().filter(|line| line["prompt"] == TOM);
        let actual: Vec<&Value> = actual.collect();
        assert_eq!(actual.len(), 3);
        let rows: String = actual.iter().map(|line| row(line)).collect();
        let file = text(&sandbox.write("rows.jsonl", rows));
        for (folder, key) in [(&model, "logp"), (&reference, "ref_logp")] {
            let call = ["score", "--model", &text(folder), "--input", &file];
            let scores = sandbox.run(&call).succeeded().json_lines();
            for (line, score) in actual.iter().zip(&scores) {
                let logprobs = floats(&score["logprobs"]);
                let of_completion: f64 = logprobs[TOM_IDS.len() - 1..].iter().sum();
                assert_close(line, of_completion, sum(line, key));
            }
        }
    }
}

/// Prompt and completion of a line as a row of token ids for `agon score`.
fn row(line: &Value) -> String {
    let completion = line["ids"].as_array().expect("ids").iter().cloned();
    let ids: Vec<Value> = TOM_IDS
        .iter()
        .map(|&id| json!(id))
        .chain(completion)
        .collect();
    json!({"ids": ids}).to_string() + "\n"
}

/// Settings of a chat judge whose verdicts are words in the vocabulary of the story model.
fn judge(model: &Path) -> Vec<String> {
    [
        "preference.judge.kind=mistral".into(),
        format!("preference.judge.path={model:?}"),
        "preference.chat.system=\"\"".into(),
        "preference.chat.template=\"{prompt} {first} {second} Tom saw\"".into(),
        "preference.chat.first_verdict=\"the\"".into(),
        "preference.chat.second_verdict=\"a\"".into(),
        "preference.chat.tie_verdict=\"\"".into(),
        "preference.chat.max_tokens=1".into(),
    ]
    .into()
}

/// Starts `agon preference` with these settings; returns the process and its address.
fn serve(sandbox: &Sandbox, sets: &[String]) -> (RunningProcess, String) {
    let path = text(&config("stories.toml"));
    let listen = "preference.http.listen=\"127.0.0.1:0\"".to_owned();
    let mut arguments = vec!["preference".to_owned(), path];
    let sets = sets.iter().chain([&listen]);
    arguments.extend(sets.flat_map(|set| ["--set".to_owned(), set.clone()]));
    let mut running = sandbox.start(&arguments);
    let [stdout, _] = running.output_files();
    let address = running.until("its address", || {
        let text = fs::read_to_string(&stdout).ok()?;
        Some(text.split_once('\n')?.0.to_owned())
    });
    (running, address)
}

#[test]
fn a_local_chat_model_judges_in_both_orders() {
    let sandbox = Sandbox::new();
    let Some(model) = stories("mistral_judge", &sandbox) else {
        return;
    };
    let answers = |orders: &str| -> Vec<f64> {
        let orders = format!("preference.orders={orders}");
        let (running, base) = serve(&sandbox, &[judge(&model), vec![orders]].concat());
        let pair = |first: &str, second: &str| json!({"prompt": "Tom had a ball.", "first": first, "second": second});
        let (happy, sad) = ("Tom was happy.", "Lily was sad and cried.");
        let body = json!({"pairs": [pair(happy, sad), pair(sad, happy)]}).to_string();
        let (status, answer) = http(&base, "POST", "/v1/preferences", &body);
        assert_eq!(
            (status, &answer["judge"]),
            (200, &"mistral".into()),
            "{answer}"
        );
        running.terminate();
        running.wait().succeeded().without_panic();
        let results = answer["results"].as_array().expect("results");
        let p = |result: &Value| result["p"].as_f64().unwrap_or_else(|| panic!("{answer}"));
        results.iter().map(p).collect()
    };
    let one = answers("one");
    for p in &one {
        assert!(*p > 0.0 && *p < 1.0, "{one:?}");
    }
    let both = answers("both");
    assert!((both[0] + both[1] - 1.0).abs() < 1e-6, "{both:?}");
    let mean = (one[0] + 1.0 - one[1]) / 2.0;
    assert!((both[0] - mean).abs() < 1e-5, "{one:?} and {both:?}");
    assert_eq!(answers("one"), one, "answers are deterministic");
}

/// Arguments of `agon train` on the story model with mistral.rs as the engine of the actor.
fn train(model: &Path, prompts: &Path, run: &Path, sets: &[&str]) -> Vec<String> {
    let base = [
        format!("model.path={model:?}"),
        format!("prompts.path={prompts:?}"),
        "prompts.held_out=4".into(),
        "actor.engine.kind=mistral".into(),
        "actor.slots=8".into(),
        "actor.max_new_tokens=16".into(),
        "actor.max_prompt_length=32".into(),
        "learner.steps=5".into(),
        "learner.train_batch_size=4".into(),
        "learner.max_staleness=0".into(),
        "learner.learning_rate=5e-3".into(),
        "learner.save_steps=0".into(),
        "evaluation.prompts=4".into(),
        "evaluation.eval_steps=0".into(),
    ];
    let path = text(&config("stories.toml"));
    let mut arguments = ["train", &path, "--run-dir", &text(run)]
        .map(str::to_owned)
        .to_vec();
    let sets = sets.iter().map(|&set| set.to_owned());
    for set in base.into_iter().chain(sets) {
        arguments.extend(["--set".into(), set]);
    }
    arguments
}

/// A file of short prompts.
fn prompts(sandbox: &Sandbox) -> PathBuf {
    let first = [
        "Tom", "Lily", "Once", "The dog", "A cat", "One day", "Sam", "Mom", "Dad",
    ];
    let second = [
        "Ben",
        "Anna",
        "The sun",
        "Her friend",
        "They",
        "He",
        "She",
        "A bird",
        "We",
    ];
    let rows = first.into_iter().chain(second);
    let rows: String = rows
        .map(|prompt| json!({"prompt": prompt}).to_string() + "\n")
        .collect();
    sandbox.write("prompts.jsonl", rows)
}

#[test]
fn the_actor_samples_with_every_new_weight_version() {
    let sandbox = Sandbox::new();
    let Some(model) = stories("mistral_train", &sandbox) else {
        return;
    };
    let prompts = prompts(&sandbox);
    for (name, sets) in [
        ("full", &[][..]),
        (
            "adapter",
            &["model.lora_rank=4", "learner.learning_rate=1e-1"],
        ),
    ] {
        let run = sandbox.path(name);
        let result = sandbox.run(&train(&model, &prompts, &run, sets));
        result.succeeded().without_panic();
        assert_eq!(steps(&run).len(), 5, "{name}");
        // The actor sampled with the current weights of the learner: each version was loaded.
        let mismatch = column(&run, "mismatch/logp_abs_diff");
        assert!(
            mismatch.iter().all(|d| *d < TOLERANCE),
            "{name}: {mismatch:?}"
        );
        // The weights changed: the policy's log-probabilities moved away from the reference.
        let log_ratio = column(&run, "objective/log_ratio");
        assert!(
            log_ratio.iter().any(|kl| kl.abs() > 0.05),
            "{name}: {log_ratio:?}"
        );
        // Two equal completions of a prompt are not a pair; how often they occur depends on the machine's rounding.
        let mut dropped = report(&run)["stages"]["actor"]["dropped"].take();
        let dropped = dropped.as_object_mut().expect("counts by reason");
        dropped.remove("identical");
        assert!(dropped.is_empty(), "{name}: {dropped:?}");
    }
}

#[test]
fn golden_answers_are_added_to_the_rows() {
    let sandbox = Sandbox::new();
    let Some(model) = stories("mistral_golden", &sandbox) else {
        return;
    };
    let rows = [
        json!({"prompt": "Once upon a time", "id": 7}),
        json!({"messages": [{"role": "user", "content": "Tom and his dog"}]}),
        json!({"prompt": "Lily", "id": 8}),
        json!({"prompt": "Sam had a red car", "id": 9}),
        json!({"prompt": "One day", "id": 10}),
    ];
    let rows: String = rows.iter().map(|row| row.to_string() + "\n").collect();
    let prompts = text(&sandbox.write("prompts.jsonl", rows.clone()));
    let (model, output) = (text(&model), sandbox.path("golden.jsonl"));
    let call = |more: &[&str]| {
        let path = text(&output);
        let call = [
            &[
                "golden",
                "--model",
                &model,
                "--prompts",
                &prompts,
                "--output",
                &path,
            ],
            more,
        ];
        sandbox.run(&call.concat())
    };
    let long = ["--max-new-tokens", "480", "--temperature", "0.7"];
    let result = call(&long).succeeded().without_panic();
    let written = fs::read_to_string(&output).expect("the file was written");
    let first: Vec<Value> = written
        .lines()
        .map(|line| serde_json::from_str(line).expect("a row"))
        .collect();
    // A story that does not end within 480 tokens is omitted.
    assert!(first.len() >= 2, "{written}");
    result.check(0, &[&format!("wrote {} golden answers", first.len())]);
    for row in &first {
        let golden = row["golden"].as_str().expect("an answer");
        assert!(golden.len() > 20 && golden.trim_end() == golden, "{row}");
    }
    let requested: Vec<Value> = rows
        .lines()
        .map(|row| serde_json::from_str(row).expect("a row"))
        .collect();
    for row in first.iter().filter(|row| row["id"].is_u64()) {
        let request = requested.iter().find(|request| request["id"] == row["id"]);
        assert_eq!(
            request.expect("a row of the input")["prompt"],
            row["prompt"]
        );
    }
    call(&[]).check(2, &["golden.jsonl is there already"]);
    fs::remove_file(&output).expect("the file was written");
    call(&["--max-new-tokens", "4"])
        .check(0, &["wrote 0 golden answers", "5 prompts were left out"]);
    assert_eq!(fs::read_to_string(&output).expect("an empty file"), "");
}

#[test]
fn load_errors_name_the_file_and_a_remedy() {
    let sandbox = Sandbox::new();
    let Some(model) = stories("mistral_refusals", &sandbox) else {
        return;
    };
    let prompts = text(&prompts(&sandbox));
    let golden = |model: &Path, more: &[&str], says: &[&str]| {
        let output = text(&sandbox.path("golden.jsonl"));
        let model = text(model);
        let call = [
            &[
                "golden",
                "--model",
                &model,
                "--prompts",
                &prompts,
                "--output",
                &output,
            ],
            more,
        ];
        let result = sandbox.run(&call.concat());
        result.check(3, says).without_panic();
    };
    for (name, content) in [
        ("truncated.gguf", &b"GGUF\x03\0\0\0\xff\xff"[..]),
        ("other.gguf", b"no gguf"),
    ] {
        let invalid = sandbox.write(name, content);
        golden(&invalid, &[], &[name, "download or convert the file again"]);
    }
    golden(
        Path::new("/nowhere/model"),
        &[],
        &["/nowhere/model", "name a Hugging Face folder"],
    );
    golden(&model, &["--isq", "q3"], &["q3", "Q4K"]);

    let unsupported = sandbox.copy_of(&model, "unsupported");
    let mut config_json = read(&unsupported.join("config.json"));
    config_json["architectures"] = json!(["UnsupportedForCausalLM"]);
    fs::write(unsupported.join("config.json"), config_json.to_string())
        .expect("the file was copied");
    golden(
        &unsupported,
        &[],
        &["unsupported", "UnsupportedForCausalLM", "such as Llama"],
    );

    let truncated = sandbox.copy_of(&model, "truncated");
    let weights = fs::read(truncated.join("model.safetensors")).expect("the file was copied");
    fs::write(
        truncated.join("model.safetensors"),
        &weights[..weights.len() / 2],
    )
    .expect("a writable copy");
    golden(&truncated, &[], &["truncated", "complete folder"]);

    let no_template = sandbox.copy_of(&model, "no-template");
    fs::write(no_template.join("tokenizer_config.json"), "{}").expect("the file was copied");
    golden(
        &no_template,
        &["--chat"],
        &["no-template has no chat template", "--chat-template"],
    );
    check_judge_is_rejected(&sandbox, &no_template);
}

/// A preference service does not start with a judge without a chat template.
fn check_judge_is_rejected(sandbox: &Sandbox, no_template: &Path) {
    let mut call = vec!["preference".to_owned(), text(&config("stories.toml"))];
    let listen = "preference.http.listen=\"127.0.0.1:0\"".to_owned();
    for set in judge(no_template).into_iter().chain([listen]) {
        call.extend(["--set".into(), set]);
    }
    let says = ["has no chat template", "preference.judge.chat_template"];
    sandbox.run(&call).check(3, &says).without_panic();
}
