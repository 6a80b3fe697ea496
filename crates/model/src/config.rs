//! Model configuration read from a Hugging Face `config.json`, in the old style (`rope_theta`, `rope_scaling`) or that
//! of transformers 5 (`rope_parameters`).
//!
//! Missing keys get the defaults of transformers 5.23; keys that are not read are harmless, reported or refused
//! (`keys`).

use std::path::Path;

use serde_json::Value;

use crate::{
    error::ModelError,
    input_file,
    keys::{self, AttentionMask},
    reward,
    rope::{Rope, cached_rows},
    shards::{EMBEDDING, ExpectedTensors, HEAD, Shards, check_not_lfs_pointer},
    stop_tokens::StopTokens,
};

/// Supported language-model architectures, as `config.json` names them.
pub const SUPPORTED_ARCHITECTURES: [&str; 4] = [
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
];

/// Supported reward-model architectures, as `config.json` names them.
pub const SUPPORTED_REWARD_ARCHITECTURES: [&str; 4] = [
    "LlamaForSequenceClassification",
    "MistralForSequenceClassification",
    "Qwen2ForSequenceClassification",
    "Qwen3ForSequenceClassification",
];

/// The head of a decoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ModelTask {
    /// Next-token prediction.
    Language,
    /// Sequence classification, as a reward.
    Reward,
}

impl ModelTask {
    /// Supported architectures with this head, as `config.json` names them.
    pub(crate) fn architectures(self) -> &'static [&'static str] {
        match self {
            Self::Language => &SUPPORTED_ARCHITECTURES,
            Self::Reward => &SUPPORTED_REWARD_ARCHITECTURES,
        }
    }

    /// Keys of `config.json` that are read for this head, in addition to those of the decoder.
    fn keys(self) -> &'static [&'static str] {
        match self {
            Self::Language => &["id2label", "label2id", "num_labels"],
            Self::Reward => &["agon_reward", "id2label", "label2id", "num_labels"],
        }
    }
}

/// Model family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Llama and models of the same architecture, such as SmolLM.
    Llama,
    /// Mistral: Llama with an optional sliding window.
    Mistral,
    /// Qwen 2 and 2.5: Llama with query, key and value biases.
    Qwen2,
    /// Qwen 3: Llama with RMSNorm on queries and keys.
    Qwen3,
}

/// Hyperparameters of a decoder.
#[derive(Debug, Clone)]
pub struct ModelConfig {
    /// Model family.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Number of transformer blocks.
    pub layers: usize,
    /// Number of query heads.
    pub heads: usize,
    /// Number of key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of an attention head.
    pub head_dim: usize,
    /// Vocabulary size.
    pub vocab_size: usize,
    /// Maximum sequence length, prompt and completion together.
    pub max_positions: usize,
    /// RMSNorm epsilon, added to the mean square.
    pub rms_norm_eps: f64,
    /// Base and scaling of the rotary frequencies.
    pub rope: Rope,
    /// Sliding-window size of each layer in tokens, the query itself included; `None` for full causal attention.
    pub windows: Vec<Option<usize>>,
    /// Whether the query, key and value projections have biases.
    pub qkv_bias: bool,
    /// Whether the attention output projection has a bias.
    pub output_bias: bool,
    /// Whether queries and keys are RMS-normalised per head.
    pub qk_norm: bool,
    /// Whether the language-model head shares the embedding's weights.
    pub tied_head: bool,
    /// Beginning-of-sequence token.
    pub bos: Option<u32>,
    /// Tokens that end a completion, including the tokenizer's when the folder was opened with it.
    pub stops: StopTokens,
    /// The raw `config.json`, preserved for saving.
    pub raw: Value,
}

impl ModelConfig {
    /// Reads `folder/config.json`, and further stop tokens from `folder/generation_config.json`.
    ///
    /// # Errors
    /// When a file is missing or malformed, or the architecture is not supported.
    pub fn load(folder: &Path) -> Result<Self, ModelError> {
        Self::load_for(ModelTask::Language, folder)
    }

