//! From a Hugging Face `config.json`, in the old style (`rope_theta`, `rope_scaling`) or in that of
//! transformers 5 (`rope_parameters`), to the few numbers that the network needs.

use std::path::Path;

use candle_transformers::models::{
    llama::{Llama3RopeConfig, Llama3RopeType, LlamaConfig},
    mistral, qwen2, qwen3,
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::{ModelError, stop_tokens::StopTokens};

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
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Llama 3's scaling of the rotary frequencies.
    pub rope_scaling: Option<Llama3RopeConfig>,
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
        let mut config = Self::read(task, read_json(&path)?, &path)?;
        let generation = folder.join("generation_config.json");
        if generation.exists() {
            let eos = tokens(&read_json(&generation)?["eos_token_id"]);
            config.stops = config.stops.and(&eos);
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
        let flat = old_style(&raw, path)?;
        let mut config = match architecture {
            Architecture::Llama => from_llama(&parse(&flat, path)?, &flat),
            Architecture::Mistral => from_mistral(&parse(&flat, path)?),
            Architecture::Qwen2 => from_qwen2(&parse(&flat, path)?),
            Architecture::Qwen3 => from_qwen3(&parse(&flat, path)?),
        };
        config.windows =
            windows(architecture, &raw, config.layers).map_err(|reason| ModelError::Malformed {
                path: path.to_owned(),
                reason,
            })?;
        config.tied_head = flat["tie_word_embeddings"]
            .as_bool()
            .unwrap_or(config.tied_head);
        config.bos = tokens(&flat["bos_token_id"]).first().copied();
        config.stops = StopTokens::declared(&tokens(&flat["eos_token_id"]));
        config.raw = raw;
        config.check(path)?;
        Ok(config)
    }

    fn check(&self, path: &Path) -> Result<(), ModelError> {
        let act = self.raw["hidden_act"].as_str().unwrap_or("silu");
        let reason = if act != "silu" {
            format!("hidden_act is {act:?}, only \"silu\" is known")
        } else if self.raw["mlp_bias"].as_bool() == Some(true) {
            "mlp_bias = true is not known".into()
        } else if self.kv_heads == 0 || !self.heads.is_multiple_of(self.kv_heads) {
            format!(
                "num_key_value_heads = {} does not divide {} heads",
                self.kv_heads, self.heads
            )
        } else if !self.head_dim.is_multiple_of(2) {
            format!(
                "head_dim = {} is odd, rotary positions need an even one",
                self.head_dim
            )
        } else {
            return Ok(());
        };
        Err(ModelError::Malformed {
            path: path.to_owned(),
            reason,
        })
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
    let text = std::fs::read_to_string(path).map_err(|source| ModelError::Unreadable {
        path: path.to_owned(),
        source,
    })?;
    serde_json::from_str(&text).map_err(|error| ModelError::Malformed {
        path: path.to_owned(),
        reason: error.to_string(),
    })
}

fn parse<T: DeserializeOwned>(value: &Value, path: &Path) -> Result<T, ModelError> {
    T::deserialize(value).map_err(|error| ModelError::Malformed {
        path: path.to_owned(),
        reason: error.to_string(),
    })
}

/// One token or several, or null.
pub(crate) fn tokens(value: &Value) -> Vec<u32> {
    let one = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Array(ids) => ids.iter().filter_map(one).collect(),
        other => one(other).into_iter().collect(),
    }
}

/// The window of each layer, as transformers reads it.
fn windows(
    architecture: Architecture,
    raw: &Value,
    layers: usize,
) -> Result<Vec<Option<usize>>, String> {
    let number = |key: &str, default: usize| match raw.get(key) {
        None => Some(default),
        Some(value) => value.as_u64().and_then(|n| usize::try_from(n).ok()),
    };
    let window = number("sliding_window", 4096);
    Ok(match (architecture, &raw["layer_types"]) {
        (Architecture::Llama, _) => vec![None; layers],
        (Architecture::Mistral, _) => vec![window; layers],
        _ if raw["use_sliding_window"] != true => vec![None; layers],
        (_, Value::Array(types)) if types.len() != layers => {
            return Err(format!(
                "layer_types names {} layers, num_hidden_layers is {layers}",
                types.len()
            ));
        }
        (_, Value::Array(types)) => types
            .iter()
            .map(|kind| match kind.as_str() {
                Some("sliding_attention") => Ok(window),
                Some("full_attention") => Ok(None),
                _ => Err(format!(
                    "layer_types names {kind}, only \"full_attention\" and \"sliding_attention\" are known"
                )),
            })
            .collect::<Result<_, _>>()?,
        _ => {
            let first = number("max_window_layers", 28).unwrap_or(0);
            let of = |layer: usize| window.filter(|_| layer >= first);
            (0..layers).map(of).collect()
        }
    })
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
        .map(|((architecture, _), _)| *architecture);
    family.ok_or_else(|| ModelError::Architecture {
        path: path.to_owned(),
        found: named.or(kind).unwrap_or("(none is named)").to_owned(),
        supported: task.architectures().to_vec(),
    })
}

impl Architecture {
    /// How `config.json` names this family's model for `task`.
    pub(crate) fn name_for(self, task: Task) -> &'static str {
        let place = FAMILIES.iter().position(|(family, _)| *family == self);
        task.architectures()[place.expect("every family is in the list")]
    }
}

