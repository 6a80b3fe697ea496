use std::{collections::BTreeSet, fs, path::Path};

use serde_json::{Value, json};

use super::*;
use crate::{
    Gradients,
    config::{ModelTask, read_json},
    fixtures::{adapted, folder, lora_config as config, shared, tiny_model},
    folder::ModelFolder,
    optimizer::{AdamWSettings, Optimizer},
    ragged::Sequence,
    sampling::{MixtureSampler, Request, Sampler as _, SamplingSettings},
};

const SEQUENCES: [Sequence<'static>; 2] = [
    Sequence {
        prompt: &[0, 3],
        completion: &[4, 2, 1],
    },
    Sequence {
        prompt: &[0, 5, 6],
        completion: &[7, 1],
    },
];

fn fresh(base: &LanguageModel, config: LoraConfig, seed: u64) -> Adapter {
    Adapter::fresh(config, base.config(), Seed(seed), base.device()).unwrap()
}

fn logprobs(model: &LanguageModel) -> Vec<f32> {
    model.logprobs(&SEQUENCES).unwrap().logp.to_vec1().unwrap()
}

fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    let differences = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, f32::max)
}

#[test]
fn a_fresh_adapter_is_the_identity_and_initialised_as_in_peft() {
    let base = tiny_model(9, 1);
    let adapter = fresh(&base, config(&["all-linear"]), 5);
    // Seven modules in each of two blocks, two factors each.
    assert_eq!(adapter.weights.tensors.len(), 28);
    for (name, tensor) in &adapter.weights.tensors {
        let values: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
        if name.contains("lora_B") {
            assert!(values.iter().all(|&x| x == 0.0), "{name}");
        } else {
            let bound = 1.0 / (tensor.dim(1).unwrap() as f32).sqrt();
            assert!(values.iter().all(|x| x.abs() <= bound), "{name}");
            // Uniform in [−bound, bound]: a variance of bound²/3.
            let variance = values.iter().map(|x| x * x).sum::<f32>() / values.len() as f32;
            assert!(
                (0.5..1.5).contains(&(variance * 3.0 / bound.powi(2))),
                "{name}"
            );
        }
    }
    let adapted = base.with_adapter(adapter.clone()).unwrap();
    assert_eq!(logprobs(&adapted), logprobs(&base));
    let digest = |seed| {
        fresh(&base, config(&["all-linear"]), seed)
            .weights
            .digest()
            .unwrap()
    };
    assert_eq!(digest(5), adapter.weights.digest().unwrap());
    assert_ne!(digest(6), digest(5));
}

#[test]
fn a_merged_model_matches_the_adapted_one_and_the_base_is_unchanged() {
    for targets in [&["q_proj", "v_proj", "down_proj"][..], &["all-linear"]] {
        let model = adapted(9, 1, targets);
        let base = tiny_model(9, 1);
        assert_eq!(logprobs(&model.without_adapter()), logprobs(&base));
        assert!(
            max_difference(&logprobs(&model), &logprobs(&base)) > 1e-2,
            "{targets:?}"
        );
        let merged = LanguageModel::new(model.config().clone(), model.merged().unwrap()).unwrap();
        assert!(
            max_difference(&logprobs(&model), &logprobs(&merged)) < 1e-5,
            "{targets:?}"
        );
    }
}

#[test]
fn the_scale_is_alpha_over_the_rank_or_its_square_root() {
    let plain = LoraConfig {
        rank: 16,
        alpha: 8.0,
        ..config(&["q_proj"])
    };
    let stabilised = LoraConfig {
        rank_stabilised: true,
        ..plain.clone()
    };
    let base = tiny_model(9, 1);
    let scale = |config: &LoraConfig| config.modules(base.config()).unwrap()[0].scale;
    assert_eq!((scale(&plain), scale(&stabilised)), (0.5, 2.0));
}