    /// As [`Self::load`], for a folder of a model with the head of `task`.
    pub(crate) fn load_for(task: ModelTask, folder: &Path) -> Result<Self, ModelError> {
        let path = folder.join("config.json");
        let raw = match task {
            ModelTask::Language => read_json(&path)?,
            ModelTask::Reward => reward::from_disk(read_json(&path)?),
        };
        let mut config = Self::read(task, raw, &path)?;
        if config.raw["model_type"].is_null() {
            let (_, name) = FAMILIES[config.architecture as usize];
            let reason = format!(
                "model_type is missing, without which transformers opens no folder; set it to {name:?}"
            );
            return Err(ModelError::Malformed { path, reason });
        }
        let generation = folder.join("generation_config.json");
        if generation.exists() {
            let generation_config = read_json(&generation)?;
            let eos = stop_tokens(&generation_config, config.vocab_size, &generation);
            config.stops = config.stops.and(&eos);
            if !keys::is_off(&generation_config["stop_strings"]) {
                let path = generation.display();
                tracing::warn!(
                    %path,
                    strings = %generation_config["stop_strings"],
                    "stop_strings are not supported, only stop tokens are: list them as eos_token_id"
                );
            }
        }
        if task == ModelTask::Language {
            config.untie(folder)?;
        }
        Ok(config)
    }

    /// Parses a configuration; `path` identifies it in errors.
    ///
    /// # Errors
    /// When it is malformed or the architecture is not supported.
    pub fn from_json(raw: Value, path: &Path) -> Result<Self, ModelError> {
        Self::read(ModelTask::Language, raw, path)
    }

    fn read(task: ModelTask, raw: Value, path: &Path) -> Result<Self, ModelError> {
        let architecture = architecture(task, &raw, path)?;
        let malformed = |reason| ModelError::Malformed {
            path: path.to_owned(),
            reason,
        };
        let read = [&READ[..], architecture.keys(), task.keys()];
        let ignored = keys::ignored(&raw, &read, AttentionMask::Causal).map_err(malformed)?;
        if !ignored.is_empty() {
            let (path, keys) = (path.display(), ignored.join(", "));
            tracing::warn!(%path, keys, "the configuration has keys that are not read");
        }
        let config = Self::of(architecture, raw).map_err(malformed)?;
        let stops = stop_tokens(&config.raw, config.vocab_size, path);
        Ok(Self {
            stops: StopTokens::declared(&stops),
            ..config
        })
    }

    /// Parses the hyperparameters of a decoder of this family.
    fn of(architecture: Architecture, raw: Value) -> Result<Self, String> {
        let reader = ConfigReader { raw: &raw };
        let (hidden_size, heads) = (
            reader.required("hidden_size")?,
            reader.required("num_attention_heads")?,
        );
        let layers = layers(&raw)?;
        let max_positions = reader.required("max_position_embeddings")?;
        // Defaults of the transformers configuration classes.
        let kv_heads = match (architecture, raw.get("num_key_value_heads")) {
            (Architecture::Mistral, None) => 8,
            (Architecture::Qwen2 | Architecture::Qwen3, None) => 32,
            _ => reader.size_or("num_key_value_heads", heads)?,
        };
        let head_dim = match architecture {
            Architecture::Qwen3 => 128,
            _ => hidden_size / heads.max(1),
        };
        let bias = reader.flag("attention_bias")?;
        let (qkv_bias, output_bias) = match architecture {
            Architecture::Llama | Architecture::Qwen3 => (bias, bias),
            Architecture::Mistral => (false, false),
            Architecture::Qwen2 => (true, false),
        };
        let vocab_size = reader.required("vocab_size")?;
        let config = Self {
            architecture,
            hidden_size,
            intermediate_size: reader.required("intermediate_size")?,
            layers,
            heads,
            kv_heads,
            head_dim: reader.size_or("head_dim", head_dim)?,
            vocab_size,
            max_positions,
            rms_norm_eps: reader.epsilon()?,
            rope: Rope::read(&raw, max_positions)?,
            windows: windows(architecture, reader, layers)?,
            qkv_bias,
            output_bias,
            qk_norm: architecture == Architecture::Qwen3,
            tied_head: reader.flag("tie_word_embeddings")?,
            bos: tokens(&raw["bos_token_id"])
                .into_iter()
                .find(|&id| (id as usize) < vocab_size),
            stops: StopTokens::default(),
            raw: Value::Null,
        };
        config.check(&raw)?;
        Ok(Self { raw, ..config })
    }

