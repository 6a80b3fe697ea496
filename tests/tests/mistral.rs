//! mistral.rs from the outside, in a build that has it: the same completions as Agon's own sampler writes, a
//! judge, runs whose actor it is, golden answers, and what is refused.

use std::{
    fs,
    path::{Path, PathBuf},
};

use house::{Running, Workplace, column, config, http, report, shared, steps};
use serde_json::{Value, json};

/// Log-probabilities of the two engines differ by rounding alone, a token.
const CLOSE: f64 = 1e-3;

/// A prompt, and its tokens in the vocabulary of the stories.
const TOM: &str = "Tom and his dog";
const TOM_IDS: [u32; 7] = [1, 274, 287, 269, 345, 400, 428];

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// A copy of a small writer of stories, with a template for chats.
fn stories(test: &str, workplace: &Workplace) -> Option<PathBuf> {
    let folder = workplace.copy_of(&shared(test, "data/models/stories260K")?, "stories");
    let path = folder.join("tokenizer_config.json");
    let mut tokenizer = read(&path);
    tokenizer["chat_template"] =
        "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}".into();
    fs::write(&path, tokenizer.to_string()).expect("it was copied");
    Some(folder)
}

fn read(path: &Path) -> Value {
    let content = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&content).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The model of `folder`, less sure of itself: its last norm is scaled.
fn unsure(workplace: &Workplace, folder: &Path) -> PathBuf {
    let other = workplace.copy_of(folder, "unsure");
    let path = other.join("model.safetensors");
    let mut bytes = fs::read(&path).expect("it was copied");
    let length = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).expect("a header");
    let norm = &header["model.norm.weight"];
    assert_eq!(norm["dtype"], "F32");
    let place = |i: usize| 8 + length + norm["data_offsets"][i].as_u64().expect("a place") as usize;
    for number in bytes[place(0)..place(1)].chunks_exact_mut(4) {
        let value = f32::from_le_bytes(number.try_into().expect("four bytes"));
        number.copy_from_slice(&(value * 0.8).to_le_bytes());
    }
    fs::write(&path, bytes).expect("it was copied");
    other
}

