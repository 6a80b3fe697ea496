use std::{collections::BTreeSet, fs, path::Path};

use serde_json::{Value, json};

use super::*;
use crate::{
    AdamWSettings, CompletionWriter as _, Gradients, ModelFolder, Optimizer, Request, Sampler,
    SamplingSettings, Sequence,
    config::{Task, read_json},
    fixtures::{adapted, folder, lora_config as config, shared, tiny_model},
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

fn scores(model: &LanguageModel) -> Vec<f32> {
    model.score(&SEQUENCES).unwrap().logp.to_vec1().unwrap()
}

fn apart(a: &[f32], b: &[f32]) -> f32 {
    let gaps = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    gaps.fold(0.0, f32::max)
}

#[test]
fn a_fresh_adapter_changes_no_bit_and_begins_as_peft_does() {
    let base = tiny_model(9, 1);
    let adapter = fresh(&base, config(&["all-linear"]), 5);
    // Seven modules in each of two blocks, two factors each.
    assert_eq!(adapter.weights.tensors.len(), 28);
    for (name, tensor) in &adapter.weights.tensors {
        let numbers: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
        if name.contains("lora_B") {
            assert!(numbers.iter().all(|&x| x == 0.0), "{name}");
        } else {
            let bound = 1.0 / (tensor.dim(1).unwrap() as f32).sqrt();
            assert!(numbers.iter().all(|x| x.abs() <= bound), "{name}");
            // Uniform in both directions: a variance of bound²/3.
            let variance = numbers.iter().map(|x| x * x).sum::<f32>() / numbers.len() as f32;
            assert!(
                (0.5..1.5).contains(&(variance * 3.0 / bound.powi(2))),
                "{name}"
            );
        }
    }
    let adapted = base.with_adapter(adapter.clone()).unwrap();
    assert_eq!(scores(&adapted), scores(&base));
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
fn a_merged_model_says_what_the_adapted_one_does_and_the_base_stays() {
    for targets in [&["q_proj", "v_proj", "down_proj"][..], &["all-linear"]] {
        let model = adapted(9, 1, targets);
        let base = tiny_model(9, 1);
        assert_eq!(scores(&model.without_adapter()), scores(&base));
        assert!(apart(&scores(&model), &scores(&base)) > 1e-2, "{targets:?}");
        let merged = LanguageModel::new(model.config().clone(), model.merged().unwrap()).unwrap();
        assert!(
            apart(&scores(&model), &scores(&merged)) < 1e-5,
            "{targets:?}"
        );
    }
}

#[test]
fn the_scale_is_alpha_over_the_rank_or_over_its_root() {
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
fn training_moves_the_adapter_alone_and_no_gradient_of_the_base_is_computed() {
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
    let before = (base.weights().digest().unwrap(), scores(&base));
    for step in 0..20 {
        let loss = model
            .score(&SEQUENCES)
            .unwrap()
            .logp
            .sum_all()
            .unwrap()
            .neg()
            .unwrap();
        let mut gradients = Gradients::default();
        gradients.add(&loss).unwrap();
        for (name, tensor) in &model.weights().tensors {
            assert!(
                gradients.get(tensor).is_none(),
                "step {step}: {name} got a gradient"
            );
        }
        let norm = optimizer.norm(&gradients).unwrap();
        optimizer.step(&gradients, norm, 3e-2).unwrap();
    }
    assert_eq!((base.weights().digest().unwrap(), scores(&base)), before);
    let sum = |model: &LanguageModel| scores(model).iter().sum::<f32>();
    assert!(
        sum(&model) > sum(&base) + 0.5,
        "{} after {}",
        sum(&model),
        sum(&base)
    );
    assert_eq!(sum(&start), sum(&base));
}

#[test]
fn dropout_is_its_seeds_and_only_in_training() {
    let model = adapted(9, 1, &["all-linear"]);
    let adapter = model.adapter().unwrap().clone();
    let half = model.with_adapter(adapter.with_dropout(0.5)).unwrap();
    assert_eq!(scores(&half), scores(&model));
    let dropped = |seed| scores(&half.dropping(Seed(seed)));
    assert_eq!(dropped(1), dropped(1));
    assert!(apart(&dropped(1), &dropped(2)) > 1e-3);
    assert!(apart(&dropped(1), &scores(&model)) > 1e-3);
    assert_eq!(scores(&model.dropping(Seed(1))), scores(&model));
    // What is left out is made up for: the mean over masks is near the whole.
    let base = scores(&model.without_adapter());
    let rare = model.adapter().unwrap().clone().with_dropout(0.1);
    let rare = model.with_adapter(rare).unwrap();
    let count = 200;
    let mut mean = vec![0.0; base.len()];
    for seed in 0..count {
        for (mean, score) in mean.iter_mut().zip(scores(&rare.dropping(Seed(seed)))) {
            *mean += score / count as f32;
        }
    }
    let (off, whole) = (apart(&mean, &scores(&model)), apart(&base, &scores(&model)));
    assert!(off < 0.2 * whole, "{off} of {whole}");
}

#[test]
fn a_blob_holds_the_adapter_alone_and_gives_it_back() {
    let model = adapted(9, 1, &["q_proj", "v_proj"]);
    let blob = model.trained().to_blob().unwrap();
    assert!(blob.len() * 4 < model.weights().to_blob().unwrap().len());
    let base = tiny_model(9, 1);
    let idle = base
        .with_adapter(fresh(&base, config(&["q_proj", "v_proj"]), 5))
        .unwrap();
    let loaded = idle.with_blob(&blob).unwrap();
    assert_eq!(scores(&loaded), scores(&model));
    // One copy of the base: the very tensors.
    let name = "model.layers.0.mlp.up_proj.weight";
    let id = |model: &LanguageModel| model.weights().get(name).unwrap().id();
    assert_eq!(id(&loaded), id(&base));
    assert_eq!(id(&loaded.without_adapter()), id(&base));
    // The two kinds of blobs are not taken for one another.
    let whole = base.weights().to_blob().unwrap();
    let refused = idle.with_blob(&whole).unwrap_err().to_string();
    assert!(refused.contains("lora_A.weight"), "{refused}");
    let refused = base.with_blob(&blob).unwrap_err().to_string();
    assert!(refused.contains("model.embed_tokens.weight"), "{refused}");
}

#[test]
fn the_ends_of_the_mixture_are_the_adapted_model_and_its_base() {
    let policy = adapted(9, 1, &["all-linear"]);
    let reference = policy.without_adapter();
    let settings = SamplingSettings::plain(12);
    let mut sampler =
        Sampler::new(policy.clone(), Some(reference.clone()), settings, 16, 32).unwrap();
    for key in 0..8 {
        let request = Request {
            key,
            ids: vec![0, 4],
            seed: Seed(77).derive(key),
            mixture_coefs: vec![0.0, 1.0],
            exact: 0,
            max_new_tokens: 12,
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
            model.score(&[sequence]).unwrap().logp.to_vec1().unwrap()
        };
        let (of_policy, of_reference) = (of(&policy), of(&reference));
        let drawn_from = if completion.mixture_coef == 0.0 {
            &of_policy
        } else {
            &of_reference
        };
        assert!(apart(&completion.behaviour_logp, drawn_from) < 1e-4);
        assert!(apart(&completion.logp, &of_policy) < 1e-4);
        assert!(apart(&completion.ref_logp, &of_reference) < 1e-4);
        differ = f32::max(differ, apart(&of_policy, &of_reference));
    }
    assert_eq!(finished.len(), 8);
    assert!(differ > 1e-2, "the adapter makes no difference");
}

fn named(base: &str) -> BaseModel {
    BaseModel {
        name: base.into(),
        revision: None,
    }
}

/// A model's folder, and an adapted model on it.
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
fn a_saved_adapter_is_the_same_adapter_and_finds_its_base() {
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
    let numbers = (DType::F32, &Device::Cpu);
    let (base, again) = open_policy(target.path(), None, None, numbers).unwrap();
    assert_eq!(base.path, from.path);
    assert_eq!(again.adapter().unwrap().config().dropout, 0.25);
    assert_eq!(
        again.trained().digest().unwrap(),
        model.trained().digest().unwrap()
    );
    // Written again, the files are the same.
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
            .as_saved(target.path())
            .unwrap()
            .trained()
            .digest()
            .unwrap(),
        model.trained().digest().unwrap()
    );
}

#[test]
fn an_adapter_of_another_base_is_refused() {
    let (_source, from, model) = on_disk();
    let target = tempfile::tempdir().unwrap();
    save_policy(target.path(), &from, &model).unwrap();
    let opened = AdapterFolder::open(target.path()).unwrap();
    let refused = |base: &LanguageModel| opened.adapter(base).unwrap_err().to_string();
    let wider = refused(&tiny_model(9, 1));
    assert!(
        wider.contains("lora_A.weight") && wider.contains("was made for"),
        "{wider}"
    );
    // The same shape, other weights.
    let others = Weights::initialise(&from.config, Seed(8), DType::F32, &Device::Cpu).unwrap();
    let other = LanguageModel::new(from.config.clone(), others).unwrap();
    let moved = refused(&other);
    assert!(moved.contains("not those it was trained beside"), "{moved}");
    // The same weights in other numbers.
    let narrow = model.weights().to_dtype(DType::BF16).unwrap();
    let narrow = LanguageModel::new(from.config.clone(), narrow).unwrap();
    assert!(opened.adapter(&narrow).is_ok());
    fs::remove_file(target.path().join("adapter_model.safetensors")).unwrap();
    let missing = refused(&model);
    assert!(missing.contains("adapter_model.safetensors"), "{missing}");
    let gone = AdapterFolder {
        config: LoraConfig {
            base_model: named("nowhere/at-all"),
            ..opened.config
        },
        ..opened
    };
    let gone = gone.base().unwrap_err().to_string();
    assert!(
        gone.contains("\"nowhere/at-all\"") && gone.contains("is not there"),
        "{gone}"
    );
}

#[test]
fn what_peft_can_and_we_cannot_is_refused_by_name() {
    let good = json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "bias": "none",
        "target_modules": ["q_proj"], "use_rslora": true, "megatron_core": "megatron.core",
        "rank_pattern": {}, "a_key_of_tomorrow": null, "inference_mode": true,
    });
    let read = |changes: Value| {
        let mut raw = good.clone();
        let changes = changes.as_object().unwrap().clone();
        raw.as_object_mut().unwrap().extend(changes);
        LoraConfig::read(&raw, Path::new("adapter_config.json"), Task::Language)
    };
    let config = read(json!({})).unwrap();
    assert_eq!((config.rank, config.alpha), (4, 8.0));
    assert!(config.rank_stabilised);
    let cases = [
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
        (json!({"target_modules": [3]}), "target_modules holds"),
        (json!({"peft_type": "AGON_LORA"}), "peft_type is AGON_LORA"),
        (json!({"r": 0}), "r is 0"),
        (json!({"r": 2.5}), "r is 2.5"),
        (json!({"r": "four"}), "r is not a number"),
    ];
    for (changes, expected) in cases {
        let refused = read(changes).unwrap_err().to_string();
        assert!(refused.contains(expected), "{refused} lacks {expected}");
    }
}