    fn check(&self, raw: &Value) -> Result<(), String> {
        let known = |act: &&Value| *act == "silu" || *act == "swish";
        if let Some(act) = raw.get("hidden_act").filter(|act| !known(act)) {
            Err(format!("hidden_act is {act}, only \"silu\" is known"))
        } else if self.kv_heads == 0 || !self.heads.is_multiple_of(self.kv_heads) {
            Err(format!(
                "num_key_value_heads = {} does not divide {} heads",
                self.kv_heads, self.heads
            ))
        } else if self.heads * self.head_dim > MAX_SIZE {
            Err(format!(
                "{} heads of head_dim = {} are wider than {MAX_SIZE} together; correct one of them",
                self.heads, self.head_dim
            ))
        } else if !self.head_dim.is_multiple_of(2) {
            Err(format!(
                "head_dim = {} is odd, rotary positions need an even one",
                self.head_dim
            ))
        } else {
            Ok(())
        }
    }

    /// Unties the head when the weights in `folder` have a head that differs from the embedding, as transformers does,
    /// and records that in the configuration to be saved.
    fn untie(&mut self, folder: &Path) -> Result<(), ModelError> {
        if !self.tied_head || !Shards::exist_in(folder) {
            return Ok(());
        }
        let shards = Shards::open(folder)?;
        if !shards.differ(EMBEDDING, HEAD)? {
            return Ok(());
        }
        let path = folder.display();
        tracing::warn!(
            %path,
            "tie_word_embeddings is true but the weights have an lm_head that differs from the embedding: it is kept and untied"
        );
        self.tied_head = false;
        self.raw["tie_word_embeddings"] = false.into();
        Ok(())
    }

    /// Names and shapes of all tensors of the model.
    #[must_use]
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (d, f, hd) = (self.hidden_size, self.intermediate_size, self.head_dim);
        let (q, kv) = (self.heads * hd, self.kv_heads * hd);
        let mut tensors = vec![(
            "model.embed_tokens.weight".to_owned(),
            vec![self.vocab_size, d],
        )];
        for layer in 0..self.layers {
            let mut add = |name: &str, shape: &[usize]| {
                tensors.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
            };
            add("input_layernorm.weight", &[d]);
            for (name, out) in [("q", q), ("k", kv), ("v", kv)] {
                add(&format!("self_attn.{name}_proj.weight"), &[out, d]);
                if self.qkv_bias {
                    add(&format!("self_attn.{name}_proj.bias"), &[out]);
                }
            }
            add("self_attn.o_proj.weight", &[d, q]);
            if self.output_bias {
                add("self_attn.o_proj.bias", &[d]);
            }
            if self.qk_norm {
                add("self_attn.q_norm.weight", &[hd]);
                add("self_attn.k_norm.weight", &[hd]);
            }
            add("post_attention_layernorm.weight", &[d]);
            add("mlp.gate_proj.weight", &[f, d]);
            add("mlp.up_proj.weight", &[f, d]);
            add("mlp.down_proj.weight", &[d, f]);
        }
        tensors.push(("model.norm.weight".into(), vec![d]));
        if !self.tied_head {
            tensors.push(("lm_head.weight".into(), vec![self.vocab_size, d]));
        }
        tensors
    }

    /// Name of the language-model head's weight: the embedding's if they are tied.
    pub(crate) fn head_name(&self) -> &'static str {
        match self.tied_head {
            true => EMBEDDING,
            false => HEAD,
        }
    }

    /// Tensors that the folder of a language model must contain.
    pub(crate) fn expected_tensors(&self) -> ExpectedTensors {
        ExpectedTensors {
            tensors: self.tensors(),
            // A tied head was compared with the embedding when the configuration was loaded.
            ignorable: if self.tied_head {
                vec![HEAD]
            } else {
                Vec::new()
            },
            tied_head: self.tied_head,
        }
    }

    /// Number of elements of the cached RoPE table (cos and sin together) for sequences of up to `length` tokens.
    #[must_use]
    pub fn rope_table_elements(&self, length: usize) -> usize {
        cached_rows(length, self.max_positions) * self.head_dim
    }

    /// Number of parameters.
    #[must_use]
    pub fn parameter_count(&self) -> usize {
        self.tensors()
            .iter()
            .map(|(_, shape)| shape.iter().product::<usize>())
            .sum()
    }
}

