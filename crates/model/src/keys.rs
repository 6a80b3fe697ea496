//! Classification of `config.json` keys that no loader reads: harmless, ignored or refused.
//!
//! A loader lists the keys that it reads. Many others do not affect the forward pass: they describe training, sampling
//! or another program's options. A key whose name relates to the forward pass is refused unless its value is neutral,
//! since a model with an unimplemented forward pass must not be loaded as a different one. The rest are reported and
//! ignored, as in transformers. `false` counts as neutral, except for components that every network here has.

use serde_json::{Map, Value};

/// Keys that do not affect the forward pass.
const HARMLESS: [&str; 47] = [
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
    "router_aux_loss_coef",
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

/// Parts of a key name that mark it as harmless, whatever else it names: `attention_dropout`, `unsloth_version`.
const HARMLESS_PARTS: [&str; 7] = [
    "checkpointing",
    "dropout",
    "flash",
    "initializer",
    "pdrop",
    "sdpa",
    "version",
];

/// Parts of a key name that mark it as harmless unless it also names a part of the forward pass: then its meaning is not
/// known, and it is reported.
const MOSTLY_HARMLESS_PARTS: [&str; 5] = ["coef", "generation", "init", "label", "loss"];

/// Flags of components that every network here has and that transformers does not read: `true` is neutral, `false` is
/// reported.
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

/// Parts of a key name that relate it to the forward pass.
const COMPUTATION_PARTS: [&str; 82] = [
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

/// Parts of the names of keys whose neutral value is 1, not 0.
const FACTOR_PARTS: [&str; 7] = [
    "factor",
    "multiplier",
    "pct",
    "scalar",
    "scale",
    "scaled",
    "scaling",
];

/// Attention mask of a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AttentionMask {
    /// Each token attends to itself and earlier ones.
    Causal,
    /// Each token attends to all tokens.
    Bidirectional,
}

/// Names of the unknown keys of `raw` that are ignored. `read` lists the keys that the loader reads; `attention` is the
/// mask of the configured network.
///
/// # Errors
/// When an unread key changes the forward pass, with its name, its value and the remedy.
pub(crate) fn ignored(
    raw: &Value,
    read: &[&[&str]],
    attention: AttentionMask,
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
        if parts(key).any(|part| MOSTLY_HARMLESS_PARTS.contains(&part)) {
            if affects_computation(key) && !is_off(value) {
                ignored.push(key.clone());
            }
            continue;
        }
        match key_effect(key, value, raw, attention) {
            KeyEffect::None => {}
            KeyEffect::Unknown => ignored.push(key.clone()),
            KeyEffect::Deviates => refused.push(format!("{key} = {value}")),
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

/// Effect of an unread key on the forward pass.
enum KeyEffect {
    /// None: the value is the implemented behaviour.
    None,
    /// No known effect.
    Unknown,
    /// Requires a different forward pass.
    Deviates,
}

/// Classifies an unread key of the configuration `raw` for a network with this attention mask.
fn key_effect(key: &str, value: &Value, raw: &Value, attention: AttentionMask) -> KeyEffect {
    let deviates_unless = |is_neutral: bool| match is_neutral {
        true => KeyEffect::None,
        false => KeyEffect::Deviates,
    };
    if parts(key).any(|part| part == "causal") {
        // Transformers uses bidirectional attention wherever the value is present and not true, null included.
        return deviates_unless(*value == (attention == AttentionMask::Causal));
    }
    if ALWAYS_ON.contains(&key) {
        return match value {
            Value::Null | Value::Bool(true) => KeyEffect::None,
            _ => KeyEffect::Unknown,
        };
    }
    match affects_computation(key) {
        true => deviates_unless(is_off(value) || is_neutral(key, value, raw)),
        // It may disable a component of unknown meaning.
        false if *value == false || !is_off(value) => KeyEffect::Unknown,
        false => KeyEffect::None,
    }
}

/// Parts of a key name: `attn_logit_softcapping` has three.
fn parts(key: &str) -> impl Iterator<Item = &str> {
    key.split(['_', '.', '-'])
}

fn is_harmless(key: &str) -> bool {
    // A leading underscore marks keys internal to transformers.
    key.starts_with('_')
        || HARMLESS.contains(&key)
        || ["_token", "_token_id", "_token_ids"]
            .iter()
            .any(|end| key.ends_with(end))
        || parts(key).any(|part| HARMLESS_PARTS.contains(&part))
}

fn affects_computation(key: &str) -> bool {
    parts(key).any(|part| COMPUTATION_PARTS.contains(&part))
}

fn is_quantised(key: &str, value: &Value) -> bool {
    let matches = |part: &str| part.starts_with("quant") || part.starts_with("compress");
    !is_off(value) && parts(key).any(matches)
}

fn quantised(key: &str, value: &Value) -> String {
    let method = match &value["quant_method"] {
        Value::String(method) => method.clone(),
        _ => value.to_string(),
    };
    format!("this folder is quantised ({key}: {method}), use the unquantised one")
}

/// Whether this value of an unread key leaves the forward pass unchanged.
fn is_neutral(key: &str, value: &Value, raw: &Value) -> bool {
    let head_dim = || {
        let width = raw["hidden_size"].as_f64()? / raw["num_attention_heads"].as_f64()?;
        Some(raw["head_dim"].as_f64().unwrap_or(width))
    };
    let number = value.as_f64();
    match key {
        // Queries are scaled by its inverse square root; the implemented scale is that of head_dim.
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
                let is_factor = parts(key).any(|part| FACTOR_PARTS.contains(&part));
                number == Some(f64::from(u8::from(is_factor)))
            }
            Value::String(name) => [
                "none", "default", "silu", "swish", "rope", "rotary", "rms", "rmsnorm",
            ]
            .contains(&name.as_str()),
            _ => false,
        },
    }
}

/// Whether a value disables a feature: null, false or empty.
pub(crate) fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
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
        ignored(&raw, &[&READ, &read], AttentionMask::Causal)
    }

    #[test]
    fn keys_that_change_the_forward_pass_are_refused_by_name() {
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
    fn neutral_values_are_accepted_and_harmless_keys_are_not_reported() {
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
        let mixed = json!({"residual_coef": 3.5, "attn_scale_init": 2.0, "classifier_loss": 1});
        let reported = Ok(vec!["residual_coef".into(), "attn_scale_init".into()]);
        assert_eq!(ignored_of(&mixed), reported);
        let unknown = ignored_of(&json!({"a_key_of_its_own": 1, "auto_map": {"AutoModel": "x"}}));
        assert_eq!(
            unknown,
            Ok(vec!["a_key_of_its_own".into(), "auto_map".into()])
        );
    }

    #[test]
    fn disabled_keys_of_unknown_meaning_are_reported() {
        let mut off = vec!["a_key_of_its_own"];
        off.extend(ALWAYS_ON);
        for key in off {
            let ignored = ignored_of(&json!({ key: false }));
            assert_eq!(ignored, Ok(vec![key.to_owned()]));
        }
    }

    #[test]
    fn an_encoder_has_bidirectional_attention() {
        let of = |value: bool| {
            ignored(
                &json!({ "is_causal": value }),
                &[],
                AttentionMask::Bidirectional,
            )
        };
        assert_eq!(of(false), Ok(Vec::new()));
        assert!(of(true).unwrap_err().starts_with("is_causal = true"));
    }

    #[test]
    fn the_error_for_a_quantised_folder_names_the_method() {
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