#[test]
fn only_the_adapter_is_trained_and_the_base_gets_no_gradient() {
    let settings = AdamWSettings {
        beta1: 0.9,
        beta2: 0.99,
        epsilon: 1e-8,
        weight_decay: 0.0,
        max_grad_norm: 1.0,
    };
    let base = tiny_model(9, 1);
    let start = base
        .with_adapter(fresh(&base, config(&["q_proj", "up_proj"]), 5))
        .unwrap();
    let (model, vars) = start.trainable().unwrap();
    let names: BTreeSet<&str> = vars.keys().map(String::as_str).collect();
    assert_eq!(names.len(), 8);
    assert!(names.contains("base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"));
    let mut optimizer = Optimizer::new(vars, settings).unwrap();
    let before = (base.weights().digest().unwrap(), logprobs(&base));
    for step in 0..20 {
        let loss = model
            .logprobs(&SEQUENCES)
            .unwrap()
            .logp
            .sum_all()
            .unwrap()
            .neg()
            .unwrap();
        let mut gradients = Gradients::default();
        gradients.backward(&loss).unwrap();
        for (name, tensor) in &model.weights().tensors {
            assert!(
                gradients.get(tensor).is_none(),
                "step {step}: {name} got a gradient"
            );
        }
        let norm = optimizer.norm(&gradients).unwrap();
        optimizer.step(&gradients, norm, 3e-2).unwrap();
    }
    assert_eq!((base.weights().digest().unwrap(), logprobs(&base)), before);
    let sum = |model: &LanguageModel| logprobs(model).iter().sum::<f32>();
    assert!(
        sum(&model) > sum(&base) + 0.5,
        "{} after {}",
        sum(&model),
        sum(&base)
    );
    assert_eq!(sum(&start), sum(&base));
}

#[test]
fn dropout_is_determined_by_the_seed_and_only_in_training() {
    let model = adapted(9, 1, &["all-linear"]);
    let adapter = model.adapter().unwrap().clone();
    let half = model.with_adapter(adapter.with_dropout(0.5)).unwrap();
    assert_eq!(logprobs(&half), logprobs(&model));
    let dropped = |seed| logprobs(&half.with_dropout_seed(Seed(seed)));
    assert_eq!(dropped(1), dropped(1));
    assert!(max_difference(&dropped(1), &dropped(2)) > 1e-3);
    assert!(max_difference(&dropped(1), &logprobs(&model)) > 1e-3);
    assert_eq!(
        logprobs(&model.with_dropout_seed(Seed(1))),
        logprobs(&model)
    );
    // Inverted dropout preserves the expectation: the mean over masks is close to the output without dropout.
    let base = logprobs(&model.without_adapter());
    let rare = model.adapter().unwrap().clone().with_dropout(0.1);
    let rare = model.with_adapter(rare).unwrap();
    let count = 200;
    let mut mean = vec![0.0; base.len()];
    for seed in 0..count {
        for (mean, score) in mean
            .iter_mut()
            .zip(logprobs(&rare.with_dropout_seed(Seed(seed))))
        {
            *mean += score / count as f32;
        }
    }
    let (deviation, effect) = (
        max_difference(&mean, &logprobs(&model)),
        max_difference(&base, &logprobs(&model)),
    );
    assert!(deviation < 0.2 * effect, "{deviation} of {effect}");
}

#[test]
fn a_blob_round_trips_the_adapter_alone() {
    let model = adapted(9, 1, &["q_proj", "v_proj"]);
    let blob = model.trained().to_blob().unwrap();
    assert!(blob.len() * 4 < model.weights().to_blob().unwrap().len());
    let base = tiny_model(9, 1);
    let other = base
        .with_adapter(fresh(&base, config(&["q_proj", "v_proj"]), 5))
        .unwrap();
    let loaded = other.with_blob(&blob).unwrap();
    assert_eq!(logprobs(&loaded), logprobs(&model));
    // The base is shared: identical tensors.
    let name = "model.layers.0.mlp.up_proj.weight";
    let id = |model: &LanguageModel| model.weights().get(name).unwrap().id();
    assert_eq!(id(&loaded), id(&base));
    assert_eq!(id(&loaded.without_adapter()), id(&base));
    // Adapter and full blobs are not interchangeable.
    let whole = base.weights().to_blob().unwrap();
    let refused = other.with_blob(&whole).unwrap_err().to_string();
    assert!(refused.contains("lora_A.weight"), "{refused}");
    let refused = base.with_blob(&blob).unwrap_err().to_string();
    assert!(refused.contains("model.embed_tokens.weight"), "{refused}");
}