pub(crate) fn read_json(path: &Path) -> Result<Value, ModelError> {
    let text = input_file::read(path, input_file::MAX_TEXT_BYTES)?;
    check_not_lfs_pointer(path, &text)?;
    serde_json::from_slice(&text).map_err(|error| ModelError::Malformed {
        path: path.to_owned(),
        reason: error.to_string(),
    })
}

/// Upper bound on widths, heads, vocabulary size and positions: a product of three does not overflow, and an allocation
/// of one such dimension fits in memory.
const MAX_SIZE: usize = 1 << 24;
/// Key of the number of layers.
const LAYERS: &str = "num_hidden_layers";
/// Upper bound on the number of layers.
const MAX_LAYERS: usize = 1 << 12;

/// Parses a positive dimension of the network; `None` when the key is missing or null.
pub(crate) fn size(raw: &Value, key: &str) -> Result<Option<usize>, String> {
    let value = &raw[key];
    if value.is_null() {
        return Ok(None);
    }
    let max = match key {
        LAYERS => MAX_LAYERS,
        _ => MAX_SIZE,
    };
    match value.as_u64().map(usize::try_from) {
        None => Err(format!("{key} = {value} is not a whole number")),
        Some(Ok(0)) => Err(format!("{key} is 0, it must be at least 1")),
        Some(Ok(number)) if number <= max => Ok(Some(number)),
        Some(_) => Err(too_large(key, value, max)),
    }
}

/// Number of layers.
pub(crate) fn layers(raw: &Value) -> Result<usize, String> {
    size(raw, LAYERS)?.ok_or_else(|| format!("{LAYERS} is missing"))
}

fn too_large(key: &str, value: impl std::fmt::Display, max: usize) -> String {
    format!("{key} = {value} is more than {max}, which no model has: correct it in the file")
}

/// Typed access to the keys of a configuration.
#[derive(Clone, Copy)]
struct ConfigReader<'a> {
    raw: &'a Value,
}

impl ConfigReader<'_> {
    fn required(self, key: &str) -> Result<usize, String> {
        let size = self.size(key)?;
        size.ok_or_else(|| format!("{key} is missing"))
    }

    fn size_or(self, key: &str, default: usize) -> Result<usize, String> {
        Ok(self.size(key)?.unwrap_or(default))
    }

    /// A positive dimension; `None` when the key is missing or null.
    fn size(self, key: &str) -> Result<Option<usize>, String> {
        size(self.raw, key)
    }

    /// A non-negative integer; a missing key gives `default`, null is an error.
    fn integer_or(self, key: &str, default: usize) -> Result<usize, String> {
        match self.raw.get(key) {
            None => Ok(default),
            Some(value) => value
                .as_u64()
                .and_then(|n| usize::try_from(n).ok())
                .ok_or_else(|| format!("{key} = {value} is not a whole number from 0 on")),
        }
    }

    fn flag(self, key: &str) -> Result<bool, String> {
        match &self.raw[key] {
            Value::Null => Ok(false),
            Value::Bool(flag) => Ok(*flag),
            other => Err(format!("{key} = {other} is neither true nor false")),
        }
    }

    fn epsilon(self) -> Result<f64, String> {
        match self.raw.get("rms_norm_eps") {
            None => Ok(1e-6),
            Some(value) => value
                .as_f64()
                .filter(|eps| eps.is_finite() && *eps > 0.0)
                .ok_or_else(|| format!("rms_norm_eps = {value} is not a number above 0")),
        }
    }
}

