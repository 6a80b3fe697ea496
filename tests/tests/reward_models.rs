//! Reward models: scores equal to those of transformers, names of trained models, and judging with chat templates.

use std::path::{Path, PathBuf};

use playground::Bandit;
use serde_json::{Value, json};
use system_tests::{ProcessOutput, Sandbox, config, shared};

fn score(sandbox: &Sandbox, model: &Path, rows: &str) -> ProcessOutput {
    let file = sandbox.write("rows.jsonl", rows);
    let (model, file) = (model.display().to_string(), file.display().to_string());
    sandbox.run(&["score", "--reward", "--model", &model, "--input", &file])
}

fn scores(output: ProcessOutput) -> Vec<f64> {
    let answers = output.succeeded().json_lines();
    let score = |answer: &Value| answer["score"].as_f64().expect("every row has a score");
    answers.iter().map(score).collect()
}

#[test]
fn every_kind_of_reward_model_matches_transformers() {
    let sandbox = Sandbox::new();
    for name in [
        "random-llama-reward",
        "random-qwen2-reward",
        "random-deberta-reward",
    ] {
        let Some(model) = shared("reward_score", &format!("data/models/{name}")) else {
            return;
        };
        let reference = std::fs::read(model.join("reference.json")).expect("a reference");
        let reference: Value = serde_json::from_slice(&reference).expect("the reference is JSON");
        let integers = |key: &str| -> Vec<Vec<usize>> {
            serde_json::from_value(reference[key].clone()).expect("rows of integers")
        };
        // Padding is on the right.
        let rows = integers("ids").into_iter().zip(integers("attention_mask"));
        let rows = rows.map(|(ids, mask)| json!({"ids": ids[..mask.iter().sum()]}).to_string());
        let rows: Vec<String> = rows.collect();
        let actual = scores(score(&sandbox, &model, &rows.join("\n")));
        let expected: Vec<f64> =
            serde_json::from_value(reference["scores"].clone()).expect("scores");
        assert_eq!(actual.len(), expected.len());
        for (f, e) in actual.iter().zip(&expected) {
            assert!((f - e).abs() < 1e-3, "{name}: {f} is not {e}");
        }
    }
}

#[test]
fn a_completion_is_scored_given_its_prompt() {
    let Some(decoder) = shared("reward_text", "data/models/random-llama-reward") else {
        return;
    };
    let Some(encoder) = shared("reward_text", "data/models/random-deberta-reward") else {
        return;
    };
    let sandbox = Sandbox::new();
    let text = json!({"prompt": "Tom and", "completion": " his dog"}).to_string();
    let ids = json!({"ids": [1, 274, 287, 269, 345, 400, 428]}).to_string();
    let actual = scores(score(&sandbox, &decoder, &format!("{text}\n{ids}\n")));
    // With last-token pooling the score does not depend on where the prompt ends.
    assert!((actual[0] - actual[1]).abs() < 1e-5, "{actual:?}");
    let dialogue = json!({
        "prompt": [{"role": "user", "content": "Tom and"}], "completion": " his dog"
    });
    let actual = scores(score(
        &sandbox,
        &encoder,
        &format!("{text}\n{dialogue}\n{ids}\n"),
    ));
    assert_eq!(actual[0], actual[1]);
    assert!(
        (actual[0] - actual[2]).abs() > 1e-6,
        "the newline was lost: {actual:?}"
    );
}

#[test]
fn policies_and_reward_models_are_not_interchangeable() {
    let (Some(policy), Some(reward)) = (
        shared("reward_kind", "data/models/stories260K"),
        shared("reward_kind", "data/models/random-llama-reward"),
    ) else {
        return;
    };
    let sandbox = Sandbox::new();
    let rows = "{\"ids\": [1, 2]}\n";
    let says = ["LlamaForCausalLM", "ModernBertForSequenceClassification"];
    score(&sandbox, &policy, rows)
        .check(3, &says)
        .without_panic();
    let file = sandbox.write("rows.jsonl", rows).display().to_string();
    let reward = reward.display().to_string();
    sandbox
        .run(&["score", "--model", &reward, "--input", &file])
        .check(2, &["is a reward model", "--reward"])
        .without_panic();
}

/// Trains a preference model on a two-token base model with these settings and returns its folder.
fn fit_preference(sandbox: &Sandbox, name: &str, sets: &[&str]) -> PathBuf {
    fitted(sandbox, name, sets).succeeded();
    sandbox.path(name).join("model")
}

