//! ModernBERT classifier: candle's encoder with its own head, since candle's head returns the softmax of the logits,
//! which is always 1 for a single label.

use candle_core::Tensor;
use candle_nn::{
    LayerNorm, Linear, Module, VarBuilder, layer_norm_no_bias, linear, linear_no_bias,
};
use candle_transformers::models::modernbert::{Config, ModernBert};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::encoder::{BuildError, EncoderArchitecture, EncoderNetwork, MAX_POSITIONS};

/// Encoder backbone and classification head.
pub(super) struct ModernBertClassifier {
    backbone: ModernBert,
    pooling: ClassifierPooling,
    dense: Linear,
    norm: LayerNorm,
    classifier: Linear,
}

/// Pooling of hidden states.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum ClassifierPooling {
    /// The first token.
    Cls,
    /// The mean over tokens.
    Mean,
}

/// Loader of ModernBERT.
pub(super) const ARCHITECTURE: EncoderArchitecture = EncoderArchitecture {
    build,
    read: &[
        "attention_bias",
        "classifier_activation",
        "classifier_bias",
        "classifier_pooling",
        "global_attn_every_n_layers",
        "global_rope_theta",
        "hidden_activation",
        "layer_types",
        "local_attention",
        "local_rope_theta",
        "mlp_bias",
        "norm_bias",
        "norm_eps",
        "rope_parameters",
        // Options of the masked-token head or of execution.
        "decoder_bias",
        "reference_compile",
        "repad_logits_with_grad",
        "sparse_pred_ignore_index",
        "sparse_prediction",
    ],
    ignorable: &["decoder."],
};

fn build(raw: &Value, tensors: &VarBuilder<'_>) -> Result<EncoderNetwork, BuildError> {
    let (config, pooling) = (config(raw)?, pooling(raw)?);
    let (width, eps) = (config.hidden_size, config.layer_norm_eps);
    Ok(EncoderNetwork::ModernBert(Box::new(ModernBertClassifier {
        backbone: ModernBert::load(tensors.clone(), &config)?,
        pooling,
        dense: linear_no_bias(width, width, tensors.pp("head.dense"))?,
        norm: layer_norm_no_bias(width, eps, tensors.pp("head.norm"))?,
        classifier: linear(width, 1, tensors.pp("classifier"))?,
    })))
}

impl ModernBertClassifier {
    /// Logits of padded `ids` `[n, width]` with an attention mask of the same shape: `[n, 1]`.
    pub(super) fn forward(&self, ids: &Tensor, mask: &Tensor) -> candle_core::Result<Tensor> {
        let hidden = self.backbone.forward(ids, mask)?;
        let pooled = match self.pooling {
            ClassifierPooling::Cls => hidden.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?,
            ClassifierPooling::Mean => {
                let mask = mask.to_dtype(hidden.dtype())?;
                let sum = hidden.broadcast_mul(&mask.unsqueeze(2)?)?.sum(1)?;
                sum.broadcast_div(&mask.sum_keepdim(1)?)?
            }
        };
        let pooled = self
            .norm
            .forward(&self.dense.forward(&pooled)?.gelu_erf()?)?;
        self.classifier.forward(&pooled)
    }
}

fn pooling(raw: &Value) -> Result<ClassifierPooling, String> {
    match &raw["classifier_pooling"] {
        Value::Null => Ok(ClassifierPooling::Cls),
        named => ClassifierPooling::deserialize(named)
            .map_err(|error| format!("classifier_pooling: {error}")),
    }
}

/// candle's configuration, from the keys of transformers 4 or 5.
fn config(raw: &Value) -> Result<Config, String> {
    for key in ["attention_bias", "mlp_bias", "norm_bias", "classifier_bias"] {
        if raw[key] == true {
            return Err(format!("{key} = true is not supported"));
        }
    }
    for key in ["hidden_activation", "classifier_activation"] {
        let act = raw[key].as_str().unwrap_or("gelu");
        if act != "gelu" {
            return Err(format!("{key} is {act:?}, only \"gelu\" is supported"));
        }
    }
    let flat = json!({
        "vocab_size": raw["vocab_size"],
        "hidden_size": raw["hidden_size"],
        "num_hidden_layers": raw["num_hidden_layers"],
        "num_attention_heads": raw["num_attention_heads"],
        "intermediate_size": raw["intermediate_size"],
        "max_position_embeddings": raw["max_position_embeddings"].as_u64().map(|n| n.min(MAX_POSITIONS as u64)),
        "layer_norm_eps": number(raw, "norm_eps", 1e-5),
        "pad_token_id": raw["pad_token_id"].as_u64().unwrap_or(0),
        "global_attn_every_n_layers": global_every(raw)?,
        "local_attention": raw["local_attention"].as_u64().unwrap_or(128),
        "global_rope_theta": theta(raw, "full_attention", "global_rope_theta", 160_000.0)?,
        "local_rope_theta": theta(raw, "sliding_attention", "local_rope_theta", 10_000.0)?,
    });
    Config::deserialize(&flat).map_err(|error| error.to_string())
}

