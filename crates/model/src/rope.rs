//! Rotary position embedding (Su et al., RoFormer, arXiv 2104.09864): frequency scaling from `config.json`, and cos/sin
//! tables.
//!
//! Keys are read as in transformers 5.23: a non-empty `rope_scaling` replaces `rope_parameters`, and keys missing there
//! come from the top level. All model families use it, and training and decoding share the same tables, which grow with
//! the sequences: what a configuration says of its positions costs no memory.

use std::{
    f64::consts::TAU,
    sync::{Arc, PoisonError, RwLock},
};

use candle_core::{DType, Device, Tensor};
use serde_json::{Map, Value};

use crate::{config::ModelConfig, keys::is_off};

/// Default base θ.
const DEFAULT_THETA: f64 = 10_000.0;
/// Supported values of `rope_type`.
const SUPPORTED: [&str; 5] = ["default", "linear", "dynamic", "yarn", "llama3"];
/// Keys of the scaling object that are read by some type or have no effect.
const KNOWN_KEYS: [&str; 14] = [
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "finetuned",
];

/// Base and scaling of the rotary frequencies.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rope {
    /// Base θ of the frequencies θ^(-2i/d).
    pub theta: f64,
    /// Scaling of the frequencies.
    pub scaling: RopeScaling,
}

/// Scaling of rotary frequencies for context extension.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// No scaling.
    Default,
    /// Position interpolation (Chen et al., arXiv 2306.15595): every frequency divided by the factor.
    Linear {
        /// Scaling factor, at least 1 in practice.
        factor: f64,
    },
    /// Dynamic NTK scaling: a larger base for sequences longer than `max_position_embeddings`. Such sequences are
    /// refused for every model, so the frequencies are always unscaled and decoding agrees with training.
    Dynamic,
    /// YaRN (Peng et al., arXiv 2309.00071).
    Yarn(Yarn),
    /// Llama 3.1 scaling: long wavelengths are stretched, short ones unchanged, those between interpolated.
    Llama3(Llama3),
}

/// Parameters of YaRN.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Yarn {
    /// Divides the interpolated frequencies.
    pub factor: f64,
    /// Context length of pretraining.
    pub original_positions: f64,
    /// Rotations within that context above which a frequency is unchanged.
    pub beta_fast: f64,
    /// Rotations below which a frequency is divided.
    pub beta_slow: f64,
    /// Whether the interpolation bounds are rounded to whole dimensions.
    pub truncate: bool,
    /// Multiplies cos and sin.
    pub attention_factor: f64,
}

/// Parameters of Llama 3.1's scaling.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Llama3 {
    /// Divides the frequencies of long wavelengths.
    pub factor: f64,
    /// Rotations within the original context below which a wavelength is long.
    pub low_freq_factor: f64,
    /// Rotations above which a wavelength is short.
    pub high_freq_factor: f64,
    /// Context length of pretraining.
    pub original_positions: f64,
}

impl Rope {
    /// Parses the RoPE keys of the `config.json` in `raw`, for a model with `max_positions`.
    pub(crate) fn read(raw: &Value, max_positions: usize) -> Result<Self, String> {
        let chosen = ["rope_scaling", "rope_parameters"]
            .into_iter()
            .find(|key| !is_off(&raw[*key]));
        let none = Map::new();
        let keys = match chosen.map(|name| (name, &raw[name])) {
            None => RopeKeys::new("rope_parameters", &none),
            Some((name, Value::Object(keys))) => RopeKeys::new(name, keys),
            Some((name, other)) => return Err(format!("{name} = {other} is not an object")),
        };
        keys.kind()?;
        keys.check_known()?;
        let top_level = RopeKeys::new("config.json", raw.as_object().unwrap_or(&none));
        let theta = match keys.non_null("rope_theta")? {
            Some(theta) => theta,
            None => top_level.non_null("rope_theta")?.unwrap_or(DEFAULT_THETA),
        };
        let lengths = ContextLengths {
            max: max_positions as f64,
            top_level: &top_level,
        };
        let scaling = keys.scaling(lengths)?;
        if theta <= 1.0 && matches!(scaling, RopeScaling::Yarn(_)) {
            return Err(format!(
                "rope_theta = {theta} is not above 1, as the bounds of YaRN need it in {}",
                keys.name
            ));
        }
        Ok(Self { theta, scaling })
    }