/// Token ids from a number, a list or null.
pub(crate) fn tokens(value: &Value) -> Vec<u32> {
    let one = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Array(ids) => ids.iter().filter_map(one).collect(),
        other => one(other).into_iter().collect(),
    }
}

/// Token ids of `eos_token_id` in the file `path`. Ids outside the vocabulary are skipped with a warning.
fn stop_tokens(raw: &Value, vocab_size: usize, path: &Path) -> Vec<u32> {
    let key = "eos_token_id";
    let named = match &raw[key] {
        Value::Null => &[],
        Value::Array(ids) => ids.as_slice(),
        one => std::slice::from_ref(one),
    };
    let known = |id: &Value| {
        let found = id.as_u64().and_then(|id| u32::try_from(id).ok());
        let found = found.filter(|&id| (id as usize) < vocab_size);
        if found.is_none() {
            let path = path.display();
            tracing::warn!(%path, key, %id, vocab_size, "a stop token is not in the model's vocabulary: it is ignored");
        }
        found
    };
    named.iter().filter_map(known).collect()
}

/// Sliding-window size of each layer, as transformers derives it.
fn windows(
    architecture: Architecture,
    reader: ConfigReader<'_>,
    layers: usize,
) -> Result<Vec<Option<usize>>, String> {
    let raw = reader.raw;
    if architecture == Architecture::Llama {
        return Ok(vec![None; layers]);
    }
    // An unused window is only checked for its type.
    let window = match raw.get("sliding_window") {
        Some(Value::Null) => None,
        _ => Some(reader.integer_or("sliding_window", 4096)?),
    };
    let nonzero = |window: Option<usize>| match window {
        Some(0) => {
            Err("sliding_window is 0, which would mask every token; set it to null to disable it")
        }
        window => Ok(window),
    };
    if architecture == Architecture::Mistral {
        if window.is_some() && !raw["layer_types"].is_null() {
            return Err(
                "sliding_window and layer_types are both set, which programs read in different ways: remove layer_types \
                 from a copy of the file if every layer has the window, or set sliding_window to null if none has"
                    .into(),
            );
        }
        return Ok(vec![nonzero(window)?; layers]);
    }
    let enabled = match raw.get("use_sliding_window") {
        Some(Value::Null) => return Err("use_sliding_window is null, not true or false".into()),
        _ => reader.flag("use_sliding_window")?,
    };
    let first = reader.integer_or("max_window_layers", 28)?;
    let window = nonzero(window.filter(|_| enabled))?;
    match &raw["layer_types"] {
        Value::Null => Ok((0..layers)
            .map(|layer| window.filter(|_| layer >= first))
            .collect()),
        types => typed_windows(types, window, layers),
    }
}

/// Sliding-window size of each layer by its entry in `layer_types`.
fn typed_windows(
    types: &Value,
    window: Option<usize>,
    layers: usize,
) -> Result<Vec<Option<usize>>, String> {
    let Some(types) = types.as_array() else {
        return Err(format!("layer_types = {types} is not a list"));
    };
    if types.len() != layers {
        return Err(format!(
            "layer_types names {} layers, num_hidden_layers is {layers}",
            types.len()
        ));
    }
    let of = |kind: &Value| {
        match (kind.as_str(), window) {
        (Some("sliding_attention"), None) => Err(
            "layer_types names \"sliding_attention\", but use_sliding_window is false or sliding_window null"
                .into(),
        ),
        (Some("sliding_attention"), window) => Ok(window),
        (Some("full_attention" | "attention"), _) => Ok(None),
        _ => Err(format!(
            "layer_types names {kind}, only \"full_attention\" and \"sliding_attention\" are known"
        )),
    }
    };
    types.iter().map(of).collect()
}

