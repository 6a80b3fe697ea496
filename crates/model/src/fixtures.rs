//! Shared test fixtures: paths of pretrained models and tokenizers, and small generated models.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use serde_json::{Value, json};

use crate::{config::ModelConfig, weights::Weights};

/// A word-level tokenizer with ids 0 to 7, which prepends `<s>`.
pub(crate) const WORD_TOKENIZER: &str = r#"{
    "version": "1.0",
    "truncation": {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
    "added_tokens": [
        {"id": 0, "content": "<unk>", "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false},
        {"id": 1, "content": "<s>", "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false}
    ],
    "pre_tokenizer": {"type": "WhitespaceSplit"},
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    },
    "model": {
        "type": "WordLevel",
        "unk_token": "<unk>",
        "vocab": {"<unk>": 0, "<s>": 1, "the": 2, "cat": 3, "sat": 4, "on": 5, "a": 6, "mat": 7}
    }
}"#;

/// Path of a file in the shared folder: `$AGON_SHARED`, or `shared` next to the workspace. `None` when it does not
/// exist: the test is then skipped with a message, and fails in continuous integration.
pub(crate) fn shared(path: &str) -> Option<PathBuf> {
    let root = std::env::var_os("AGON_SHARED").unwrap_or_else(|| "../shared".into());
    let found = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .join(root)
        .join(path);
    if found.exists() {
        return Some(found);
    }
    let current = std::thread::current();
    let skipped = format!(
        "SKIPPED {}: AGON_SHARED has no {path}",
        current.name().unwrap_or("a test")
    );
    assert!(std::env::var("CI").as_deref() != Ok("true"), "{skipped}");
    eprintln!("{skipped}");
    None
}

/// `config.json` of a Llama with one block and `vocab_size` tokens.
pub(crate) fn config_json(vocab_size: usize) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8,
        "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": vocab_size, "max_position_embeddings": 16,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true, "bos_token_id": 1,
        "eos_token_id": 1, "torch_dtype": "float32", "a_key_of_its_own": [1, 2]
    })
}

/// Parsed configuration of [`config_json`].
pub(crate) fn config(vocab_size: usize) -> ModelConfig {
    ModelConfig::from_json(config_json(vocab_size), Path::new("config.json")).unwrap()
}

/// A complete model folder: the configuration for 8 tokens, [`WORD_TOKENIZER`], random weights.
pub(crate) fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let weights =
        Weights::initialise(&config(8), messages::Seed(7), DType::F32, &Device::Cpu).unwrap();
    for (file, bytes) in [
        ("config.json", config_json(8).to_string().into_bytes()),
        ("tokenizer.json", WORD_TOKENIZER.as_bytes().to_vec()),
        ("model.safetensors", weights.to_blob().unwrap()),
    ] {
        std::fs::write(folder.path().join(file), bytes).unwrap();
    }
    folder
}

/// A small decoder with random weights: `vocab` tokens, two blocks, grouped-query attention.
pub(crate) fn tiny_model(vocab: usize, seed: u64) -> crate::LanguageModel {
    let raw = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": vocab,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 1,
    });
    let config = crate::ModelConfig::from_json(raw, std::path::Path::new("config.json")).unwrap();
    let (dtype, device) = (crate::DType::F32, crate::Device::Cpu);
    let weights =
        crate::Weights::initialise(&config, messages::Seed(seed), dtype, &device).unwrap();
    // A larger head gives less uniform distributions.
    let weights = weights.scaled("lm_head.weight", 3.0);
    crate::LanguageModel::new(config, weights).unwrap()
}

/// LoRA configuration of rank 2 for these modules.
pub(crate) fn lora_config(targets: &[&str]) -> crate::LoraConfig {
    let targets: Vec<String> = targets.iter().map(|&name| name.to_owned()).collect();
    let mut config = crate::LoraConfig::new(2, 4.0, 0.0, &targets);
    config.base_model.name = "a/base".into();
    config
}

/// [`tiny_model`] with an adapter of rank 2 whose B is not zero.
pub(crate) fn adapted(vocab: usize, seed: u64, targets: &[&str]) -> crate::LanguageModel {
    let base = tiny_model(vocab, seed);
    let config = lora_config(targets);
    let (seed, device) = (messages::Seed(seed).derive(1), base.device());
    let adapter = crate::Adapter::fresh(config, base.config(), seed, device).unwrap();
    let model = base.with_adapter(adapter).unwrap();
    let (model, vars) = model.trainable().unwrap();
    for (name, var) in vars.iter().filter(|(name, _)| name.contains("lora_B")) {
        let count = var.elem_count();
        let wave = |i: usize| 0.3 * ((i * 7 + name.len()) as f32).sin();
        let values: Vec<f32> = (0..count).map(wave).collect();
        let updated = crate::Tensor::from_vec(values, var.shape(), device).unwrap();
        var.set(&updated).unwrap();
    }
    let blob = model.trained().to_blob().unwrap();
    model.with_blob(&blob).unwrap()
}
