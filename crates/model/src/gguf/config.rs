//! The `config.json` and `generation_config.json` that say what a GGUF file's metadata says.
//!
//! Every key of the architecture is read or refused by name: what is not understood may change what the weights mean.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use crate::gguf::header::{GgufHeader, MetadataValue};

/// An architecture: its name in GGUF and in Hugging Face's files.
#[derive(Debug, Clone, Copy)]
pub(super) struct GgufArchitecture {
    pub(super) name: &'static str,
    class: &'static str,
    model_type: &'static str,
    /// Whether llama.cpp's converter permutes the rows of queries and keys, for its form of RoPE.
    pub(super) permutes_heads: bool,
    /// Whether queries, keys and values have biases.
    pub(super) has_biases: bool,
    /// Whether queries and keys are normalised per head.
    pub(super) has_head_norms: bool,
}

/// Mistral's models are of the architecture `llama` in GGUF.
const ARCHITECTURES: [GgufArchitecture; 3] = [
    GgufArchitecture {
        name: "llama",
        class: "LlamaForCausalLM",
        model_type: "llama",
        permutes_heads: true,
        has_biases: false,
        has_head_norms: false,
    },
    GgufArchitecture {
        name: "qwen2",
        class: "Qwen2ForCausalLM",
        model_type: "qwen2",
        permutes_heads: false,
        has_biases: true,
        has_head_norms: false,
    },
    GgufArchitecture {
        name: "qwen3",
        class: "Qwen3ForCausalLM",
        model_type: "qwen3",
        permutes_heads: false,
        has_biases: false,
        has_head_norms: true,
    },
];

/// Frequency factors of Llama 3.1 and 3.2, which their configurations call `llama3`: factors of low and high frequencies,
/// and the context of the model before it was extended.
const LLAMA3_ROPE: [f64; 3] = [1.0, 4.0, 8192.0];

/// Shape of a model.
#[derive(Debug, Clone, Copy)]
pub(super) struct ModelShape {
    pub(super) layers: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
}

/// Checks that the file is one whole model.
///
/// # Errors
/// The reason why it is not: it is a part of one, or an adapter for one.
pub(super) fn check_whole(header: &GgufHeader) -> Result<(), String> {
    let number = |key: &str| header.get(key, "a number", MetadataValue::as_u64);
    let part = number("split.no")?.unwrap_or(0) + 1;
    if let Some(count) = number("split.count")?.filter(|&count| count > 1) {
        return Err(format!(
            "it is part {part} of {count} of a model (split.count): join them with `llama-gguf-split --merge`"
        ));
    }
    match header.text("general.type")? {
        None | Some("model") => Ok(()),
        Some(other) => {
            let remedy = match other {
                "adapter" => "; adapters are read as PEFT folders",
                _ => "",
            };
            Err(format!(
                "its general.type is {other:?}, where a model is needed{remedy}"
            ))
        }
    }
}

/// The architecture of a file.
///
/// # Errors
/// The reason why it is not supported.
pub(super) fn architecture(header: &GgufHeader) -> Result<GgufArchitecture, String> {
    let names = ARCHITECTURES.map(|known| known.name).join(", ");
    let Some(found) = header.text("general.architecture")? else {
        return Err(format!(
            "it has no general.architecture; supported are {names}"
        ));
    };
    let known = ARCHITECTURES.iter().find(|known| known.name == found);
    known
        .copied()
        .ok_or_else(|| format!("its general.architecture is {found:?}; supported are {names}"))
}

/// Reader of an architecture's keys, which remembers those that were read.
struct ArchitectureKeys<'a> {
    header: &'a GgufHeader,
    prefix: String,
    read: BTreeSet<String>,
}

