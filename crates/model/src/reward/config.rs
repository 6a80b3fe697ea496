//! Reward configuration: stored in `config.json` under the key `agon_reward`, next to transformers' classifier keys, or
//! in a separate file for an adapter.
//!
//! Only models for which transformers computes the same score have its architecture and model type on disk. All others
//! have names that transformers, PEFT and inference servers refuse.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::{
    config::{ModelConfig, ModelTask},
    error::ModelError,
};

/// Key of the reward configuration in `config.json`.
const KEY: &str = "agon_reward";
/// transformers' name of the head weight, `[outputs, hidden_size]`.
pub(crate) const HEAD: &str = "score.weight";
/// Prefix and suffix of Agon's architecture names: `AgonLlamaRewardModel`.
const OWN_ARCHITECTURE: (&str, &str) = ("Agon", "RewardModel");
/// Suffix of transformers' classifier architectures.
const CLASSIFIER: &str = "ForSequenceClassification";
/// Prefix of Agon's model types: `agon_llama`.
const OWN_MODEL_TYPE: &str = "agon_";
/// Keys that determine the number of outputs in transformers.
const LABELS: [&str; 3] = ["num_labels", "id2label", "label2id"];
/// Name of the coefficient of the log-likelihood feature, `[1]`.
pub(crate) const COEFFICIENT: &str = "likelihood.coefficient";

/// Configuration of a reward model. The default is that of a classifier in transformers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RewardConfig {
    /// Kind of outputs.
    pub kind: RewardKind,
    /// Pooling over the response's tokens.
    pub pooling: Pooling,
    /// Whether the backbone's mean log-likelihood of the response, times a trained coefficient, is added to the score.
    pub likelihood: bool,
}

/// Kind of outputs of a reward model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum RewardKind {
    /// A score r; p(a ≻ b) = σ(r_a − r_b) (Bradley and Terry 1952).
    #[default]
    BradleyTerry,
    /// A score and an embedding. Embeddings are compared by a skew-symmetric form, which permits intransitive
    /// preferences (General Preference Model, Zhang et al. 2410.02197).
    Pairwise {
        /// Number of planes of the embedding, two dimensions each; at least one.
        planes: usize,
    },
}

/// Pooling over the tokens of a response, end-of-text included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pooling {
    /// The last token. For models that transformers can compute, trailing tokens equal to `pad_token_id` of
    /// `config.json` are skipped, as there, including end-of-text if it is the same token.
    #[default]
    Last,
    /// The mean over tokens.
    Mean,
    /// The sum over tokens, divided by 8.
    Sum,
}

impl RewardKind {
    /// Number of outputs per response: 1, plus 2 per plane.
    #[must_use]
    pub fn outputs(self) -> usize {
        match self {
            Self::BradleyTerry => 1,
            Self::Pairwise { planes } => 1 + 2 * planes,
        }
    }
}

impl RewardConfig {
    /// Parses the configuration from `raw`, the `config.json` at `path`.
    pub(crate) fn read(raw: &Value, path: &Path) -> Result<Self, ModelError> {
        let config = match raw.get(KEY) {
            Some(own) => Self::parse(own, path, &format!("{KEY}: "))?,
            None => Self::default(),
        };
        let (outputs, labels) = (config.kind.outputs(), labels(raw));
        match labels.filter(|&labels| labels != outputs) {
            None => Ok(config),
            Some(labels) => Err(ModelError::Malformed {
                path: path.to_owned(),
                reason: format!("it has {labels} labels where a reward model has {outputs}"),
            }),
        }
    }

    /// Whether transformers, which supports a single score of the last token only, computes the same score.
    #[must_use]
    pub fn is_transformers(self) -> bool {
        self == Self::default()
    }

    /// Padding token that is skipped at the end of a sequence, if any.
    pub(crate) fn padding(self, backbone: &ModelConfig) -> Option<u32> {
        let id = backbone.raw["pad_token_id"].as_u64();
        id.and_then(|id| u32::try_from(id).ok())
            .filter(|_| self.is_transformers())
    }

    /// Whether the score ignores the end-of-text token, because a stop token is also the skipped padding token.
    #[must_use]
    pub fn ignores_end_of_text(self, backbone: &ModelConfig) -> bool {
        let padding = self.padding(backbone);
        padding.is_some_and(|padding| backbone.stops.contains(padding))
    }

