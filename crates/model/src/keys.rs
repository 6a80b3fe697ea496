//! What becomes of the keys of a `config.json` that no loader reads.
//!
//! A loader names the keys that it reads. Of the others many say nothing about what the weights compute: how they were
//! trained, how text is drawn, how another program runs them. One that by its name has to do with the computation is
//! refused, unless its value leaves the computation as it is: a model whose computation is not implemented must not be
//! loaded as another one. The rest are reported and ignored, as transformers ignores them. `false` switches a part of
//! the computation off; where the part is one that every network here has, it is no neutral value.

use serde_json::{Map, Value};

/// Keys that say nothing about what the weights compute.
const HARMLESS: [&str; 46] = [
    "architectures",
    "attn_implementation",
    "chunk_size_feed_forward",
    "custom_pipelines",
    "dtype",
    "early_stopping",
    "experts_implementation",
    "finetuning_task",
    "is_decoder",
    "is_llama_config",
    "keys_to_ignore_at_inference",
    "legacy",
    "license",
    "max_length",
    "max_new_tokens",
    "max_sequence_length",
    "min_length",
    "min_p",
    "model_max_length",
    "model_type",
    "name_or_path",
    "neftune_noise_alpha",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "pretraining_tp",
    "problem_type",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "seq_length",
    "task_specific_params",
    "temperature",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "use_bfloat16",
    "use_cache",
    "do_sample",
];

/// Words of which one makes a key harmless: `hidden_dropout_prob`, `unsloth_version`.
const HARMLESS_WORDS: [&str; 12] = [
    "checkpointing",
    "coef",
    "dropout",
    "flash",
    "generation",
    "init",
    "initializer",
    "label",
    "loss",
    "pdrop",
    "sdpa",
    "version",
];

/// Switches of parts that every network here has and that transformers does not read: on they say nothing new, off they
/// are reported.
const ALWAYS_ON: [&str; 9] = [
    "skip_connections",
    "use_residual",
    "use_residuals",
    "use_rms",
    "use_rms_norm",
    "use_rmsnorm",
    "use_rope",
    "use_rotary",
    "use_rotary_embeddings",
];

/// Words of which one makes a key a part of the computation.
const MEANING_WORDS: [&str; 82] = [
    "act",
    "activation",
    "alibi",
    "attention",
    "attn",
    "audio",
    "bias",
    "biases",
    "bidirectional",
    "bits",
    "cap",
    "clip",
    "conv",
    "cross",
    "decoder",
    "depth",
    "embed",
    "embedding",
    "embeddings",
    "emb",
    "encoder",
    "eps",
    "epsilon",
    "expert",
    "experts",
    "factor",
    "ffn",
    "gate",
    "gated",
    "glu",
    "head",
    "heads",
    "hidden",
    "interleaved",
    "intermediate",
    "layer",
    "layernorm",
    "layers",
    "logit",
    "logits",
    "lora",
    "mamba",
    "mlp",
    "moe",
    "mrope",
    "mtp",
    "multiplier",
    "mup",
    "nope",
    "norm",
    "normalization",
    "normalize",
    "parallel",
    "pct",
    "position",
    "positional",
    "positions",
    "pruned",
    "qk",
    "qkv",
    "query",
    "recurrent",
    "residual",
    "rmsnorm",
    "rope",
    "rotary",
    "router",
    "routed",
    "scalar",
    "scale",
    "scaled",
    "scaling",
    "share",
    "shared",
    "sliding",
    "softcap",
    "softcapping",
    "ssm",
    "tie",
    "tied",
    "vision",
    "window",
];

/// Words of keys whose neutral number is 1, not 0.
const FACTOR_WORDS: [&str; 7] = [
    "factor",
    "multiplier",
    "pct",
    "scalar",
    "scale",
    "scaled",
    "scaling",
];

/// Which tokens a token sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Attention {
    /// Those before it.
    Causal,
    /// All.
    Bidirectional,
}

/// Names of the keys of `raw` that are unknown and ignored; those in `read` are not among them. The network that is
/// configured attends so.
///
/// # Errors
/// When a key that is not read changes what the weights compute: its name and value, and the remedy.
pub(crate) fn ignored(
    raw: &Value,
    read: &[&[&str]],
    attention: Attention,
) -> Result<Vec<String>, String> {
    let none = Map::new();
    let keys = raw.as_object().unwrap_or(&none);
    if let Some((key, value)) = keys.iter().find(|(key, value)| is_quantised(key, value)) {
        return Err(quantised(key, value));
    }
    let (mut ignored, mut refused) = (Vec::new(), Vec::new());
    for (key, value) in keys {
        let is_read = read.iter().any(|read| read.contains(&key.as_str()));
        if is_read || is_harmless(key) {
            continue;
        }
        match bearing(key, value, (raw, attention)) {
            Bearing::None => {}
            Bearing::Unknown => ignored.push(key.clone()),
            Bearing::Deviates => refused.push(format!("{key} = {value}")),
        }
    }
    match refused.as_slice() {
        [] => Ok(ignored),
        refused => Err(format!(
            "{} changes what the weights compute, which is not supported; remove it from a copy of the file only if \
             the model does not need it",
            refused.join(", ")
        )),
    }
}