impl<'a> ArchitectureKeys<'a> {
    fn get(&mut self, key: &str) -> Option<&'a MetadataValue> {
        let key = format!("{}{key}", self.prefix);
        let value = self.header.metadata.get(&key);
        self.read.insert(key);
        value
    }

    fn count(&mut self, key: &str) -> Result<usize, String> {
        self.optional_count(key)?
            .ok_or_else(|| format!("it has no {}{key}", self.prefix))
    }

    fn optional_count(&mut self, key: &str) -> Result<Option<usize>, String> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        // A model whose layers differ has an array.
        let value = value.as_u64().and_then(|value| u32::try_from(value).ok());
        let value = value.filter(|&value| value > 0);
        value
            .map(|value| Some(value as usize))
            .ok_or_else(|| format!("{}{key} is not a positive number", self.prefix))
    }

    fn float(&mut self, key: &str) -> Result<Option<f64>, String> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let value = value
            .as_f64()
            .filter(|value| value.is_finite() && *value > 0.0);
        value
            .map(Some)
            .ok_or_else(|| format!("{}{key} is not a positive number", self.prefix))
    }

    fn text(&mut self, key: &str) -> Result<Option<&'a str>, String> {
        self.get(key);
        self.header.text(&format!("{}{key}", self.prefix))
    }

    /// The first key of the architecture that was not read.
    fn unread(&self) -> Option<&'a str> {
        let keys = self.header.metadata.keys();
        let mut keys = keys.filter(|key| key.starts_with(&self.prefix));
        keys.find(|key| !self.read.contains(*key))
            .map(String::as_str)
    }
}

/// The configuration and shape of a model, whose tensors include `rope_freqs` if the frequencies of RoPE have factors.
///
/// # Errors
/// The reason why the metadata is incomplete, contradictory or not supported, with its key.
pub(super) fn config(
    header: &GgufHeader,
    architecture: GgufArchitecture,
    rope_factors: Option<&[f32]>,
) -> Result<(Value, ModelShape), String> {
    let mut keys = ArchitectureKeys {
        header,
        prefix: format!("{}.", architecture.name),
        read: BTreeSet::new(),
    };
    let (shape, mut config) = shape(&mut keys)?;
    let theta = keys.float("rope.freq_base")?.unwrap_or(10_000.0);
    config.insert("architectures".into(), json!([architecture.class]));
    config.insert("model_type".into(), architecture.model_type.into());
    config.insert("hidden_act".into(), "silu".into());
    config.insert("attention_bias".into(), false.into());
    config.insert("rope_theta".into(), theta.into());
    let scaling = match rope_factors {
        Some(factors) => Some(llama3_scaling(factors, theta, shape.head_dim)?),
        None => scaling(&mut keys)?,
    };
    config.insert("rope_scaling".into(), scaling.into());
    if let Some(window) = keys.optional_count("attention.sliding_window")? {
        config.insert("model_type".into(), "mistral".into());
        config.insert("architectures".into(), json!(["MistralForCausalLM"]));
        config.insert("sliding_window".into(), window.into());
        if architecture.name != "llama" {
            return Err(format!(
                "{}.attention.sliding_window is {window}, which is not supported for this architecture",
                architecture.name
            ));
        }
    }
    // Read with the embedding.
    keys.get("vocab_size");
    if let Some(key) = keys.unread() {
        return Err(format!(
            "it has {key}, which is not supported: it may change what the weights mean"
        ));
    }
    Ok((Value::Object(config), shape))
}

/// The shape of the model, as read and as keys of `config.json`.
fn shape(keys: &mut ArchitectureKeys<'_>) -> Result<(ModelShape, Map<String, Value>), String> {
    let (layers, hidden) = (keys.count("block_count")?, keys.count("embedding_length")?);
    let heads = keys.count("attention.head_count")?;
    let kv_heads = keys
        .optional_count("attention.head_count_kv")?
        .unwrap_or(heads);
    let key_length = keys.optional_count("attention.key_length")?;
    let value_length = keys.optional_count("attention.value_length")?;
    let head_dim = key_length.unwrap_or(hidden / heads);
    let rotated = keys.optional_count("rope.dimension_count")?;
    for (key, found) in [
        ("attention.value_length", value_length),
        ("rope.dimension_count", rotated),
    ] {
        if let Some(found) = found.filter(|&found| found != head_dim) {
            return Err(format!(
                "{}{key} is {found} and a head has {head_dim} dimensions: parts of heads are not supported",
                keys.prefix
            ));
        }
    }
    let epsilon = keys.float("attention.layer_norm_rms_epsilon")?;
    let epsilon = epsilon.ok_or("it has no attention.layer_norm_rms_epsilon")?;
    let config = json!({
        "hidden_size": hidden,
        "intermediate_size": keys.count("feed_forward_length")?,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": keys.count("context_length")?,
        "rms_norm_eps": epsilon,
    });
    let shape = ModelShape {
        layers,
        heads,
        kv_heads,
        head_dim,
    };
    let Value::Object(config) = config else {
        unreachable!("it is written as an object")
    };
    Ok((shape, config))
}

