//! Modules that an adapter changes, chosen as PEFT chooses them (`check_target_module_exists` of its
//! `tuners_utils.py`): by the end of their names or a regular expression, without those that are excluded, in all
//! layers or in some.
//!
//! Only the linear maps of the blocks can be adapted here. A choice that PEFT would extend to other modules is refused
//! by their name.

use serde_json::{Map, Value, json};

use super::pattern::Pattern;
use crate::{ModelConfig, ModelError, config::Task};

/// PEFT's word for every linear map but the head.
const ALL_LINEAR: &str = "all-linear";
/// Modules of the four families that PEFT adapts where none are named.
const UNNAMED: [&str; 2] = ["q_proj", "v_proj"];

/// Choice of the modules that an adapter changes.
#[derive(Debug, Clone, PartialEq)]
pub struct Targets {
    chosen: Choice,
    /// Names or a pattern of modules that are left out.
    excluded: Choice,
    layers: Option<Layers>,
    /// Decides which head the model has beside its blocks.
    task: Task,
}

/// How modules are named.
#[derive(Debug, Clone, PartialEq)]
enum Choice {
    /// Every linear map of the blocks.
    AllLinear,
    /// A regular expression over the whole name.
    Pattern(Pattern),
    /// Ends of names, part by part: `q_proj`, `self_attn.q_proj`.
    Names(Vec<String>),
}

/// Layers of which modules are chosen that are not named in full.
#[derive(Debug, Clone, PartialEq)]
struct Layers {
    indexes: Vec<usize>,
    /// Whether `layers_to_transform` is a number and not a list.
    is_number: bool,
    /// Where the index stands in a name.
    patterns: Vec<Pattern>,
    /// `layers_pattern`, to be saved again.
    raw_pattern: Value,
}

/// A linear map of a block: a weight of `[out, width]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LinearMap {
    pub(super) name: String,
    pub(super) out: usize,
    pub(super) width: usize,
}

impl Targets {
    /// Modules by the ends of their names; `all-linear` among them stands for every linear map but the head.
    #[must_use]
    pub fn named(names: &[String]) -> Self {
        let chosen = match names.iter().any(|name| name == ALL_LINEAR) {
            true => Choice::AllLinear,
            false => Choice::Names(names.to_owned()),
        };
        Self {
            chosen,
            excluded: Choice::Names(Vec::new()),
            layers: None,
            task: Task::Language,
        }
    }

    /// Reads PEFT's keys `target_modules`, `exclude_modules`, `layers_to_transform` and `layers_pattern`.
    pub(super) fn read(keys: &Map<String, Value>, task: Task) -> Result<Self, String> {
        let chosen = match keys.get("target_modules").filter(|value| !value.is_null()) {
            None => Choice::Names(UNNAMED.map(str::to_owned).into()),
            Some(Value::String(word)) if word.eq_ignore_ascii_case(ALL_LINEAR) => Choice::AllLinear,
            Some(value) => choice("target_modules", value)?,
        };
        let excluded = match keys.get("exclude_modules").filter(|value| !value.is_null()) {
            None => Choice::Names(Vec::new()),
            Some(value) => choice("exclude_modules", value)?,
        };
        let layers = Layers::read(keys)?;
        let is_word = matches!(chosen, Choice::AllLinear | Choice::Pattern(_));
        if is_word && layers.is_some() {
            let reason = "layers_to_transform cannot stand beside target_modules that are one string: PEFT reads no such file";
            return Err(reason.into());
        }
        Ok(Self {
            chosen,
            excluded,
            layers,
            task,
        })
    }