/// Output of the fit of a preference model on a two-token base model with these settings, in the run directory `name`.
fn fitted(sandbox: &Sandbox, name: &str, sets: &[&str]) -> ProcessOutput {
    let backbone = sandbox.path("backbone");
    std::fs::create_dir_all(&backbone).expect("a folder in the sandbox");
    let bandit = Bandit::new(&[0.7, 0.3]).expect("two probabilities");
    bandit.write_model(&backbone).expect("the file is writable");
    // Two distinct prompts, so that one can be held out.
    let pairs = ["arm0", "arm1"].map(|prompt| {
        format!("{{\"prompt\": {prompt:?}, \"chosen\": \" arm1\", \"rejected\": \" arm0\"}}\n")
    });
    let pairs = sandbox.write("pairs.jsonl", pairs.concat().repeat(4));
    let prompts = sandbox.write("prompts.jsonl", "{\"prompt\": \"arm0\"}\n".repeat(2));
    let run = sandbox.path(name);
    let mut arguments = vec!["fit-preference".to_owned(), default_config()];
    arguments.extend(["--run-dir".into(), run.display().to_string()]);
    let base = [
        format!("model.path={backbone:?}"),
        "prompts.kind=dataset".into(),
        format!("prompts.path={prompts:?}"),
        "prompts.held_out=1".into(),
        "actor.max_prompt_length=4".into(),
        "actor.max_new_tokens=4".into(),
        "preference.judge.kind=bradley-terry".into(),
        "preference.fit.pairs.kind=dataset".into(),
        format!("preference.fit.pairs.path={pairs:?}"),
        "preference.fit.validation=0.5".into(),
    ];
    let sets = sets.iter().map(|&set| set.to_owned());
    for set in base.into_iter().chain(sets) {
        arguments.extend(["--set".into(), set]);
    }
    sandbox.run(&arguments)
}

fn default_config() -> String {
    config("default.toml").display().to_string()
}

#[test]
fn a_fit_that_diverges_says_so_by_its_exit_code() {
    let sandbox = Sandbox::new();
    let sets = [
        "preference.fit.learning_rate=1e30",
        "preference.fit.epochs=40",
    ];
    fitted(&sandbox, "diverges", &sets)
        .check(4, &["not finite", "lower preference.fit.learning_rate"])
        .without_panic();
    assert!(!sandbox.path("diverges/model").exists());
}

