//! An adapter's shape, as PEFT's `adapter_config.json` says it.
//!
//! What PEFT can do and this crate cannot is refused by its name, known to us or not: every key that is
//! not read here must be switched off (null, false, empty).

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use serde_json::{Map, Value, json};

use super::{
    base_model::BaseModel,
    pattern::Pattern,
    targets::{LinearMap, Targets},
};
use crate::{ModelConfig, ModelError, config::Task};

/// How PEFT calls the two factors of a module.
pub(super) const A: &str = "lora_A.weight";
pub(super) const B: &str = "lora_B.weight";
/// What stands before the base's name of a module or a tensor.
pub(super) const PREFIX: &str = "base_model.model.";
/// PEFT's word for adapters of this kind.
const LORA: &str = "LORA";
/// The same for adapters of reward models of which PEFT cannot compute the score. PEFT knows no such word, so it
/// refuses the folder.
const AGON_LORA: &str = "AGON_LORA";
/// Keys that say nothing about what an adapter computes, or that are read below.
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
    // How the factors began; what they are now stands in the file.
    "init_lora_weights",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "runtime_config",
];
/// Beginnings that leave the base as it is.
const PLAIN_BEGINNINGS: [&str; 3] = ["gaussian", "orthogonal", "eva"];

/// How an adapter is shaped and scaled.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraConfig {
    /// The inner width r; at least 1.
    pub rank: usize,
    /// What the product is scaled by, over r or √r.
    pub alpha: f64,
    /// The share of the inputs that training leaves out.
    pub dropout: f64,
    /// Modules that it changes.
    pub targets: Targets,
    /// Other ranks for some modules: PEFT's `rank_pattern`, of which the first key that matches a name holds.
    pub(super) ranks: Vec<(Pattern, usize)>,
    /// The same for α: PEFT's `alpha_pattern`.
    pub(super) alphas: Vec<(Pattern, f64)>,
    /// Whether the product is scaled by α/√r (Kalajdzievski 2023) instead of α/r.
    pub rank_stabilised: bool,
    /// The model it was made for.
    pub base_model: BaseModel,
}

/// A linear map that an adapter changes, with the shape and scale of its product.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct AdaptedModule {
    pub(super) map: LinearMap,
    pub(super) rank: usize,
    pub(super) scale: f64,
}

impl LoraConfig {
    /// Shape of a plain adapter: one rank and one α for all of `target_modules`, which are ends of names or
    /// `all-linear`, for a base that is not named yet.
    #[must_use]
    pub fn new(rank: usize, alpha: f64, dropout: f64, target_modules: &[String]) -> Self {
        Self {
            rank,
            alpha,
            dropout,
            targets: Targets::named(target_modules),
            ranks: Vec::new(),
            alphas: Vec::new(),
            rank_stabilised: false,
            base_model: BaseModel::default(),
        }
    }

    /// The factor s before a product of this rank and α.
    fn scale(&self, rank: usize, alpha: f64) -> f64 {
        let rank = rank as f64;
        alpha
            / if self.rank_stabilised {
                rank.sqrt()
            } else {
                rank
            }
    }

    /// How many numbers the adapter of a model of this shape holds.
    ///
    /// # Errors
    /// When the model has no such modules.
    pub fn parameter_count(&self, base: &ModelConfig) -> Result<usize, ModelError> {
        let tensors = self.tensors(base)?;
        Ok(tensors
            .iter()
            .map(|(_, s)| s.iter().product::<usize>())
            .sum())
    }

    /// Checks that every module that is named is one of a model of this shape. Where a person names them, one that is
    /// not is a mistake; PEFT, and [`Self::parameter_count`], pass over it.
    ///
    /// # Errors
    /// When one is not, with its name and those that there are.
    pub fn check_targets(&self, base: &ModelConfig) -> Result<(), ModelError> {
        self.targets.check_names(base)
    }