/// Model families with their `model_type`, in the order of the lists of architectures.
const FAMILIES: [(Architecture, &str); 4] = [
    (Architecture::Llama, "llama"),
    (Architecture::Mistral, "mistral"),
    (Architecture::Qwen2, "qwen2"),
    (Architecture::Qwen3, "qwen3"),
];

fn architecture(task: ModelTask, raw: &Value, path: &Path) -> Result<Architecture, ModelError> {
    let named = raw["architectures"][0].as_str();
    // Without a named architecture, model_type selects a language model.
    let kind = raw["model_type"].as_str();
    let unnamed = kind.filter(|_| named.is_none() && task == ModelTask::Language);
    let mut families = FAMILIES.iter().zip(task.architectures());
    let family = families
        .find(|((_, kind), name)| named == Some(**name) || unnamed == Some(*kind))
        .map(|(family, _)| *family);
    let Some((architecture, model_type)) = family else {
        return Err(ModelError::Architecture {
            path: path.to_owned(),
            found: named.or(kind).unwrap_or("(none is named)").to_owned(),
            supported: task.architectures().to_vec(),
        });
    };
    match kind.filter(|kind| *kind != model_type) {
        None => Ok(architecture),
        // Transformers selects by one of them, other programs by the other.
        Some(kind) => Err(ModelError::Malformed {
            path: path.to_owned(),
            reason: format!("architectures names a {model_type} model, model_type a {kind} one"),
        }),
    }
}

/// Keys of `config.json` that are read for every family.
const READ: [&str; 15] = [
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "hidden_act",
    "tie_word_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "original_max_position_embeddings",
];

