//! Third-party model folders: `agon score` matches transformers, or `agon score` and `agon check` reject the folder
//! with the reason.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use system_tests::{ProcessOutput, Sandbox, make_pipe, shared, workspace_root};

fn text(path: &Path) -> String {
    path.display().to_string()
}

fn case(name: &str) -> Option<PathBuf> {
    shared("model_folders", &format!("data/cases/{name}"))
}

/// File with the 61 tokens that every model scores.
fn ids() -> Option<PathBuf> {
    case("A01/ids.jsonl")
}

fn score(sandbox: &Sandbox, model: &Path, ids: &Path, more: &[&str]) -> ProcessOutput {
    let (model, ids) = (text(model), text(ids));
    let call = [&["score", "--model", &model, "--input", &ids], more].concat();
    sandbox.run(&call)
}

/// Runs `agon check` on a configuration that trains the model in `folder`.
fn check(sandbox: &Sandbox, model: &Path) -> ProcessOutput {
    let rows = "{\"prompt\": \"Once upon a time\"}\n{\"prompt\": \"Once there was\"}\n";
    let prompts = sandbox.write("prompts.jsonl", rows);
    let config = workspace_root().join("configs/stories.toml");
    sandbox.run(&[
        "check",
        &text(&config),
        "--set",
        &format!("model.path={}", model.display()),
        "--set",
        &format!("prompts.path={}", prompts.display()),
        "--set",
        "prompts.held_out=1",
        "--set",
        "actor.max_prompt_length=32",
        "--set",
        "actor.max_new_tokens=32",
    ])
}

/// Sum of the log-probabilities of a single row.
fn sum(output: ProcessOutput) -> f64 {
    let answers = output.succeeded().json_lines();
    let logprobs: Vec<f64> =
        serde_json::from_value(answers[0]["logprobs"].clone()).expect("log-probabilities");
    logprobs.iter().sum()
}

/// Reference values of transformers 5.23: sum of `log_softmax` at the next tokens.
const SCORED: [(&str, f64); 10] = [
    ("A01/fp8-ct-llama-deq", -411.910),
    ("A01/fp8-qwen3-deq", -474.833),
    // The folder has both tensors and they differ: the LM head is not tied.
    ("A05/tied-other-head", -389.7856),
    ("A06/mistral-rope-llama3", -428.7938),
    ("A06/qwen2-rope-llama3-old", -498.6389),
    ("A06/qwen3-rope-llama3", -470.7051),
    ("A32/llama-linear-old", -408.2803),
    ("A32/qwen2-yarn-old", -490.3611),
    // The tokenizer has a pad token without an embedding in the model.
    ("A22/pad-beyond-vocab", -1102.8487),
    ("../models/random-llama3", f64::NAN),
];

#[test]
fn scores_match_transformers_and_check_succeeds() {
    let Some(ids) = ids() else { return };
    let sandbox = Sandbox::new();
    for (name, expected) in SCORED {
        let Some(folder) = case(name) else { return };
        let actual = sum(score(&sandbox, &folder, &ids, &[]));
        assert!(
            expected.is_nan() || (actual - expected).abs() < 1e-2,
            "{name}: {actual} is not {expected}"
        );
        check(&sandbox, &folder).succeeded();
    }
}

#[test]
fn deviations_from_the_configuration_are_logged() {
    let Some(ids) = ids() else { return };
    let sandbox = Sandbox::new();
    for (name, says) in [
        ("A05/tied-other-head", "tie_word_embeddings is true but"),
        (
            "A22/pad-beyond-vocab",
            "added tokens that the model has no embedding of",
        ),
    ] {
        let Some(folder) = case(name) else { return };
        score(&sandbox, &folder, &ids, &[]).check(0, &[says]);
        check(&sandbox, &folder).check(0, &[says]);
    }
}

#[test]
fn a_template_whose_end_of_turn_is_no_token_is_logged() {
    let test = "a_template_whose_end_of_turn_is_no_token_is_logged";
    let Some(folder) = shared(test, "data/models/stories260K") else {
        return;
    };
    let sandbox = Sandbox::new();
    let says = "the chat template ends a turn with a text that is no token";
    for (index, (end, is_said)) in [("<|nowhere|>", true), ("</s>", false), ("\n", false)]
        .into_iter()
        .enumerate()
    {
        let copy = sandbox.copy_of(&folder, &format!("chat-{index}"));
        let template = format!(
            "{{% for m in messages %}}{{{{ m.role }}}}: {{{{ m.content }}}}{end}{{% endfor %}}"
        );
        fs::write(copy.join("chat_template.jinja"), template).expect("a file");
        let log = check(&sandbox, &copy).succeeded().stderr;
        assert_eq!(log.contains(says), is_said, "{end:?}: {log}");
    }
}