    /// The modules it stands beside, in the model's order.
    pub(super) fn modules(&self, base: &ModelConfig) -> Result<Vec<AdaptedModule>, ModelError> {
        let adapted = |map: LinearMap| {
            let rank = *first_match(&self.ranks, &map.name)?.unwrap_or(&self.rank);
            if rank == 0 {
                let reason = "its rank is 0; an adapter needs a rank of at least 1".into();
                return Err(ModelError::Adapter { reason });
            }
            let alpha = *first_match(&self.alphas, &map.name)?.unwrap_or(&self.alpha);
            let scale = self.scale(rank, alpha);
            Ok(AdaptedModule { map, rank, scale })
        };
        self.targets.of(base)?.into_iter().map(adapted).collect()
    }

    /// Every tensor of the adapter: PEFT's name for it and its shape.
    pub(super) fn tensors(
        &self,
        base: &ModelConfig,
    ) -> Result<Vec<(String, Vec<usize>)>, ModelError> {
        let both = |AdaptedModule { map, rank, .. }: AdaptedModule| {
            [
                (tensor_name(&map.name, A), vec![rank, map.width]),
                (tensor_name(&map.name, B), vec![map.out, rank]),
            ]
        };
        Ok(self.modules(base)?.into_iter().flat_map(both).collect())
    }

    /// Reads PEFT's configuration of an adapter for `task`; `path` names it in errors.
    pub(super) fn read(raw: &Value, path: &Path, task: Task) -> Result<Self, ModelError> {
        let malformed = |reason: String| ModelError::Malformed {
            path: path.to_owned(),
            reason,
        };
        let keys = raw
            .as_object()
            .ok_or_else(|| malformed("it is not an object".into()))?;
        supported(keys, task).map_err(malformed)?;
        let number = |key: &str, default: Option<f64>| {
            let found = keys.get(key).filter(|value| !value.is_null());
            let number = found.map_or(default, Value::as_f64);
            number
                .filter(|number| number.is_finite() && *number >= 0.0)
                .ok_or_else(|| malformed(format!("{key} is not a number from 0 on")))
        };
        if keys.get("r").is_none_or(Value::is_null) {
            let reason =
                "r is missing, the rank of the adapter: set it to the rows of its lora_A tensors";
            return Err(malformed(reason.into()));
        }
        let rank = number("r", None)?;
        Ok(Self {
            rank: whole_rank(rank).ok_or_else(|| malformed(bad_rank("r", rank)))?,
            alpha: number("lora_alpha", Some(8.0))?,
            dropout: number("lora_dropout", Some(0.0))?,
            targets: Targets::read(keys, task).map_err(malformed)?,
            ranks: ranks(keys).map_err(malformed)?,
            alphas: patterns(keys, "alpha_pattern").map_err(malformed)?,
            rank_stabilised: keys.get("use_rslora").and_then(Value::as_bool) == Some(true),
            base_model: BaseModel::read(raw),
        })
    }