/// RoPE scaling as `config.json` has it; null without any.
fn scaling(keys: &mut ArchitectureKeys<'_>) -> Result<Option<Value>, String> {
    let kind = keys.text("rope.scaling.type")?;
    let factor = keys.float("rope.scaling.factor")?;
    let original = keys.optional_count("rope.scaling.original_context_length")?;
    keys.get("rope.scaling.finetuned");
    match (kind, factor) {
        (None | Some("none"), None) => Ok(None),
        (Some("linear"), Some(factor)) => {
            Ok(Some(json!({"rope_type": "linear", "factor": factor})))
        }
        (Some("yarn"), Some(factor)) => {
            let original = original.ok_or("it has no rope.scaling.original_context_length")?;
            Ok(Some(json!({
                "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original,
            })))
        }
        (kind, factor) => Err(format!(
            "its RoPE scaling of type {} with factor {} is not supported",
            kind.unwrap_or("(none)"),
            factor.map_or("(none)".into(), |factor| factor.to_string())
        )),
    }
}

/// The scaling `llama3` with these factors of frequencies, whose parameters a GGUF file does not have.
fn llama3_scaling(factors: &[f32], theta: f64, head_dim: usize) -> Result<Value, String> {
    let [low, high, original] = LLAMA3_ROPE;
    let factor = factors.iter().copied().fold(1.0, f32::max);
    let factor = f64::from(factor);
    let expected = |index: usize| {
        let exponent = 2.0 * index as f64 / head_dim as f64;
        let wavelength = 2.0 * std::f64::consts::PI * theta.powf(exponent);
        let smooth = (original / wavelength - low) / (high - low);
        match smooth {
            smooth if smooth >= 1.0 => 1.0,
            smooth if smooth <= 0.0 => factor,
            smooth => 1.0 / ((1.0 - smooth) / factor + smooth),
        }
    };
    let is_llama3 = factors.len() == head_dim / 2
        && (factors.iter().enumerate())
            .all(|(index, &found)| (f64::from(found) / expected(index) - 1.0).abs() < 1e-3);
    match is_llama3 {
        true => Ok(json!({
            "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
            "original_max_position_embeddings": original as u64,
        })),
        false => Err("its rope_freqs are not the factors of Llama 3.1 or 3.2".into()),
    }
}

/// Ids of the special tokens of a file, as `config.json` and `generation_config.json` have them.
pub(super) fn special_ids(header: &GgufHeader) -> Result<SpecialIds, String> {
    let id = |name: &str| {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let read = |value: &MetadataValue| value.as_u64().and_then(|id| u32::try_from(id).ok());
        let id = header.get(&key, "a token", read)?;
        // Older converters write -1 for a token that there is not.
        Ok::<_, String>(id.filter(|&id| id != u32::MAX))
    };
    Ok(SpecialIds {
        bos: id("bos")?,
        eos: id("eos")?,
        eot: id("eot")?,
        unknown: id("unknown")?,
        padding: id("padding")?,
    })
}

/// Ids of special tokens.
#[derive(Debug, Clone, Copy)]
pub(super) struct SpecialIds {
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    /// End of a turn, where it is another than the end of a text.
    pub(super) eot: Option<u32>,
    pub(super) unknown: Option<u32>,
    pub(super) padding: Option<u32>,
}

impl SpecialIds {
    /// All of them, by their names in GGUF's keys.
    pub(super) fn named(&self) -> [(&'static str, Option<u32>); 5] {
        [
            ("bos", self.bos),
            ("eos", self.eos),
            ("eot", self.eot),
            ("unknown", self.unknown),
            ("padding", self.padding),
        ]
    }

    /// Tokens that end a text or a turn.
    pub(super) fn ends(&self) -> Vec<u32> {
        let mut ends: Vec<u32> = self.eos.into_iter().chain(self.eot).collect();
        ends.dedup();
        ends
    }
}
