//! Target modules of an adapter, selected as in PEFT (`check_target_module_exists` of its `tuners_utils.py`): by name
//! suffix or regular expression, minus exclusions, in all layers or some.
//!
//! Only linear layers of the transformer blocks can be adapted. A selection that in PEFT includes other modules is
//! refused with their names.

use serde_json::{Map, Value, json};

use crate::lora::pattern::NamePattern;
use crate::{
    config::{ModelConfig, ModelTask},
    error::ModelError,
};

/// PEFT's keyword for all linear layers except the head.
const ALL_LINEAR: &str = "all-linear";
/// PEFT's default target modules for the supported families.
const DEFAULT_TARGETS: [&str; 2] = ["q_proj", "v_proj"];

/// Selection of target modules.
#[derive(Debug, Clone, PartialEq)]
pub struct TargetModules {
    chosen: ModuleSelector,
    /// Excluded modules.
    excluded: ModuleSelector,
    layers: Option<LayerFilter>,
    /// Head of the model, which determines its other modules.
    task: ModelTask,
}

/// A way to select modules by name.
#[derive(Debug, Clone, PartialEq)]
enum ModuleSelector {
    /// All linear layers of the blocks.
    AllLinear,
    /// A regular expression that matches the whole name.
    Pattern(NamePattern),
    /// Dotted name suffixes: `q_proj`, `self_attn.q_proj`.
    Names(Vec<String>),
}

/// Restriction to some layers, for modules that are not selected by their full names.
#[derive(Debug, Clone, PartialEq)]
struct LayerFilter {
    indexes: Vec<usize>,
    /// Whether `layers_to_transform` is a single number, for saving.
    is_number: bool,
    /// Patterns that capture the layer index in a name.
    patterns: Vec<NamePattern>,
    /// `layers_pattern`, for saving.
    raw_pattern: Value,
}

/// A linear layer of a block, with a weight of shape `[out, width]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LinearSpec {
    pub(super) name: String,
    pub(super) out: usize,
    pub(super) width: usize,
}

impl TargetModules {
    /// Selects modules by name suffixes; `all-linear` among them selects all linear layers except the head.
    #[must_use]
    pub fn named(names: &[String]) -> Self {
        let chosen = match names.iter().any(|name| name == ALL_LINEAR) {
            true => ModuleSelector::AllLinear,
            false => ModuleSelector::Names(names.to_owned()),
        };
        Self {
            chosen,
            excluded: ModuleSelector::Names(Vec::new()),
            layers: None,
            task: ModelTask::Language,
        }
    }