    /// Frequencies in radians per position, one for each pair of dimensions of a head.
    fn frequencies(self, head_dim: usize) -> Vec<f64> {
        let dim = head_dim as f64;
        let plain = (0..head_dim)
            .step_by(2)
            .map(|i| self.theta.powf(-(i as f64) / dim));
        match self.scaling {
            RopeScaling::Default | RopeScaling::Dynamic => plain.collect(),
            RopeScaling::Linear { factor } => plain.map(|f| f / factor).collect(),
            RopeScaling::Yarn(yarn) => {
                let (low, high) = yarn.correction_range(dim, self.theta);
                plain
                    .enumerate()
                    .map(|(pair, f)| {
                        let interpolated = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
                        f / yarn.factor * interpolated + f * (1.0 - interpolated)
                    })
                    .collect()
            }
            RopeScaling::Llama3(llama3) => plain.map(|f| llama3.scaled(f)).collect(),
        }
    }

    /// Factor on cos and sin.
    fn attention_factor(self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn(yarn) => yarn.attention_factor,
            _ => 1.0,
        }
    }
}

impl Yarn {
    /// Bounds, in pairs of dimensions, of the interpolation ramp (Peng et al., section 3.2).
    fn correction_range(self, dim: f64, theta: f64) -> (f64, f64) {
        let pair = |rotations: f64| {
            dim * (self.original_positions / (rotations * TAU)).ln() / (2.0 * theta.ln())
        };
        let (mut low, mut high) = (pair(self.beta_fast), pair(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, high) = (low.max(0.0), high.min(dim - 1.0));
        let singular = low == high;
        (low, if singular { high + 0.001 } else { high })
    }

    /// Default factor on cos and sin: 0.1 ln(factor) + 1 (Peng et al., eq. 22), or DeepSeek's quotient of two such
    /// terms.
    fn default_attention_factor(factor: f64, mscales: Option<(f64, f64)>) -> f64 {
        let scale = |mscale: f64| {
            if factor <= 1.0 {
                1.0
            } else {
                0.1 * mscale * factor.ln() + 1.0
            }
        };
        mscales.map_or_else(
            || scale(1.0),
            |(numerator, denominator)| scale(numerator) / scale(denominator),
        )
    }
}

impl Llama3 {
    fn scaled(self, frequency: f64) -> f64 {
        let rotations = self.original_positions * frequency / TAU;
        let (low, high) = (self.low_freq_factor, self.high_freq_factor);
        if rotations > high {
            frequency
        } else if rotations < low {
            frequency / self.factor
        } else {
            let smooth = (rotations - low) / (high - low);
            (1.0 - smooth) * frequency / self.factor + smooth * frequency
        }
    }
}

/// Context lengths declared outside the scaling object.
#[derive(Clone, Copy)]
struct ContextLengths<'a> {
    /// `max_position_embeddings`.
    max: f64,
    /// Top-level keys, whose `original_max_position_embeddings` takes precedence over the one in the scaling object.
    top_level: &'a RopeKeys<'a>,
}

/// Keys of a JSON object that configures RoPE, with the object's name for errors.
struct RopeKeys<'a> {
    name: &'a str,
    keys: &'a Map<String, Value>,
}

impl<'a> RopeKeys<'a> {
    fn new(name: &'a str, keys: &'a Map<String, Value>) -> Self {
        Self { name, keys }
    }

    /// Checks that no unsupported key is set.
    fn check_known(&self) -> Result<(), String> {
        let is_unknown = |(key, value): &(&String, &Value)| match key.as_str() {
            "partial_rotary_factor" | "attn_factor" | "extrapolation_factor" => {
                !is_off(value) && value.as_f64() != Some(1.0)
            }
            key => !KNOWN_KEYS.contains(&key) && !is_off(value),
        };
        match self.keys.iter().find(is_unknown) {
            None => Ok(()),
            Some((key, value)) => Err(format!("{}: {key} = {value} is not supported", self.name)),
        }
    }