#[test]
fn mixture_coefficients_0_and_1_are_the_adapted_model_and_its_base() {
    let policy = adapted(9, 1, &["all-linear"]);
    let reference = policy.without_adapter();
    let settings = SamplingSettings::plain(12);
    let mut sampler =
        MixtureSampler::new(policy.clone(), Some(reference.clone()), settings, 16, 32).unwrap();
    for key in 0..8 {
        let request = Request {
            key,
            ids: vec![0, 4],
            seed: Seed(77).derive(key),
            mixture_coefs: vec![0.0, 1.0],
            exact: 0,
            max_new_tokens: 12,
            records_reference: true,
        };
        sampler.admit(request).unwrap();
    }
    let mut finished = Vec::new();
    while !sampler.is_idle() {
        finished.extend(sampler.step().unwrap());
    }
    let mut differ = 0.0;
    for completion in finished.iter().flat_map(|f| &f.completions) {
        let sequence = Sequence {
            prompt: &[0, 4],
            completion: &completion.ids,
        };
        let of = |model: &LanguageModel| -> Vec<f32> {
            model.logprobs(&[sequence]).unwrap().logp.to_vec1().unwrap()
        };
        let (policy_logp, reference_logp) = (of(&policy), of(&reference));
        let behaviour_logp = if completion.mixture_coef == 0.0 {
            &policy_logp
        } else {
            &reference_logp
        };
        assert!(max_difference(&completion.behaviour_logp, behaviour_logp) < 1e-4);
        assert!(max_difference(&completion.logp, &policy_logp) < 1e-4);
        assert!(max_difference(&completion.ref_logp, &reference_logp) < 1e-4);
        differ = f32::max(differ, max_difference(&policy_logp, &reference_logp));
    }
    assert_eq!(finished.len(), 8);
    assert!(differ > 1e-2, "the adapter has no effect");
}

fn named(base: &str) -> BaseModel {
    BaseModel {
        name: base.into(),
        revision: None,
    }
}

/// A model folder and a model with an adapter for it.
fn on_disk() -> (tempfile::TempDir, ModelFolder, LanguageModel) {
    let source = folder();
    let from = ModelFolder::open(source.path(), None).unwrap();
    let weights = from.weights(DType::F32, &Device::Cpu).unwrap();
    let base = LanguageModel::new(from.config.clone(), weights).unwrap();
    let config = LoraConfig {
        base_model: from.base_model.clone(),
        alpha: 3.5,
        dropout: 0.25,
        ..config(&["all-linear"])
    };
    let model = base.with_adapter(fresh(&base, config, 3)).unwrap();
    (source, from, model)
}

#[test]
fn a_saved_adapter_round_trips_and_finds_its_base() {
    let (_source, from, model) = on_disk();
    let target = tempfile::tempdir().unwrap();
    save_policy(target.path(), &from, &model).unwrap();
    let saved = read_json(&target.path().join("adapter_config.json")).unwrap();
    assert_eq!(saved["peft_type"], "LORA");
    assert_eq!(saved["lora_alpha"], 3.5);
    assert_eq!(
        saved["target_modules"],
        json!([
            "down_proj",
            "gate_proj",
            "k_proj",
            "o_proj",
            "q_proj",
            "up_proj",
            "v_proj"
        ])
    );
    assert!(!target.path().join("model.safetensors").exists());
    let opened = open_policy(target.path(), None, None, DType::F32, &Device::Cpu);
    let (base, again) = opened.unwrap();
    assert_eq!(base.path, from.path);
    assert_eq!(again.adapter().unwrap().config().dropout, 0.25);
    assert_eq!(
        again.trained().digest().unwrap(),
        model.trained().digest().unwrap()
    );
    // Saved again, the files are identical.
    let second = tempfile::tempdir().unwrap();
    save_policy(second.path(), &base, &again).unwrap();
    for file in [
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
    ] {
        let read = |folder: &Path| fs::read(folder.join(file)).unwrap();
        assert_eq!(read(second.path()), read(target.path()), "{file}");
    }
    assert_eq!(
        model
            .with_saved_weights(target.path())
            .unwrap()
            .trained()
            .digest()
            .unwrap(),
        model.trained().digest().unwrap()
    );
}

#[test]
fn an_adapter_of_a_different_base_is_refused() {
    let (_source, from, model) = on_disk();
    let target = tempfile::tempdir().unwrap();
    save_policy(target.path(), &from, &model).unwrap();
    let opened = AdapterFolder::open(target.path()).unwrap();
    let refused = |base: &LanguageModel| opened.adapter(base).unwrap_err().to_string();
    let mismatched = refused(&tiny_model(9, 1));
    assert!(
        mismatched.contains("lora_A.weight") && mismatched.contains("was made for"),
        "{mismatched}"
    );
    // The same shapes with different weights.
    let others = Weights::initialise(&from.config, Seed(8), DType::F32, &Device::Cpu).unwrap();
    let other = LanguageModel::new(from.config.clone(), others).unwrap();
    let changed = refused(&other);
    assert!(changed.contains("not those it was trained on"), "{changed}");
    // The same weights in another dtype.
    let narrow = model.weights().to_dtype(DType::BF16).unwrap();
    let narrow = LanguageModel::new(from.config.clone(), narrow).unwrap();
    assert!(opened.adapter(&narrow).is_ok());
    fs::remove_file(target.path().join("adapter_model.safetensors")).unwrap();
    let missing = refused(&model);
    assert!(missing.contains("adapter_model.safetensors"), "{missing}");
    let orphan = AdapterFolder {
        config: LoraConfig {
            base_model: named("nowhere/at-all"),
            ..opened.config
        },
        ..opened
    };
    let orphan = orphan.base().unwrap_err().to_string();
    assert!(
        orphan.contains("\"nowhere/at-all\"") && orphan.contains("was not found"),
        "{orphan}"
    );
}

