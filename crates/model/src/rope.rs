//! Rotary position embedding (Su et al., RoFormer, arXiv 2104.09864): how a `config.json` scales its frequencies, and
//! the tables of cos and sin.
//!
//! The keys are read as transformers 5.23 reads them: a `rope_scaling` that holds anything takes the place of
//! `rope_parameters`, and what the chosen one leaves out comes from the top level. The four families share this; so do
//! scoring, training and decoding, which look into the same tables.

use std::f64::consts::TAU;

use candle_core::{DType, Device, Tensor};
use serde_json::{Map, Value};

use crate::{ModelConfig, ModelError, keys::is_off};

/// Base of the frequencies where a configuration names none.
const DEFAULT_THETA: f64 = 10_000.0;
/// The types of scaling that can be computed, as `rope_type` names them.
const SUPPORTED: [&str; 5] = ["default", "linear", "dynamic", "yarn", "llama3"];
/// Keys of the scaling that some type reads, or that change nothing.
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
    /// What becomes of these frequencies.
    pub scaling: RopeScaling,
}

/// How rotary frequencies are scaled for sequences longer than those of pretraining.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// Position interpolation (Chen et al., arXiv 2306.15595): every frequency divided by the factor.
    Linear {
        /// At least 1 where it makes sense.
        factor: f64,
    },
    /// Dynamic NTK scaling: a larger base for sequences longer than `max_position_embeddings`, none up to there.
    /// Longer sequences are refused for every model, so that cached keys and scored ones cannot differ: here the
    /// frequencies are always the plain ones.
    Dynamic,
    /// YaRN (Peng et al., arXiv 2309.00071).
    Yarn(Yarn),
    /// Llama 3.1's: long wavelengths are stretched, short ones kept, those between blended.
    Llama3(Llama3),
}

/// Parameters of YaRN.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Yarn {
    /// Divides the interpolated frequencies.
    pub factor: f64,
    /// Positions of pretraining.
    pub original_positions: f64,
    /// Turns within these positions above which a frequency is kept.
    pub beta_fast: f64,
    /// Turns below which it is divided.
    pub beta_slow: f64,
    /// Whether the bounds between are rounded to whole dimensions.
    pub truncate: bool,
    /// Multiplies cos and sin.
    pub attention_factor: f64,
}

/// Parameters of Llama 3.1's scaling.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Llama3 {
    /// Divides the frequencies of long wavelengths.
    pub factor: f64,
    /// Turns within the original positions below which a wavelength is long.
    pub low_freq_factor: f64,
    /// Turns above which it is short.
    pub high_freq_factor: f64,
    /// Positions of pretraining.
    pub original_positions: f64,
}

impl Rope {
    /// Reads the rotary keys of the `config.json` in `raw`, of a model with `max_positions`.
    pub(crate) fn read(raw: &Value, max_positions: usize) -> Result<Self, String> {
        let chosen = ["rope_scaling", "rope_parameters"]
            .into_iter()
            .find(|key| !is_off(&raw[*key]));
        let none = Map::new();
        let keys = match chosen.map(|name| (name, &raw[name])) {
            None => Keys::new("rope_parameters", &none),
            Some((name, Value::Object(keys))) => Keys::new(name, keys),
            Some((name, other)) => return Err(format!("{name} = {other} is not an object")),
        };
        keys.kind()?;
        keys.are_known()?;
        let outside = Keys::new("config.json", raw.as_object().unwrap_or(&none));
        let theta = match keys.set("rope_theta")? {
            Some(theta) => theta,
            None => outside.set("rope_theta")?.unwrap_or(DEFAULT_THETA),
        };
        let positions = Positions {
            max: max_positions as f64,
            outside: &outside,
        };
        let scaling = keys.scaling(positions)?;
        if theta <= 1.0 && matches!(scaling, RopeScaling::Yarn(_)) {
            return Err(format!(
                "rope_theta = {theta} is not above 1, as the bounds of YaRN need it in {}",
                keys.name
            ));
        }
        Ok(Self { theta, scaling })
    }

    /// Radians per position of every pair of dimensions of a head of `head_dim`.
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

    /// The factor on cos and sin.
    fn attention_factor(self) -> f64 {
        match self.scaling {
            RopeScaling::Yarn(yarn) => yarn.attention_factor,
            _ => 1.0,
        }
    }
}

