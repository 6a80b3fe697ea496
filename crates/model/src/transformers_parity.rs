//! Parity of training and decoding with log-probabilities computed by other implementations for the same weights.

use std::path::Path;

use serde_json::{Value, json};

use crate::{
    DType, Device, Tensor,
    config::ModelConfig,
    decode::{Decoder, Precision, Prefill},
    fixtures::shared,
    folder::ModelFolder,
    lora::open_policy,
    ragged::Sequence,
    transformer::LanguageModel,
    weights::Weights,
};

const TRANSFORMERS: [&str; 4] = [
    "random-llama3",
    "random-mistral",
    "random-qwen2",
    "random-qwen3",
];
const NUMPY: [&str; 2] = ["stories260K", "babyllama-tok361"];

fn load(path: &Path) -> (LanguageModel, Value) {
    let folder = ModelFolder::open(path, None).unwrap();
    let weights = folder.weights(DType::F32, &Device::Cpu).unwrap();
    let expected = std::fs::read_to_string(path.join("reference.json")).unwrap();
    (
        LanguageModel::new(folder.config, weights).unwrap(),
        serde_json::from_str(&expected).unwrap(),
    )
}

fn ids(value: &Value) -> Vec<u32> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|id| id.as_u64().unwrap() as u32)
        .collect()
}

fn floats(value: &Value) -> Vec<f64> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|x| x.as_f64().unwrap())
        .collect()
}

/// log p(ids[t+1] | ids[..=t]) of every sequence by [`LanguageModel::logprobs`], in one ragged batch.
fn scored(model: &LanguageModel, sequences: &[Vec<u32>]) -> Vec<Vec<f64>> {
    let split: Vec<Sequence<'_>> = sequences
        .iter()
        .map(|ids| Sequence {
            prompt: &ids[..1],
            completion: &ids[1..],
        })
        .collect();
    let logprobs = model.logprobs(&split).unwrap();
    let mut flat = logprobs
        .logp
        .to_vec1::<f32>()
        .unwrap()
        .into_iter()
        .map(f64::from);
    logprobs
        .lengths
        .iter()
        .map(|&n| flat.by_ref().take(n).collect())
        .collect()
}

/// The same by incremental decoding: the first half of each sequence is prefilled, the rest decoded token by token, all
/// sequences concurrently and with different lengths.
fn decoded(model: &LanguageModel, sequences: &[Vec<u32>]) -> Vec<Vec<f64>> {
    let slots: Vec<usize> = (0..sequences.len()).rev().collect();
    let mut decoder = Decoder::new(model.clone(), Precision::F32, slots.len(), 256).unwrap();
    let prompts: Vec<Prefill<'_>> = sequences
        .iter()
        .zip(&slots)
        .map(|(ids, slot)| Prefill {
            ids: &ids[..ids.len() / 2],
            slots: std::slice::from_ref(slot),
        })
        .collect();
    let mut found: Vec<Vec<f64>> = vec![Vec::new(); sequences.len()];
    let mut rows: Vec<usize> = (0..sequences.len()).collect();
    let mut logits = decoder.prefill(&prompts).unwrap();
    loop {
        for (index, row) in rows.iter().enumerate() {
            let ids = &sequences[*row];
            let target = ids[ids.len() / 2 + found[*row].len()];
            found[*row].push(f64::from(crate::sampling::log_softmax_at(
                logits.row(index),
                target,
            )));
        }
        rows.retain(|&row| sequences[row].len() / 2 + found[row].len() < sequences[row].len());
        if rows.is_empty() {
            return found;
        }
        let step = |&row: &usize| {
            let ids = &sequences[row];
            (slots[row], ids[ids.len() / 2 + found[row].len() - 1])
        };
        let (slots, tokens): (Vec<usize>, Vec<u32>) = rows.iter().map(step).unzip();
        logits = decoder.extend(&slots, &tokens).unwrap();
    }
}

fn close(found: &[f64], expected: &[f64], context: &str) {
    assert_eq!(found.len(), expected.len(), "{context}");
    for (t, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!(
            (f - e).abs() < 1e-3,
            "{context}: entry {t} is {f}, expected {e}"
        );
    }
}

