//! LoRA configuration in PEFT's `adapter_config.json`.
//!
//! PEFT features that are not implemented here are refused by name: every key that is not read must be disabled (null,
//! false, empty), whether it is known or not.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use serde_json::{Map, Value, json};

use crate::lora::{
    base_model::BaseModel,
    pattern::NamePattern,
    targets::{LinearSpec, TargetModules},
};
use crate::{
    config::{ModelConfig, ModelTask},
    error::ModelError,
};

/// PEFT's names of the two factors of a module.
pub(super) const A: &str = "lora_A.weight";
pub(super) const B: &str = "lora_B.weight";
/// PEFT's prefix of the base model's module and tensor names.
pub(super) const PREFIX: &str = "base_model.model.";
/// PEFT's `peft_type` of LoRA adapters.
const LORA: &str = "LORA";
/// `peft_type` of adapters of reward models whose score PEFT cannot compute. It is unknown to PEFT, which therefore
/// refuses the folder.
const AGON_LORA: &str = "AGON_LORA";
/// Keys that are read below or do not affect what an adapter computes.
const READ: [&str; 27] = [
    "peft_type",
    "task_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "bias",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "peft_version",
    "auto_mapping",
    "megatron_core",
    "qalora_group_size",
    "ensure_weight_tying",
    // Initialisation of the factors, whose current values are in the file.
    "init_lora_weights",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "runtime_config",
];
/// Keys with a text, or null.
const TEXTS: [&str; 5] = [
    "peft_type",
    "task_type",
    "bias",
    "base_model_name_or_path",
    "revision",
];
/// Largest rank; no module is as wide.
const MAX_RANK: f64 = 16_777_216.0;
/// Largest number of patterns of modules: more than a model has modules.
const MAX_PATTERNS: usize = 4096;
/// Values of `init_lora_weights` that leave the base weights unchanged.
const PLAIN_INITIALISATIONS: [&str; 3] = ["gaussian", "orthogonal", "eva"];

/// Shape and scaling of a LoRA adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraConfig {
    /// Rank r; at least 1.
    pub rank: usize,
    /// α: the product is scaled by α/r or α/√r.
    pub alpha: f64,
    /// Dropout rate of the inputs in training.
    pub dropout: f64,
    /// Target modules.
    pub targets: TargetModules,
    /// PEFT's `rank_pattern`: ranks of individual modules, by the first pattern that matches the name.
    pub(super) ranks: Vec<(NamePattern, usize)>,
    /// PEFT's `alpha_pattern`, likewise for α.
    pub(super) alphas: Vec<(NamePattern, f64)>,
    /// Whether the product is scaled by α/√r (Kalajdzievski 2023) instead of α/r.
    pub rank_stabilised: bool,
    /// The base model.
    pub base_model: BaseModel,
}

/// A linear layer with the rank and scale of its low-rank update.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct AdaptedModule {
    pub(super) layer: LinearSpec,
    pub(super) rank: usize,
    pub(super) scale: f64,
}

impl LoraConfig {
    /// An adapter with one rank and one α for all of `target_modules`, which are name suffixes or `all-linear`. The
    /// base model is left unnamed.
    #[must_use]
    pub fn new(rank: usize, alpha: f64, dropout: f64, target_modules: &[String]) -> Self {
        Self {
            rank,
            alpha,
            dropout,
            targets: TargetModules::named(target_modules),
            ranks: Vec::new(),
            alphas: Vec::new(),
            rank_stabilised: false,
            base_model: BaseModel::default(),
        }
    }

    /// Scale s of a product of this rank and α.
    fn scale(&self, rank: usize, alpha: f64) -> f64 {
        let rank = rank as f64;
        alpha
            / if self.rank_stabilised {
                rank.sqrt()
            } else {
                rank
            }
    }