/// Quantised folders, each with a fragment of the error.
const QUANTISED: [(&str, &str); 6] = [
    ("A01/fp8-qwen3", "quantization_config: fp8"),
    (
        "A01/fp8-ct-llama",
        "quantization_config: compressed-tensors",
    ),
    ("A23/bnb4", "quantization_config: bitsandbytes"),
    ("A23/bnb8-llama", "quantization_config: bitsandbytes"),
    ("A23/gptq", "quantization_config: gptq"),
    // Its configuration has no quantisation key.
    ("A23/fp8-e5", "down_proj.weight is F8_E5M2"),
];

#[test]
fn quantised_folders_are_rejected_by_configuration_or_tensors() {
    let Some(ids) = ids() else { return };
    let sandbox = Sandbox::new();
    for (index, (name, fragment)) in QUANTISED.into_iter().enumerate() {
        let Some(folder) = case(name) else { return };
        assert_rejected(
            &sandbox,
            &folder,
            &ids,
            &[fragment, "use the unquantised one"],
        );

        let copy = sandbox.copy_of(&folder, &format!("silent-{index}"));
        let path = copy.join("config.json");
        let mut config: Value =
            serde_json::from_slice(&fs::read(&path).expect("a file")).expect("JSON");
        config
            .as_object_mut()
            .expect("an object")
            .remove("quantization_config");
        fs::write(&path, config.to_string()).expect("a writable copy");
        assert_rejected(&sandbox, &copy, &ids, &["this folder is quantised ("]);
    }
}

/// Asserts that both commands reject the folder with these messages.
fn assert_rejected(sandbox: &Sandbox, folder: &Path, ids: &Path, says: &[&str]) {
    score(sandbox, folder, ids, &[])
        .check(3, says)
        .without_panic();
    check(sandbox, folder).check(3, says).without_panic();
}

#[test]
fn unsupported_formats_are_named_with_a_conversion() {
    let Some(ids) = ids() else { return };
    let sandbox = Sandbox::new();
    for (name, says) in [
        ("A29/bin-only", ["pytorch_model.bin", "save_pretrained"]),
        (
            "A29/no-tokenizer-json",
            ["tokenizer.model", "AutoTokenizer"],
        ),
    ] {
        let Some(folder) = case(name) else { return };
        assert_rejected(&sandbox, &folder, &ids, &says);
    }
    let (Some(adapter), Some(base)) = (case("A29/bin"), case("../models/random-llama3")) else {
        return;
    };
    let says = ["adapter_model.bin", "save_file"];
    let with = ["--adapter", &text(&adapter)];
    score(&sandbox, &base, &ids, &with)
        .check(3, &says)
        .without_panic();
}

#[test]
fn a_classifier_adapter_replaces_the_head() {
    let (Some(ids), Some(adapter), Some(base)) = (
        ids(),
        case("A25/rl-default"),
        case("../models/random-llama-reward"),
    ) else {
        return;
    };
    let sandbox = Sandbox::new();
    let copy = sandbox.copy_of(&adapter, "adapter");
    let path = copy.join("adapter_config.json");
    let mut config: Value =
        serde_json::from_slice(&fs::read(&path).expect("a file")).expect("JSON");
    config["base_model_name_or_path"] = json!(text(&base));
    fs::write(&path, config.to_string()).expect("a writable copy");
    let answers = score(&sandbox, &copy, &ids, &["--reward"])
        .succeeded()
        .json_lines();
    let actual = answers[0]["score"].as_f64().expect("a score");
    // Reference value of PEFT.
    assert!((actual - 0.89841).abs() < 1e-4, "{actual}");
}