#[test]
fn training_and_decoding_match_transformers() {
    for name in TRANSFORMERS {
        let Some(path) = shared(&format!("data/models/{name}")) else {
            return;
        };
        let (model, expected) = load(&path);
        assert_parity(&model, &expected, name);
    }
}

#[test]
fn an_adapted_model_matches_peft() {
    let name = "random-llama3-lora";
    let (Some(base), Some(adapter)) = (
        shared("data/models/random-llama3"),
        shared(&format!("data/models/{name}")),
    ) else {
        return;
    };
    let opened = open_policy(&base, Some(&adapter), None, DType::F32, &Device::Cpu);
    let (_, model) = opened.unwrap();
    let expected = std::fs::read_to_string(adapter.join("reference.json")).unwrap();
    let expected: Value = serde_json::from_str(&expected).unwrap();
    assert_parity(&model, &expected, name);
    let merged = LanguageModel::new(model.config().clone(), model.merged().unwrap()).unwrap();
    assert_parity(&merged, &expected, "merged");
    // The adapter changes the log-probabilities.
    let (_, base_expected) = load(&base);
    assert_parity(
        &model.without_adapter(),
        &base_expected,
        "without the adapter",
    );
    let first = |expected: &Value| floats(&expected["logprobs"][0])[0];
    assert!((first(&expected) - first(&base_expected)).abs() > 1e-2);
}

/// Asserts that training and decoding give the expected log-probabilities.
fn assert_parity(model: &LanguageModel, parity: &Value, name: &str) {
    let rows = parity["ids"].as_array().unwrap().len();
    let length = |row: usize| floats(&parity["attention_mask"][row]).iter().sum::<f64>() as usize;
    let sequences: Vec<Vec<u32>> = (0..rows)
        .map(|row| ids(&parity["ids"][row])[..length(row)].to_vec())
        .collect();
    let expected: Vec<Vec<f64>> = (0..rows)
        .map(|row| floats(&parity["logprobs"][row])[..sequences[row].len() - 1].to_vec())
        .collect();
    for (row, found) in scored(model, &sequences).iter().enumerate() {
        close(found, &expected[row], &format!("{name}, scored, row {row}"));
    }
    for (row, found) in decoded(model, &sequences).iter().enumerate() {
        let from = sequences[row].len() / 2 - 1;
        close(
            found,
            &expected[row][from..],
            &format!("{name}, decoded, row {row}"),
        );
    }
}

#[test]
fn training_and_decoding_match_numpy_on_pretrained_models() {
    for name in NUMPY {
        let Some(path) = shared(&format!("data/models/{name}")) else {
            return;
        };
        let (model, expected) = load(&path);
        let text = ids(&expected["scored"]["ids"]);
        let found: f64 = scored(&model, std::slice::from_ref(&text))[0].iter().sum();
        let sum = expected["scored"]["sum_logprob"].as_f64().unwrap();
        assert!(
            (found - sum).abs() < 1e-3 * text.len() as f64,
            "{name}: {found}, not {sum}"
        );
        for prompt in expected["prompts"].as_array().unwrap() {
            let (start, greedy) = (ids(&prompt["ids"]), ids(&prompt["greedy_ids"]));
            assert_eq!(
                decode_greedily(&model, &start, greedy.len() - start.len()),
                greedy,
                "{name}"
            );
            let mut decoder = Decoder::new(model.clone(), Precision::F32, 1, 64).unwrap();
            let read = Prefill {
                ids: &start,
                slots: &[0],
            };
            let logits = decoder.prefill(&[read]).unwrap();
            let logits = logits.row(0);
            for pair in prompt["last_logits_top8"].as_array().unwrap() {
                let (token, logit) = (
                    pair[0].as_u64().unwrap() as usize,
                    pair[1].as_f64().unwrap(),
                );
                assert!(
                    (f64::from(logits[token]) - logit).abs() < 1e-3,
                    "{name}: token {token}"
                );
            }
        }
    }
}

