//! From a Hugging Face `config.json`, in the old style (`rope_theta`, `rope_scaling`) or in that of
//! transformers 5 (`rope_parameters`), to the few numbers that the network needs.
//!
//! What a file leaves out is what transformers 5.23 takes for it; what it says beyond that is harmless, reported or
//! refused (`keys`).

use std::path::Path;

use serde_json::Value;

use crate::{
    ModelError,
    keys::{self, Attention},
    reward,
    rope::{Rope, kept_rows},
    shards::{EMBEDDING, HEAD, Shards, Wanted, is_fetched, missing},
    stop_tokens::StopTokens,
};

/// The architectures that can be loaded, as `config.json` names them.
pub const SUPPORTED_ARCHITECTURES: [&str; 4] = [
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
];

/// The architectures of decoders with a head that scores, as `config.json` names them.
pub const SUPPORTED_REWARD_ARCHITECTURES: [&str; 4] = [
    "LlamaForSequenceClassification",
    "MistralForSequenceClassification",
    "Qwen2ForSequenceClassification",
    "Qwen3ForSequenceClassification",
];

/// What a decoder's hidden states are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Task {
    /// The next token.
    Language,
    /// A score.
    Reward,
}

impl Task {
    /// How `config.json` names the architectures for it.
    pub(crate) fn architectures(self) -> &'static [&'static str] {
        match self {
            Self::Language => &SUPPORTED_ARCHITECTURES,
            Self::Reward => &SUPPORTED_REWARD_ARCHITECTURES,
        }
    }

    /// Keys of `config.json` that are read for it beside those of the decoder.
    fn keys(self) -> &'static [&'static str] {
        match self {
            Self::Language => &["id2label", "label2id", "num_labels"],
            Self::Reward => &["agon_reward", "id2label", "label2id", "num_labels"],
        }
    }
}

/// Which family of decoders a model belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Llama and all that copy it, SmolLM for one.
    Llama,
    /// Mistral: Llama with an optional sliding window.
    Mistral,
    /// Qwen 2 and 2.5: Llama with biases on queries, keys and values.
    Qwen2,
    /// Qwen 3: Llama with normalised queries and keys.
    Qwen3,
}

/// The shape of a decoder.
#[derive(Debug, Clone)]
pub struct ModelConfig {
    /// Its family.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward part.
    pub intermediate_size: usize,
    /// Transformer blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// The longest sequence, prompt and completion together.
    pub max_positions: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f64,
    /// Base and scaling of the rotary frequencies.
    pub rope: Rope,
    /// Of each layer: a token sees so many tokens, itself included; none: all before it.
    pub windows: Vec<Option<usize>>,
    /// Whether queries, keys and values have biases.
    pub qkv_bias: bool,
    /// Whether the attention's output has a bias.
    pub output_bias: bool,
    /// Whether queries and keys are normalised per head.
    pub qk_norm: bool,
    /// Whether the output head is the embedding.
    pub tied_head: bool,
    /// The token that begins a text.
    pub bos: Option<u32>,
    /// The tokens that end a completion; the tokenizer's among them where the folder was opened with it.
    pub stops: StopTokens,
    /// `config.json` as it was read, to be written again.
    pub raw: Value,
}

impl ModelConfig {
    /// Reads `folder/config.json`, and `folder/generation_config.json` for more tokens that end a completion.
    ///
    /// # Errors
    /// When a file is missing or malformed, or the architecture is not supported.
    pub fn load(folder: &Path) -> Result<Self, ModelError> {
        Self::load_for(Task::Language, folder)
    }

    /// As [`Self::load`], of a folder that is for `task`.
    pub(crate) fn load_for(task: Task, folder: &Path) -> Result<Self, ModelError> {
        let path = folder.join("config.json");
        let raw = match task {
            Task::Language => read_json(&path)?,
            Task::Reward => reward::from_disk(read_json(&path)?),
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
            let said = read_json(&generation)?;
            let eos = stop_tokens(&said, config.vocab_size, &generation);
            config.stops = config.stops.and(&eos);
            if !keys::is_off(&said["stop_strings"]) {
                let path = generation.display();
                tracing::warn!(
                    %path,
                    strings = %said["stop_strings"],
                    "stop_strings end no completion here, only tokens do: name them as eos_token_id"
                );
            }
        }
        if task == Task::Language {
            config.untie(folder)?;
        }
        Ok(config)
    }

    /// Reads a configuration; `path` names it in errors.
    ///
    /// # Errors
    /// When it is malformed or the architecture is not supported.
    pub fn from_json(raw: Value, path: &Path) -> Result<Self, ModelError> {
        Self::read(Task::Language, raw, path)
    }