    /// Type of scaling, one of [`SUPPORTED`].
    fn kind(&self) -> Result<&'a str, String> {
        let kind = ["rope_type", "type"]
            .into_iter()
            .find_map(|key| self.keys.get(key));
        match kind {
            None => Ok("default"),
            Some(Value::String(kind)) if SUPPORTED.contains(&kind.as_str()) => Ok(kind),
            Some(Value::String(other)) => Err(self.unsupported(other)),
            Some(other) => Err(format!("{}: rope_type is {other}", self.name)),
        }
    }

    fn unsupported(&self, kind: &str) -> String {
        format!(
            "{}: the rotary scaling {kind:?} is not supported; supported are {}",
            self.name,
            SUPPORTED.join(", ")
        )
    }

    fn scaling(&self, lengths: ContextLengths<'_>) -> Result<RopeScaling, String> {
        Ok(match self.kind()? {
            "default" => RopeScaling::Default,
            "linear" => RopeScaling::Linear {
                factor: self.required("factor")?,
            },
            "dynamic" => {
                self.required("factor")?;
                RopeScaling::Dynamic
            }
            "yarn" => RopeScaling::Yarn(self.yarn(lengths)?),
            "llama3" => RopeScaling::Llama3(Llama3 {
                factor: self.required("factor")?,
                low_freq_factor: self.required("low_freq_factor")?,
                high_freq_factor: self.required("high_freq_factor")?,
                original_positions: self.original_positions(lengths)?,
            }),
            other => return Err(self.unsupported(other)),
        })
    }

    fn yarn(&self, lengths: ContextLengths<'_>) -> Result<Yarn, String> {
        let original_positions = self.original_positions(lengths)?;
        let factor = match self.keys.get("factor") {
            // DeepSeek leaves the factor null.
            Some(Value::Null) => lengths.max / original_positions,
            _ => self.required("factor")?,
        };
        // 0 and null count as missing.
        let nonzero =
            |key: &str| Ok::<_, String>(self.number(key)?.filter(|number| *number != 0.0));
        let mscales = nonzero("mscale")?.zip(nonzero("mscale_all_dim")?);
        let given = self.number("attention_factor")?;
        let attention_factor =
            given.unwrap_or_else(|| Yarn::default_attention_factor(factor, mscales));
        Ok(Yarn {
            factor,
            original_positions,
            beta_fast: nonzero("beta_fast")?.unwrap_or(32.0),
            beta_slow: nonzero("beta_slow")?.unwrap_or(1.0),
            truncate: self.truncates()?,
            attention_factor,
        })
    }

    /// Python semantics: null is false, and a missing key is true.
    fn truncates(&self) -> Result<bool, String> {
        match self.keys.get("truncate") {
            None => Ok(true),
            Some(Value::Null) => Ok(false),
            Some(Value::Bool(truncates)) => Ok(*truncates),
            Some(other) => Err(format!(
                "{}: truncate = {other} is neither true nor false",
                self.name
            )),
        }
    }

    fn original_positions(&self, lengths: ContextLengths<'_>) -> Result<f64, String> {
        let key = "original_max_position_embeddings";
        let own = self.non_null(key)?;
        Ok(lengths
            .top_level
            .non_null(key)?
            .or(own)
            .unwrap_or(lengths.max))
    }

    /// A required number above 0.
    fn required(&self, key: &str) -> Result<f64, String> {
        let number = self.positive(key)?;
        number.ok_or_else(|| format!("{}: {key} is missing", self.name))
    }

    /// As [`Self::positive`], but null is an error, as it is in transformers.
    fn non_null(&self, key: &str) -> Result<Option<f64>, String> {
        match self.keys.get(key) {
            Some(Value::Null) => Err(format!(
                "{}: {key} is null; leave the key out or set it to a number",
                self.name
            )),
            _ => self.positive(key),
        }
    }

    /// As [`Self::number`], but 0 is an error.
    fn positive(&self, key: &str) -> Result<Option<f64>, String> {
        match self.number(key)? {
            Some(0.0) => Err(format!("{}: {key} is 0", self.name)),
            number => Ok(number),
        }
    }

    /// A number of at least 0; `None` when the key is missing or null.
    fn number(&self, key: &str) -> Result<Option<f64>, String> {
        let value = self.keys.get(key).filter(|value| !value.is_null());
        let Some(value) = value else { return Ok(None) };
        let number = value.as_f64().filter(|n| n.is_finite() && *n >= 0.0);
        let refused = || format!("{}: {key} = {value} is not a number from 0 on", self.name);
        number.map(Some).ok_or_else(refused)
    }
}