    /// Number of parameters of the adapter for this base.
    ///
    /// # Errors
    /// When the base has none of the target modules.
    pub fn parameter_count(&self, base: &ModelConfig) -> Result<usize, ModelError> {
        let tensors = self.tensors(base)?;
        Ok(tensors
            .iter()
            .map(|(_, s)| s.iter().product::<usize>())
            .sum())
    }

    /// Checks that every target module exists in the base. An unknown name in the settings is a mistake; PEFT and
    /// [`Self::parameter_count`] ignore it.
    ///
    /// # Errors
    /// When one does not, with its name and the existing ones.
    pub fn check_targets(&self, base: &ModelConfig) -> Result<(), ModelError> {
        self.targets.check_names(base)
    }

    /// The adapted modules of the base, in the model's order.
    pub(super) fn modules(&self, base: &ModelConfig) -> Result<Vec<AdaptedModule>, ModelError> {
        let adapted = |layer: LinearSpec| {
            let rank = *first_match(&self.ranks, &layer.name)?.unwrap_or(&self.rank);
            if rank == 0 {
                let reason = "its rank is 0; an adapter needs a rank of at least 1".into();
                return Err(ModelError::Adapter { reason });
            }
            let alpha = *first_match(&self.alphas, &layer.name)?.unwrap_or(&self.alpha);
            let scale = self.scale(rank, alpha);
            Ok(AdaptedModule { layer, rank, scale })
        };
        self.targets.of(base)?.into_iter().map(adapted).collect()
    }

    /// PEFT's names and the shapes of all tensors of the adapter.
    pub(super) fn tensors(
        &self,
        base: &ModelConfig,
    ) -> Result<Vec<(String, Vec<usize>)>, ModelError> {
        let factors = |AdaptedModule { layer, rank, .. }: AdaptedModule| {
            [
                (tensor_name(&layer.name, A), vec![rank, layer.width]),
                (tensor_name(&layer.name, B), vec![layer.out, rank]),
            ]
        };
        Ok(self.modules(base)?.into_iter().flat_map(factors).collect())
    }

    /// Parses PEFT's configuration of an adapter for a model with the head of `task`; `path` identifies it in errors.
    pub(super) fn read(raw: &Value, path: &Path, task: ModelTask) -> Result<Self, ModelError> {
        let malformed = |reason: String| ModelError::Malformed {
            path: path.to_owned(),
            reason,
        };
        let keys = raw
            .as_object()
            .ok_or_else(|| malformed("it is not an object".into()))?;
        check_types(keys).map_err(malformed)?;
        check_supported(keys, task).map_err(malformed)?;
        let number = |key: &str, default: Option<f64>| {
            let found = keys.get(key).filter(|value| !value.is_null());
            let number = found.map_or(default, Value::as_f64);
            let value = found.unwrap_or(&Value::Null);
            number
                .filter(|number| number.is_finite() && *number >= 0.0)
                .ok_or_else(|| malformed(format!("{key} is {value}, not a number from 0 on")))
        };
        if keys.get("r").is_none_or(Value::is_null) {
            let reason =
                "r is missing, the rank of the adapter: set it to the rows of its lora_A tensors";
            return Err(malformed(reason.into()));
        }
        let rank = number("r", None)?;
        Ok(Self {
            rank: integer_rank(rank).ok_or_else(|| malformed(bad_rank("r", rank)))?,
            alpha: number("lora_alpha", Some(8.0))?,
            dropout: number("lora_dropout", Some(0.0))?,
            targets: TargetModules::read(keys, task).map_err(malformed)?,
            ranks: ranks(keys).map_err(malformed)?,
            alphas: patterns(keys, "alpha_pattern").map_err(malformed)?,
            rank_stabilised: keys.get("use_rslora").and_then(Value::as_bool) == Some(true),
            base_model: BaseModel::read(raw),
        })
    }