    fn read(task: Task, raw: Value, path: &Path) -> Result<Self, ModelError> {
        let architecture = architecture(task, &raw, path)?;
        let malformed = |reason| ModelError::Malformed {
            path: path.to_owned(),
            reason,
        };
        let read = [&READ[..], architecture.keys(), task.keys()];
        let ignored = keys::ignored(&raw, &read, Attention::Causal).map_err(malformed)?;
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

    /// The shape of a decoder of this family that `raw` describes.
    fn of(architecture: Architecture, raw: Value) -> Result<Self, String> {
        let numbers = Numbers { raw: &raw };
        let (hidden_size, heads) = (
            numbers.needed("hidden_size")?,
            numbers.needed("num_attention_heads")?,
        );
        let layers = layers(&raw)?;
        let max_positions = numbers.needed("max_position_embeddings")?;
        // Where a file leaves these out, the class of transformers has a number of its own.
        let kv_heads = match (architecture, raw.get("num_key_value_heads")) {
            (Architecture::Mistral, None) => 8,
            (Architecture::Qwen2 | Architecture::Qwen3, None) => 32,
            _ => numbers.or("num_key_value_heads", heads)?,
        };
        let head_dim = match architecture {
            Architecture::Qwen3 => 128,
            _ => hidden_size / heads.max(1),
        };
        let bias = numbers.flag("attention_bias")?;
        let (qkv_bias, output_bias) = match architecture {
            Architecture::Llama | Architecture::Qwen3 => (bias, bias),
            Architecture::Mistral => (false, false),
            Architecture::Qwen2 => (true, false),
        };
        let vocab_size = numbers.needed("vocab_size")?;
        let config = Self {
            architecture,
            hidden_size,
            intermediate_size: numbers.needed("intermediate_size")?,
            layers,
            heads,
            kv_heads,
            head_dim: numbers.or("head_dim", head_dim)?,
            vocab_size,
            max_positions,
            rms_norm_eps: numbers.epsilon()?,
            rope: Rope::read(&raw, max_positions)?,
            windows: windows(architecture, numbers, layers)?,
            qkv_bias,
            output_bias,
            qk_norm: architecture == Architecture::Qwen3,
            tied_head: numbers.flag("tie_word_embeddings")?,
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
        } else if self.heads * self.head_dim > LARGEST_SIZE {
            Err(format!(
                "{} heads of head_dim = {} are wider than {LARGEST_SIZE} together; correct one of them",
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

    /// Unties the head where the weights in `folder` hold one of its own that differs from the embedding, whatever
    /// the configuration says, as transformers does; what is saved later says so.
    fn untie(&mut self, folder: &Path) -> Result<(), ModelError> {
        if !self.tied_head || !Shards::are_in(folder) {
            return Ok(());
        }
        let shards = Shards::open(folder)?;
        if !shards.differ(EMBEDDING, HEAD)? {
            return Ok(());
        }
        let path = folder.display();
        tracing::warn!(
            %path,
            "tie_word_embeddings is true but the weights hold an lm_head that is not the embedding: it is kept"
        );
        self.tied_head = false;
        self.raw["tie_word_embeddings"] = false.into();
        Ok(())
    }

    /// Every tensor of the model: its name in the folder and its shape.
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

    /// What the folder of such a language model has to hold.
    pub(crate) fn wanted(&self) -> Wanted {
        Wanted {
            tensors: self.tensors(),
            // Where they are tied, it has been compared with the embedding.
            spare: if self.tied_head {
                vec![HEAD]
            } else {
                Vec::new()
            },
            tied: self.tied_head,
        }
    }

    /// How many numbers the tables of rotary positions hold that a model of this shape keeps.
    #[must_use]
    pub fn rotary_numbers(&self) -> usize {
        kept_rows(self.max_positions) * self.head_dim
    }

    /// How many numbers the weights hold.
    #[must_use]
    pub fn parameter_count(&self) -> usize {
        self.tensors()
            .iter()
            .map(|(_, shape)| shape.iter().product::<usize>())
            .sum()
    }
}

pub(crate) fn read_json(path: &Path) -> Result<Value, ModelError> {
    let text = std::fs::read_to_string(path).map_err(|source| missing(path, source))?;
    is_fetched(path, text.as_bytes())?;
    serde_json::from_str(&text).map_err(|error| ModelError::Malformed {
        path: path.to_owned(),
        reason: error.to_string(),
    })
}

/// The largest width, number of heads, of tokens or of positions that is believed: products of three of them are
/// counted without overflow, and what is allocated by one of them fits a machine.
const LARGEST_SIZE: usize = 1 << 24;
/// The key of the number of layers.
const LAYERS: &str = "num_hidden_layers";
/// The most layers that are believed.
const MOST_LAYERS: usize = 1 << 12;

/// A number that gives the network its shape; none where there is none or null.
pub(crate) fn size(raw: &Value, key: &str) -> Result<Option<usize>, String> {
    let value = &raw[key];
    if value.is_null() {
        return Ok(None);
    }
    let most = match key {
        LAYERS => MOST_LAYERS,
        _ => LARGEST_SIZE,
    };
    match value.as_u64().map(usize::try_from) {
        None => Err(format!("{key} = {value} is not a whole number")),
        Some(Ok(0)) => Err(format!("{key} is 0, it must be at least 1")),
        Some(Ok(number)) if number <= most => Ok(Some(number)),
        Some(_) => Err(too_large(key, value, most)),
    }
}

/// The number of layers.
pub(crate) fn layers(raw: &Value) -> Result<usize, String> {
    size(raw, LAYERS)?.ok_or_else(|| format!("{LAYERS} is missing"))
}

fn too_large(key: &str, value: impl std::fmt::Display, most: usize) -> String {
    format!("{key} = {value} is more than {most}, which no model has: correct it in the file")
}

/// The numbers of a configuration by their keys.
#[derive(Clone, Copy)]
struct Numbers<'a> {
    raw: &'a Value,
}

impl Numbers<'_> {
    fn needed(self, key: &str) -> Result<usize, String> {
        let number = self.number(key)?;
        number.ok_or_else(|| format!("{key} is missing"))
    }

    fn or(self, key: &str, default: usize) -> Result<usize, String> {
        Ok(self.number(key)?.unwrap_or(default))
    }

    /// None where there is none or null.
    fn number(self, key: &str) -> Result<Option<usize>, String> {
        size(self.raw, key)
    }

    /// The whole number under a key that may be missing, but not null.
    fn whole(self, key: &str, default: usize) -> Result<usize, String> {
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

/// One token or several, or null.
pub(crate) fn tokens(value: &Value) -> Vec<u32> {
    let one = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Array(ids) => ids.iter().filter_map(one).collect(),
        other => one(other).into_iter().collect(),
    }
}

/// The tokens of `eos_token_id` in the file `path`. Those that the model does not have end nothing and close nothing:
/// they are left out, which is said.
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
            tracing::warn!(%path, %id, vocab_size, "{key} names a token that the model does not have: it is left out");
        }
        found
    };
    named.iter().filter_map(known).collect()
}

/// The window of each layer, as transformers reads it.
fn windows(
    architecture: Architecture,
    numbers: Numbers<'_>,
    layers: usize,
) -> Result<Vec<Option<usize>>, String> {
    let raw = numbers.raw;
    if architecture == Architecture::Llama {
        return Ok(vec![None; layers]);
    }
    // Of a window that is not used nothing but its type matters.
    let window = match raw.get("sliding_window") {
        Some(Value::Null) => None,
        _ => Some(numbers.whole("sliding_window", 4096)?),
    };
    let is_used = |window: Option<usize>| match window {
        Some(0) => Err("sliding_window is 0, so that a token sees nothing; null switches it off"),
        window => Ok(window),
    };
    if architecture == Architecture::Mistral {
        return Ok(vec![is_used(window)?; layers]);
    }
    let uses = match raw.get("use_sliding_window") {
        Some(Value::Null) => return Err("use_sliding_window is null, not true or false".into()),
        _ => numbers.flag("use_sliding_window")?,
    };
    let first = numbers.whole("max_window_layers", 28)?;
    let window = is_used(window.filter(|_| uses))?;
    match &raw["layer_types"] {
        Value::Null => Ok((0..layers)
            .map(|layer| window.filter(|_| layer >= first))
            .collect()),
        types => typed_windows(types, window, layers),
    }
}

/// The window of each layer, of which `layer_types` names the kind.
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

/// The families in the order in which every list of architectures names them.
const FAMILIES: [(Architecture, &str); 4] = [
    (Architecture::Llama, "llama"),
    (Architecture::Mistral, "mistral"),
    (Architecture::Qwen2, "qwen2"),
    (Architecture::Qwen3, "qwen3"),
];

fn architecture(task: Task, raw: &Value, path: &Path) -> Result<Architecture, ModelError> {
    let named = raw["architectures"][0].as_str();
    // A model that names no architecture is one for the next token.
    let kind = raw["model_type"].as_str();
    let unnamed = kind.filter(|_| named.is_none() && task == Task::Language);
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
        // Transformers chooses by the one, other programs by the other.
        Some(kind) => Err(ModelError::Malformed {
            path: path.to_owned(),
            reason: format!("architectures names a {model_type} model, model_type a {kind} one"),
        }),
    }
}

