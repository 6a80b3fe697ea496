//! A small ModernBERT with weights from a formula, reproducible in other programs.

use std::{collections::HashMap, fs};

use candle_core::{Device, Tensor};
use serde_json::{Value, json};

use crate::fixtures::WORD_TOKENIZER;

/// Value of an element of a tensor, by exact integer arithmetic.
fn value(tensor: usize, element: usize) -> f32 {
    let (t, i) = (tensor as u64, element as u64);
    ((t * 7919 + i * 104_729 + i * i * 31) % 997) as f32 / 997.0 - 0.5
}

/// A ModernBERT of four layers, the second and third with local attention of 4 tokens to each side. Tensors are
/// numbered in alphabetical order.
pub(super) fn modern_bert(change: impl Fn(&mut Value)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut config = json!({
        "architectures": ["ModernBertForSequenceClassification"], "vocab_size": 24,
        "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 4,
        "num_attention_heads": 2, "max_position_embeddings": 40, "local_attention": 8,
        "norm_eps": 1e-5, "global_attn_every_n_layers": 3, "global_rope_theta": 160_000.0,
        "local_rope_theta": 10_000.0, "pad_token_id": 2, "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0}, "classifier_pooling": "cls"
    });
    change(&mut config);
    let mut shapes: Vec<(String, Vec<usize>)> = vec![
        ("classifier.bias".into(), vec![1]),
        ("classifier.weight".into(), vec![1, 16]),
        ("head.dense.weight".into(), vec![16, 16]),
        ("head.norm.weight".into(), vec![16]),
        ("model.embeddings.norm.weight".into(), vec![16]),
        (
            "model.embeddings.tok_embeddings.weight".into(),
            vec![24, 16],
        ),
        ("model.final_norm.weight".into(), vec![16]),
    ];
    for layer in 0..4 {
        let mut add = |name: &str, shape: &[usize]| {
            shapes.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
        };
        add("attn.Wo.weight", &[16, 16]);
        add("attn.Wqkv.weight", &[48, 16]);
        if layer > 0 {
            add("attn_norm.weight", &[16]);
        }
        add("mlp.Wi.weight", &[24, 16]);
        add("mlp.Wo.weight", &[16, 12]);
        add("mlp_norm.weight", &[16]);
    }
    let tensors: HashMap<String, Tensor> = shapes
        .into_iter()
        .enumerate()
        .map(|(tensor, (name, shape))| {
            let base = if shape.len() == 1 { 1.0 } else { 0.0 };
            let values: Vec<f32> = (0..shape.iter().product())
                .map(|element| base + value(tensor, element))
                .collect();
            let tensor = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
            (name, tensor)
        })
        .collect();
    let weights = folder.path().join("model.safetensors");
    candle_core::safetensors::save(&tensors, weights).unwrap();
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    fs::write(folder.path().join("tokenizer.json"), WORD_TOKENIZER).unwrap();
    folder
}

/// Sequences of 30, 1 and 11 tokens, longer and shorter than the attention window.
pub(super) fn sequences() -> Vec<Vec<u32>> {
    [30u32, 1, 11]
        .map(|length| (0..length).map(|i| (i * i + 5 * i + length) % 24).collect())
        .to_vec()
}