/// What the value of a key that is not read has to do with the computation.
enum Bearing {
    /// Nothing: it says what is computed anyway.
    None,
    /// Nothing that is known.
    Unknown,
    /// It asks for another computation.
    Deviates,
}

/// The bearing of a key on the network that `raw` configures and that attends so.
fn bearing(key: &str, value: &Value, (raw, attention): (&Value, Attention)) -> Bearing {
    let deviates_unless = |is_neutral: bool| match is_neutral {
        true => Bearing::None,
        false => Bearing::Deviates,
    };
    if words(key).any(|word| word == "causal") {
        // Transformers attends in both directions wherever the value is there and not true, null included.
        return deviates_unless(*value == (attention == Attention::Causal));
    }
    if ALWAYS_ON.contains(&key) {
        return match value {
            Value::Null | Value::Bool(true) => Bearing::None,
            _ => Bearing::Unknown,
        };
    }
    match is_meant(key) {
        true => deviates_unless(is_off(value) || is_neutral(key, value, raw)),
        // Nobody knows what it switches off.
        false if *value == false || !is_off(value) => Bearing::Unknown,
        false => Bearing::None,
    }
}

/// The words of a key: `attn_logit_softcapping` has three.
fn words(key: &str) -> impl Iterator<Item = &str> {
    key.split(['_', '.', '-'])
}

fn is_harmless(key: &str) -> bool {
    // A leading underscore marks what transformers keeps for itself.
    key.starts_with('_')
        || HARMLESS.contains(&key)
        || ["_token", "_token_id", "_token_ids"]
            .iter()
            .any(|end| key.ends_with(end))
        || words(key).any(|word| HARMLESS_WORDS.contains(&word))
}

fn is_meant(key: &str) -> bool {
    words(key).any(|word| MEANING_WORDS.contains(&word))
}

fn is_quantised(key: &str, value: &Value) -> bool {
    let says = |word: &str| word.starts_with("quant") || word.starts_with("compress");
    !is_off(value) && words(key).any(says)
}

fn quantised(key: &str, value: &Value) -> String {
    let method = match &value["quant_method"] {
        Value::String(method) => method.clone(),
        _ => value.to_string(),
    };
    format!("this folder is quantised ({key}: {method}), use the unquantised one")
}

/// Whether this value of a key that is not read leaves the computation as it is.
fn is_neutral(key: &str, value: &Value, raw: &Value) -> bool {
    let head_dim = || {
        let width = raw["hidden_size"].as_f64()? / raw["num_attention_heads"].as_f64()?;
        Some(raw["head_dim"].as_f64().unwrap_or(width))
    };
    let number = value.as_f64();
    match key {
        // Queries are multiplied by its inverse square root, as they are by that of the head's width.
        "query_pre_attn_scalar" => number.is_some() && number == head_dim(),
        "attention_multiplier" => number
            .zip(head_dim())
            .is_some_and(|(multiplier, width)| (multiplier * width.sqrt() - 1.0).abs() < 1e-6),
        "sliding_window" => number >= raw["max_position_embeddings"].as_f64(),
        "layer_types" => {
            let types = value.as_array();
            let fits = |types: &Vec<Value>| {
                raw["num_hidden_layers"] == types.len()
                    && types.iter().all(|kind| kind == "full_attention")
            };
            types.is_some_and(fits)
        }
        "max_window_layers" => raw["use_sliding_window"] != true,
        _ => match value {
            Value::Number(_) => {
                let is_factor = words(key).any(|word| FACTOR_WORDS.contains(&word));
                number == Some(f64::from(u8::from(is_factor)))
            }
            Value::String(word) => [
                "none", "default", "silu", "swish", "rope", "rotary", "rms", "rmsnorm",
            ]
            .contains(&word.as_str()),
            _ => false,
        },
    }
}