impl Yarn {
    /// The pairs of dimensions between which interpolation sets in (Peng et al., section 3.2).
    fn correction_range(self, dim: f64, theta: f64) -> (f64, f64) {
        let pair =
            |turns: f64| dim * (self.original_positions / (turns * TAU)).ln() / (2.0 * theta.ln());
        let (mut low, mut high) = (pair(self.beta_fast), pair(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, high) = (low.max(0.0), high.min(dim - 1.0));
        let singular = low == high;
        (low, if singular { high + 0.001 } else { high })
    }

    /// The factor on cos and sin where a configuration does not name it: 0.1 ln(factor) + 1 (Peng et al., eq. 22),
    /// or DeepSeek's quotient of two of these.
    fn default_attention_factor(factor: f64, mscales: Option<(f64, f64)>) -> f64 {
        let scale = |mscale: f64| {
            if factor <= 1.0 {
                1.0
            } else {
                0.1 * mscale * factor.ln() + 1.0
            }
        };
        mscales.map_or_else(|| scale(1.0), |(over, under)| scale(over) / scale(under))
    }
}

impl Llama3 {
    fn scaled(self, frequency: f64) -> f64 {
        let turns = self.original_positions * frequency / TAU;
        let (low, high) = (self.low_freq_factor, self.high_freq_factor);
        if turns > high {
            frequency
        } else if turns < low {
            frequency / self.factor
        } else {
            let smooth = (turns - low) / (high - low);
            (1.0 - smooth) * frequency / self.factor + smooth * frequency
        }
    }
}

/// How many positions a model has.
#[derive(Clone, Copy)]
struct Positions<'a> {
    /// `max_position_embeddings`.
    max: f64,
    /// The top level, whose `original_max_position_embeddings` goes before the one inside.
    outside: &'a Keys<'a>,
}

/// The object that says how frequencies are scaled, and its name.
struct Keys<'a> {
    name: &'a str,
    keys: &'a Map<String, Value>,
}

impl<'a> Keys<'a> {
    fn new(name: &'a str, keys: &'a Map<String, Value>) -> Self {
        Self { name, keys }
    }