fn decode_greedily(model: &LanguageModel, start: &[u32], count: usize) -> Vec<u32> {
    let capacity = start.len() + count;
    let mut decoder = Decoder::new(model.clone(), Precision::F32, 1, capacity).unwrap();
    let mut text = start.to_vec();
    let prompt = Prefill {
        ids: start,
        slots: &[0],
    };
    let mut logits = decoder.prefill(&[prompt]).unwrap();
    for _ in 0..count {
        let likeliest = logits.row(0).iter().enumerate();
        let likeliest = likeliest.max_by(|a, b| a.1.total_cmp(b.1)).unwrap();
        let next = likeliest.0 as u32;
        text.push(next);
        logits = decoder.extend(&[0], &[next]).unwrap();
    }
    text
}

/// A decoder of two layers with sine-wave weights, which need no file, with `changes` applied to its configuration.
fn sine_model(changes: &Value) -> LanguageModel {
    let mut raw = json!({
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 11, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "sliding_window": WINDOW,
    });
    for (key, value) in changes.as_object().unwrap() {
        raw[key] = value.clone();
    }
    let config = ModelConfig::from_json(raw, Path::new("config.json")).unwrap();
    let tensors = config.tensors().into_iter().enumerate();
    let tensors = tensors.map(|(k, (name, shape))| {
        let wave = |i: usize| 0.5 * (0.37 * (i * i) as f64 + 1.3 * k as f64).sin();
        let is_norm = shape.len() == 1 && !name.ends_with("bias");
        let value = |i| {
            if is_norm {
                1.0 + 0.2 * wave(i)
            } else {
                wave(i)
            }
        };
        let values: Vec<f32> = (0..shape.iter().product())
            .map(|i| value(i) as f32)
            .collect();
        (name, Tensor::from_vec(values, shape, &Device::Cpu).unwrap())
    });
    let weights = Weights::of(tensors.collect());
    LanguageModel::new(config, weights).unwrap()
}

/// Sliding-window size of the layers of [`sine_model`] that have one.
const WINDOW: usize = 5;

/// Token ids whose log-probabilities under models with the weights of [`sine_model`] were computed by transformers 5.23
/// in f32.
const SINE_IDS: [u32; 20] = [3, 10, 7, 5, 3, 2, 2, 2, 3, 5, 7, 10, 3, 7, 1, 7, 2, 9, 6, 3];
const MISTRAL: [f64; 19] = [
    -3.2282, -1.7039, -2.3451, -0.4275, -2.6335, -3.1496, -2.8385, -2.2058, -4.2300, -1.0817,
    -3.6216, -0.8570, -2.5334, -3.8968, -3.5806, -2.0548, -1.7985, -1.9055, -1.5341,
];
const MISTRAL_WITHOUT: [f64; 19] = [
    -3.2282, -1.7039, -2.3451, -0.4275, -2.6335, -2.4564, -2.1132, -2.1425, -5.4927, -2.0903,
    -3.2926, -0.3625, -2.8219, -4.8257, -2.8041, -2.2336, -2.4768, -3.1568, -0.7916,
];
const QWEN2: [f64; 19] = [
    -2.2316, -5.2714, -3.9935, -5.9924, -3.2816, -1.4419, -3.1138, -3.6269, -3.1008, -3.8145,
    -2.4055, -3.8055, -4.2634, -0.9171, -7.6356, -2.8332, -0.7989, -2.1389, -5.1990,
];
const QWEN2_WITHOUT: [f64; 19] = [
    -2.2316, -5.2714, -3.9935, -5.9924, -3.2816, -1.8537, -2.2675, -4.3614, -3.7866, -3.9957,
    -2.4753, -5.2803, -3.9134, -1.8880, -4.3798, -3.4115, -3.0945, -2.5210, -5.0486,
];
const QWEN3: [f64; 19] = [
    -5.1775, -4.4363, -4.5910, -3.5366, -2.8219, -2.5556, -1.7915, -3.8992, -4.6602, -5.8065,
    -3.7147, -2.8812, -3.6691, -2.0798, -1.5574, -4.1215, -3.6401, -4.8115, -2.9599,
];
const QWEN2_SECOND: [f64; 19] = [
    -2.2316, -5.2714, -3.9935, -5.9924, -3.2816, -1.6020, -2.1916, -4.0878, -3.8386, -4.1304,
    -2.4506, -5.0581, -3.9094, -1.6454, -4.5732, -2.3368, -3.2268, -2.8315, -3.4770,
];
const QWEN3_FIRST: [f64; 19] = [
    -5.1775, -4.4363, -4.5910, -3.5366, -2.8219, -2.6278, -1.7131, -3.8280, -3.7775, -5.3390,
    -3.4117, -3.2505, -4.9818, -1.4327, -1.9503, -3.5688, -3.7747, -3.8257, -2.3926,
];

