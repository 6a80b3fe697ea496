//! What a reward model gives and how: kept in its `config.json` under a key of our own, beside the keys
//! by which transformers knows a classifier; of an adapter in a file of its own.
//!
//! Only what transformers computes to the same number bears the name of its architecture and model type. Every other
//! reward model has names of our own on disk, which transformers, PEFT and serving programs refuse.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::{ModelConfig, ModelError, config::Task};

/// The key in `config.json`.
const KEY: &str = "agon_reward";
/// The name of the head's weight, `[outputs, hidden_size]`, as transformers has it.
pub(crate) const HEAD: &str = "score.weight";
/// What stands around a family's name where the architecture is ours: `AgonLlamaRewardModel`.
const OWN_ARCHITECTURE: (&str, &str) = ("Agon", "RewardModel");
/// What transformers writes behind a family's name.
const CLASSIFIER: &str = "ForSequenceClassification";
/// What stands before a family's name where the model type is ours: `agon_llama`.
const OWN_MODEL_TYPE: &str = "agon_";
/// Keys by which transformers knows how many outputs a head has.
const LABELS: [&str; 3] = ["num_labels", "id2label", "label2id"];
/// The name of the likelihood's coefficient, `[1]`.
pub(crate) const COEFFICIENT: &str = "likelihood.coefficient";

/// What a reward model gives and how. The default is what every classifier of transformers does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RewardConfig {
    /// What its outputs are.
    pub kind: RewardKind,
    /// How the response's hidden states become one row.
    pub pooling: Pooling,
    /// Whether the trunk's own mean log-likelihood of the response adds to the score, by a coefficient
    /// that is trained.
    pub likelihood: bool,
}

/// What the outputs of a reward model are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum RewardKind {
    /// A score r; p(a ≻ b) = σ(r_a − r_b) (Bradley and Terry 1952).
    #[default]
    BradleyTerry,
    /// A score and an embedding that meets another's in a skew-symmetric form, so that preferences may
    /// go in circles (General Preference Model, Zhang et al. 2410.02197).
    Pairwise {
        /// Planes of the embedding, two numbers each; at least one.
        planes: usize,
    },
}

/// How the hidden states of a response's tokens, end-of-text included, become one row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pooling {
    /// The last token's. Where transformers computes the model too, its rule holds: tokens at the end that are the
    /// `pad_token_id` of `config.json` are passed over, end-of-text among them where it is that.
    #[default]
    Last,
    /// Their mean.
    Mean,
    /// An eighth of their sum.
    Sum,
}

impl RewardKind {
    /// How many numbers a response gets: one, and two for every plane.
    #[must_use]
    pub fn outputs(self) -> usize {
        match self {
            Self::BradleyTerry => 1,
            Self::Pairwise { planes } => 1 + 2 * planes,
        }
    }
}

impl RewardConfig {
    /// What `raw` says, the `config.json` at `path`.
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

    /// Whether transformers, which knows no more than a score of the last token, computes such a model's score.
    #[must_use]
    pub fn is_transformers(self) -> bool {
        self == Self::default()
    }

    /// The token that is passed over at the end of a sequence on this trunk, where there is one.
    pub(crate) fn padding(self, trunk: &ModelConfig) -> Option<u32> {
        let id = trunk.raw["pad_token_id"].as_u64();
        id.and_then(|id| u32::try_from(id).ok())
            .filter(|_| self.is_transformers())
    }

    /// Whether such a model on this trunk does not see the end of a text, for a token that ends one is also the padding
    /// that is passed over.
    #[must_use]
    pub fn passes_over_the_end(self, trunk: &ModelConfig) -> bool {
        let padding = self.padding(trunk);
        padding.is_some_and(|padding| trunk.stops.contains(padding))
    }

    /// The `config.json` to save of a model with the configuration `raw`: with names of our own where transformers
    /// would compute something else.
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
        // Without them transformers takes it for two labels: the head fits no class of it that is called by name.
        if let Some(keys) = raw.as_object_mut() {
            keys.retain(|key, _| !LABELS.contains(&key.as_str()));
        }
        raw
    }

    /// What `own` says, in the file at `path`, where `place` leads to it.
    pub(super) fn parse(own: &Value, path: &Path, place: &str) -> Result<Self, ModelError> {
        let config = Self::deserialize(own).map_err(|error| format!("{place}{error}"));
        let checked = config.and_then(|config| config.check().map(|()| config));
        checked.map_err(|reason| ModelError::Malformed {
            path: path.to_owned(),
            reason,
        })
    }

    /// Whether such a model can be.
    pub(crate) fn check(self) -> Result<(), String> {
        match self.kind {
            RewardKind::Pairwise { planes: 0 } => {
                Err("a pairwise model needs at least one plane".into())
            }
            _ => Ok(()),
        }
    }

    /// The shape of a reward model on the decoder of `trunk`.
    pub(crate) fn shape(self, trunk: &ModelConfig) -> ModelConfig {
        let mut shape = self.headless(trunk.clone());
        let names: Map<String, Value> = (0..self.kind.outputs())
            .map(|output| (output.to_string(), format!("LABEL_{output}").into()))
            .collect();
        let places: Map<String, Value> = (0..self.kind.outputs())
            .map(|output| (format!("LABEL_{output}"), output.into()))
            .collect();
        shape.raw["architectures"] = json!([shape.architecture.name_for(Task::Reward)]);
        shape.raw["num_labels"] = self.kind.outputs().into();
        shape.raw["id2label"] = names.into();
        shape.raw["label2id"] = places.into();
        shape.raw[KEY] = json!(self);
        shape
    }

    /// A decoder that nobody asks for a next token has no language head; where one must stand, it is
    /// the embedding.
    pub(crate) fn headless(self, mut trunk: ModelConfig) -> ModelConfig {
        trunk.tied_head |= !self.likelihood;
        trunk
    }

    /// The tensors beside those of its trunk: their names and shapes.
    pub(crate) fn head(self, trunk: &ModelConfig) -> Vec<(String, Vec<usize>)> {
        let score = vec![self.kind.outputs(), trunk.hidden_size];
        let coefficient = self.likelihood.then(|| (COEFFICIENT.to_owned(), vec![1]));
        [(HEAD.to_owned(), score)]
            .into_iter()
            .chain(coefficient)
            .collect()
    }
}

/// The `config.json` of a reward model with the names of transformers for what it is made of, where it bears our own.
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

/// How many labels a classifier says it has, if it does.
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
    fn what_is_written_is_read() {
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
    fn a_classifier_of_another_house_scores_by_its_last_token() {
        for labels in [
            json!({"id2label": {"0": "LABEL_0"}}),
            json!({"num_labels": 1}),
            json!({}),
        ] {
            assert_eq!(read(&labels), Ok(RewardConfig::default()));
        }
    }

    #[test]
    fn what_cannot_be_is_refused_with_the_reason() {
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
    fn the_language_head_is_kept_only_where_it_is_asked() {
        let mut trunk = config(8);
        trunk.tied_head = false;
        let names = |likelihood: bool| {
            let reward = RewardConfig {
                likelihood,
                ..RewardConfig::default()
            };
            let shape = reward.shape(&trunk);
            let tensors = shape.tensors().into_iter().chain(reward.head(&shape));
            let names: Vec<String> = tensors.map(|(name, _)| name).collect();
            ["lm_head.weight", HEAD, COEFFICIENT].map(|name| names.iter().any(|n| n == name))
        };
        assert_eq!(names(false), [false, true, false]);
        assert_eq!(names(true), [true, true, true]);
    }
}