/// Whether a value says that something is not used.
pub(crate) fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(word) => word.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(items) => items.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const READ: [&str; 2] = ["hidden_size", "num_attention_heads"];

    fn ignored_of(more: &Value) -> Result<Vec<String>, String> {
        let mut raw = json!({"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 128,
                   "num_hidden_layers": 2});
        for (key, value) in more.as_object().unwrap() {
            raw[key] = value.clone();
        }
        let read = ["max_position_embeddings", "num_hidden_layers"];
        ignored(&raw, &[&READ, &read], Attention::Causal)
    }

    #[test]
    fn what_says_how_to_compute_is_refused_by_name() {
        let cases = [
            json!({"logit_scale": 0.0625}),
            json!({"logits_scaling": 8.0}),
            json!({"embedding_multiplier": 12.0}),
            json!({"scale_emb": 12}),
            json!({"scale_depth": 1.4}),
            json!({"residual_multiplier": 0.22}),
            json!({"attention_multiplier": 0.5}),
            json!({"query_pre_attn_scalar": 256}),
            json!({"attn_logit_softcapping": 50.0}),
            json!({"final_logit_softcapping": 30.0}),
            json!({"partial_rotary_factor": 0.5}),
            json!({"rope_interleaved": true}),
            json!({"no_rope_layers": [1, 1, 0, 1]}),
            json!({"use_mrope": true}),
            json!({"use_qk_norm": true}),
            json!({"mlp_bias": true}),
            json!({"clip_qkv": 8.0}),
            json!({"num_experts": 8}),
            json!({"hidden_activation": "gelu_pytorch_tanh"}),
            json!({"use_parallel_residual": true}),
            json!({"per_layer_config": {"0": {"num_attention_heads": 2}}}),
            json!({"pruned_heads": {"0": [1]}}),
            json!({"sliding_window": 64}),
            json!({"layer_types": ["full_attention", "sliding_attention"]}),
            json!({"layer_types": ["full_attention"]}),
            json!({"num_nextn_predict_layers": 1}),
            json!({"is_causal": false}),
            json!({"is_causal": null}),
            json!({"causal": 0}),
            json!({"use_causal_mask": false}),
            json!({"use_bidirectional": true}),
        ];
        for raw in cases {
            let key = raw.as_object().unwrap().keys().next().unwrap().clone();
            let refused = ignored_of(&raw).unwrap_err();
            assert!(refused.starts_with(&format!("{key} = ")), "{refused}");
        }
        let both = ignored_of(&json!({"logit_scale": 2, "use_qk_norm": true})).unwrap_err();
        assert!(
            both.starts_with("logit_scale = 2, use_qk_norm = true changes"),
            "{both}"
        );
    }

    #[test]
    fn values_that_change_nothing_are_taken_and_harmless_keys_are_not_spoken_of() {
        let cases = [
            json!({"logit_scale": 1.0, "residual_multiplier": 1, "partial_rotary_factor": 1.0}),
            json!({"attention_multiplier": 0.25, "query_pre_attn_scalar": 16}),
            json!({"final_logit_softcapping": null, "num_experts": 0, "clip_qkv": null}),
            json!({"mlp_bias": false, "use_mrope": false, "rope_interleaved": false}),
            json!({"is_causal": true, "use_rope": true, "skip_connections": true, "use_rms": null}),
            json!({"hidden_activation": "silu", "sliding_window": 128}),
            json!({"layer_types": ["full_attention", "full_attention"], "pruned_heads": {}}),
            json!({"attention_dropout": 0.1, "initializer_range": 0.02, "pad_token_id": 2}),
            json!({"_name_or_path": "a/b", "_attn_implementation_autoset": true}),
            json!({"transformers_version": "5.23.0", "unsloth_version": "2", "torch_dtype": "bfloat16"}),
            json!({"use_cache": true, "pretraining_tp": 2, "is_llama_config": true}),
            json!({"quantization_config": null, "temperature": 0.6, "router_aux_loss_coef": 0.1}),
        ];
        for raw in cases {
            assert_eq!(ignored_of(&raw), Ok(Vec::new()), "{raw}");
        }
        let unknown = ignored_of(&json!({"a_key_of_its_own": 1, "auto_map": {"AutoModel": "x"}}));
        assert_eq!(
            unknown,
            Ok(vec!["a_key_of_its_own".into(), "auto_map".into()])
        );
    }

    #[test]
    fn what_is_switched_off_and_not_known_to_be_off_is_spoken_of() {
        let mut off = vec!["a_key_of_its_own"];
        off.extend(ALWAYS_ON);
        for key in off {
            let said = ignored_of(&json!({ key: false }));
            assert_eq!(said, Ok(vec![key.to_owned()]));
        }
    }

    #[test]
    fn an_encoder_sees_in_both_directions() {
        let of = |value: bool| {
            ignored(
                &json!({ "is_causal": value }),
                &[],
                Attention::Bidirectional,
            )
        };
        assert_eq!(of(false), Ok(Vec::new()));
        assert!(of(true).unwrap_err().starts_with("is_causal = true"));
    }

    #[test]
    fn quantised_folders_are_named_by_their_method() {
        for (raw, expected) in [
            (
                json!({"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}}),
                "this folder is quantised (quantization_config: fp8), use the unquantised one",
            ),
            (
                json!({"quantization": {"group_size": 64, "bits": 4}}),
                "this folder is quantised (quantization: {\"group_size\":64,\"bits\":4})",
            ),
            (
                json!({"compression_config": {"format": "int-quantized"}, "logit_scale": 2}),
                "this folder is quantised (compression_config: {\"format\":\"int-quantized\"})",
            ),
        ] {
            let refused = ignored_of(&raw).unwrap_err();
            assert!(refused.starts_with(expected), "{refused}");
        }
    }
}