    /// `config.json` to save for the configuration `raw`: with Agon's names where transformers would compute a
    /// different score.
    pub(crate) fn to_disk(self, mut raw: Value) -> Value {
        if self.is_transformers() {
            return raw;
        }
        let family = raw["architectures"][0].as_str().unwrap_or_default();
        let family = family.strip_suffix(CLASSIFIER).unwrap_or(family);
        let (before, after) = OWN_ARCHITECTURE;
        let kind = raw["model_type"].as_str();
        let kind = kind.map_or_else(|| family.to_ascii_lowercase(), str::to_owned);
        raw["architectures"] = json!([format!("{before}{family}{after}")]);
        raw["model_type"] = format!("{OWN_MODEL_TYPE}{kind}").into();
        // Without these keys transformers assumes two labels, so that loading the head by an explicit class fails.
        if let Some(keys) = raw.as_object_mut() {
            keys.retain(|key, _| !LABELS.contains(&key.as_str()));
        }
        raw
    }

    /// Parses a reward configuration; `path` and `prefix` identify it in errors.
    pub(super) fn parse(own: &Value, path: &Path, prefix: &str) -> Result<Self, ModelError> {
        let config = Self::deserialize(own).map_err(|error| format!("{prefix}{error}"));
        let checked = config.and_then(|config| config.check().map(|()| config));
        checked.map_err(|reason| ModelError::Malformed {
            path: path.to_owned(),
            reason,
        })
    }

    /// Validates the configuration.
    pub(crate) fn check(self) -> Result<(), String> {
        match self.kind {
            RewardKind::Pairwise { planes: 0 } => {
                Err("a pairwise model needs at least one plane".into())
            }
            _ => Ok(()),
        }
    }

    /// Model configuration of a reward model on `backbone`.
    pub(crate) fn shape(self, backbone: &ModelConfig) -> ModelConfig {
        let mut shape = self.without_language_head(backbone.clone());
        let names: Map<String, Value> = (0..self.kind.outputs())
            .map(|output| (output.to_string(), format!("LABEL_{output}").into()))
            .collect();
        let indexes: Map<String, Value> = (0..self.kind.outputs())
            .map(|output| (format!("LABEL_{output}"), output.into()))
            .collect();
        shape.raw["architectures"] = json!([shape.architecture.name_for(ModelTask::Reward)]);
        shape.raw["num_labels"] = self.kind.outputs().into();
        shape.raw["id2label"] = names.into();
        shape.raw["label2id"] = indexes.into();
        shape.raw[KEY] = json!(self);
        shape
    }

    /// The backbone's configuration without a separate language-model head, unless the log-likelihood feature uses it.
    pub(crate) fn without_language_head(self, mut backbone: ModelConfig) -> ModelConfig {
        backbone.tied_head |= !self.likelihood;
        backbone
    }

    /// Names and shapes of the head's tensors.
    pub(crate) fn head(self, backbone: &ModelConfig) -> Vec<(String, Vec<usize>)> {
        let score = vec![self.kind.outputs(), backbone.hidden_size];
        let coefficient = self.likelihood.then(|| (COEFFICIENT.to_owned(), vec![1]));
        [(HEAD.to_owned(), score)]
            .into_iter()
            .chain(coefficient)
            .collect()
    }
}

/// Restores transformers' architecture and model type in a `config.json` with Agon's names.
pub(crate) fn from_disk(mut raw: Value) -> Value {
    let (before, after) = OWN_ARCHITECTURE;
    let named = raw["architectures"][0].as_str();
    let family = named.and_then(|name| name.strip_prefix(before)?.strip_suffix(after));
    let Some(family) = family.map(str::to_owned) else {
        return raw;
    };
    raw["architectures"] = json!([format!("{family}{CLASSIFIER}")]);
    let kind = raw["model_type"].as_str();
    if let Some(kind) = kind.and_then(|kind| kind.strip_prefix(OWN_MODEL_TYPE)) {
        raw["model_type"] = kind.to_owned().into();
    }
    raw
}