fn json_of(path: &Path) -> Value {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

#[test]
fn trained_models_name_a_compatible_architecture() {
    let sandbox = Sandbox::new();
    let plain = [
        "preference.fit.pooling=last",
        "preference.fit.likelihood=false",
    ];
    let adapter = ["preference.fit.lora_rank=2"];
    let pairwise = ["preference.fit.head=pairwise"];
    let rows = "{\"ids\": [0, 1]}\n";
    for (name, sets, is_plain) in [
        ("default", Vec::new(), false),
        ("plain", plain.to_vec(), true),
        ("plain-pairwise", [plain, [pairwise[0]; 2]].concat(), false),
        ("adapter", adapter.to_vec(), false),
        ("plain-adapter", [&plain[..], &adapter].concat(), true),
    ] {
        let model = fit_preference(&sandbox, name, &sets);
        let adapter_config = model.join("adapter_config.json");
        if adapter_config.exists() {
            let kind = if is_plain { "LORA" } else { "AGON_LORA" };
            assert_eq!(json_of(&adapter_config)["peft_type"], kind, "{name}");
        } else {
            let config = json_of(&model.join("config.json"));
            let (architecture, kind) = match is_plain {
                true => ("LlamaForSequenceClassification", "llama"),
                false => ("AgonLlamaRewardModel", "agon_llama"),
            };
            assert_eq!(config["architectures"], json!([architecture]), "{name}");
            assert_eq!(config["model_type"], kind, "{name}");
        }
        // Agon reads every kind.
        let output = score(&sandbox, &model, rows);
        if name == "plain-pairwise" {
            output.check(3, &["the model is pairwise"]);
        } else {
            assert_eq!(scores(output).len(), 1, "{name}");
        }
    }
}

/// Trains on these prompts with a reward model as judge and returns the samples of the training pairs.
fn training_samples(
    sandbox: &Sandbox,
    case: &Path,
    policy: &str,
    prompts: &str,
    more: &[&str],
) -> Vec<Value> {
    let path = |name: &str| format!("{:?}", case.join(name).display().to_string());
    let config = case.join("rm.toml").display().to_string();
    let run = sandbox.path("judged").display().to_string();
    let sets = [
        format!("model.path={}", path(policy)),
        format!("prompts.path={}", path(prompts)),
        format!("preference.judge.path={}", path("rw-other")),
    ];
    let mut call = vec!["train", &config, "--run-dir", &run];
    let sets = sets.iter().map(String::as_str).chain(more.iter().copied());
    call.extend(sets.flat_map(|set| ["--set", set]));
    sandbox.run(&call).succeeded();
    let samples = sandbox.run(&["samples", &run, "--json", "--limit", "100"]);
    let samples = samples.succeeded().json_lines().into_iter();
    samples.filter(|row| row["purpose"] == "train").collect()
}

/// Asserts the judge's preference of the pairs whose prompts contain these texts.
fn assert_preferences(rows: &[Value], expected: &[(&str, f64)]) {
    for (ending, p) in expected {
        let has_prompt = |row: &&Value| {
            row["prompt"]
                .as_str()
                .is_some_and(|text| text.contains(ending))
        };
        let row = rows
            .iter()
            .find(has_prompt)
            .unwrap_or_else(|| panic!("no {ending:?} in {rows:?}"));
        let actual = row["p"].as_f64().expect("a label");
        assert!(
            (actual - p).abs() < 5e-5,
            "{ending}: {actual} is not {p}: {row}"
        );
    }
}

/// Reference values of transformers: σ of the difference of `LlamaForSequenceClassification`'s scores of
/// `apply_chat_template(messages, add_generation_prompt=True)`, the completion and the end token.
const OWN_TEMPLATE: [(&str, f64); 4] = [
    ("The cat sat on", 0.444_73),
    ("Once upon a time", 0.519_53),
    ("Lily had a red", 0.560_63),
    ("Tom went to the", 0.797_43),
];

#[test]
fn a_judge_with_its_own_tokenizer_uses_its_own_chat_template() {
    let Some(case) = shared("own_template", "data/cases/A03") else {
        return;
    };
    let sandbox = Sandbox::new();
    let rows = training_samples(&sandbox, &case, "chat-bos", "chatprompts.jsonl", &[]);
    assert_eq!(rows.len(), 4, "{rows:?}");
    assert_preferences(&rows, &OWN_TEMPLATE);
    for row in &rows {
        let messages = &row["dialogue"]["messages"];
        assert_eq!(messages[0]["role"], "user", "{row}");
    }
}

#[test]
fn the_space_between_prompt_and_completion_belongs_to_the_completion() {
    let Some(case) = shared("seam", "data/cases/A11") else {
        return;
    };
    let sandbox = Sandbox::new();
    let rows = training_samples(&sandbox, &case, "eos-list-config", "plain.jsonl", &[]);
    // As above, for the prompt's text followed by the completion and the end token.
    let expected = [
        ("The cat sat on", 0.709_67),
        ("Once upon a time", 0.654_56),
        ("Tom went to the", 0.172_75),
        ("Lily had a red", 0.807_55),
    ];
    assert_preferences(&rows, &expected);
    let cat = rows.iter().find(|row| row["prompt"] == "The cat sat on");
    let cat = cat.expect("a sample of the prompt");
    assert_eq!(cat["completions"][0], " the floor.");
    let tokens = json!([" the", " f", "l", "o", "or", "."]);
    assert_eq!(cat["tokens"][0], tokens);
}

#[test]
fn a_judge_behind_a_service_receives_messages() {
    let Some(case) = shared("service_template", "data/cases/A03") else {
        return;
    };
    let sandbox = Sandbox::new();
    let config = config("default.toml").display().to_string();
    let judge = case.join("rw-other").display().to_string();
    let path = format!("preference.judge.path={judge:?}");
    let serve = [
        "preference",
        &config,
        "--set",
        "preference.http.listen=\"127.0.0.1:0\"",
        "--set",
        "preference.judge.kind=bradley-terry",
        "--set",
        &path,
    ];
    let mut service = sandbox.start(&serve);
    let [stdout, _] = service.output_files();
    let address = service.until("its address", || {
        let text = std::fs::read_to_string(&stdout).ok()?;
        Some(text.split_once('\n')?.0.to_owned())
    });
    // Replaces the judge table of the configuration.
    let service_judge = format!("preference.judge={{kind = \"service\", urls = [{address:?}]}}");
    let text = std::fs::read_to_string(case.join("rm.toml")).expect("the file exists");
    let folder = sandbox.path("case");
    std::fs::create_dir_all(&folder).expect("a folder");
    let judge = "[preference.judge]\nkind = \"bradley-terry\"\npath = \"models/rw-other\"\n";
    assert!(text.contains(judge), "{text}");
    std::fs::write(folder.join("rm.toml"), text.replace(judge, "")).expect("the file is writable");
    let path = |name: &str| format!("{:?}", case.join(name).display().to_string());
    let sets = [
        format!("model.path={}", path("chat-bos")),
        format!("prompts.path={}", path("chatprompts.jsonl")),
        service_judge,
    ];
    let run = sandbox.path("judged").display().to_string();
    let config = folder.join("rm.toml").display().to_string();
    let mut call = vec!["train", &config, "--run-dir", &run];
    call.extend(sets.iter().flat_map(|set| ["--set", set.as_str()]));
    sandbox.run(&call).succeeded();
    let samples = sandbox.run(&["samples", &run, "--json", "--limit", "100"]);
    assert_preferences(&samples.succeeded().json_lines(), &OWN_TEMPLATE);
    service.terminate();
    service.wait().succeeded().without_panic();
}
