//! DeBERTa-v2 and v3 classifiers, implemented by candle.

use candle_core::Tensor;
use candle_nn::VarBuilder;
use candle_transformers::models::debertav2::{Config, DebertaV2SeqClassificationModel};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::encoder::{BuildError, EncoderArchitecture, EncoderNetwork};

/// Network and the options of its forward pass.
pub(super) struct DebertaV2Classifier {
    network: DebertaV2SeqClassificationModel,
    absolute_positions: bool,
}

/// Loader of DeBERTa-v2 and v3.
pub(super) const ARCHITECTURE: EncoderArchitecture = EncoderArchitecture {
    build,
    read: &[
        "attention_head_size",
        "conv_act",
        "conv_groups",
        "conv_kernel_size",
        "embedding_size",
        "hidden_act",
        "legacy",
        "max_relative_positions",
        "norm_rel_ebd",
        "pooler_hidden_act",
        "pooler_hidden_size",
        "pos_att_type",
        "position_biased_input",
        "position_buckets",
        "relative_attention",
        "share_att_key",
        "type_vocab_size",
    ],
    ignorable: &[
        "lm_predictions.",
        "mask_predictions.",
        "cls.",
        "deberta.embeddings.position_embeddings.weight",
    ],
};

fn build(raw: &Value, tensors: &VarBuilder<'_>) -> Result<EncoderNetwork, BuildError> {
    let config = config(raw)?;
    Ok(EncoderNetwork::DebertaV2(Box::new(DebertaV2Classifier {
        network: DebertaV2SeqClassificationModel::load(tensors.pp("deberta"), &config, None)?,
        absolute_positions: config.position_biased_input,
    })))
}

impl DebertaV2Classifier {
    /// Logits of padded `ids` `[n, width]` with an attention mask of the same shape: `[n, 1]`.
    pub(super) fn forward(&self, ids: &Tensor, mask: &Tensor) -> candle_core::Result<Tensor> {
        if !self.absolute_positions {
            return self.network.forward(ids, None, Some(mask.clone()));
        }
        // candle supports absolute positions for a batch of one only.
        let logits = (0..ids.dim(0)?).map(|row| {
            let mask = mask.narrow(0, row, 1)?;
            self.network
                .forward(&ids.narrow(0, row, 1)?, None, Some(mask))
        });
        Tensor::cat(&logits.collect::<candle_core::Result<Vec<_>>>()?, 0)
    }
}

/// candle's configuration, with the defaults of transformers for keys that candle requires.
fn config(raw: &Value) -> Result<Config, String> {
    if raw["conv_kernel_size"].as_u64().unwrap_or(0) > 0 {
        let reason = "conv_kernel_size > 0, as in the xlarge models of version 2, is not supported; \
                      use a model of version 3";
        return Err(reason.into());
    }
    let mut flat = raw.clone();
    let defaults = [
        ("id2label", json!({"0": "LABEL_0"})),
        // candle requires the key but does not use it.
        ("label2id", json!({})),
        ("pooler_hidden_size", raw["hidden_size"].clone()),
        ("pooler_dropout", json!(0.0)),
        ("pooler_hidden_act", json!("gelu")),
        ("hidden_dropout_prob", json!(0.0)),
        ("attention_probs_dropout_prob", json!(0.0)),
        ("initializer_range", json!(0.02)),
        ("layer_norm_eps", json!(1e-7)),
        ("type_vocab_size", json!(0)),
        ("relative_attention", json!(false)),
        ("max_relative_positions", json!(-1)),
        ("position_biased_input", json!(true)),
        ("pos_att_type", json!([])),
    ];
    for (key, default) in defaults {
        if flat[key].is_null() {
            flat[key] = default;
        }
    }
    Config::deserialize(&flat).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw() -> Value {
        json!({
            "vocab_size": 8, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 4, "hidden_act": "gelu", "max_position_embeddings": 16,
            "label2id": {"LABEL_0": 0}, "pos_att_type": "p2c|c2p", "position_buckets": 4
        })
    }

    #[test]
    fn missing_keys_get_the_defaults_of_transformers() {
        let config = config(&raw()).unwrap();
        assert_eq!(config.pos_att_type, ["p2c", "c2p"]);
        assert_eq!(config.pooler_hidden_size, Some(4));
        assert_eq!(config.max_relative_positions, -1);
        assert_eq!(config.id2label.unwrap().len(), 1);
        assert!(config.position_biased_input && !config.relative_attention);
    }

    #[test]
    fn unsupported_values_are_refused() {
        for (key, value, expected) in [
            ("conv_kernel_size", json!(3), "conv_kernel_size > 0"),
            ("hidden_act", json!("swish"), "unknown variant `swish`"),
            ("hidden_size", json!("4"), "invalid type"),
        ] {
            let mut raw = raw();
            raw[key] = value;
            let refused = config(&raw).unwrap_err();
            assert!(refused.contains(expected), "{refused}");
        }
    }
}