/// The same configuration with `rope_theta` and `rope_scaling` where the old style has them, and
/// without nulls where candle's types want numbers.
fn old_style(raw: &Value, path: &Path) -> Result<Value, ModelError> {
    let mut flat = raw.clone();
    let rope = if raw["rope_parameters"].is_object() {
        &raw["rope_parameters"]
    } else {
        &raw["rope_scaling"]
    };
    if let Some(theta) = rope.get("rope_theta") {
        flat["rope_theta"] = theta.clone();
    }
    if flat["rope_theta"].is_null() {
        flat["rope_theta"] = json!(10_000.0);
    }
    let kind = rope["rope_type"]
        .as_str()
        .or(rope["type"].as_str())
        .unwrap_or("default");
    flat["rope_scaling"] = match kind {
        "default" => Value::Null,
        "llama3" => {
            let mut scaling = rope.clone();
            scaling["rope_type"] = json!("llama3");
            scaling
        }
        other => {
            let reason = format!(
                "rotary scaling {other:?} is not known, only \"default\" and \"llama3\" are"
            );
            return Err(ModelError::Malformed {
                path: path.to_owned(),
                reason,
            });
        }
    };
    fill_missing(&mut flat);
    Ok(flat)
}

/// What older files leave out and candle's types insist on.
fn fill_missing(flat: &mut Value) {
    let heads = flat["num_attention_heads"].as_u64().unwrap_or(1).max(1);
    let head_dim = flat["hidden_size"].as_u64().unwrap_or(0) / heads;
    let defaults = [
        ("num_key_value_heads", json!(heads)),
        ("head_dim", json!(head_dim)),
        ("attention_bias", json!(false)),
        ("use_sliding_window", json!(false)),
        ("max_window_layers", json!(0)),
        ("tie_word_embeddings", json!(false)),
        ("hidden_act", json!("silu")),
    ];
    for (key, default) in defaults {
        if flat[key].is_null() {
            flat[key] = default;
        }
    }
    if flat["model_type"] == "qwen2" && flat["sliding_window"].is_null() {
        flat["sliding_window"] = json!(0);
    }
}

fn from_llama(c: &LlamaConfig, flat: &Value) -> ModelConfig {
    let bias = flat["attention_bias"].as_bool().unwrap_or(false);
    let scaling = c
        .rope_scaling
        .clone()
        .filter(|s| matches!(s.rope_type, Llama3RopeType::Llama3));
    ModelConfig {
        architecture: Architecture::Llama,
        hidden_size: c.hidden_size,
        intermediate_size: c.intermediate_size,
        layers: c.num_hidden_layers,
        heads: c.num_attention_heads,
        kv_heads: c.num_key_value_heads(),
        head_dim: usize::try_from(flat["head_dim"].as_u64().unwrap_or(0)).unwrap_or(0),
        vocab_size: c.vocab_size,
        max_positions: c.max_position_embeddings,
        rms_norm_eps: c.rms_norm_eps,
        rope_theta: f64::from(c.rope_theta),
        rope_scaling: scaling,
        windows: Vec::new(),
        qkv_bias: bias,
        output_bias: bias,
        qk_norm: false,
        tied_head: c.tie_word_embeddings.unwrap_or(false),
        bos: None,
        stops: StopTokens::default(),
        raw: Value::Null,
    }
}

fn from_mistral(c: &mistral::Config) -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Mistral,
        hidden_size: c.hidden_size,
        intermediate_size: c.intermediate_size,
        layers: c.num_hidden_layers,
        heads: c.num_attention_heads,
        kv_heads: c.num_key_value_heads,
        head_dim: c
            .head_dim
            .unwrap_or(c.hidden_size / c.num_attention_heads.max(1)),
        vocab_size: c.vocab_size,
        max_positions: c.max_position_embeddings,
        rms_norm_eps: c.rms_norm_eps,
        rope_theta: c.rope_theta,
        rope_scaling: None,
        windows: Vec::new(),
        qkv_bias: false,
        output_bias: false,
        qk_norm: false,
        tied_head: false,
        bos: None,
        stops: StopTokens::default(),
        raw: Value::Null,
    }
}

fn from_qwen2(c: &qwen2::Config) -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Qwen2,
        hidden_size: c.hidden_size,
        intermediate_size: c.intermediate_size,
        layers: c.num_hidden_layers,
        heads: c.num_attention_heads,
        kv_heads: c.num_key_value_heads,
        head_dim: c.hidden_size / c.num_attention_heads.max(1),
        vocab_size: c.vocab_size,
        max_positions: c.max_position_embeddings,
        rms_norm_eps: c.rms_norm_eps,
        rope_theta: c.rope_theta,
        rope_scaling: None,
        windows: Vec::new(),
        qkv_bias: true,
        output_bias: false,
        qk_norm: false,
        tied_head: c.tie_word_embeddings,
        bos: None,
        stops: StopTokens::default(),
        raw: Value::Null,
    }
}

fn from_qwen3(c: &qwen3::Config) -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Qwen3,
        hidden_size: c.hidden_size,
        intermediate_size: c.intermediate_size,
        layers: c.num_hidden_layers,
        heads: c.num_attention_heads,
        kv_heads: c.num_key_value_heads,
        head_dim: c.head_dim,
        vocab_size: c.vocab_size,
        max_positions: c.max_position_embeddings,
        rms_norm_eps: c.rms_norm_eps,
        rope_theta: c.rope_theta,
        rope_scaling: None,
        windows: Vec::new(),
        qkv_bias: c.attention_bias,
        output_bias: c.attention_bias,
        qk_norm: true,
        tied_head: c.tie_word_embeddings,
        bos: None,
        stops: StopTokens::default(),
        raw: Value::Null,
    }
}