/// Keys of `config.json` that are read whatever the family.
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
    /// Keys of `config.json` that are read of this family beside [`READ`].
    fn keys(self) -> &'static [&'static str] {
        match self {
            Self::Llama => &["attention_bias"],
            Self::Mistral => &["sliding_window"],
            // Whether queries, keys and values have biases the family says, not the key.
            Self::Qwen2 | Self::Qwen3 => &[
                "attention_bias",
                "layer_types",
                "max_window_layers",
                "sliding_window",
                "use_sliding_window",
            ],
        }
    }

    /// How `config.json` names this family's model for `task`.
    pub(crate) fn name_for(self, task: Task) -> &'static str {
        let place = FAMILIES.iter().position(|(family, _)| *family == self);
        task.architectures()[place.expect("every family is in the list")]
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::fixtures::{config_json, shared};

    /// The configuration of [`config_json`] with these keys changed; null removes one.
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
    fn what_a_file_leaves_out_is_what_transformers_takes_for_it() {
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
    fn what_is_not_computed_is_refused_by_name() {
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

    /// The configuration of [`config_json`] as this family has it, with a key of this value.
    fn with(family: &str, (key, value): (&str, &Value)) -> Result<ModelConfig, String> {
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
    fn a_window_of_another_type_is_not_taken_for_none() {
        let whole = "is not a whole number";
        let cases = [
            ("Mistral", "sliding_window", json!(4.0), whole),
            ("Mistral", "sliding_window", json!("16"), whole),
            ("Mistral", "sliding_window", json!(true), whole),
            ("Mistral", "sliding_window", json!(-1), whole),
            ("Mistral", "sliding_window", json!(0), "sliding_window is 0"),
            ("Qwen2", "sliding_window", json!(16.0), whole),
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
            ("Qwen2", "max_window_layers", json!(2.0), whole),
            ("Qwen2", "max_window_layers", json!(null), whole),
            (
                "Qwen2",
                "layer_types",
                json!("full_attention"),
                "is not a list",
            ),
            ("Qwen2", "layer_types", json!([]), "names 0 layers"),
        ];
        for (family, key, value, expected) in cases {
            let refused = with(family, (key, &value)).unwrap_err();
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
            let config = with(family, (key, &value)).unwrap();
            assert_eq!(config.windows, [window], "{family} {key} = {value}");
        }
    }

    #[test]
    fn numbers_that_cannot_work_are_refused_by_their_keys() {
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
            let refused = with("Llama", (key, &value)).unwrap_err();
            assert!(refused.contains(key), "{refused} for {key} = {value}");
        }
    }

    #[test]
    fn a_stop_token_is_one_that_the_model_has() {
        for (named, expected) in [
            (json!(3), vec![3]),
            (json!(8), vec![]),
            (json!([9999, 2, -1, null, "x"]), vec![2]),
            (json!(-1), vec![]),
            (json!([]), vec![]),
        ] {
            let config = with("Llama", ("eos_token_id", &named)).unwrap();
            assert_eq!(config.stops.ids().collect::<Vec<_>>(), expected, "{named}");
            assert_eq!(config.stops.text_end(), expected.first().copied());
        }
        let bos = with("Llama", ("bos_token_id", &json!(8))).unwrap().bos;
        assert_eq!(bos, None);
    }

    #[test]
    fn a_folder_says_its_model_type() {
        let place = crate::fixtures::folder();
        let path = place.path().join("config.json");
        let mut raw = config_json(8);
        raw.as_object_mut().unwrap().remove("model_type");
        std::fs::write(&path, raw.to_string()).unwrap();
        let refused = ModelConfig::load(place.path()).unwrap_err().to_string();
        assert!(
            refused.contains("model_type is missing") && refused.contains("\"llama\""),
            "{refused}"
        );
    }

    #[test]
    fn sizes_that_no_machine_holds_are_refused() {
        let Some(place) = shared("data/cases/security/config") else {
            return;
        };
        let files = std::fs::read_dir(place).unwrap();
        for file in files {
            let path = file.unwrap().path();
            let raw = read_json(&path).unwrap();
            let refused = ModelConfig::from_json(raw, &path).unwrap_err().to_string();
            let name = path.file_name().unwrap().to_string_lossy();
            let key = name.rsplit_once('_').unwrap().0;
            assert!(refused.contains(&format!("{key} = ")), "{refused}");
            let most = if key == LAYERS {
                MOST_LAYERS
            } else {
                LARGEST_SIZE
            };
            assert!(refused.contains(&format!("more than {most},")), "{refused}");
        }
    }
}
