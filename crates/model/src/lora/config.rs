//! An adapter's shape, as PEFT's `adapter_config.json` says it.
//!
//! What PEFT can do and this crate cannot is refused by its name, known to us or not: every key that is
//! not read here must be switched off (null, false, empty).

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::{ModelConfig, ModelError, Weights, config::Task};

/// How PEFT calls the two factors of a module.
pub(super) const A: &str = "lora_A.weight";
pub(super) const B: &str = "lora_B.weight";
/// What stands before the base's name of a module or a tensor.
pub(super) const PREFIX: &str = "base_model.model.";
/// Stands for every linear map but the head.
const ALL_LINEAR: &str = "all-linear";
/// Keys that say nothing about what an adapter computes, or that are read below.
const READ: [&str; 22] = [
    "peft_type",
    "task_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
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
    /// Modules by the end of their names, as `q_proj`; `all-linear`: every linear map but the head.
    pub target_modules: Vec<String>,
    /// Whether the product is scaled by α/√r (Kalajdzievski 2023) instead of α/r.
    pub rank_stabilised: bool,
    /// The model it was made for: a folder or a name.
    pub base_model: String,
}

impl LoraConfig {
    /// The factor s before the product.
    #[must_use]
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        let divisor = if self.rank_stabilised {
            rank.sqrt()
        } else {
            rank
        };
        self.alpha / divisor
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

    /// The modules it stands beside: name, width out, width in.
    pub(super) fn modules(
        &self,
        base: &ModelConfig,
    ) -> Result<Vec<(String, usize, usize)>, ModelError> {
        let linear = linear_maps(base);
        if self.rank == 0 {
            let reason = "its rank is 0; an adapter needs a rank of at least 1".into();
            return Err(ModelError::Adapter { reason });
        }
        for target in &self.target_modules {
            if target != ALL_LINEAR && !linear.iter().any(|(name, ..)| is_at_end(name, target)) {
                return Err(unknown(target, &linear));
            }
        }
        let wanted = |name: &str| {
            let mut targets = self.target_modules.iter();
            targets.any(|target| target == ALL_LINEAR || is_at_end(name, target))
        };
        let modules: Vec<_> = linear.into_iter().filter(|(n, ..)| wanted(n)).collect();
        if modules.is_empty() {
            let reason = "it names no target modules; \"all-linear\" means all of them".into();
            return Err(ModelError::Adapter { reason });
        }
        Ok(modules)
    }