#[test]
fn an_adapter_is_known_by_its_fingerprint_or_the_name_of_its_base() {
    let (_source, from, model) = on_disk();
    let target = tempfile::tempdir().unwrap();
    save_policy(target.path(), &from, &model).unwrap();
    let folder_name = from.path.file_name().unwrap().to_str().unwrap();
    let moved = format!("/elsewhere/{folder_name}/");
    let rename = |name: Value| {
        let path = target.path().join("adapter_config.json");
        let mut raw = read_json(&path).unwrap();
        raw["base_model_name_or_path"] = name;
        fs::write(path, raw.to_string()).unwrap();
    };
    let is_known = || {
        let adapter = AdapterFolder::open(target.path()).unwrap();
        let bytes = fs::read(target.path().join("adapter_model.safetensors")).unwrap();
        adapter.is_known_for(&bytes, &from)
    };
    rename(json!("org/another"));
    assert!(is_known(), "its fingerprint shows the base");
    let blob = model.trained().to_blob().unwrap();
    fs::write(target.path().join("adapter_model.safetensors"), blob).unwrap();
    for (name, expected) in [
        (json!("org/another"), false),
        (json!("/models/another"), false),
        (json!(from.base_model.name), true),
        (json!(moved), true),
        (json!(format!("org/{folder_name}")), true),
        (json!(""), true),
        (json!(null), true),
    ] {
        rename(name.clone());
        assert_eq!(is_known(), expected, "{name}");
    }
}

const OTHER_TEMPLATE: &str = "other {{ messages[0].content }}";

/// A copy of a policy's folder.
fn exported(adapter: &AdapterFolder, policy: &(ModelFolder, LanguageModel)) -> tempfile::TempDir {
    let to = tempfile::tempdir().unwrap();
    save_policy(to.path(), &policy.0, &policy.1).unwrap();
    adapter.save_tokenizer_files(to.path(), &policy.0).unwrap();
    to
}

#[test]
fn the_chat_template_of_an_adapter_is_used_and_saved() {
    let (source, _, model) = on_disk();
    let given = source.path().join("given.jinja");
    fs::write(&given, OTHER_TEMPLATE).unwrap();
    fs::write(source.path().join("chat_template.jinja"), "base").unwrap();
    let trained = ModelFolder::open(source.path(), Some(&given)).unwrap();
    let digest = trained.tokenizer.chat_template_digest();
    let checkpoint = tempfile::tempdir().unwrap();
    save_policy(checkpoint.path(), &trained, &model).unwrap();
    let in_folder = |name: &str| checkpoint.path().join(name);
    let open = || {
        let opened = open_policy(checkpoint.path(), None, None, DType::F32, &Device::Cpu);
        opened.map_err(|error| error.to_string())
    };
    let check = |case: &str| {
        let policy = open().unwrap();
        assert_eq!(policy.0.tokenizer.chat_template_digest(), digest, "{case}");
        let merged = policy.1.merged().unwrap();
        let merged = LanguageModel::new(policy.0.config.clone(), merged).unwrap();
        let adapter = AdapterFolder::open(checkpoint.path()).unwrap();
        let copy = exported(&adapter, &policy);
        let again = open_policy(copy.path(), None, None, DType::F32, &Device::Cpu).unwrap();
        assert_eq!(again.0.tokenizer.chat_template_digest(), digest, "{case}");
        let copy = exported(&adapter, &(policy.0, merged));
        let again = ModelFolder::open(copy.path(), None).unwrap();
        assert_eq!(again.tokenizer.chat_template_digest(), digest, "{case}");
    };
    check("with a whole tokenizer");
    fs::remove_file(in_folder("tokenizer.json")).unwrap();
    check("with a template only");
    fs::remove_file(in_folder("chat_template.jinja")).unwrap();
    let raw = json!({"chat_template": OTHER_TEMPLATE}).to_string();
    fs::write(in_folder("tokenizer_config.json"), raw).unwrap();
    let refused = open().unwrap_err();
    assert!(refused.contains("save the template as"), "{refused}");
    let tokenizer = source.path().join("tokenizer.json");
    fs::copy(tokenizer, in_folder("tokenizer.json")).unwrap();
    check("in tokenizer_config.json");
    // Settings override it.
    fs::write(&given, "given").unwrap();
    let opened = open_policy(
        checkpoint.path(),
        None,
        Some(&given),
        DType::F32,
        &Device::Cpu,
    );
    let text = opened.unwrap().0.tokenizer;
    assert_eq!(text.given_chat_template(), Some("given"));
    // Without one, the base's is used.
    fs::remove_file(in_folder("tokenizer_config.json")).unwrap();
    let base = ModelFolder::open(source.path(), None).unwrap();
    assert_eq!(
        open().unwrap().0.tokenizer.chat_template_digest(),
        base.tokenizer.chat_template_digest()
    );
}