fn number(raw: &Value, key: &str, default: f64) -> f64 {
    raw[key].as_f64().unwrap_or(default)
}

/// RoPE base of one kind of layer.
fn theta(raw: &Value, layers: &str, old_key: &str, default: f64) -> Result<f64, String> {
    let nested = raw["rope_parameters"].as_object();
    let kinds = ["full_attention", "sliding_attention"];
    let unknown = nested.and_then(|keys| keys.keys().find(|key| !kinds.contains(&key.as_str())));
    if let Some(unknown) = unknown {
        return Err(format!(
            "rope_parameters: {unknown} is none of {}",
            kinds.join(", ")
        ));
    }
    let rope = &raw["rope_parameters"][layers];
    match rope["rope_type"].as_str().or(rope["type"].as_str()) {
        None | Some("default") => Ok(rope["rope_theta"]
            .as_f64()
            .unwrap_or_else(|| number(raw, old_key, default))),
        Some(other) => Err(format!(
            "rotary scaling {other:?} is not supported, only \"default\" is"
        )),
    }
}

/// Interval between layers with global attention.
fn global_every(raw: &Value) -> Result<usize, String> {
    let Some(types) = raw["layer_types"].as_array() else {
        let every = raw["global_attn_every_n_layers"].as_u64().unwrap_or(3);
        return usize::try_from(every.max(1)).map_err(|error| error.to_string());
    };
    let full: Vec<bool> = types.iter().map(|kind| kind == "full_attention").collect();
    let second = full.iter().skip(1).position(|&full| full);
    let every = second.map_or(full.len().max(1), |index| index + 1);
    let regular = |(layer, &full): (usize, &bool)| full == layer.is_multiple_of(every);
    if full.iter().enumerate().all(regular) {
        Ok(every)
    } else {
        Err("layer_types is not supported: \"full_attention\" must occur at regular intervals, starting with the first layer".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A configuration in the style of transformers 5.
    fn raw() -> Value {
        json!({
            "vocab_size": 8, "hidden_size": 4, "num_hidden_layers": 4, "num_attention_heads": 2,
            "intermediate_size": 4, "max_position_embeddings": 16, "norm_eps": 1e-6,
            "local_attention": 8, "layer_types": [
                "full_attention", "sliding_attention", "full_attention", "sliding_attention"
            ],
            "rope_parameters": {
                "full_attention": {"rope_theta": 5000.0, "rope_type": "default"},
                "sliding_attention": {"rope_theta": 70.0, "rope_type": "default"}
            }
        })
    }

    #[test]
    fn both_styles_of_configuration_are_read() {
        let new = config(&raw()).unwrap();
        let mut old = raw();
        old["rope_parameters"] = Value::Null;
        old["layer_types"] = Value::Null;
        old["global_rope_theta"] = json!(5000.0);
        old["local_rope_theta"] = json!(70);
        old["global_attn_every_n_layers"] = json!(2);
        assert_eq!(config(&old).unwrap(), new);
        assert_eq!(
            (new.global_rope_theta, new.local_rope_theta),
            (5000.0, 70.0)
        );
        assert_eq!(
            (new.global_attn_every_n_layers, new.local_attention),
            (2, 8)
        );
        assert_eq!(new.layer_norm_eps, 1e-6);
        assert_eq!(pooling(&raw()), Ok(ClassifierPooling::Cls));
    }

    #[test]
    fn the_interval_of_global_layers_is_derived() {
        let of = |kinds: &str| {
            let name = |kind| match kind {
                'f' => "full_attention",
                _ => "sliding_attention",
            };
            let kinds: Vec<&str> = kinds.chars().map(name).collect();
            global_every(&json!({ "layer_types": kinds }))
        };
        for (kinds, every) in [
            ("fff", 1),
            ("fsfs", 2),
            ("fssfssf", 3),
            ("fss", 3),
            ("f", 1),
        ] {
            assert_eq!(of(kinds), Ok(every), "{kinds}");
        }
        for irregular in ["sfsf", "fsff", "fsfss"] {
            assert!(of(irregular).is_err(), "{irregular}");
        }
        assert_eq!(global_every(&json!({})), Ok(3));
    }

    #[test]
    fn unsupported_values_are_refused() {
        let cases = [
            ("norm_bias", json!(true), "norm_bias = true"),
            (
                "hidden_activation",
                json!("silu"),
                "hidden_activation is \"silu\"",
            ),
            ("hidden_size", Value::Null, "invalid type: null"),
            (
                "rope_parameters",
                json!({"full_attention": {"rope_type": "yarn"}}),
                "rotary scaling \"yarn\"",
            ),
        ];
        for (key, value, expected) in cases {
            let mut raw = raw();
            raw[key] = value;
            let refused = config(&raw).unwrap_err();
            assert!(refused.contains(expected), "{refused}");
        }
        let refused = pooling(&json!({"classifier_pooling": "max"})).unwrap_err();
        assert!(
            refused.contains("classifier_pooling: unknown variant"),
            "{refused}"
        );
    }
}