    /// PEFT's configuration of the adapter for a base with the head of `task`.
    pub(super) fn to_json(&self, base: &ModelConfig, task: ModelTask) -> Value {
        let saved_modules = Some(modules_to_save(task)).filter(|modules| !modules.is_empty());
        let ranks = self
            .ranks
            .iter()
            .map(|(key, rank)| (key.source().to_owned(), json!(rank)));
        let alphas = self
            .alphas
            .iter()
            .map(|(key, alpha)| (key.source().to_owned(), plain(*alpha)));
        let mut json = json!({
            "peft_type": LORA, "task_type": task_type(task), "inference_mode": true,
            "r": self.rank, "lora_alpha": plain(self.alpha), "lora_dropout": self.dropout,
            "use_rslora": self.rank_stabilised,
            "rank_pattern": ranks.collect::<Map<_, _>>(),
            "alpha_pattern": alphas.collect::<Map<_, _>>(),
            "bias": "none", "fan_in_fan_out": false, "init_lora_weights": true,
            "modules_to_save": saved_modules, "use_dora": false,
        });
        for (key, value) in self.base_model.keys() {
            json[key] = value;
        }
        for (key, value) in self.targets.keys(base) {
            json[key] = value;
        }
        json
    }
}

/// Marks the configuration of an adapter whose score PEFT cannot compute, so that PEFT refuses it.
pub(super) fn mark_incompatible_with_peft(json: &mut Value) {
    json["peft_type"] = AGON_LORA.into();
}

/// A JSON number, written as an integer where it is one.
fn plain(number: f64) -> Value {
    if number.fract() == 0.0 {
        json!(number as u64)
    } else {
        json!(number)
    }
}

/// Value of the first pattern that matches the name.
fn first_match<'a, T>(
    patterns: &'a [(NamePattern, T)],
    name: &str,
) -> Result<Option<&'a T>, ModelError> {
    for (pattern, value) in patterns {
        if pattern.matches(name)? {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

/// Patterns of `rank_pattern` or `alpha_pattern` with their values, in the file's order.
fn patterns(keys: &Map<String, Value>, key: &str) -> Result<Vec<(NamePattern, f64)>, String> {
    let entries = match keys.get(key) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Object(entries)) => entries,
        Some(other) => return Err(format!("{key} is {other}, not an object")),
    };
    if entries.len() > MAX_PATTERNS {
        let count = entries.len();
        return Err(format!(
            "{key} has {count} patterns, more than {MAX_PATTERNS}"
        ));
    }
    let entry = |(source, value): (&String, &Value)| {
        let pattern = NamePattern::at_end(source).map_err(|reason| format!("{key}: {reason}"))?;
        let number = value
            .as_f64()
            .filter(|number| number.is_finite() && *number >= 0.0);
        let number = number
            .ok_or_else(|| format!("{key} gives {source:?} {value}, not a number from 0 on"))?;
        Ok((pattern, number))
    };
    entries.iter().map(entry).collect()
}

fn ranks(keys: &Map<String, Value>) -> Result<Vec<(NamePattern, usize)>, String> {
    let rank = |(pattern, number): (NamePattern, f64)| match integer_rank(number) {
        Some(rank) => Ok((pattern, rank)),
        None => Err(bad_rank(
            &format!("rank_pattern's {:?}", pattern.source()),
            number,
        )),
    };
    patterns(keys, "rank_pattern")?
        .into_iter()
        .map(rank)
        .collect()
}

fn integer_rank(number: f64) -> Option<usize> {
    ((1.0..=MAX_RANK).contains(&number) && number.fract() == 0.0).then_some(number as usize)
}

fn bad_rank(key: &str, number: f64) -> String {
    format!("{key} is {number}; a rank is a whole number of at least 1")
}

/// PEFT's name for a factor of a module.
pub(super) fn tensor_name(module: &str, factor: &str) -> String {
    format!("{PREFIX}{module}.{factor}")
}

/// PEFT's task type.
fn task_type(task: ModelTask) -> &'static str {
    match task {
        ModelTask::Language => "CAUSAL_LM",
        ModelTask::Reward => "SEQ_CLS",
    }
}