#[test]
fn keys_that_change_the_computation_are_rejected_and_unknown_ones_logged() {
    let (Some(ids), Some(folder)) = (ids(), case("../models/random-llama3")) else {
        return;
    };
    let sandbox = Sandbox::new();
    let with = |name: &str, key: &str, value: Value| {
        let copy = sandbox.copy_of(&folder, name);
        let path = copy.join("config.json");
        let mut config: Value =
            serde_json::from_slice(&fs::read(&path).expect("a file")).expect("JSON");
        config[key] = value;
        fs::write(&path, config.to_string()).expect("a writable copy");
        copy
    };
    for (name, key, value) in [
        ("a", "logits_scaling", json!(8.0)),
        ("b", "attn_logit_softcapping", json!(50.0)),
        (
            "c",
            "rope_scaling",
            json!({"type": "longrope", "factor": 2.0}),
        ),
        ("d", "hidden_act", json!("gelu")),
        ("e", "num_hidden_layers", json!(2)),
    ] {
        let says = match key {
            "num_hidden_layers" => "model.layers.2",
            "rope_scaling" => "\"longrope\" is not supported",
            key => key,
        };
        assert_rejected(&sandbox, &with(name, key, value), &ids, &[says]);
    }
    let copy = with("f", "a_key_of_its_own", json!(1));
    let before = sum(score(&sandbox, &folder, &ids, &[]));
    let after = score(&sandbox, &copy, &ids, &[]).check(0, &["a_key_of_its_own"]);
    assert_eq!(sum(after), before);
}

/// Folder of a small model, copied so that it can be changed.
fn changeable(sandbox: &Sandbox, name: &str) -> Option<PathBuf> {
    Some(sandbox.copy_of(&case("../models/random-llama3")?, name))
}

#[test]
fn an_index_names_plain_files_only() {
    let Some(ids) = ids() else { return };
    let sandbox = Sandbox::new();
    let Some(folder) = changeable(&sandbox, "model") else {
        return;
    };
    fs::remove_file(folder.join("model.safetensors")).expect("a file of the model");
    let index = folder.join("model.safetensors.index.json");
    let Some(cases) = case("security/index") else {
        return;
    };
    for entry in fs::read_dir(cases).expect("a folder") {
        let case = entry.expect("an entry").path();
        fs::write(&index, fs::read(&case).expect("a file")).expect("a writable copy");
        let says = ["model.safetensors.index.json", "is not a plain file name"];
        assert_rejected(&sandbox, &folder, &ids, &says);
    }
}

#[test]
fn configurations_with_impossible_sizes_are_rejected() {
    let Some(ids) = ids() else { return };
    let sandbox = Sandbox::new();
    let Some(folder) = changeable(&sandbox, "model") else {
        return;
    };
    let Some(cases) = case("security/config") else {
        return;
    };
    for entry in fs::read_dir(cases).expect("a folder") {
        let case = entry.expect("an entry").path();
        let config = fs::read(&case).expect("a file");
        fs::write(folder.join("config.json"), config).expect("a writable copy");
        let name = text(case.file_name().expect("a name").as_ref());
        let (key, _) = name.rsplit_once('_').expect("a key and its value");
        assert_rejected(&sandbox, &folder, &ids, &["config.json is not usable", key]);
    }
}

#[test]
fn tokenizers_that_break_the_library_are_rejected() {
    let Some(ids) = ids() else { return };
    let sandbox = Sandbox::new();
    let Some(folder) = changeable(&sandbox, "model") else {
        return;
    };
    let Some(cases) = case("security/tokenizer") else {
        return;
    };
    for entry in fs::read_dir(cases).expect("a folder") {
        let case = entry.expect("an entry").path();
        let tokenizer = fs::read(&case).expect("a file");
        fs::write(folder.join("tokenizer.json"), tokenizer).expect("a writable copy");
        assert_rejected(&sandbox, &folder, &ids, &["tokenizer.json is not usable"]);
    }
}

#[test]
fn only_regular_files_inside_a_folder_are_read() {
    let Some(ids) = ids() else { return };
    let sandbox = Sandbox::new();
    for (index, name) in [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "model.safetensors",
        "adapter_config.json",
        "LICENSE",
    ]
    .into_iter()
    .enumerate()
    {
        let Some(folder) = changeable(&sandbox, &format!("model-{index}")) else {
            return;
        };
        let file = folder.join(name);
        let content = fs::read(&file).unwrap_or_else(|_| b"{}".to_vec());
        let outside = sandbox.write("outside", content);
        fs::remove_file(&file).ok();
        std::os::unix::fs::symlink(&outside, &file).expect("a link");
        let says = [name, "outside of its folder"];
        assert_rejected(&sandbox, &folder, &ids, &says);
        if name == "LICENSE" {
            // A licence is a regular file, or none.
            continue;
        }
        fs::remove_file(&file).expect("the link");
        make_pipe(&file);
        let says = [name, "it is a named pipe, not a regular file"];
        assert_rejected(&sandbox, &folder, &ids, &says);
    }
}