impl Architecture {
    /// Keys of `config.json` that are read for this family, in addition to [`READ`].
    fn keys(self) -> &'static [&'static str] {
        match self {
            Self::Llama => &["attention_bias"],
            Self::Mistral => &["sliding_window"],
            // For Qwen2, query, key and value biases follow from the family, not from attention_bias.
            Self::Qwen2 | Self::Qwen3 => &[
                "attention_bias",
                "layer_types",
                "max_window_layers",
                "sliding_window",
                "use_sliding_window",
            ],
        }
    }

    /// Name in `config.json` of this family's architecture with the head of `task`.
    pub(crate) fn name_for(self, task: ModelTask) -> &'static str {
        let index = FAMILIES.iter().position(|(family, _)| *family == self);
        task.architectures()[index.expect("every family is in the list")]
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::fixtures::{config_json, shared};

    /// The configuration of [`config_json`] with `changes` applied; null removes a key.
    fn changed(changes: Value) -> Result<ModelConfig, String> {
        let mut raw = config_json(8);
        let keys = raw.as_object_mut().unwrap();
        let Value::Object(changes) = changes else {
            panic!("changes are an object")
        };
        for (key, value) in changes {
            match value {
                Value::Null => drop(keys.remove(&key)),
                value => drop(keys.insert(key, value)),
            }
        }
        let config = ModelConfig::from_json(raw, Path::new("config.json"));
        config.map_err(|error| error.to_string())
    }

    #[test]
    fn missing_keys_get_the_defaults_of_transformers() {
        let bare = |family: &str, heads: usize| {
            changed(json!({
                "architectures": [format!("{family}ForCausalLM")], "model_type": family.to_lowercase(),
                "hidden_size": 320, "num_attention_heads": heads, "num_key_value_heads": null,
                "head_dim": null, "rms_norm_eps": null, "rope_theta": null, "tie_word_embeddings": null,
            }))
            .unwrap()
        };
        for (family, kv_heads, head_dim) in [
            ("Llama", 32, 10),
            ("Mistral", 8, 10),
            ("Qwen2", 32, 10),
            ("Qwen3", 32, 128),
        ] {
            let config = bare(family, 32);
            assert_eq!(
                (config.kv_heads, config.head_dim, config.tied_head),
                (kv_heads, head_dim, false),
                "{family}"
            );
            assert_eq!((config.rms_norm_eps, config.rope.theta), (1e-6, 10_000.0));
        }
        let qwen2 = changed(json!({
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "head_dim": 6,
        }));
        assert_eq!(qwen2.unwrap().head_dim, 6);
    }

    #[test]
    fn unsupported_values_are_refused_by_name() {
        let cases = [
            (json!({"hidden_act": "gelu"}), "hidden_act is \"gelu\""),
            (json!({"mlp_bias": true}), "mlp_bias = true"),
            (json!({"logit_scale": 0.5}), "logit_scale = 0.5"),
            (json!({"sliding_window": 8}), "sliding_window = 8"),
            (
                json!({"hidden_size": "8"}),
                "hidden_size = \"8\" is not a whole number",
            ),
            (json!({"hidden_size": null}), "hidden_size is missing"),
            (
                json!({"tie_word_embeddings": "yes"}),
                "tie_word_embeddings = \"yes\" is neither true nor false",
            ),
            (
                json!({"quantization_config": {"quant_method": "gptq"}}),
                "this folder is quantised (quantization_config: gptq), use the unquantised one",
            ),
            (
                json!({"rope_scaling": {"type": "longrope", "factor": 2.0}}),
                "the rotary scaling \"longrope\" is not supported",
            ),
            (
                json!({"model_type": "mistral"}),
                "architectures names a llama model, model_type a mistral one",
            ),
            (
                json!({
                    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3",
                    "num_key_value_heads": 1, "layer_types": ["sliding_attention"],
                }),
                "use_sliding_window is false",
            ),
        ];
        for (changes, expected) in cases {
            let refused = changed(changes.clone()).unwrap_err();
            assert!(refused.contains(expected), "{refused} for {changes}");
            assert!(refused.contains("config.json"), "{refused}");
        }
        assert!(changed(json!({"hidden_act": "swish", "sliding_window": 16})).is_ok());
    }

    /// The configuration of [`config_json`] for this family, with one key set.
    fn with_key(family: &str, key: &str, value: &Value) -> Result<ModelConfig, String> {
        let mut raw = config_json(8);
        raw["architectures"] = json!([format!("{family}ForCausalLM")]);
        raw["model_type"] = family.to_lowercase().into();
        raw["use_sliding_window"] = (family != "Mistral").into();
        if family != "Qwen2" {
            raw.as_object_mut().unwrap().remove("use_sliding_window");
        }
        raw[key] = value.clone();
        let config = ModelConfig::from_json(raw, Path::new("config.json"));
        config.map_err(|error| error.to_string())
    }

    #[test]
    fn a_window_of_the_wrong_type_is_refused() {
        let integer = "is not a whole number";
        let cases = [
            ("Mistral", "sliding_window", json!(4.0), integer),
            ("Mistral", "sliding_window", json!("16"), integer),
            ("Mistral", "sliding_window", json!(true), integer),
            ("Mistral", "sliding_window", json!(-1), integer),
            ("Mistral", "sliding_window", json!(0), "sliding_window is 0"),
            (
                "Mistral",
                "layer_types",
                json!(["full_attention"]),
                "are both set",
            ),
            ("Qwen2", "sliding_window", json!(16.0), integer),
            ("Qwen2", "sliding_window", json!(0), "sliding_window is 0"),
            (
                "Qwen2",
                "use_sliding_window",
                json!(1),
                "neither true nor false",
            ),
            (
                "Qwen2",
                "use_sliding_window",
                json!("true"),
                "neither true nor false",
            ),
            ("Qwen2", "use_sliding_window", json!(null), "is null"),
            ("Qwen2", "max_window_layers", json!(2.0), integer),
            ("Qwen2", "max_window_layers", json!(null), integer),
            (
                "Qwen2",
                "layer_types",
                json!("full_attention"),
                "is not a list",
            ),
            ("Qwen2", "layer_types", json!([]), "names 0 layers"),
        ];
        for (family, key, value, expected) in cases {
            let refused = with_key(family, key, &value).unwrap_err();
            let is_named = refused.contains(key) && refused.contains(expected);
            assert!(is_named, "{refused} for {key} = {value}");
        }
        for (family, key, value, window) in [
            ("Mistral", "sliding_window", json!(null), None),
            ("Mistral", "sliding_window", json!(4), Some(4)),
            ("Mistral", "rms_norm_eps", json!(1e-5), Some(4096)),
            ("Qwen2", "max_window_layers", json!(0), Some(4096)),
            ("Qwen2", "max_window_layers", json!(1), None),
            (
                "Qwen2",
                "layer_types",
                json!(["sliding_attention"]),
                Some(4096),
            ),
        ] {
            let config = with_key(family, key, &value).unwrap();
            assert_eq!(config.windows, [window], "{family} {key} = {value}");
        }
    }

    #[test]
    fn invalid_numbers_are_refused_by_their_keys() {
        let yarn = json!({"rope_type": "yarn", "factor": 4.0, "rope_theta": 1.0});
        for (key, value) in [
            ("rms_norm_eps", json!(0)),
            ("rms_norm_eps", json!(-1e-6)),
            ("rms_norm_eps", json!(null)),
            ("rope_theta", json!(0.0)),
            ("rope_theta", json!(-1)),
            ("rope_parameters", yarn),
            ("hidden_act", json!(null)),
            ("hidden_size", json!(0)),
            ("num_attention_heads", json!(0)),
            ("vocab_size", json!(u64::MAX)),
            ("intermediate_size", json!(1u64 << 62)),
            ("num_hidden_layers", json!(4097)),
            ("head_dim", json!(1 << 24)),
        ] {
            let refused = with_key("Llama", key, &value).unwrap_err();
            assert!(refused.contains(key), "{refused} for {key} = {value}");
        }
    }

    #[test]
    fn stop_tokens_outside_the_vocabulary_are_skipped() {
        for (named, expected) in [
            (json!(3), vec![3]),
            (json!(8), vec![]),
            (json!([9999, 2, -1, null, "x"]), vec![2]),
            (json!(-1), vec![]),
            (json!([]), vec![]),
        ] {
            let config = with_key("Llama", "eos_token_id", &named).unwrap();
            assert_eq!(config.stops.ids().collect::<Vec<_>>(), expected, "{named}");
            assert_eq!(config.stops.text_end(), expected.first().copied());
        }
        let bos = with_key("Llama", "bos_token_id", &json!(8)).unwrap().bos;
        assert_eq!(bos, None);
    }

    #[test]
    fn a_missing_model_type_is_refused() {
        let folder = crate::fixtures::folder();
        let path = folder.path().join("config.json");
        let mut raw = config_json(8);
        raw.as_object_mut().unwrap().remove("model_type");
        std::fs::write(&path, raw.to_string()).unwrap();
        let refused = ModelConfig::load(folder.path()).unwrap_err().to_string();
        assert!(
            refused.contains("model_type is missing") && refused.contains("\"llama\""),
            "{refused}"
        );
    }

    #[test]
    fn implausible_sizes_are_refused() {
        let Some(folder) = shared("data/cases/security/config") else {
            return;
        };
        let files = std::fs::read_dir(folder).unwrap();
        for file in files {
            let path = file.unwrap().path();
            let raw = read_json(&path).unwrap();
            let refused = ModelConfig::from_json(raw, &path).unwrap_err().to_string();
            let name = path.file_name().unwrap().to_string_lossy();
            let key = name.rsplit_once('_').unwrap().0;
            assert!(refused.contains(&format!("{key} = ")), "{refused}");
            let max = if key == LAYERS { MAX_LAYERS } else { MAX_SIZE };
            assert!(refused.contains(&format!("more than {max},")), "{refused}");
        }
    }
}