#[test]
fn modules_are_named_by_their_ends() {
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
    // A name of another family's module is passed over, as in PEFT, but not where a person writes it.
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
        config(targets).to_json(base.config(), Task::Language)["target_modules"].clone()
    };
    assert_eq!(
        saved(&["layers.1.self_attn.q_proj"]),
        json!(["layers.1.self_attn.q_proj"])
    );
    assert_eq!(saved(&["all-linear"]).as_array().unwrap().len(), 7);
}

#[test]
fn modules_that_are_no_linear_map_of_a_block_are_refused_by_name() {
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
        let refused = refused(targets, Task::Language).unwrap_err();
        assert!(refused.contains(name), "{refused} lacks {name}");
    }
    // A classifier has no such head: to PEFT the name is absent there.
    assert_eq!(refused(json!(["q_proj", "lm_head"]), Task::Reward), Ok(2));
}

/// The numbers of a tensor of this name, as the script below has them.
fn wave(name: &str, shape: &[usize]) -> Tensor {
    let sum = name.bytes().map(u64::from).sum::<u64>() % 97;
    let count = shape.iter().product::<usize>();
    let number = |i: usize| (0.2 * (0.7 * i as f64 + sum as f64).sin()) as f32;
    Tensor::from_vec(
        (0..count).map(number).collect::<Vec<_>>(),
        shape,
        &Device::Cpu,
    )
    .unwrap()
}

