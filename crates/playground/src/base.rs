//! Configuration of the playground's base model, a small Llama over the 200-token vocabulary.

use serde_json::{Value, json};

use crate::vocabulary::{BOS, EOS, PAD, VOCABULARY_SIZE};

/// A Hugging Face `config.json` (LlamaForCausalLM, untied head) of the given sizes: hidden size `dim`, `layers`
/// layers of `heads` attention heads of size `dim / heads`, SwiGLU intermediate size `ffn`.
///
/// # Panics
/// If `heads` is zero or does not divide `dim`.
pub fn base_config_json(dim: usize, layers: usize, heads: usize, ffn: usize) -> Value {
    assert!(
        heads > 0 && dim.is_multiple_of(heads),
        "{heads} heads do not divide {dim} units"
    );
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": dim,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": dim / heads,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": false,
        "mlp_bias": false,
        "tie_word_embeddings": false,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "use_cache": true,
        "torch_dtype": "float32",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_config_holds_sizes_and_token_ids() {
        let config = base_config_json(96, 2, 4, 256);
        for (key, value) in [
            ("vocab_size", json!(200)),
            ("hidden_size", json!(96)),
            ("num_hidden_layers", json!(2)),
            ("num_attention_heads", json!(4)),
            ("num_key_value_heads", json!(4)),
            ("intermediate_size", json!(256)),
            ("head_dim", json!(24)),
            ("bos_token_id", json!(1)),
            ("eos_token_id", json!(3)),
            ("pad_token_id", json!(0)),
            ("tie_word_embeddings", json!(false)),
            ("rms_norm_eps", json!(1e-5)),
            ("max_position_embeddings", json!(128)),
        ] {
            assert_eq!(config[key], value, "{key}");
        }
    }

    #[test]
    #[should_panic(expected = "5 heads do not divide 96 units")]
    fn heads_must_divide_the_hidden_size() {
        base_config_json(96, 2, 5, 256);
    }
}