    /// Every tensor of the adapter: PEFT's name for it and its shape.
    pub(super) fn tensors(
        &self,
        base: &ModelConfig,
    ) -> Result<Vec<(String, Vec<usize>)>, ModelError> {
        let both = |(module, out, width): (String, usize, usize)| {
            [
                (tensor_name(&module, A), vec![self.rank, width]),
                (tensor_name(&module, B), vec![out, self.rank]),
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
        let config = Self {
            rank: number("r", None)? as usize,
            alpha: number("lora_alpha", Some(8.0))?,
            dropout: number("lora_dropout", Some(0.0))?,
            target_modules: targets(keys.get("target_modules")).map_err(malformed)?,
            rank_stabilised: keys.get("use_rslora").and_then(Value::as_bool) == Some(true),
            base_model: keys
                .get("base_model_name_or_path")
                .and_then(Value::as_str)
                .unwrap_or_default()
                .to_owned(),
        };
        if config.rank == 0 {
            return Err(malformed(
                "r is 0; an adapter has a rank of at least 1".into(),
            ));
        }
        Ok(config)
    }

    /// The configuration as PEFT reads it of an adapter for `task`.
    pub(super) fn to_json(&self, base: &ModelConfig, task: Task) -> Result<Value, ModelError> {
        let modules = self.modules(base)?;
        let mut targets: Vec<&str> = modules.iter().map(|(name, ..)| last_word(name)).collect();
        targets.sort_unstable();
        targets.dedup();
        // A module that is adapted in some blocks only must be named in full.
        let everywhere = targets.len() * base.layers == modules.len();
        if !everywhere {
            targets = self.target_modules.iter().map(String::as_str).collect();
        }
        let whole = Some(modules_to_save(task)).filter(|modules| !modules.is_empty());
        let alpha = if self.alpha.fract() == 0.0 {
            json!(self.alpha as u64)
        } else {
            json!(self.alpha)
        };
        Ok(json!({
            "peft_type": "LORA", "task_type": task_type(task), "inference_mode": true,
            "base_model_name_or_path": self.base_model, "revision": null,
            "r": self.rank, "lora_alpha": alpha, "lora_dropout": self.dropout,
            "use_rslora": self.rank_stabilised, "target_modules": targets,
            "bias": "none", "fan_in_fan_out": false, "init_lora_weights": true,
            "modules_to_save": whole, "layers_to_transform": null, "layers_pattern": null,
            "rank_pattern": {}, "alpha_pattern": {}, "use_dora": false,
        }))
    }
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

/// An error unless `weights` are exactly the tensors that are expected.
pub(super) fn fits(weights: &Weights, expected: &[(String, Vec<usize>)]) -> Result<(), ModelError> {
    for (name, shape) in expected {
        let found = weights.tensors.get(name).map(|tensor| tensor.dims());
        if found != Some(shape.as_slice()) {
            let found = found.map_or("missing".to_owned(), |dims| format!("{dims:?}"));
            let reason = format!("{name} is {found}, this model needs {shape:?}");
            return Err(ModelError::Adapter { reason });
        }
    }
    let expected = |name: &String| expected.iter().any(|(known, _)| known == name);
    match weights.tensors.keys().find(|name| !expected(name)) {
        None => Ok(()),
        Some(stranger) => Err(ModelError::Adapter {
            reason: format!("{stranger} belongs to no module that it names"),
        }),
    }
}

/// The linear maps of the blocks: name, width out, width in.
fn linear_maps(base: &ModelConfig) -> Vec<(String, usize, usize)> {
    let of_block = |(name, shape): (String, Vec<usize>)| {
        let module = name.strip_suffix(".weight")?;
        let [out, width] = shape[..] else { return None };
        module
            .starts_with("model.layers.")
            .then(|| (module.to_owned(), out, width))
    };
    base.tensors().into_iter().filter_map(of_block).collect()
}

fn is_at_end(name: &str, target: &str) -> bool {
    let before = name.strip_suffix(target);
    before.is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

fn last_word(name: &str) -> &str {
    name.rsplit_once('.').map_or(name, |(_, word)| word)
}

fn unknown(target: &str, linear: &[(String, usize, usize)]) -> ModelError {
    let mut names: Vec<&str> = Vec::new();
    for (name, ..) in linear {
        if !names.contains(&last_word(name)) {
            names.push(last_word(name));
        }
    }
    let reason = format!(
        "the target module {target:?} is none of this model's: {}",
        names.join(", ")
    );
    ModelError::Adapter { reason }
}

fn targets(value: Option<&Value>) -> Result<Vec<String>, String> {
    let of_list = |names: &Vec<Value>| {
        let names = names.iter().map(|name| name.as_str().map(str::to_owned));
        names.collect::<Option<Vec<_>>>()
    };
    match value {
        Some(Value::String(word)) if word == ALL_LINEAR => Ok(vec![word.clone()]),
        Some(Value::String(_)) => {
            Err("target_modules is a pattern, which is not supported: list the modules".into())
        }
        Some(Value::Array(names)) => {
            of_list(names).ok_or("target_modules holds what is no name".into())
        }
        _ => Err("target_modules is missing: list the modules".into()),
    }
}

/// Whether everything that is not read is switched off.
fn supported(keys: &Map<String, Value>, task: Task) -> Result<(), String> {
    let word = |key: &str| keys.get(key).and_then(Value::as_str);
    if word("peft_type") != Some("LORA") {
        let found = word("peft_type").unwrap_or("(none)");
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