    /// PEFT's keys for an adapter of `base`. Every linear map is written as a list, which PEFT reads alike for all
    /// kinds of models.
    pub(super) fn keys(&self, base: &ModelConfig) -> [(&'static str, Value); 4] {
        let chosen = match &self.chosen {
            Choice::AllLinear => {
                let linear = linear_maps(base);
                let mut names: Vec<&str> = linear.iter().map(|map| last_part(&map.name)).collect();
                names.sort_unstable();
                names.dedup();
                json!(names)
            }
            named => named.to_json(),
        };
        let excluded = match &self.excluded {
            Choice::Names(names) if names.is_empty() => Value::Null,
            named => named.to_json(),
        };
        let (indexes, pattern) = match &self.layers {
            None => (Value::Null, Value::Null),
            Some(layers) if layers.is_number => {
                (json!(layers.indexes[0]), layers.raw_pattern.clone())
            }
            Some(layers) => (json!(layers.indexes), layers.raw_pattern.clone()),
        };
        [
            ("target_modules", chosen),
            ("exclude_modules", excluded),
            ("layers_to_transform", indexes),
            ("layers_pattern", pattern),
        ]
    }

    /// The linear maps of a model of this shape that are chosen, in the model's order. Names that belong to no module
    /// are passed over, as PEFT does.
    ///
    /// # Errors
    /// When none is, or a module is chosen that is no linear map of a block.
    pub(super) fn of(&self, base: &ModelConfig) -> Result<Vec<LinearMap>, ModelError> {
        let mut chosen = Vec::new();
        let linear = linear_maps(base);
        for map in &linear {
            if self.has(&map.name)? {
                chosen.push(map.clone());
            }
        }
        for name in others(base, self.task) {
            if self.chosen != Choice::AllLinear && self.has(&name)? {
                let reason = format!(
                    "target_modules names {name}, which is not supported: only the linear maps of the blocks are"
                );
                return Err(ModelError::Adapter { reason });
            }
        }
        if chosen.is_empty() {
            return Err(self.none_of(&linear));
        }
        Ok(chosen)
    }

    /// Checks that every name belongs to a module: for settings, where one that does not is a mistake.
    ///
    /// # Errors
    /// When one does not.
    pub(super) fn check_names(&self, base: &ModelConfig) -> Result<(), ModelError> {
        let Choice::Names(names) = &self.chosen else {
            return Ok(());
        };
        let linear = linear_maps(base);
        let is_there = |name: &&String| linear.iter().any(|map| is_at_end(&map.name, name));
        match names.iter().find(|name| !is_there(name)) {
            None => Ok(()),
            Some(name) => Err(ModelError::Adapter {
                reason: format!(
                    "the target module {name:?} is none of this model's: {}",
                    kinds(&linear)
                ),
            }),
        }
    }

    fn has(&self, name: &str) -> Result<bool, ModelError> {
        if self.excluded.has(name)? || !self.chosen.has(name)? {
            return Ok(false);
        }
        match (&self.layers, &self.chosen) {
            // A name in full is taken whatever layer it is of.
            (Some(_), Choice::Names(names)) if names.iter().any(|full| full == name) => Ok(true),
            (Some(layers), _) => layers.have(name),
            (None, _) => Ok(true),
        }
    }

    fn none_of(&self, linear: &[LinearMap]) -> ModelError {
        let chosen = match &self.chosen {
            Choice::Names(names) if names.is_empty() => {
                "it names no target modules; \"all-linear\" means all of them".to_owned()
            }
            chosen => format!(
                "its target modules {} are none of this model's",
                chosen.to_json()
            ),
        };
        let narrowed = match (&self.layers, &self.excluded) {
            (None, Choice::Names(names)) if names.is_empty() => "",
            _ => ", with what exclude_modules and layers_to_transform leave",
        };
        let reason = format!("{chosen}{narrowed}: {}", kinds(linear));
        ModelError::Adapter { reason }
    }
}

impl Choice {
    fn has(&self, name: &str) -> Result<bool, ModelError> {
        match self {
            Self::AllLinear => Ok(true),
            Self::Pattern(pattern) => pattern.matches(name),
            Self::Names(names) => Ok(names.iter().any(|end| is_at_end(name, end))),
        }
    }