    /// The configuration as PEFT reads it of an adapter of `base` for `task`.
    pub(super) fn to_json(&self, base: &ModelConfig, task: Task) -> Value {
        let whole = Some(modules_to_save(task)).filter(|modules| !modules.is_empty());
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
            "modules_to_save": whole, "use_dora": false,
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

/// Marks the configuration of a reward model's adapter of which PEFT cannot compute the score, so that PEFT refuses
/// it.
pub(super) fn hide_from_peft(json: &mut Value) {
    json["peft_type"] = AGON_LORA.into();
}

/// A number as a person writes it: whole where it is whole.
fn plain(number: f64) -> Value {
    if number.fract() == 0.0 {
        json!(number as u64)
    } else {
        json!(number)
    }
}

/// What the first pattern that matches the name stands for.
fn first_match<'a, T>(
    patterns: &'a [(Pattern, T)],
    name: &str,
) -> Result<Option<&'a T>, ModelError> {
    for (pattern, value) in patterns {
        if pattern.matches(name)? {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

/// The patterns of `rank_pattern` or `alpha_pattern`, in the file's order, each with its number.
fn patterns(keys: &Map<String, Value>, key: &str) -> Result<Vec<(Pattern, f64)>, String> {
    let entries = match keys.get(key) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Object(entries)) => entries,
        Some(other) => return Err(format!("{key} is {other}, not an object")),
    };
    let entry = |(source, value): (&String, &Value)| {
        let pattern = Pattern::at_end(source).map_err(|reason| format!("{key}: {reason}"))?;
        let number = value
            .as_f64()
            .filter(|number| number.is_finite() && *number >= 0.0);
        let number = number
            .ok_or_else(|| format!("{key} gives {source:?} {value}, not a number from 0 on"))?;
        Ok((pattern, number))
    };
    entries.iter().map(entry).collect()
}

fn ranks(keys: &Map<String, Value>) -> Result<Vec<(Pattern, usize)>, String> {
    let whole = |(pattern, number): (Pattern, f64)| match whole_rank(number) {
        Some(rank) => Ok((pattern, rank)),
        None => Err(bad_rank(
            &format!("rank_pattern's {:?}", pattern.source()),
            number,
        )),
    };
    patterns(keys, "rank_pattern")?
        .into_iter()
        .map(whole)
        .collect()
}

fn whole_rank(number: f64) -> Option<usize> {
    (number >= 1.0 && number.fract() == 0.0).then_some(number as usize)
}

fn bad_rank(key: &str, number: f64) -> String {
    format!("{key} is {number}; a rank is a whole number of at least 1")
}

/// PEFT's name for a factor of a module.
pub(super) fn tensor_name(module: &str, factor: &str) -> String {
    format!("{PREFIX}{module}.{factor}")
}

/// PEFT's word for what a model is for.
fn task_type(task: Task) -> &'static str {
    match task {
        Task::Language => "CAUSAL_LM",
        Task::Reward => "SEQ_CLS",
    }
}

/// The modules that are whole in the file: PEFT's names for a classifier's head.
fn modules_to_save(task: Task) -> &'static [&'static str] {
    match task {
        Task::Language => &[],
        Task::Reward => &["classifier", "score"],
    }
}

/// The base's name for the weight of a module.
pub(super) fn base_name(module: &str) -> String {
    format!("{module}.weight")
}

/// An error unless the tensors of these names and shapes are exactly those that are expected.
pub(super) fn fits(
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
        Some(stranger) => Err(ModelError::Adapter {
            reason: format!("{stranger} belongs to no module that it names"),
        }),
    }
}

/// Whether everything that is not read is switched off.
fn supported(keys: &Map<String, Value>, task: Task) -> Result<(), String> {
    let word = |key: &str| keys.get(key).and_then(Value::as_str);
    let kind = word("peft_type");
    let is_reward = task == Task::Reward && kind == Some(AGON_LORA);
    if kind != Some(LORA) && !is_reward {
        let found = kind.unwrap_or("(none)");
        return Err(format!("peft_type is {found}; only LORA is supported"));
    }
    let expected = task_type(task);
    if let Some(found) = word("task_type").filter(|found| *found != expected) {
        return Err(format!(
            "task_type is {found}; only {expected} is supported here"
        ));
    }
    if let Some(bias) = word("bias").filter(|bias| *bias != "none") {
        return Err(format!(
            "bias is {bias:?}; trained biases are not supported"
        ));
    }
    if let Some(beginning) = word("init_lora_weights").filter(|b| !PLAIN_BEGINNINGS.contains(b)) {
        let reason = "it changes the base's weights, which is not supported";
        return Err(format!("init_lora_weights is {beginning:?}: {reason}"));
    }
    let of_head = |name: &Value| modules_to_save(task).iter().any(|known| name == known);
    let is_head = |value: &Value| {
        value
            .as_array()
            .is_some_and(|names| names.iter().all(of_head))
    };
    let on = |(key, value): &(&String, &Value)| match key.as_str() {
        "modules_to_save" => !is_off(value) && !is_head(value),
        key => !READ.contains(&key) && !is_off(value),
    };
    match keys.iter().find(on) {
        None => Ok(()),
        Some((key, value)) => Err(format!("{key} = {value} is not supported")),
    }
}

fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(items) => items.is_empty(),
        _ => false,
    }
}