#[test]
fn the_generation_configuration_of_an_adapter_is_used_and_saved() {
    let (source, from, model) = on_disk();
    let generation = |folder: &Path, raw: &str| {
        fs::write(folder.join("generation_config.json"), raw).unwrap();
    };
    generation(source.path(), r#"{"eos_token_id": 3}"#);
    let checkpoint = tempfile::tempdir().unwrap();
    save_policy(checkpoint.path(), &from, &model).unwrap();
    let raw = r#"{"eos_token_id": [2, 9999], "temperature": 0.5}"#;
    generation(checkpoint.path(), raw);
    let policy = open_policy(checkpoint.path(), None, None, DType::F32, &Device::Cpu).unwrap();
    let stops: Vec<u32> = policy.0.config.stops.ids().collect();
    assert_eq!(stops, [1, 2]);
    let stops: Vec<u32> = policy.1.config().stops.ids().collect();
    assert_eq!(stops, [1, 2]);
    let adapter = AdapterFolder::open(checkpoint.path()).unwrap();
    let copy = exported(&adapter, &policy);
    let saved = fs::read_to_string(copy.path().join("generation_config.json")).unwrap();
    assert_eq!(saved, raw);
}

#[test]
fn an_adapter_with_another_vocabulary_is_refused() {
    let (source, from, model) = on_disk();
    let target = tempfile::tempdir().unwrap();
    save_policy(target.path(), &from, &model).unwrap();
    let open = |change: fn(&mut Value)| {
        let mut raw = read_json(&source.path().join("tokenizer.json")).unwrap();
        change(&mut raw);
        fs::write(target.path().join("tokenizer.json"), raw.to_string()).unwrap();
        let opened = open_policy(target.path(), None, None, DType::F32, &Device::Cpu);
        opened.map(drop).map_err(|error| error.to_string())
    };
    // Another release writes other defaults.
    assert_eq!(open(|raw| raw["padding"] = json!(null)), Ok(()));
    let changes: [fn(&mut Value); 2] = [
        |raw| raw["model"]["vocab"]["cat"] = json!(4),
        |raw| raw["added_tokens"][0]["content"] = json!("<new>"),
    ];
    for change in changes {
        let refused = open(change).unwrap_err();
        assert!(
            refused.contains("tokenizer.json") && refused.contains("name the model"),
            "{refused}"
        );
    }
}

/// PEFT's file with some keys changed, as read.
fn read_peft(changes: Value) -> Result<LoraConfig, ModelError> {
    let mut raw = json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "bias": "none",
        "target_modules": ["q_proj"], "use_rslora": true, "megatron_core": "megatron.core",
        "rank_pattern": {}, "a_key_of_tomorrow": null, "inference_mode": true,
    });
    let Value::Object(changes) = changes else {
        panic!("{changes} are no keys")
    };
    raw.as_object_mut().unwrap().extend(changes);
    LoraConfig::read(&raw, Path::new("adapter_config.json"), ModelTask::Language)
}