#[test]
fn sliding_windows_match_transformers() {
    let mistral = |window: Value| json!({"architectures": ["MistralForCausalLM"], "sliding_window": window, "head_dim": 4});
    let qwen2 = |uses: bool, first: usize| {
        json!({
            "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": true,
            "use_sliding_window": uses, "max_window_layers": first,
        })
    };
    let qwen3 = |second: &str| {
        json!({
            "architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": true, "head_dim": 8,
            "use_sliding_window": true, "layer_types": ["sliding_attention", second],
        })
    };
    let cases = [
        (mistral(WINDOW.into()), MISTRAL),
        (mistral(Value::Null), MISTRAL_WITHOUT),
        (qwen2(true, 0), QWEN2),
        // No layer has a window.
        (qwen2(true, 2), QWEN2_WITHOUT),
        (qwen2(false, 0), QWEN2_WITHOUT),
        (qwen2(true, 1), QWEN2_SECOND),
        (qwen3("sliding_attention"), QWEN3),
        (qwen3("full_attention"), QWEN3_FIRST),
    ];
    for (changes, expected) in cases {
        let model = sine_model(&changes);
        let sequences = [SINE_IDS.to_vec()];
        close(
            &scored(&model, &sequences)[0],
            &expected,
            &format!("{changes}, scored"),
        );
        let found = decoded(&model, &sequences).remove(0);
        close(
            &found,
            &expected[expected.len() - found.len()..],
            &format!("{changes}, decoded"),
        );
    }
}

/// Log-probabilities computed by transformers 5.23 for [`SINE_IDS`] under a model with the weights of [`sine_model`]
/// and a type of RoPE scaling.
struct ScaledRope {
    kind: &'static str,
    /// Sum of the log-probabilities.
    sum: f64,
    /// The last log-probability.
    last: f64,
}

const fn scaled_rope(kind: &'static str, sum: f64, last: f64) -> ScaledRope {
    ScaledRope { kind, sum, last }
}

/// Without its window Mistral equals Llama.
const LLAMA_ROPE: [ScaledRope; 5] = [
    scaled_rope("default", -61.7621, -4.1505),
    scaled_rope("linear", -67.2225, -3.7956),
    scaled_rope("dynamic", -61.7621, -4.1505),
    scaled_rope("yarn", -65.0708, -4.2622),
    scaled_rope("llama3", -69.4374, -3.9427),
];
const QWEN2_ROPE: [ScaledRope; 5] = [
    scaled_rope("default", -56.4242, -2.8565),
    scaled_rope("linear", -59.0458, -2.9829),
    scaled_rope("dynamic", -56.4242, -2.8565),
    scaled_rope("yarn", -57.0805, -2.8139),
    scaled_rope("llama3", -60.1543, -2.5482),
];
const QWEN3_ROPE: [ScaledRope; 5] = [
    scaled_rope("default", -65.3806, -2.3126),
    scaled_rope("linear", -67.5944, -2.3478),
    scaled_rope("dynamic", -65.3806, -2.3126),
    scaled_rope("yarn", -64.9745, -2.3730),
    scaled_rope("llama3", -67.8661, -2.2093),
];

/// A model of this family with the weights of [`sine_model`] and this type of RoPE scaling.
fn sine_model_with_scaled_rope(architecture: &str, kind: &str) -> LanguageModel {
    let factor = if kind == "llama3" { 8.0 } else { 4.0 };
    let scaling = json!({
        "rope_type": kind, "factor": factor, "original_max_position_embeddings": 16,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    });
    let mut changes = json!({
        "architectures": [architecture], "sliding_window": null, "rope_scaling": scaling,
    });
    if architecture != "Qwen2ForCausalLM" {
        changes["head_dim"] = json!(8);
    }
    sine_model(&changes)
}

