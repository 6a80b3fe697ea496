//! Model folders from elsewhere: their numbers are transformers' ones, or they are refused with the reason, by
//! `agon score` as by `agon check`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use house::{Ended, Workplace, shared, workspace_root};
use serde_json::{Value, json};

fn text(path: &Path) -> String {
    path.display().to_string()
}

fn case(name: &str) -> Option<PathBuf> {
    shared("folders", &format!("data/cases/{name}"))
}

/// The 61 tokens that every model is asked about.
fn ids() -> Option<PathBuf> {
    case("A01/ids.jsonl")
}

fn score(workplace: &Workplace, model: &Path, ids: &Path, more: &[&str]) -> Ended {
    let (model, ids) = (text(model), text(ids));
    let call = [&["score", "--model", &model, "--input", &ids], more].concat();
    workplace.run(&call)
}

/// `agon check` of a run that trains the model in this folder.
fn check(workplace: &Workplace, model: &Path) -> Ended {
    let rows = "{\"prompt\": \"Once upon a time\"}\n{\"prompt\": \"Once there was\"}\n";
    let prompts = workplace.write("prompts.jsonl", rows);
    let config = workspace_root().join("configs/stories.toml");
    workplace.run(&[
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

/// The sum of the log-probabilities of the one row.
fn sum(ended: Ended) -> f64 {
    let answers = ended.succeeded().json_lines();
    let numbers: Vec<f64> =
        serde_json::from_value(answers[0]["logprobs"].clone()).expect("log-probabilities");
    numbers.iter().sum()
}

/// What transformers 5.23 gives: `log_softmax` of the logits at the next token, summed.
const SCORED: [(&str, f64); 10] = [
    ("A01/fp8-ct-llama-deq", -411.910),
    ("A01/fp8-qwen3-deq", -474.833),
    // Both tensors are there and differ: the head is its own.
    ("A05/tied-other-head", -389.7856),
    ("A06/mistral-rope-llama3", -428.7938),
    ("A06/qwen2-rope-llama3-old", -498.6389),
    ("A06/qwen3-rope-llama3", -470.7051),
    ("A32/llama-linear-old", -408.2803),
    ("A32/qwen2-yarn-old", -490.3611),
    // The tokenizer has a pad token that the model has no embedding of.
    ("A22/pad-beyond-vocab", -1102.8487),
    ("../models/random-llama3", f64::NAN),
];

#[test]
fn scores_are_those_of_transformers_and_check_finds_nothing() {
    let Some(ids) = ids() else { return };
    let workplace = Workplace::new();
    for (name, expected) in SCORED {
        let Some(folder) = case(name) else { return };
        let found = sum(score(&workplace, &folder, &ids, &[]));
        assert!(
            expected.is_nan() || (found - expected).abs() < 1e-2,
            "{name}: {found} is not {expected}"
        );
        check(&workplace, &folder).succeeded();
    }
}

#[test]
fn departures_from_the_configuration_are_logged() {
    let Some(ids) = ids() else { return };
    let workplace = Workplace::new();
    for (name, says) in [
        ("A05/tied-other-head", "tie_word_embeddings is true but"),
        (
            "A22/pad-beyond-vocab",
            "added tokens that the model has no embedding of",
        ),
    ] {
        let Some(folder) = case(name) else { return };
        score(&workplace, &folder, &ids, &[]).check(0, &[says]);
        check(&workplace, &folder).check(0, &[says]);
    }
}

/// Quantised folders, and what their refusal names.
const QUANTISED: [(&str, &str); 6] = [
    ("A01/fp8-qwen3", "quantization_config: fp8"),
    (
        "A01/fp8-ct-llama",
        "quantization_config: compressed-tensors",
    ),
    ("A23/bnb4", "quantization_config: bitsandbytes"),
    ("A23/bnb8-llama", "quantization_config: bitsandbytes"),
    ("A23/gptq", "quantization_config: gptq"),
    // Its configuration says nothing.
    ("A23/fp8-e5", "down_proj.weight is F8_E5M2"),
];

#[test]
fn quantised_folders_are_refused_also_where_only_their_tensors_show_it() {
    let Some(ids) = ids() else { return };
    let workplace = Workplace::new();
    for (index, (name, sign)) in QUANTISED.into_iter().enumerate() {
        let Some(folder) = case(name) else { return };
        refused(
            &workplace,
            &folder,
            &ids,
            &[sign, "use the unquantised one"],
        );

        let copy = workplace.copy_of(&folder, &format!("silent-{index}"));
        let path = copy.join("config.json");
        let mut config: Value =
            serde_json::from_slice(&fs::read(&path).expect("a file")).expect("JSON");
        config
            .as_object_mut()
            .expect("an object")
            .remove("quantization_config");
        fs::write(&path, config.to_string()).expect("a writable copy");
        refused(&workplace, &copy, &ids, &["this folder is quantised ("]);
    }
}

/// That both commands refuse the folder and say so.
fn refused(workplace: &Workplace, folder: &Path, ids: &Path, says: &[&str]) {
    score(workplace, folder, ids, &[])
        .check(3, says)
        .without_panic();
    check(workplace, folder).check(3, says).without_panic();
}

#[test]
fn other_formats_are_named_with_the_way_to_convert_them() {
    let Some(ids) = ids() else { return };
    let workplace = Workplace::new();
    for (name, says) in [
        ("A29/bin-only", ["pytorch_model.bin", "save_pretrained"]),
        (
            "A29/no-tokenizer-json",
            ["tokenizer.model", "AutoTokenizer"],
        ),
    ] {
        let Some(folder) = case(name) else { return };
        refused(&workplace, &folder, &ids, &says);
    }
    let (Some(adapter), Some(base)) = (case("A29/bin"), case("../models/random-llama3")) else {
        return;
    };
    let says = ["adapter_model.bin", "save_file"];
    let with = ["--adapter", &text(&adapter)];
    score(&workplace, &base, &ids, &with)
        .check(3, &says)
        .without_panic();
}

#[test]
fn an_adapter_of_a_classifier_takes_the_place_of_its_head() {
    let (Some(ids), Some(adapter), Some(base)) = (
        ids(),
        case("A25/rl-default"),
        case("../models/random-llama-reward"),
    ) else {
        return;
    };
    let workplace = Workplace::new();
    let copy = workplace.copy_of(&adapter, "adapter");
    let path = copy.join("adapter_config.json");
    let mut config: Value =
        serde_json::from_slice(&fs::read(&path).expect("a file")).expect("JSON");
    config["base_model_name_or_path"] = json!(text(&base));
    fs::write(&path, config.to_string()).expect("a writable copy");
    let answers = score(&workplace, &copy, &ids, &["--reward"])
        .succeeded()
        .json_lines();
    let found = answers[0]["score"].as_f64().expect("a score");
    // By PEFT.
    assert!((found - 0.89841).abs() < 1e-4, "{found}");
}

#[test]
fn keys_that_change_the_computation_are_refused_and_unknown_ones_logged() {
    let (Some(ids), Some(folder)) = (ids(), case("../models/random-llama3")) else {
        return;
    };
    let workplace = Workplace::new();
    let with = |name: &str, key: &str, value: Value| {
        let copy = workplace.copy_of(&folder, name);
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
        refused(&workplace, &with(name, key, value), &ids, &[says]);
    }
    let copy = with("f", "a_key_of_its_own", json!(1));
    let before = sum(score(&workplace, &folder, &ids, &[]));
    let after = score(&workplace, &copy, &ids, &[]).check(0, &["a_key_of_its_own"]);
    assert_eq!(sum(after), before);
}