fn assert_refused(cases: impl IntoIterator<Item = (Value, &'static str)>) {
    for (changes, expected) in cases {
        let refused = read_peft(changes).unwrap_err().to_string();
        assert!(refused.contains(expected), "{refused} lacks {expected}");
    }
}

#[test]
fn unsupported_peft_features_are_refused_by_name() {
    let config = read_peft(json!({})).unwrap();
    assert_eq!((config.rank, config.alpha), (4, 8.0));
    assert!(config.rank_stabilised);
    assert_refused([
        (json!({"peft_type": "IA3"}), "peft_type is IA3"),
        (json!({"task_type": "SEQ_CLS"}), "task_type is SEQ_CLS"),
        (json!({"use_dora": true}), "use_dora = true"),
        (json!({"bias": "lora_only"}), "bias is \"lora_only\""),
        (json!({"modules_to_save": ["lm_head"]}), "modules_to_save"),
        (json!({"rank_pattern": {"q_proj": 0}}), "rank_pattern's"),
        (
            json!({"rank_pattern": {"q_proj": "8"}}),
            "rank_pattern gives",
        ),
        (json!({"rank_pattern": {"(q": 8}}), "rank_pattern: \"(q\""),
        (json!({"alpha_pattern": [8]}), "alpha_pattern is [8]"),
        (json!({"layers_to_transform": ["0"]}), "layers_to_transform"),
        (
            json!({"layers_pattern": "layers"}),
            "needs layers_to_transform",
        ),
        (
            json!({"target_modules": "all-linear", "layers_to_transform": [0]}),
            "layers_to_transform cannot stand beside",
        ),
        (json!({"exclude_modules": "["}), "exclude_modules: \"[\""),
        (json!({"lora_bias": true}), "lora_bias = true"),
        (
            json!({"trainable_token_indices": [1]}),
            "trainable_token_indices",
        ),
        (
            json!({"target_parameters": ["mlp.experts"]}),
            "target_parameters",
        ),
        (json!({"layer_replication": [[0, 1]]}), "layer_replication"),
        (json!({"fan_in_fan_out": true}), "fan_in_fan_out"),
        (json!({"a_key_of_tomorrow": 3}), "a_key_of_tomorrow = 3"),
        (json!({"init_lora_weights": "pissa"}), "init_lora_weights"),
        (json!({"target_modules": "(.*_proj"}), "target_modules: \"("),
        (json!({"target_modules": 3}), "target_modules is 3"),
        (
            json!({"target_modules": [3]}),
            "target_modules has an entry",
        ),
        (json!({"peft_type": "AGON_LORA"}), "peft_type is AGON_LORA"),
    ]);
}

#[test]
fn peft_keys_of_another_type_are_refused_by_name() {
    assert_refused([
        (json!({"r": 0}), "r is 0"),
        (json!({"r": 2.5}), "r is 2.5"),
        (
            json!({"r": "four"}),
            "adapter_config.json is not usable: r is \"four\", not a number from 0 on",
        ),
        (
            json!({"use_rslora": 1}),
            "adapter_config.json is not usable: use_rslora is 1, not true, false or null",
        ),
        (
            json!({"use_rslora": "true"}),
            "use_rslora is \"true\", not true, false or null",
        ),
        (json!({"bias": true}), "bias is true, not a text"),
        (json!({"task_type": 3}), "task_type is 3, not a text"),
        (
            json!({"peft_type": ["LORA"]}),
            "peft_type is [\"LORA\"], not",
        ),
        (
            json!({"base_model_name_or_path": 1}),
            "base_model_name_or_path is 1, not",
        ),
        (json!({"revision": 1}), "revision is 1, not a text"),
        (json!({"init_lora_weights": 1}), "init_lora_weights is 1"),
    ]);
}

#[test]
fn target_modules_match_name_suffixes() {
    let base = tiny_model(9, 1);
    let modules = |targets: &[&str]| {
        let found = config(targets).modules(base.config());
        found
            .map(|found| found.len())
            .map_err(|error| error.to_string())
    };
    assert_eq!(modules(&["q_proj"]), Ok(2));
    assert_eq!(
        modules(&["layers.1.self_attn.q_proj", "mlp.down_proj"]),
        Ok(3)
    );
    assert_eq!(modules(&["all-linear"]), Ok(14));
    // Module names of another family are ignored, as in PEFT, but refused in settings.
    assert_eq!(modules(&["q_proj", "query"]), Ok(2));
    let check = |targets: &[&str]| {
        let checked = config(targets).check_targets(base.config());
        checked.map_err(|error| error.to_string())
    };
    let unknown = check(&["q_proj", "query"]).unwrap_err();
    let kinds = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj";
    assert!(
        unknown.contains("\"query\"") && unknown.contains(kinds),
        "{unknown}"
    );
    assert_eq!(check(&["q_proj", "mlp.down_proj"]), Ok(()));
    assert_eq!(check(&["all-linear"]), Ok(()));
    let none = modules(&["query", "proj"]).unwrap_err();
    assert!(
        none.contains("[\"query\",\"proj\"]") && none.contains(kinds),
        "{none}"
    );
    assert!(modules(&[]).unwrap_err().contains("all-linear"));
    let none = LoraConfig {
        rank: 0,
        ..config(&["q_proj"])
    };
    let refused = none.modules(base.config()).unwrap_err().to_string();
    assert!(refused.contains("rank of at least 1"), "{refused}");
    let saved = |targets: &[&str]| {
        config(targets).to_json(base.config(), ModelTask::Language)["target_modules"].clone()
    };
    assert_eq!(
        saved(&["layers.1.self_attn.q_proj"]),
        json!(["layers.1.self_attn.q_proj"])
    );
    assert_eq!(saved(&["all-linear"]).as_array().unwrap().len(), 7);
}

#[test]
fn modules_other_than_linear_layers_of_blocks_are_refused_by_name() {
    let base = tiny_model(9, 1);
    let refused = |targets: Value, task| {
        let raw = json!({"peft_type": "LORA", "r": 2, "target_modules": targets});
        let read = LoraConfig::read(&raw, Path::new("adapter_config.json"), task).unwrap();
        let modules = read.modules(base.config());
        modules.map(|found| found.len()).map_err(|e| e.to_string())
    };
    for (targets, name) in [
        (json!(["q_proj", "lm_head"]), "names lm_head"),
        (
            json!(["q_proj", "embed_tokens"]),
            "names model.embed_tokens",
        ),
        (
            json!(["q_proj", "input_layernorm"]),
            "names model.layers.0.input_layernorm",
        ),
        (json!(".*"), "names model, which"),
        (json!(r".*\.(self_attn|mlp)\..*"), "mlp.act_fn"),
    ] {
        let refused = refused(targets, ModelTask::Language).unwrap_err();
        assert!(refused.contains(name), "{refused} lacks {name}");
    }
    // A classifier has no lm_head, so that PEFT ignores the name.
    assert_eq!(
        refused(json!(["q_proj", "lm_head"]), ModelTask::Reward),
        Ok(2)
    );
}

/// Values of a tensor of this name, by the formula in the test below.
fn wave(name: &str, shape: &[usize]) -> Tensor {
    let sum = name.bytes().map(u64::from).sum::<u64>() % 97;
    let count = shape.iter().product::<usize>();
    let value = |i: usize| (0.2 * (0.7 * i as f64 + sum as f64).sin()) as f32;
    Tensor::from_vec(
        (0..count).map(value).collect::<Vec<_>>(),
        shape,
        &Device::Cpu,
    )
    .unwrap()
}

/// The log-probabilities of the tokens 20 to 80 after 1 under an adapter of `random-llama3` with these keys, as PEFT
/// 0.21.2 computes them with transformers 5.23 in float32: `get_peft_model` of a `LoraConfig(r=4, lora_alpha=8,
/// **keys)`, every `lora_` tensor filled with `0.2 * sin(0.7 * i + sum(name.encode()) % 97)` at its flat index i.
#[test]
#[expect(clippy::too_many_lines, reason = "a table of values")]
fn adapters_of_every_shape_match_peft() {
    let Some(base) = shared("data/models/random-llama3") else {
        return;
    };
    let q_and_v = [
        -5.8002, -7.38645, -6.02407, -7.23771, -8.32895, -7.9218, -4.86261,
    ];
    let cases = [
        (
            json!({"target_modules": ["q_proj", "v_proj", "query_key_value", "W_pack"]}),
            q_and_v,
        ),
        (
            json!({"target_modules": r"model\.layers\.\d+\.self_attn\.(q|v)_proj"}),
            q_and_v,
        ),
        (json!({"target_modules": null}), q_and_v),
        (
            json!({"target_modules": r"^(?!.*layers\.0\.).*\.(up|down)_proj$"}),
            [
                -5.59188, -7.66881, -6.80829, -8.31897, -5.91054, -5.60774, -5.40681,
            ],
        ),
        (
            json!({"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]}),
            [
                -6.69111, -6.38925, -6.77773, -7.94008, -8.91999, -7.8906, -5.20842,
            ],
        ),
        (
            json!({
                "target_modules": ["q_proj", "down_proj"], "layers_to_transform": 1,
                "layers_pattern": "layers"
            }),
            [
                -5.54238, -7.66878, -7.08329, -7.87991, -6.42328, -5.79435, -4.66857,
            ],
        ),
        (
            json!({
                "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0],
                "layers_pattern": ["h", "layers"]
            }),
            [
                -6.438, -6.38731, -7.32488, -7.84936, -9.63574, -7.66426, -4.45079,
            ],
        ),
        (
            json!({
                "target_modules": ["model.layers.2.mlp.up_proj", "o_proj"],
                "layers_to_transform": [1]
            }),
            [
                -5.80588, -7.63458, -5.97961, -8.79893, -5.91564, -5.87148, -5.06175,
            ],
        ),
        (
            json!({
                "target_modules": ["q_proj", "v_proj", "down_proj"],
                "rank_pattern": {
                    "layers.1.self_attn.q_proj": 2, "q_proj": 6, r"layers\.[01]\..*_proj": 3
                },
                "alpha_pattern": {r"^model\.layers\.2\..*": 2.5, "down_proj": 16}
            }),
            [
                -7.28548, -6.03176, -6.96875, -8.18066, -5.86158, -6.27063, -5.44069,
            ],
        ),
        (
            json!({
                "target_modules": ["q_proj", "v_proj", "down_proj"], "use_rslora": true,
                "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"v_proj": 16}
            }),
            [
                -6.04096, -6.59016, -6.39714, -5.03952, -7.26616, -7.77588, -7.34783,
            ],
        ),
        (
            json!({
                "target_modules": "all-linear",
                "exclude_modules": ["k_proj", "layers.0.mlp.gate_proj"]
            }),
            [
                -5.97786, -6.99404, -6.43315, -9.99208, -6.27476, -6.67876, -4.95414,
            ],
        ),
        (
            json!({"target_modules": "ALL-linear", "exclude_modules": r".*layers\.[12]\..*"}),
            [
                -6.54412, -7.79223, -7.54247, -7.03748, -6.54527, -6.58608, -5.28864,
            ],
        ),
        (
            json!({"target_modules": ["proj", "self_attn.k_proj"]}),
            [
                -6.35992, -7.07174, -5.92771, -8.04268, -8.69846, -9.61063, -4.41563,
            ],
        ),
    ];
    for (keys, expected) in cases {
        matches_peft(&base, &keys, &expected);
    }
}

/// Compares an adapter with these keys for the model in `base` with PEFT, as read and after saving it again.
fn matches_peft(base: &Path, keys: &Value, expected: &[f32]) {
    let mut raw = json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8,
        "base_model_name_or_path": "org/base", "revision": "v1",
    });
    raw.as_object_mut()
        .unwrap()
        .extend(keys.as_object().unwrap().clone());
    let first = tempfile::tempdir().unwrap();
    fs::write(first.path().join("adapter_config.json"), raw.to_string()).unwrap();
    let opened = AdapterFolder::open(first.path()).unwrap();
    let shape = ModelConfig::load(base).unwrap();
    let tensors = opened.config.tensors(&shape).unwrap();
    let tensors = tensors.into_iter().map(|(name, shape)| {
        let tensor = wave(&name, &shape);
        (name, tensor)
    });
    let weights = Weights::of(tensors.collect());
    let file = "adapter_model.safetensors";
    fs::write(first.path().join(file), weights.to_blob().unwrap()).unwrap();
    let second = tempfile::tempdir().unwrap();
    for adapter in [first.path(), second.path()] {
        let opened = open_policy(base, Some(adapter), None, DType::F32, &Device::Cpu);
        let (folder, model) = opened.unwrap();
        let sequence = Sequence {
            prompt: &[1],
            completion: &[20, 30, 40, 50, 60, 70, 80],
        };
        let found: Vec<f32> = model.logprobs(&[sequence]).unwrap().logp.to_vec1().unwrap();
        assert!(max_difference(&found, expected) < 1e-3, "{keys}: {found:?}");
        save_policy(second.path(), &folder, &model).unwrap();
    }
    let saved = read_json(&second.path().join("adapter_config.json")).unwrap();
    assert_eq!(saved["base_model_name_or_path"], "org/base");
    assert_eq!(saved["revision"], "v1");
    let preserved = |key: &str| match (&saved[key], &keys[key]) {
        (saved, Value::Null) => saved.is_null() || saved == &json!({}) || saved == &json!(false),
        (saved, given) => saved == given,
    };
    for key in [
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
    ] {
        assert!(preserved(key), "{key} of {keys} became {}", saved[key]);
    }
}

#[test]
fn the_task_type_must_match_the_model() {
    let base = tiny_model(9, 1);
    let read = |raw: &Value, task| {
        let read = LoraConfig::read(raw, Path::new("adapter_config.json"), task);
        read.map(|_| ()).map_err(|error| error.to_string())
    };
    for (task, other, task_type) in [
        (ModelTask::Language, ModelTask::Reward, "CAUSAL_LM"),
        (ModelTask::Reward, ModelTask::Language, "SEQ_CLS"),
    ] {
        let raw = config(&["q_proj"]).to_json(base.config(), task);
        assert_eq!(raw["task_type"], task_type);
        assert_eq!(read(&raw, task), Ok(()));
        let refused = read(&raw, other).unwrap_err();
        assert!(
            refused.contains(&format!("task_type is {task_type}")),
            "{refused}"
        );
    }
    // PEFT lists one or both names as a classifier's head.
    let mut raw = config(&["q_proj"]).to_json(base.config(), ModelTask::Reward);
    for (whole, fits) in [
        (json!(["score"]), true),
        (json!(null), true),
        (json!(["score", "embed_tokens"]), false),
        (json!("score"), false),
    ] {
        raw["modules_to_save"] = whole;
        assert_eq!(read(&raw, ModelTask::Reward).is_ok(), fits, "{raw}");
    }
}