/// The log-probabilities of the tokens 20 to 80 after 1 under an adapter of `random-llama3` with these keys, as PEFT
/// 0.21.2 computes them with transformers 5.23 in float32: `get_peft_model` of a `LoraConfig(r=4, lora_alpha=8, **keys)`,
/// every `lora_` tensor filled with `0.2 * sin(0.7 * i + sum(name.encode()) % 97)` at its flat index i.
#[test]
#[expect(clippy::too_many_lines, reason = "a table of values")]
fn adapters_of_every_shape_say_what_they_say_in_peft() {
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
        says_what_it_says_in_peft(&base, &keys, &expected);
    }
}

/// An adapter with these keys beside the model in `base`, as it is read, and as it is read when it was saved again.
fn says_what_it_says_in_peft(base: &Path, keys: &Value, expected: &[f32]) {
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
        let numbers = (DType::F32, &Device::Cpu);
        let (folder, model) = open_policy(base, Some(adapter), None, numbers).unwrap();
        let sequence = Sequence {
            prompt: &[1],
            completion: &[20, 30, 40, 50, 60, 70, 80],
        };
        let found: Vec<f32> = model.score(&[sequence]).unwrap().logp.to_vec1().unwrap();
        assert!(apart(&found, expected) < 1e-3, "{keys}: {found:?}");
        save_policy(second.path(), &folder, &model).unwrap();
    }
    let saved = read_json(&second.path().join("adapter_config.json")).unwrap();
    assert_eq!(saved["base_model_name_or_path"], "org/base");
    assert_eq!(saved["revision"], "v1");
    let kept = |key: &str| match (&saved[key], &keys[key]) {
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
        assert!(kept(key), "{key} of {keys} became {}", saved[key]);
    }
}