/// Maximum number of rows of a cached table. A forward pass over longer sequences computes the rows that it needs.
const MAX_CACHED: usize = 1 << 17;
/// Number of rows with which a table begins, unless the model has fewer positions.
const MIN_CACHED: usize = 1 << 8;

/// Number of rows of the cached table once sequences of `length` tokens were processed; 0 for those that are too long.
pub(crate) fn cached_rows(length: usize, max_positions: usize) -> usize {
    if length > MAX_CACHED {
        0
    } else {
        let grown = length.next_power_of_two().max(MIN_CACHED);
        grown.min(max_positions.max(length))
    }
}

/// cos and sin, each `[positions, head_dim / 2]`.
type Angles = (Tensor, Tensor);

/// Positions of tokens in their sequences.
#[derive(Debug)]
pub(crate) struct Positions {
    /// One for each token, `[N]`, u32.
    pub(crate) index: Tensor,
    /// Number of positions from the first on that include all of them.
    span: usize,
}

impl Positions {
    /// Moves positions to a device.
    pub(crate) fn new(positions: Vec<u32>, device: &Device) -> candle_core::Result<Self> {
        let last = positions.iter().max();
        Ok(Self {
            span: last.map_or(0, |&last| last as usize + 1),
            index: Tensor::new(positions, device)?,
        })
    }
}

/// Tables of cos and sin for every position and frequency.
#[derive(Debug, Clone)]
pub(crate) struct RopeTable {
    frequencies: Vec<f64>,
    factor: f64,
    dtype: DType,
    device: Device,
    max_positions: usize,
    /// Rows of the first positions, as many as were needed so far; shared by clones.
    cached: Arc<RwLock<Option<Angles>>>,
}

impl RopeTable {
    pub(crate) fn new(config: &ModelConfig, dtype: DType, device: &Device) -> Self {
        Self {
            frequencies: config.rope.frequencies(config.head_dim),
            factor: config.rope.attention_factor(),
            dtype,
            device: device.clone(),
            max_positions: config.max_positions,
            cached: Arc::default(),
        }
    }

    /// Table of at least the first `length` positions, which grows if it is shorter; `None` for more than
    /// [`MAX_CACHED`].
    fn covering(&self, length: usize) -> candle_core::Result<Option<Angles>> {
        let rows = cached_rows(length, self.max_positions);
        if rows == 0 {
            return Ok(None);
        }
        let covers = |(cos, _): &&Angles| cos.dims().first().is_some_and(|&rows| rows >= length);
        let cached = self.cached.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = cached.as_ref().filter(covers) {
            return Ok(Some(found.clone()));
        }
        drop(cached);
        let grown = self.computed(0..rows)?;
        let mut cached = self.cached.write().unwrap_or_else(PoisonError::into_inner);
        // Another thread may have grown it further.
        let found = match cached.as_ref().filter(covers) {
            Some(found) => found.clone(),
            None => cached.insert(grown).clone(),
        };
        Ok(Some(found))
    }

    fn computed(
        &self,
        positions: impl ExactSizeIterator<Item = usize>,
    ) -> candle_core::Result<Angles> {
        let shape = (positions.len(), self.frequencies.len());
        let angles: Vec<f64> = positions
            .flat_map(|position| self.frequencies.iter().map(move |f| position as f64 * f))
            .collect();
        let table = |f: fn(f64) -> f64| {
            let values: Vec<f64> = angles.iter().map(|&a| self.factor * f(a)).collect();
            Tensor::from_vec(values, shape, &Device::Cpu)?
                .to_dtype(self.dtype)?
                .to_device(&self.device)
        };
        Ok((table(f64::cos)?, table(f64::sin)?))
    }