    /// Reads PEFT's keys `target_modules`, `exclude_modules`, `layers_to_transform` and `layers_pattern`.
    pub(super) fn read(keys: &Map<String, Value>, task: ModelTask) -> Result<Self, String> {
        let chosen = match keys.get("target_modules").filter(|value| !value.is_null()) {
            None => ModuleSelector::Names(DEFAULT_TARGETS.map(str::to_owned).into()),
            Some(Value::String(keyword)) if keyword.eq_ignore_ascii_case(ALL_LINEAR) => {
                ModuleSelector::AllLinear
            }
            Some(value) => selector("target_modules", value)?,
        };
        let excluded = match keys.get("exclude_modules").filter(|value| !value.is_null()) {
            None => ModuleSelector::Names(Vec::new()),
            Some(value) => selector("exclude_modules", value)?,
        };
        let layers = LayerFilter::read(keys)?;
        let is_string = matches!(
            chosen,
            ModuleSelector::AllLinear | ModuleSelector::Pattern(_)
        );
        if is_string && layers.is_some() {
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

    /// PEFT's keys for an adapter of `base`. `all-linear` is written as a list of names, which PEFT interprets the same
    /// for all model classes.
    pub(super) fn keys(&self, base: &ModelConfig) -> [(&'static str, Value); 4] {
        let chosen = match &self.chosen {
            ModuleSelector::AllLinear => {
                let linear = linear_layers(base);
                let mut names: Vec<&str> =
                    linear.iter().map(|layer| last_part(&layer.name)).collect();
                names.sort_unstable();
                names.dedup();
                json!(names)
            }
            named => named.to_json(),
        };
        let excluded = match &self.excluded {
            ModuleSelector::Names(names) if names.is_empty() => Value::Null,
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

    /// The selected linear layers of the base, in the model's order. Names of missing modules are ignored, as in PEFT.
    ///
    /// # Errors
    /// When none is selected, or a selected module is not a linear layer of a block.
    pub(super) fn of(&self, base: &ModelConfig) -> Result<Vec<LinearSpec>, ModelError> {
        let mut chosen = Vec::new();
        let linear = linear_layers(base);
        for layer in &linear {
            if self.selects(&layer.name)? {
                chosen.push(layer.clone());
            }
        }
        for name in other_modules(base, self.task) {
            if self.chosen != ModuleSelector::AllLinear && self.selects(&name)? {
                let reason = format!(
                    "target_modules names {name}, which is not supported: only linear layers of the blocks are"
                );
                return Err(ModelError::Adapter { reason });
            }
        }
        if chosen.is_empty() {
            return Err(self.no_match_error(&linear));
        }
        Ok(chosen)
    }

    /// Checks that every name matches a module, for names from the settings.
    ///
    /// # Errors
    /// When one does not.
    pub(super) fn check_names(&self, base: &ModelConfig) -> Result<(), ModelError> {
        let ModuleSelector::Names(names) = &self.chosen else {
            return Ok(());
        };
        let linear = linear_layers(base);
        let exists = |name: &&String| linear.iter().any(|layer| has_suffix(&layer.name, name));
        match names.iter().find(|name| !exists(name)) {
            None => Ok(()),
            Some(name) => Err(ModelError::Adapter {
                reason: format!(
                    "the target module {name:?} does not exist in this model, which has {}",
                    kinds(&linear)
                ),
            }),
        }
    }

    fn selects(&self, name: &str) -> Result<bool, ModelError> {
        if self.excluded.selects(name)? || !self.chosen.selects(name)? {
            return Ok(false);
        }
        match (&self.layers, &self.chosen) {
            // A full name is selected in any layer.
            (Some(_), ModuleSelector::Names(names)) if names.iter().any(|full| full == name) => {
                Ok(true)
            }
            (Some(layers), _) => layers.contains(name),
            (None, _) => Ok(true),
        }
    }

    fn no_match_error(&self, linear: &[LinearSpec]) -> ModelError {
        let chosen = match &self.chosen {
            ModuleSelector::Names(names) if names.is_empty() => {
                "it names no target modules; \"all-linear\" means all of them".to_owned()
            }
            chosen => format!(
                "its target modules {} do not exist in this model",
                chosen.to_json()
            ),
        };
        let narrowed = match (&self.layers, &self.excluded) {
            (None, ModuleSelector::Names(names)) if names.is_empty() => "",
            _ => " after exclude_modules and layers_to_transform",
        };
        let reason = format!("{chosen}{narrowed}: it has {}", kinds(linear));
        ModelError::Adapter { reason }
    }
}

impl ModuleSelector {
    fn selects(&self, name: &str) -> Result<bool, ModelError> {
        match self {
            Self::AllLinear => Ok(true),
            Self::Pattern(pattern) => pattern.matches(name),
            Self::Names(names) => Ok(names.iter().any(|end| has_suffix(name, end))),
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

/// Parses a regular expression or a list of name suffixes.
fn selector(key: &str, value: &Value) -> Result<ModuleSelector, String> {
    let of_list = |names: &Vec<Value>| {
        let names = names.iter().map(|name| name.as_str().map(str::to_owned));
        names.collect::<Option<Vec<_>>>()
    };
    match value {
        Value::String(pattern) => NamePattern::whole(pattern)
            .map(ModuleSelector::Pattern)
            .map_err(|reason| format!("{key}: {reason}")),
        Value::Array(names) => of_list(names)
            .map(ModuleSelector::Names)
            .ok_or_else(|| format!("{key} has an entry that is not a string: {value}")),
        other => Err(format!(
            "{key} is {other}; it is a list of names or a regular expression"
        )),
    }
}

impl LayerFilter {
    fn read(keys: &Map<String, Value>) -> Result<Option<Self>, String> {
        let raw_pattern = keys.get("layers_pattern").cloned().unwrap_or(Value::Null);
        let sources: Vec<&str> = match &raw_pattern {
            Value::Null => Vec::new(),
            Value::String(pattern) => vec![pattern],
            Value::Array(patterns) => {
                let patterns = patterns.iter().map(Value::as_str);
                let patterns = patterns.collect::<Option<Vec<_>>>();
                patterns.ok_or_else(|| {
                    format!("layers_pattern has an entry that is not a string: {raw_pattern}")
                })?
            }
            other => {
                return Err(format!(
                    "layers_pattern is {other}, not a string or a list of strings"
                ));
            }
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
        let indexes = indexes.ok_or_else(|| {
            let value = &keys["layers_to_transform"];
            format!("layers_to_transform has an entry that is not a layer index: {value}")
        })?;
        let sources = if sources.is_empty() {
            vec![""]
        } else {
            sources
        };
        let patterns = sources.into_iter().map(NamePattern::layer);
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

    /// Whether the module belongs to one of the layers, by the first pattern that captures an index.
    fn contains(&self, name: &str) -> Result<bool, ModelError> {
        for pattern in &self.patterns {
            if let Some(layer) = pattern.layer_index(name)? {
                return Ok(self.indexes.contains(&layer));
            }
        }
        Ok(false)
    }
}

/// Linear layers of the blocks, layer by layer.
pub(super) fn linear_layers(base: &ModelConfig) -> Vec<LinearSpec> {
    let of_block = |(tensor, shape): (String, Vec<usize>)| {
        let name = tensor.strip_suffix(".weight")?;
        let [out, width] = shape[..] else { return None };
        name.starts_with("model.layers.").then(|| LinearSpec {
            name: name.to_owned(),
            out,
            width,
        })
    };
    base.tensors().into_iter().filter_map(of_block).collect()
}

/// Names of all other modules of the model in transformers, except a classifier head, which target modules never select
/// (it is in PEFT's `modules_to_save`).
fn other_modules(base: &ModelConfig, task: ModelTask) -> Vec<String> {
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
    if task == ModelTask::Language {
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

fn has_suffix(name: &str, end: &str) -> bool {
    let before = name.strip_suffix(end);
    before.is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

fn last_part(name: &str) -> &str {
    name.rsplit_once('.').map_or(name, |(_, part)| part)
}

/// Distinct last parts of the names of linear layers.
fn kinds(linear: &[LinearSpec]) -> String {
    let mut kinds: Vec<&str> = Vec::new();
    for layer in linear {
        let kind = last_part(&layer.name);
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    kinds.join(", ")
}