    /// An error if a key is set that no type of scaling here reads.
    fn are_known(&self) -> Result<(), String> {
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

    /// The type of scaling, one of [`SUPPORTED`].
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

    fn scaling(&self, positions: Positions<'_>) -> Result<RopeScaling, String> {
        Ok(match self.kind()? {
            "default" => RopeScaling::Default,
            "linear" => RopeScaling::Linear {
                factor: self.needed("factor")?,
            },
            "dynamic" => {
                self.needed("factor")?;
                RopeScaling::Dynamic
            }
            "yarn" => RopeScaling::Yarn(self.yarn(positions)?),
            "llama3" => RopeScaling::Llama3(Llama3 {
                factor: self.needed("factor")?,
                low_freq_factor: self.needed("low_freq_factor")?,
                high_freq_factor: self.needed("high_freq_factor")?,
                original_positions: self.original_positions(positions)?,
            }),
            other => return Err(self.unsupported(other)),
        })
    }

    fn yarn(&self, positions: Positions<'_>) -> Result<Yarn, String> {
        let original_positions = self.original_positions(positions)?;
        let factor = match self.keys.get("factor") {
            // As DeepSeek writes it.
            Some(Value::Null) => positions.max / original_positions,
            _ => self.needed("factor")?,
        };
        // What is 0 or null counts as left out.
        let some = |key: &str| Ok::<_, String>(self.number(key)?.filter(|number| *number != 0.0));
        let mscales = some("mscale")?.zip(some("mscale_all_dim")?);
        let given = self.number("attention_factor")?;
        let attention_factor =
            given.unwrap_or_else(|| Yarn::default_attention_factor(factor, mscales));
        Ok(Yarn {
            factor,
            original_positions,
            beta_fast: some("beta_fast")?.unwrap_or(32.0),
            beta_slow: some("beta_slow")?.unwrap_or(1.0),
            truncate: self.truncates()?,
            attention_factor,
        })
    }

    /// As Python takes it: null is false, and only a key that is left out is true by itself.
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

    fn original_positions(&self, positions: Positions<'_>) -> Result<f64, String> {
        let key = "original_max_position_embeddings";
        let own = self.set(key)?;
        Ok(positions.outside.set(key)?.or(own).unwrap_or(positions.max))
    }

    /// The number under this key, above 0.
    fn needed(&self, key: &str) -> Result<f64, String> {
        let number = self.positive(key)?;
        number.ok_or_else(|| format!("{}: {key} is missing", self.name))
    }

    /// As [`Self::positive`]; null, with which transformers cannot compute either, is no number.
    fn set(&self, key: &str) -> Result<Option<f64>, String> {
        match self.keys.get(key) {
            Some(Value::Null) => Err(format!(
                "{}: {key} is null; leave the key out or set it to a number",
                self.name
            )),
            _ => self.positive(key),
        }
    }

    /// As [`Self::number`], above 0.
    fn positive(&self, key: &str) -> Result<Option<f64>, String> {
        match self.number(key)? {
            Some(0.0) => Err(format!("{}: {key} is 0", self.name)),
            number => Ok(number),
        }
    }

    /// The number under this key, from 0 on; none where there is none or null.
    fn number(&self, key: &str) -> Result<Option<f64>, String> {
        let value = self.keys.get(key).filter(|value| !value.is_null());
        let Some(value) = value else { return Ok(None) };
        let number = value.as_f64().filter(|n| n.is_finite() && *n >= 0.0);
        let refused = || format!("{}: {key} = {value} is not a number from 0 on", self.name);
        number.map(Some).ok_or_else(refused)
    }
}

/// The most positions whose rows are kept. Of a model that has more, every pass computes those that it needs.
const KEPT: usize = 1 << 17;

/// Rows of the cached table for a model with this number of positions.
pub(crate) fn kept_rows(max_positions: usize) -> usize {
    if max_positions > KEPT {
        0
    } else {
        max_positions
    }
}

/// cos and sin, both `[positions, head_dim / 2]`.
type Angles = (Tensor, Tensor);

/// cos and sin for every position and frequency.
#[derive(Debug, Clone)]
pub(crate) struct RopeTable {
    frequencies: Vec<f64>,
    factor: f64,
    dtype: DType,
    device: Device,
    max_positions: usize,
    /// Those of every position, where they are not too many.
    kept: Option<Angles>,
}

impl RopeTable {
    pub(crate) fn new(
        config: &ModelConfig,
        dtype: DType,
        device: &Device,
    ) -> Result<Self, ModelError> {
        let mut table = Self {
            frequencies: config.rope.frequencies(config.head_dim),
            factor: config.rope.attention_factor(),
            dtype,
            device: device.clone(),
            max_positions: config.max_positions,
            kept: None,
        };
        let kept = kept_rows(config.max_positions);
        if kept > 0 {
            table.kept = Some(table.computed(0..kept)?);
        }
        Ok(table)
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

    /// The rows of the first `count` positions, or of all there are: cos and sin, `head_dim / 2` numbers a
    /// position.
    pub(crate) fn rows(&self, count: usize) -> candle_core::Result<(Vec<f32>, Vec<f32>)> {
        let count = count.min(self.max_positions);
        let (cos, sin) = match &self.kept {
            Some((cos, sin)) => (cos.narrow(0, 0, count)?, sin.narrow(0, 0, count)?),
            None => self.computed(0..count)?,
        };
        let numbers = |table: Tensor| table.to_dtype(DType::F32)?.flatten_all()?.to_vec1();
        Ok((numbers(cos)?, numbers(sin)?))
    }

    /// The rows of these positions: cos and sin, both `[N, head_dim / 2]`.
    pub(crate) fn at(&self, positions: &Tensor) -> candle_core::Result<Angles> {
        match &self.kept {
            Some((cos, sin)) => Ok((
                cos.index_select(positions, 0)?,
                sin.index_select(positions, 0)?,
            )),
            None => {
                let positions = positions.to_vec1::<u32>()?;
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

    /// A configuration, and `inv_freq` and `attention_scaling` of the rotary embedding that transformers 5.23 makes
    /// of it: `LlamaForCausalLM(LlamaConfig(hidden_size=32, num_attention_heads=2, max_position_embeddings=64, ..))`.
    type Case = (Value, [f64; 8], f64);

    /// Which keys count.
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
            // Of the two objects the old one counts, and alone.
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
            // The base inside counts, and that outside where there is none.
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
            // Up to `max_position_embeddings`, beyond which nothing is read, dynamic scaling changes nothing.
            (
                json!({"rope_scaling": {"rope_type": "dynamic", "type": "linear", "factor": 4.0}}),
                PLAIN,
                1.0,
            ),
        ]
    }

    fn yarns() -> Vec<Case> {
        let mut outside = yarn(&json!({}));
        outside["original_max_position_embeddings"] = json!(32);
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
            (outside, YARN_OF_32, MSCALE),
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
        let mut outside = llama3(&json!({"original_max_position_embeddings": 16}));
        outside["original_max_position_embeddings"] = json!(32);
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
                outside,
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
    fn frequencies_are_those_of_transformers() {
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
    fn what_is_not_computed_is_refused_by_name() {
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

    #[test]
    fn a_table_that_is_not_kept_has_the_same_rows() {
        let raw = |positions: usize| {
            let mut raw = crate::fixtures::config_json(8);
            raw["max_position_embeddings"] = json!(positions);
            raw
        };
        let table = |positions: usize| {
            let path = std::path::Path::new("config.json");
            let config = ModelConfig::from_json(raw(positions), path).unwrap();
            RopeTable::new(&config, DType::F32, &Device::Cpu).unwrap()
        };
        let (kept, computed) = (table(64), table(1 << 24));
        assert!(kept.kept.is_some() && computed.kept.is_none());
        assert_eq!(kept.rows(9).unwrap(), computed.rows(9).unwrap());
        let positions = Tensor::new(&[0u32, 7, 63, 7], &Device::Cpu).unwrap();
        let rows = |table: &RopeTable| {
            let (cos, sin) = table.at(&positions).unwrap();
            [cos, sin].map(|rows| rows.to_vec2::<f32>().unwrap())
        };
        assert_eq!(rows(&kept), rows(&computed));
    }
}