/// PEFT's names of a classifier head, which is saved in full.
fn modules_to_save(task: ModelTask) -> &'static [&'static str] {
    match task {
        ModelTask::Language => &[],
        ModelTask::Reward => &["classifier", "score"],
    }
}

/// Name of a module's weight in the base model.
pub(super) fn base_name(module: &str) -> String {
    format!("{module}.weight")
}

/// Checks that names and shapes are exactly the expected ones.
pub(super) fn check_shapes(
    shapes: &BTreeMap<String, Vec<usize>>,
    expected: &[(String, Vec<usize>)],
) -> Result<(), ModelError> {
    for (name, shape) in expected {
        let found = shapes.get(name);
        if found != Some(shape) {
            let found = found.map_or("missing".to_owned(), |dims| format!("{dims:?}"));
            let reason = format!("{name} is {found}, this model needs {shape:?}");
            return Err(ModelError::Adapter { reason });
        }
    }
    let expected: BTreeSet<&String> = expected.iter().map(|(known, _)| known).collect();
    let expected = |name: &String| expected.contains(name);
    match shapes.keys().find(|name| !expected(name)) {
        None => Ok(()),
        Some(unexpected) => Err(ModelError::Adapter {
            reason: format!("{unexpected} belongs to none of its target modules"),
        }),
    }
}

/// Checks the types of the keys that are read as a text or as true or false; PEFT takes 1 or "true" for true.
fn check_types(keys: &Map<String, Value>) -> Result<(), String> {
    let check = |key: &str, fits: fn(&Value) -> bool, expected: &str| match keys.get(key) {
        Some(value) if !value.is_null() && !fits(value) => {
            Err(format!("{key} is {value}, not {expected}"))
        }
        _ => Ok(()),
    };
    for key in TEXTS {
        check(key, Value::is_string, "a text in quotes or null")?;
    }
    check("use_rslora", Value::is_boolean, "true, false or null")?;
    let initialisation = |value: &Value| value.is_string() || value.is_boolean();
    check(
        "init_lora_weights",
        initialisation,
        "a text in quotes, true, false or null",
    )
}

/// Checks that all unsupported features are disabled.
fn check_supported(keys: &Map<String, Value>, task: ModelTask) -> Result<(), String> {
    let text = |key: &str| keys.get(key).and_then(Value::as_str);
    let kind = text("peft_type");
    let is_reward = task == ModelTask::Reward && kind == Some(AGON_LORA);
    if kind != Some(LORA) && !is_reward {
        let found = kind.unwrap_or("(none)");
        return Err(format!("peft_type is {found}; only LORA is supported"));
    }
    let expected = task_type(task);
    if let Some(found) = text("task_type").filter(|found| *found != expected) {
        return Err(format!(
            "task_type is {found}; only {expected} is supported here"
        ));
    }
    if let Some(bias) = text("bias").filter(|bias| *bias != "none") {
        return Err(format!(
            "bias is {bias:?}; trained biases are not supported"
        ));
    }
    if let Some(initialisation) =
        text("init_lora_weights").filter(|b| !PLAIN_INITIALISATIONS.contains(b))
    {
        let reason = "it changes the base's weights, which is not supported";
        return Err(format!("init_lora_weights is {initialisation:?}: {reason}"));
    }
    let is_head_module = |name: &Value| modules_to_save(task).iter().any(|known| name == known);
    let is_head = |value: &Value| {
        value
            .as_array()
            .is_some_and(|names| names.iter().all(is_head_module))
    };
    let unsupported = |(key, value): &(&String, &Value)| match key.as_str() {
        "modules_to_save" => !is_off(value) && !is_head(value),
        key => !READ.contains(&key) && !is_off(value),
    };
    match keys.iter().find(unsupported) {
        None => Ok(()),
        Some((key, value)) => Err(format!("{key} = {value} is not supported")),
    }
}

/// Whether a value disables a feature.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(items) => items.is_empty(),
        _ => false,
    }
}