#[test]
fn scaled_rope_matches_transformers_in_every_family() {
    let ids = [SINE_IDS.to_vec()];
    let families = [
        ("LlamaForCausalLM", LLAMA_ROPE),
        ("MistralForCausalLM", LLAMA_ROPE),
        ("Qwen2ForCausalLM", QWEN2_ROPE),
        ("Qwen3ForCausalLM", QWEN3_ROPE),
    ];
    for (architecture, kinds) in families {
        for ScaledRope { kind, sum, last } in kinds {
            let model = sine_model_with_scaled_rope(architecture, kind);
            let scored = scored(&model, &ids).remove(0);
            let context = format!("{architecture}, {kind}");
            close(&[scored.iter().sum()], &[sum], &context);
            close(&scored[18..], &[last], &context);
            let decoded = decoded(&model, &ids).remove(0);
            close(&decoded, &scored[19 - decoded.len()..], &context);
        }
    }
}

#[test]
fn gradients_flow_through_scaled_rope() {
    // YaRN also scales the rotated vectors.
    let model = sine_model_with_scaled_rope("Qwen3ForCausalLM", "yarn");
    let (weights, vars) = model.weights().trainable().unwrap();
    let sequence = Sequence {
        prompt: &SINE_IDS[..1],
        completion: &SINE_IDS[1..],
    };
    let of = |weights: Weights| {
        let model = LanguageModel::new(model.config().clone(), weights).unwrap();
        model.logprobs(&[sequence]).unwrap().logp.sum_all().unwrap()
    };
    let gradients = kernels::backward(&of(weights)).unwrap();
    let name = "model.layers.0.self_attn.q_proj.weight";
    let gradient = gradients.get(vars[name].as_tensor()).unwrap();
    let norm = gradient.sqr().unwrap().sum_all().unwrap();
    let norm = f64::from(norm.to_scalar::<f32>().unwrap()).sqrt();
    let step = 1e-2;
    let perturbed = |by: f64| {
        let mut weights = model.weights().clone();
        let direction = (gradient * (by / norm)).unwrap();
        let tensor = weights.tensors.get_mut(name).unwrap();
        *tensor = (&*tensor + direction).unwrap();
        f64::from(of(weights).to_scalar::<f32>().unwrap())
    };
    let slope = (perturbed(step) - perturbed(-step)) / (2.0 * step);
    assert!((slope / norm - 1.0).abs() < 1e-2, "{slope} is not {norm}");
}

#[test]
fn layer_types_must_be_supported_and_match_the_layer_count() {
    let refused = |types: Value| {
        let raw = json!({
            "architectures": ["Qwen3ForCausalLM"], "hidden_size": 16, "intermediate_size": 24,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
            "vocab_size": 11, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
            "sliding_window": 5, "use_sliding_window": true, "max_window_layers": 0, "layer_types": types,
        });
        let refused = ModelConfig::from_json(raw, Path::new("config.json"));
        refused.unwrap_err().to_string()
    };
    let short = refused(json!(["full_attention"]));
    assert!(
        short.contains("layer_types names 1 layers, num_hidden_layers is 2"),
        "{short}"
    );
    let unknown = refused(json!(["full_attention", "linear_attention"]));
    assert!(
        unknown.contains("layer_types names \"linear_attention\""),
        "{unknown}"
    );
}

#[test]
fn bf16_is_close_to_f32() {
    let Some(path) = shared("data/models/random-llama3") else {
        return;
    };
    let folder = ModelFolder::open(&path, None).unwrap();
    let of = |dtype| {
        let weights = folder.weights(dtype, &Device::Cpu).unwrap();
        let model = LanguageModel::new(folder.config.clone(), weights).unwrap();
        let sequences = vec![vec![1, 95, 138, 5, 366, 6, 345, 458], vec![1, 339, 343]];
        (
            scored(&model, &sequences).concat(),
            decoded(&model, &sequences).concat(),
        )
    };
    let (f32_logprobs, bf16_logprobs) = (of(DType::F32), of(DType::BF16));
    let scored = f32_logprobs.0.iter().zip(&bf16_logprobs.0);
    let decoded = f32_logprobs.1.iter().zip(&bf16_logprobs.1);
    for (w, n) in scored.chain(decoded) {
        assert!((w - n).abs() < 0.15, "{w} in f32, {n} in bf16");
    }
}