    fn to_json(&self) -> Value {
        match self {
            Self::AllLinear => json!(ALL_LINEAR),
            Self::Pattern(pattern) => json!(pattern.source()),
            Self::Names(names) => json!(names),
        }
    }
}

/// A string that is a regular expression, or a list of ends of names.
fn choice(key: &str, value: &Value) -> Result<Choice, String> {
    let of_list = |names: &Vec<Value>| {
        let names = names.iter().map(|name| name.as_str().map(str::to_owned));
        names.collect::<Option<Vec<_>>>()
    };
    match value {
        Value::String(pattern) => Pattern::whole(pattern)
            .map(Choice::Pattern)
            .map_err(|reason| format!("{key}: {reason}")),
        Value::Array(names) => of_list(names)
            .map(Choice::Names)
            .ok_or_else(|| format!("{key} holds what is no name")),
        other => Err(format!(
            "{key} is {other}; it is a list of names or a regular expression"
        )),
    }
}

impl Layers {
    fn read(keys: &Map<String, Value>) -> Result<Option<Self>, String> {
        let raw_pattern = keys.get("layers_pattern").cloned().unwrap_or(Value::Null);
        let sources: Vec<&str> = match &raw_pattern {
            Value::Null => Vec::new(),
            Value::String(pattern) => vec![pattern],
            Value::Array(patterns) => {
                let patterns = patterns.iter().map(Value::as_str);
                let patterns = patterns.collect::<Option<Vec<_>>>();
                patterns.ok_or("layers_pattern holds what is no name")?
            }
            other => return Err(format!("layers_pattern is {other}, not a name")),
        };
        let named = sources.iter().any(|source| !source.is_empty());
        let index = |value: &Value| value.as_u64().and_then(|index| usize::try_from(index).ok());
        let (indexes, is_number) = match keys.get("layers_to_transform") {
            None | Some(Value::Null) if named => {
                return Err("layers_pattern needs layers_to_transform beside it".into());
            }
            None | Some(Value::Null) => return Ok(None),
            Some(Value::Array(indexes)) if indexes.is_empty() => return Ok(None),
            Some(Value::Array(indexes)) => (indexes.iter().map(index).collect(), false),
            Some(one) => (index(one).map(|index| vec![index]), true),
        };
        let indexes: Option<Vec<usize>> = indexes;
        let indexes = indexes.ok_or("layers_to_transform holds what is no layer's number")?;
        let sources = if sources.is_empty() {
            vec![""]
        } else {
            sources
        };
        let patterns = sources.into_iter().map(Pattern::layer);
        let patterns = patterns
            .collect::<Result<_, _>>()
            .map_err(|reason| format!("layers_pattern: {reason}"))?;
        Ok(Some(Self {
            indexes,
            is_number,
            patterns,
            raw_pattern,
        }))
    }

    /// Whether a module of this name is of one of the layers: the first pattern that finds a number decides.
    fn have(&self, name: &str) -> Result<bool, ModelError> {
        for pattern in &self.patterns {
            if let Some(layer) = pattern.layer_of(name)? {
                return Ok(self.indexes.contains(&layer));
            }
        }
        Ok(false)
    }
}

/// The linear maps of the blocks, layer by layer.
pub(super) fn linear_maps(base: &ModelConfig) -> Vec<LinearMap> {
    let of_block = |(tensor, shape): (String, Vec<usize>)| {
        let name = tensor.strip_suffix(".weight")?;
        let [out, width] = shape[..] else { return None };
        name.starts_with("model.layers.").then(|| LinearMap {
            name: name.to_owned(),
            out,
            width,
        })
    };
    base.tensors().into_iter().filter_map(of_block).collect()
}

/// Names of all other modules of the model in transformers. A classifier's head is PEFT's `modules_to_save`, which
/// target modules never mean.
fn others(base: &ModelConfig, task: Task) -> Vec<String> {
    let of_layer = [
        "",
        ".self_attn",
        ".self_attn.q_norm",
        ".self_attn.k_norm",
        ".mlp",
        ".mlp.act_fn",
        ".input_layernorm",
        ".post_attention_layernorm",
    ];
    let mut names = vec![
        "model".to_owned(),
        "model.embed_tokens".to_owned(),
        "model.layers".to_owned(),
        "model.norm".to_owned(),
        "model.rotary_emb".to_owned(),
    ];
    if task == Task::Language {
        names.push("lm_head".to_owned());
    }
    for layer in 0..base.layers {
        let parts = of_layer
            .iter()
            .filter(|part| base.qk_norm || !is_qk_norm(part));
        names.extend(parts.map(|part| format!("model.layers.{layer}{part}")));
    }
    names
}

fn is_qk_norm(part: &str) -> bool {
    part.ends_with("q_norm") || part.ends_with("k_norm")
}

fn is_at_end(name: &str, end: &str) -> bool {
    let before = name.strip_suffix(end);
    before.is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

fn last_part(name: &str) -> &str {
    name.rsplit_once('.').map_or(name, |(_, part)| part)
}

/// The last parts of the names of linear maps, each once.
fn kinds(linear: &[LinearMap]) -> String {
    let mut kinds: Vec<&str> = Vec::new();
    for map in linear {
        let kind = last_part(&map.name);
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    kinds.join(", ")
}