/// What `agon generate` says with this engine, a completion each.
fn generated(
    workplace: &Workplace,
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
    workplace
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

/// That two sums over a completion's tokens differ by rounding alone.
#[track_caller]
fn close(line: &Value, a: f64, b: f64) {
    let tokens = line["ids"].as_array().expect("ids").len() as f64;
    assert!((a - b).abs() < CLOSE * tokens, "{a} is not {b}: {line}");
}

#[test]
fn a_seed_writes_what_it_writes_with_agons_own_sampler() {
    let workplace = Workplace::new();
    let Some(model) = stories("mistral_generate", &workplace) else {
        return;
    };
    let reference = unsure(&workplace, &model);
    let truncated = ["--top-k", "20", "--top-p", "0.9", "--temperature", "0.8"];
    let greedy = ["--top-k", "1"];
    for more in [
        &["--mixture-coef", "0"][..],
        &["--mixture-coef", "0.5"],
        &["--mixture-coef", "1"],
        &[&["--mixture-coef", "0.3"][..], &truncated].concat(),
        &[&["--mixture-coef", "0.125"][..], &greedy].concat(),
    ] {
        let of = |engine| generated(&workplace, engine, &model, &reference, more);
        let (own, found) = (of("own"), of("mistral"));
        assert_eq!(own.len(), found.len());
        for (own, found) in own.iter().zip(&found) {
            for key in ["prompt", "completion", "ids", "finish"] {
                assert_eq!(own[key], found[key], "{key} with {more:?}");
            }
            for key in ["logp", "ref_logp", "behaviour_logp"] {
                close(found, sum(found, key), sum(own, key));
            }
            let tokens = floats(&found["logprobs"]).into_iter();
            for (a, b) in tokens.zip(floats(&own["logprobs"])) {
                assert!((a - b).abs() < CLOSE, "{a} is not {b} with {more:?}");
            }
        }
    }
}

#[test]
fn other_architectures_write_the_same() {
    let workplace = Workplace::new();
    for name in [
        "random-llama3",
        "random-mistral",
        "random-qwen2",
        "random-qwen3",
    ] {
        let Some(model) = shared("mistral_architectures", &format!("data/models/{name}")) else {
            return;
        };
        let of = |engine| generated(&workplace, engine, &model, &model, &[]);
        for (own, found) in of("own").iter().zip(&of("mistral")) {
            assert_eq!(own["ids"], found["ids"], "{name}");
            close(found, sum(found, "logp"), sum(own, "logp"));
        }
    }
}

#[test]
fn the_ends_of_the_mixture_are_the_policy_and_the_reference() {
    let workplace = Workplace::new();
    let Some(model) = stories("mistral_ends", &workplace) else {
        return;
    };
    let reference = unsure(&workplace, &model);
    for (mixture, behaves_as) in [("0", "logp"), ("1", "ref_logp")] {
        let more = ["--mixture-coef", mixture];
        let found = generated(&workplace, "mistral", &model, &reference, &more);
        let mut apart = 0.0f64;
        for line in &found {
            let (behaviour, expected) = (sum(line, "behaviour_logp"), sum(line, behaves_as));
            assert!((behaviour - expected).abs() < 1e-4, "{line}");
            apart = apart.max((sum(line, "logp") - sum(line, "ref_logp")).abs());
        }
        assert!(apart > 0.1, "policy and reference are the same");
        // What was recorded is what the uncached models say of the same tokens.
        let found = found.iter().filter(|line| line["prompt"] == TOM);
        let found: Vec<&Value> = found.collect();
        assert_eq!(found.len(), 3);
        let rows: String = found.iter().map(|line| row(line)).collect();
        let file = text(&workplace.write("rows.jsonl", rows));
        for (folder, key) in [(&model, "logp"), (&reference, "ref_logp")] {
            let call = ["score", "--model", &text(folder), "--input", &file];
            let scores = workplace.run(&call).succeeded().json_lines();
            for (line, score) in found.iter().zip(&scores) {
                let logprobs = floats(&score["logprobs"]);
                let of_completion: f64 = logprobs[TOM_IDS.len() - 1..].iter().sum();
                close(line, of_completion, sum(line, key));
            }
        }
    }
}

/// The prompt of a line and what was written, as a row of tokens for `agon score`.
fn row(line: &Value) -> String {
    let written = line["ids"].as_array().expect("ids").iter().cloned();
    let ids: Vec<Value> = TOM_IDS.iter().map(|&id| json!(id)).chain(written).collect();
    json!({"ids": ids}).to_string() + "\n"
}

/// A chat model as a judge whose verdicts are words that a writer of stories uses.
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

/// `agon preference` with these settings, and where it listens.
fn serve(workplace: &Workplace, sets: &[String]) -> (Running, String) {
    let path = text(&config("stories.toml"));
    let listen = "preference.http.listen=\"127.0.0.1:0\"".to_owned();
    let mut arguments = vec!["preference".to_owned(), path];
    let sets = sets.iter().chain([&listen]);
    arguments.extend(sets.flat_map(|set| ["--set".to_owned(), set.clone()]));
    let mut running = workplace.start(&arguments);
    let [out, _] = running.files();
    let address = running.until("its address", || {
        let words = fs::read_to_string(&out).ok()?;
        Some(words.split_once('\n')?.0.to_owned())
    });
    (running, address)
}

#[test]
fn a_local_chat_model_judges_in_both_orders() {
    let workplace = Workplace::new();
    let Some(model) = stories("mistral_judge", &workplace) else {
        return;
    };
    let answers = |orders: &str| -> Vec<f64> {
        let orders = format!("preference.orders={orders}");
        let (running, base) = serve(&workplace, &[judge(&model), vec![orders]].concat());
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
    assert_eq!(answers("one"), one, "it answers the same again");
}

/// `agon train` on stories with mistral.rs as its actor's engine.
fn train(model: &Path, prompts: &Path, run: &Path, sets: &[&str]) -> Vec<String> {
    let named = [
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
    for set in named.into_iter().chain(sets) {
        arguments.extend(["--set".into(), set]);
    }
    arguments
}

/// Prompts of one word each.
fn prompts(workplace: &Workplace) -> PathBuf {
    let words = [
        "Tom", "Lily", "Once", "The dog", "A cat", "One day", "Sam", "Mom", "Dad",
    ];
    let also = [
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
    let rows = words.into_iter().chain(also);
    let rows: String = rows
        .map(|word| json!({"prompt": word}).to_string() + "\n")
        .collect();
    workplace.write("prompts.jsonl", rows)
}

#[test]
fn a_run_has_its_actor_write_with_every_new_version() {
    let workplace = Workplace::new();
    let Some(model) = stories("mistral_train", &workplace) else {
        return;
    };
    let prompts = prompts(&workplace);
    for (name, sets) in [
        ("whole", &[][..]),
        (
            "adapter",
            &["model.lora_rank=4", "learner.learning_rate=1e-1"],
        ),
    ] {
        let run = workplace.path(name);
        let ended = workplace.run(&train(&model, &prompts, &run, sets));
        ended.succeeded().without_panic();
        assert_eq!(steps(&run).len(), 5, "{name}");
        // Actors wrote with the very weights that the learner then had: each version was loaded.
        let apart = column(&run, "mismatch/logp_abs_diff");
        assert!(apart.iter().all(|d| *d < CLOSE), "{name}: {apart:?}");
        // And these were others with every step: the policy's own log-probabilities moved away.
        let moved = column(&run, "objective/log_ratio");
        assert!(moved.iter().any(|kl| kl.abs() > 0.05), "{name}: {moved:?}");
        assert_eq!(
            report(&run)["stations"]["actor"]["dropped"],
            json!({}),
            "{name}"
        );
    }
}

#[test]
fn golden_answers_are_written_into_the_rows() {
    let workplace = Workplace::new();
    let Some(model) = stories("mistral_golden", &workplace) else {
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
    let prompts = text(&workplace.write("prompts.jsonl", rows.clone()));
    let (model, output) = (text(&model), workplace.path("golden.jsonl"));
    let call = |more: &[&str]| {
        let named = text(&output);
        let call = [
            &[
                "golden",
                "--model",
                &model,
                "--prompts",
                &prompts,
                "--output",
                &named,
            ],
            more,
        ];
        workplace.run(&call.concat())
    };
    let whole = ["--max-new-tokens", "480", "--temperature", "0.7"];
    let ended = call(&whole).succeeded().without_panic();
    let written = fs::read_to_string(&output).expect("it was written");
    let first: Vec<Value> = written
        .lines()
        .map(|line| serde_json::from_str(line).expect("a row"))
        .collect();
    // A story that runs on for 480 tokens is no golden answer.
    assert!(first.len() >= 2, "{written}");
    ended.check(0, &[&format!("wrote {} golden answers", first.len())]);
    for row in &first {
        let golden = row["golden"].as_str().expect("an answer");
        assert!(golden.len() > 20 && golden.trim_end() == golden, "{row}");
    }
    let asked: Vec<Value> = rows
        .lines()
        .map(|row| serde_json::from_str(row).expect("a row"))
        .collect();
    for row in first.iter().filter(|row| row["id"].is_u64()) {
        let asked = asked.iter().find(|asked| asked["id"] == row["id"]);
        assert_eq!(
            asked.expect("a row that was given")["prompt"],
            row["prompt"]
        );
    }
    call(&[]).check(2, &["golden.jsonl is there already"]);
    fs::remove_file(&output).expect("it was written");
    call(&["--max-new-tokens", "4"])
        .check(0, &["wrote 0 golden answers", "5 prompts were left out"]);
    assert_eq!(fs::read_to_string(&output).expect("an empty file"), "");
}

#[test]
fn what_mistral_rs_cannot_load_is_told_with_the_file_and_the_remedy() {
    let workplace = Workplace::new();
    let Some(model) = stories("mistral_refusals", &workplace) else {
        return;
    };
    let prompts = text(&prompts(&workplace));
    let golden = |model: &Path, more: &[&str], says: &[&str]| {
        let output = text(&workplace.path("golden.jsonl"));
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
        let ended = workplace.run(&call.concat());
        ended.check(3, says).without_panic();
    };
    for (name, content) in [
        ("torn.gguf", &b"GGUF\x03\0\0\0\xff\xff"[..]),
        ("other.gguf", b"no gguf"),
    ] {
        let torn = workplace.write(name, content);
        golden(&torn, &[], &[name, "fetch or convert the file again"]);
    }
    golden(
        Path::new("/nowhere/model"),
        &[],
        &["/nowhere/model", "name a Hugging Face folder"],
    );
    golden(&model, &["--isq", "q3"], &["q3", "Q4K"]);

    let odd = workplace.copy_of(&model, "odd");
    let mut config_json = read(&odd.join("config.json"));
    config_json["architectures"] = json!(["OddForCausalLM"]);
    fs::write(odd.join("config.json"), config_json.to_string()).expect("it was copied");
    golden(&odd, &[], &["odd", "OddForCausalLM", "such as Llama"]);

    let cut = workplace.copy_of(&model, "cut");
    let weights = fs::read(cut.join("model.safetensors")).expect("it was copied");
    fs::write(cut.join("model.safetensors"), &weights[..weights.len() / 2]).expect("the half");
    golden(&cut, &[], &["cut", "files are whole"]);

    let silent = workplace.copy_of(&model, "silent");
    fs::write(silent.join("tokenizer_config.json"), "{}").expect("it was copied");
    golden(
        &silent,
        &["--chat"],
        &["silent has no chat template", "--chat-template"],
    );
    refused_as_a_judge(&workplace, &silent);
}

/// A run judged by a model without a chat template does not begin.
fn refused_as_a_judge(workplace: &Workplace, silent: &Path) {
    let mut call = vec!["preference".to_owned(), text(&config("stories.toml"))];
    let listen = "preference.http.listen=\"127.0.0.1:0\"".to_owned();
    for set in judge(silent).into_iter().chain([listen]) {
        call.extend(["--set".into(), set]);
    }
    let says = ["has no chat template", "preference.judge.chat_template"];
    workplace.run(&call).check(3, &says).without_panic();
}