    /// cos and sin of the first `count` positions, at most all: `head_dim / 2` values per position, row-major.
    pub(crate) fn rows(&self, count: usize) -> candle_core::Result<(Vec<f32>, Vec<f32>)> {
        let count = count.min(self.max_positions);
        let (cos, sin) = match self.covering(count)? {
            Some((cos, sin)) => (cos.narrow(0, 0, count)?, sin.narrow(0, 0, count)?),
            None => self.computed(0..count)?,
        };
        let values = |table: Tensor| table.to_dtype(DType::F32)?.flatten_all()?.to_vec1();
        Ok((values(cos)?, values(sin)?))
    }

    /// cos and sin at these positions, each `[N, head_dim / 2]`.
    pub(crate) fn at(&self, positions: &Positions) -> candle_core::Result<Angles> {
        match self.covering(positions.span)? {
            Some((cos, sin)) => Ok((
                cos.index_select(&positions.index, 0)?,
                sin.index_select(&positions.index, 0)?,
            )),
            None => {
                let positions = positions.index.to_vec1::<u32>()?;
                self.computed(positions.into_iter().map(|position| position as usize))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const HEAD: usize = 16;
    const POSITIONS: usize = 64;
    const PLAIN: [f64; 8] = [
        1.0,
        0.316228,
        0.1,
        0.0316228,
        0.01,
        0.00316228,
        0.001,
        0.000316228,
    ];
    const YARN: [f64; 8] = [
        1.0,
        0.0790569,
        0.025,
        0.00790569,
        0.0025,
        0.000790569,
        0.00025,
        7.90569e-05,
    ];
    const YARN_OF_32: [f64; 8] = [
        1.0,
        0.197642,
        0.025,
        0.00790569,
        0.0025,
        0.000790569,
        0.00025,
        7.90569e-05,
    ];
    const YARN_OF_40: [f64; 8] = [
        1.0,
        0.168711,
        0.025,
        0.00790569,
        0.0025,
        0.000790569,
        0.00025,
        7.90569e-05,
    ];
    const LINEAR_OF_7: [f64; 8] = [
        0.5, 0.392042, 0.307394, 0.241023, 0.188982, 0.148178, 0.116184, 0.0910981,
    ];
    /// 0.1 ln 4 + 1.
    const MSCALE: f64 = 1.138629436111989;

    fn yarn(more: &Value) -> Value {
        let mut keys =
            json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16});
        for (key, value) in more.as_object().unwrap() {
            keys[key] = value.clone();
        }
        json!({ "rope_scaling": keys })
    }

    fn llama3(more: &Value) -> Value {
        let mut keys = json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0
        });
        for (key, value) in more.as_object().unwrap() {
            keys[key] = value.clone();
        }
        json!({ "rope_scaling": keys })
    }

    /// A configuration with `inv_freq` and `attention_scaling` of the rotary embedding that transformers 5.23 builds
    /// from it: `LlamaForCausalLM(LlamaConfig(hidden_size=32, num_attention_heads=2, max_position_embeddings=64, ..))`.
    type Case = (Value, [f64; 8], f64);

    /// Precedence of keys.
    fn precedence() -> Vec<Case> {
        vec![
            (json!({}), PLAIN, 1.0),
            (
                json!({"rope_theta": 500.0, "rope_scaling": null}),
                [
                    1.0, 0.459863, 0.211474, 0.0972492, 0.0447214, 0.0205657, 0.00945742,
                    0.00434912,
                ],
                1.0,
            ),
            (
                json!({"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 4.0}}),
                [
                    0.25, 0.114966, 0.0528686, 0.0243123, 0.0111803, 0.00514143, 0.00236435,
                    0.00108728,
                ],
                1.0,
            ),
            // The old object replaces the new one entirely.
            (
                json!({
                    "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
                    "rope_scaling": {"type": "linear", "factor": 2.0}
                }),
                PLAIN.map(|f| f / 2.0),
                1.0,
            ),
            (
                json!({
                    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0},
                    "rope_scaling": {}
                }),
                LINEAR_OF_7,
                1.0,
            ),
            // The base in the object takes precedence over the top-level one.
            (
                json!({
                    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0},
                    "rope_theta": 500.0
                }),
                LINEAR_OF_7,
                1.0,
            ),
            (
                json!({"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 500.0}),
                [
                    0.5, 0.229932, 0.105737, 0.0486246, 0.0223607, 0.0102829, 0.00472871,
                    0.00217456,
                ],
                1.0,
            ),
            // Dynamic scaling has no effect up to `max_position_embeddings`, the maximum length.
            (
                json!({"rope_scaling": {"rope_type": "dynamic", "type": "linear", "factor": 4.0}}),
                PLAIN,
                1.0,
            ),
        ]
    }

    fn yarns() -> Vec<Case> {
        let mut with_top_level = yarn(&json!({}));
        with_top_level["original_max_position_embeddings"] = json!(32);
        vec![
            (yarn(&json!({})), YARN, MSCALE),
            (yarn(&json!({"factor": null})), YARN, MSCALE),
            (
                json!({"rope_scaling": {"type": "yarn", "factor": 4.0}}),
                [
                    1.0,
                    0.237171,
                    0.05,
                    0.00790569,
                    0.0025,
                    0.000790569,
                    0.00025,
                    7.90569e-05,
                ],
                MSCALE,
            ),
            (with_top_level, YARN_OF_32, MSCALE),
            (
                yarn(&json!({"beta_fast": 8, "beta_slow": 0.5})),
                YARN_OF_32,
                MSCALE,
            ),
            (yarn(&json!({"truncate": false})), YARN, MSCALE),
            (
                yarn(&json!({"truncate": null, "original_max_position_embeddings": 40})),
                YARN_OF_40,
                MSCALE,
            ),
            (yarn(&json!({"attention_factor": 0.5})), YARN, 0.5),
            (
                yarn(&json!({"mscale": 0.707, "mscale_all_dim": 1.0})),
                YARN,
                0.964326914892074,
            ),
            (yarn(&json!({"mscale": 0.707})), YARN, MSCALE),
            (
                yarn(&json!({"factor": 0.5})),
                [
                    1.0,
                    0.632456,
                    0.2,
                    0.0632456,
                    0.02,
                    0.00632456,
                    0.002,
                    0.000632456,
                ],
                1.0,
            ),
        ]
    }

    fn llama3s() -> Vec<Case> {
        let mut with_top_level = llama3(&json!({"original_max_position_embeddings": 16}));
        with_top_level["original_max_position_embeddings"] = json!(32);
        vec![
            (
                llama3(&json!({"original_max_position_embeddings": 16})),
                [
                    0.576056,
                    0.0395285,
                    0.0125,
                    0.00395285,
                    0.00125,
                    0.000395285,
                    0.000125,
                    3.95285e-05,
                ],
                1.0,
            ),
            (
                llama3(&json!({})),
                [
                    1.0,
                    0.244385,
                    0.0130423,
                    0.00395285,
                    0.00125,
                    0.000395285,
                    0.000125,
                    3.95285e-05,
                ],
                1.0,
            ),
            (
                with_top_level,
                [
                    1.0,
                    0.09584,
                    0.0125,
                    0.00395285,
                    0.00125,
                    0.000395285,
                    0.000125,
                    3.95285e-05,
                ],
                1.0,
            ),
        ]
    }

    #[test]
    fn frequencies_match_transformers() {
        for (raw, expected, factor) in [precedence(), yarns(), llama3s()].concat() {
            let rope = Rope::read(&raw, POSITIONS).unwrap();
            let found = rope.frequencies(HEAD);
            assert_eq!(found.len(), expected.len(), "{raw}");
            for (found, expected) in found.iter().zip(expected) {
                assert!(
                    (found / expected - 1.0).abs() < 2e-5,
                    "{raw}: {found} is not {expected}"
                );
            }
            assert!((rope.attention_factor() - factor).abs() < 1e-12, "{raw}");
        }
    }

    #[test]
    fn unsupported_scalings_are_refused_by_name() {
        let cases = [
            (
                json!({"rope_scaling": {"type": "su", "short_factor": [1.0]}}),
                "rope_scaling: the rotary scaling \"su\" is not supported",
            ),
            (
                yarn(&json!({"original_max_position_embeddings": null})),
                "rope_scaling: original_max_position_embeddings is null",
            ),
            (
                yarn(&json!({"rope_theta": null})),
                "rope_scaling: rope_theta is null",
            ),
            (
                json!({"rope_theta": null}),
                "config.json: rope_theta is null",
            ),
            (yarn(&json!({"truncate": 0})), "truncate = 0"),
            (
                yarn(&json!({"rope_theta": 1})),
                "rope_theta = 1 is not above 1",
            ),
            (
                json!({"rope_scaling": {"type": "longrope"}}),
                "rope_scaling: the rotary scaling \"longrope\" is not supported; supported are default",
            ),
            (
                json!({"rope_parameters": {"rope_type": "proportional"}}),
                "rope_parameters: the rotary scaling \"proportional\"",
            ),
            (
                json!({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
                "rope_parameters: partial_rotary_factor = 0.5",
            ),
            (
                json!({"rope_scaling": {"type": "default", "mrope_section": [2, 2, 4]}}),
                "rope_scaling: mrope_section = [2,2,4]",
            ),
            (
                json!({"rope_parameters": {"full_attention": {"rope_type": "default"}}}),
                "rope_parameters: full_attention",
            ),
            (
                json!({"rope_scaling": {"type": "linear"}}),
                "rope_scaling: factor is missing",
            ),
            (
                json!({"rope_scaling": {"type": "linear", "factor": 0}}),
                "rope_scaling: factor is 0",
            ),
            (
                json!({"rope_scaling": {"type": "llama3", "factor": "8"}}),
                "rope_scaling: factor = \"8\" is not a number",
            ),
            (json!({"rope_scaling": "linear"}), "is not an object"),
            (json!({"rope_theta": "1e4"}), "config.json: rope_theta"),
        ];
        for (raw, expected) in cases {
            let refused = Rope::read(&raw, POSITIONS).unwrap_err();
            assert!(refused.contains(expected), "{refused:?} for {raw}");
        }
    }

    fn table(positions: usize) -> RopeTable {
        let mut raw = crate::fixtures::config_json(8);
        raw["max_position_embeddings"] = json!(positions);
        let config = ModelConfig::from_json(raw, std::path::Path::new("config.json")).unwrap();
        RopeTable::new(&config, DType::F32, &Device::Cpu)
    }

    fn row_count(table: &RopeTable) -> usize {
        let cached = table.cached.read().unwrap();
        cached.as_ref().map_or(0, |(cos, _)| cos.dims()[0])
    }

    #[test]
    fn a_table_grows_with_the_sequences_and_not_with_the_configuration() {
        let (small, large) = (table(64), table(1 << 24));
        assert_eq!((row_count(&small), row_count(&large)), (0, 0));
        let positions = Positions::new(vec![0, 7, 63, 7], &Device::Cpu).unwrap();
        let rows = |table: &RopeTable| {
            let (cos, sin) = table.at(&positions).unwrap();
            [cos, sin].map(|rows| rows.to_vec2::<f32>().unwrap())
        };
        let clone = large.clone();
        assert_eq!(rows(&small), rows(&large));
        assert_eq!((row_count(&small), row_count(&large)), (64, MIN_CACHED));
        assert_eq!(row_count(&clone), MIN_CACHED, "clones share the rows");
        assert_eq!(small.rows(9).unwrap(), large.rows(9).unwrap());

        let before = rows(&large);
        large.rows(MIN_CACHED + 1).unwrap();
        assert_eq!(row_count(&large), 2 * MIN_CACHED);
        assert_eq!(rows(&large), before);
    }

    #[test]
    fn positions_beyond_the_largest_table_are_computed() {
        let table = table(1 << 24);
        let last = MAX_CACHED as u32;
        let positions = Positions::new(vec![3, last], &Device::Cpu).unwrap();
        let (cos, _) = table.at(&positions).unwrap();
        assert_eq!(row_count(&table), 0);
        let cos = cos.to_vec2::<f32>().unwrap();
        assert!((cos[1][0] - f64::from(last).cos() as f32).abs() < 1e-6);
        let near = Positions::new(vec![3], &Device::Cpu).unwrap();
        let (cached, _) = table.at(&near).unwrap();
        assert_eq!(cached.to_vec2::<f32>().unwrap()[0], cos[0]);
    }
}