/// Number of labels that a classifier declares, if any.
fn labels(raw: &Value) -> Option<usize> {
    let named = raw["id2label"].as_object().map(Map::len);
    let counted = || usize::try_from(raw["num_labels"].as_u64()?).ok();
    named.or_else(counted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::config;

    fn read(raw: &Value) -> Result<RewardConfig, String> {
        RewardConfig::read(raw, Path::new("config.json")).map_err(|error| error.to_string())
    }

    #[test]
    fn configurations_round_trip() {
        let kinds = [
            RewardKind::BradleyTerry,
            RewardKind::Pairwise { planes: 1 },
            RewardKind::Pairwise { planes: 3 },
        ];
        for (kind, outputs) in kinds.into_iter().zip([1, 3, 7]) {
            for pooling in [Pooling::Last, Pooling::Mean, Pooling::Sum] {
                for likelihood in [false, true] {
                    let reward = RewardConfig {
                        kind,
                        pooling,
                        likelihood,
                    };
                    let raw = reward.shape(&config(8)).raw;
                    assert_eq!(read(&raw), Ok(reward));
                    assert_eq!(
                        raw["architectures"],
                        json!(["LlamaForSequenceClassification"])
                    );
                    assert_eq!(raw["num_labels"], outputs);
                    assert_eq!(raw["id2label"].as_object().unwrap().len(), outputs);
                    assert_eq!(raw["a_key_of_its_own"], json!([1, 2]));
                    let saved = reward.to_disk(raw.clone());
                    let (architecture, model_type) = match reward == RewardConfig::default() {
                        true => ("LlamaForSequenceClassification", "llama"),
                        false => ("AgonLlamaRewardModel", "agon_llama"),
                    };
                    assert_eq!(saved["architectures"], json!([architecture]));
                    assert_eq!(saved["model_type"], model_type);
                    let again = from_disk(saved);
                    assert_eq!(read(&again), Ok(reward));
                    let named = |key: &&str| again.get(key).is_some();
                    assert_eq!(LABELS.iter().any(named), reward == RewardConfig::default());
                    for key in ["architectures", "model_type", "agon_reward"] {
                        assert_eq!(again[key], raw[key]);
                    }
                }
            }
        }
    }

    #[test]
    fn a_foreign_classifier_gets_the_default_configuration() {
        for labels in [
            json!({"id2label": {"0": "LABEL_0"}}),
            json!({"num_labels": 1}),
            json!({}),
        ] {
            assert_eq!(read(&labels), Ok(RewardConfig::default()));
        }
    }

    #[test]
    fn invalid_configurations_are_refused() {
        let own = |value: Value| json!({ "agon_reward": value });
        let cases = [
            (
                json!({"num_labels": 3}),
                "it has 3 labels where a reward model has 1",
            ),
            (
                json!({"id2label": {"0": "a", "1": "b"}, "num_labels": 1}),
                "it has 2 labels where a reward model has 1",
            ),
            (
                own(
                    json!({"kind": {"pairwise": {"planes": 0}}, "pooling": "last", "likelihood": false}),
                ),
                "at least one plane",
            ),
            (
                own(json!({"kind": "bradley-terry", "pooling": "max", "likelihood": false})),
                "agon_reward: unknown variant `max`",
            ),
            (
                own(
                    json!({"kind": "bradley-terry", "pooling": "sum", "likelihood": false, "bias": 1}),
                ),
                "agon_reward: unknown field `bias`",
            ),
            (
                own(
                    json!({"kind": {"pairwise": {"planes": 1, "plane": 2}}, "pooling": "sum", "likelihood": false}),
                ),
                "agon_reward: unknown field `plane`",
            ),
        ];
        for (raw, expected) in cases {
            let refused = read(&raw).unwrap_err();
            assert!(refused.contains(expected), "{refused:?} for {raw}");
        }
    }

    #[test]
    fn the_language_head_is_kept_only_for_the_likelihood() {
        let mut backbone = config(8);
        backbone.tied_head = false;
        let names = |likelihood: bool| {
            let reward = RewardConfig {
                likelihood,
                ..RewardConfig::default()
            };
            let shape = reward.shape(&backbone);
            let tensors = shape.tensors().into_iter().chain(reward.head(&shape));
            let names: Vec<String> = tensors.map(|(name, _)| name).collect();
            ["lm_head.weight", HEAD, COEFFICIENT].map(|name| names.iter().any(|n| n == name))
        };
        assert_eq!(names(false), [false, true, false]);
        assert_eq!(names(true), [true, true, true]);
    }
}