#[test]
fn an_adapter_is_for_what_its_model_is_for() {
    let base = tiny_model(9, 1);
    let read = |raw: &Value, task| {
        let read = LoraConfig::read(raw, Path::new("adapter_config.json"), task);
        read.map(|_| ()).map_err(|error| error.to_string())
    };
    for (task, other, word) in [
        (Task::Language, Task::Reward, "CAUSAL_LM"),
        (Task::Reward, Task::Language, "SEQ_CLS"),
    ] {
        let raw = config(&["q_proj"]).to_json(base.config(), task);
        assert_eq!(raw["task_type"], word);
        assert_eq!(read(&raw, task), Ok(()));
        let refused = read(&raw, other).unwrap_err();
        assert!(
            refused.contains(&format!("task_type is {word}")),
            "{refused}"
        );
    }
    // PEFT itself names one of the two as a classifier's head, or both.
    let mut raw = config(&["q_proj"]).to_json(base.config(), Task::Reward);
    for (whole, fits) in [
        (json!(["score"]), true),
        (json!(null), true),
        (json!(["score", "embed_tokens"]), false),
        (json!("score"), false),
    ] {
        raw["modules_to_save"] = whole;
        assert_eq!(read(&raw, Task::Reward).is_ok(), fits, "{raw}");
    }
}
