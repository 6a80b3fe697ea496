//! Reward models: a decoder with a head that scores what was answered.
//!
//! On disk they are classifiers in the layout of Hugging Face, with a few words of our own in
//! `config.json` that others pass over. In memory they are differentiable over packed ragged batches,
//! by the same network as the language model. They promise that exchanging two responses exactly
//! exchanges their odds. How a score is trained, and what is done with it, they do not know.

mod architecture;
mod config;
mod folder;
mod preference;
mod score;

use std::{collections::BTreeMap, path::Path};

use candle_core::{Device, Tensor, Var};
use messages::{Digest, Seed};
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use serde_json::json;

pub use architecture::RewardArchitecture;
use config::{COEFFICIENT, HEAD};
pub use config::{Pooling, RewardConfig, RewardKind};
pub use folder::RewardFolder;

use crate::{
    LanguageModel, ModelConfig, ModelError, ModelFolder, Precision, Weights, folder::save_folder,
    weights::normal,
};

/// The likelihood's coefficient before it is trained.
const FIRST_COEFFICIENT: f32 = 0.05;
/// Deviation of a fresh head's scores, of hidden states of unit mean square.
const SCORE_DEVIATION: f64 = 0.02;
/// The same of its embeddings. Nothing would ever move one that starts at zero: the skew form is flat
/// there.
const EMBEDDING_DEVIATION: f64 = 1.0;

/// A decoder with a head that scores. Clones share the weights.
#[derive(Debug, Clone)]
pub struct RewardModel {
    config: RewardConfig,
    /// It carries all the weights, the head's too.
    trunk: LanguageModel,
    /// `[outputs, hidden_size]`.
    head: Tensor,
    /// `[1]`, where the likelihood is a feature.
    coefficient: Option<Tensor>,
}

impl RewardModel {
    /// The same model, its weights not copied, with products taken in this precision on the CPU.
    #[must_use]
    pub fn with_products_in(&self, precision: Precision) -> Self {
        Self {
            trunk: self.trunk.with_products_in(precision),
            ..self.clone()
        }
    }

    /// A fresh head on the decoder of `trunk`, whose tensors it shares. The head's first numbers are
    /// small and depend on `seed` alone.
    ///
    /// # Errors
    /// When the configuration is not possible, or the device cannot hold the head.
    pub fn from_trunk(
        trunk: &LanguageModel,
        config: RewardConfig,
        seed: Seed,
    ) -> Result<Self, ModelError> {
        config
            .check()
            .map_err(|reason| ModelError::Weights { reason })?;
        let (dtype, device) = (trunk.dtype(), trunk.device());
        let shape = config.shape(trunk.config());
        let mut tensors = BTreeMap::new();
        for (name, dims) in config.tensors(&shape) {
            let fresh = |numbers: Vec<f32>| {
                let tensor = Tensor::from_vec(numbers, dims, &Device::Cpu)?;
                tensor.to_dtype(dtype)?.to_device(device)
            };
            let tensor = match name.as_str() {
                HEAD => fresh(fresh_head(config.kind.outputs(), shape.hidden_size, seed))?,
                COEFFICIENT => fresh(vec![FIRST_COEFFICIENT])?,
                of_the_trunk => trunk.weights().get(of_the_trunk)?,
            };
            tensors.insert(name, tensor);
        }
        Self::new(shape, config, Weights { tensors })
    }

    fn new(trunk: ModelConfig, config: RewardConfig, weights: Weights) -> Result<Self, ModelError> {
        let head = weights.get(HEAD)?;
        let coefficient = config
            .likelihood
            .then(|| weights.get(COEFFICIENT))
            .transpose()?;
        Ok(Self {
            config,
            trunk: LanguageModel::new(trunk, weights)?,
            head,
            coefficient,
        })
    }

    /// What it gives and how.
    #[must_use]
    pub fn config(&self) -> RewardConfig {
        self.config
    }

    /// The shape of its trunk.
    #[must_use]
    pub fn trunk_config(&self) -> &ModelConfig {
        self.trunk.config()
    }

    /// All weights, those of the trunk and of the head.
    #[must_use]
    pub fn weights(&self) -> &Weights {
        self.trunk.weights()
    }

    /// Where the weights lie.
    #[must_use]
    pub fn device(&self) -> &Device {
        self.trunk.device()
    }

    /// How many numbers the weights hold.
    #[must_use]
    pub fn parameter_count(&self) -> usize {
        self.weights().parameter_count()
    }

    /// The digest of the weights and of what [`Self::config`] says: on trunks of one shape, equal digests
    /// give equal scores.
    ///
    /// # Errors
    /// When a tensor cannot be read from its device.
    pub fn digest(&self) -> Result<Digest, ModelError> {
        let mut bytes = self.weights().to_blob()?;
        bytes.extend_from_slice(json!(self.config).to_string().as_bytes());
        Ok(Digest::of(&bytes))
    }

    /// The same model with its weights copied, to be differentiated and trained, and its variables for
    /// an [`crate::Optimizer`]. Every variable gets a gradient from [`Self::score`].
    ///
    /// # Errors
    /// When the device cannot hold them.
    pub fn trainable(&self) -> Result<(Self, BTreeMap<String, Var>), ModelError> {
        let (weights, vars) = self.weights().trainable()?;
        let model = Self::new(self.trunk.config().clone(), self.config, weights)?;
        Ok((model, vars))
    }

    /// Saves the model in the folder `to`, which is made when it is missing, with the tokenizer's files
    /// of `like`. Transformers loads it as a classifier; where a likelihood is a feature it does not know
    /// of it, and it pools the last token only. Files that are there are replaced; others stay.
    ///
    /// # Errors
    /// When a file cannot be read or written, or a tensor cannot be read from its device.
    pub fn save(&self, to: &Path, like: &ModelFolder) -> Result<(), ModelError> {
        let from = ModelFolder {
            path: like.path.clone(),
            config: self.trunk.config().clone(),
            tokenizer: like.tokenizer.clone(),
        };
        save_folder(to, &from, self.weights())
    }
}

/// A head's first numbers, row by row: the score's, then the embedding's.
fn fresh_head(outputs: usize, hidden_size: usize, seed: Seed) -> Vec<f32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed.0);
    let row = |output: usize| {
        let deviation = if output == 0 {
            SCORE_DEVIATION
        } else {
            EMBEDDING_DEVIATION
        };
        std::iter::repeat_n(deviation / (hidden_size as f64).sqrt(), hidden_size)
    };
    (0..outputs)
        .flat_map(row)
        .map(|deviation| (normal(&mut random) * deviation) as f32)
        .collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::Value;

    use super::*;
    use crate::{
        AdamWSettings, DType, Optimizer, Sequence,
        fixtures::{config_json, folder as policy_folder, shared, tiny_model},
    };

    /// A reward model whose head has opinions.
    pub(crate) fn reward(trunk: &LanguageModel, config: RewardConfig) -> RewardModel {
        let fresh = RewardModel::from_trunk(trunk, config, Seed(3)).unwrap();
        let weights = fresh.weights().clone().scaled(HEAD, 4.0);
        RewardModel::new(fresh.trunk.config().clone(), config, weights).unwrap()
    }

    pub(crate) fn close(found: &[f32], expected: &[f32], tolerance: f32) {
        assert_eq!(found.len(), expected.len());
        for (f, e) in found.iter().zip(expected) {
            assert!(
                (f - e).abs() <= tolerance * (1.0 + e.abs()),
                "{f} is not {e}"
            );
        }
    }

    fn configs() -> Vec<RewardConfig> {
        let mut configs = Vec::new();
        for kind in [RewardKind::BradleyTerry, RewardKind::Pairwise { planes: 2 }] {
            for pooling in [Pooling::Last, Pooling::Mean, Pooling::Sum] {
                configs.extend([false, true].map(|likelihood| RewardConfig {
                    kind,
                    pooling,
                    likelihood,
                }));
            }
        }
        configs
    }

    const SEQUENCES: [Sequence<'static>; 2] = [
        Sequence {
            prompt: &[1, 3],
            completion: &[4, 2, 1],
        },
        Sequence {
            prompt: &[1, 5, 6],
            completion: &[7, 1],
        },
    ];

    #[test]
    fn scores_are_those_of_transformers() {
        for name in ["random-llama-reward", "random-qwen2-reward"] {
            let Some(path) = shared(&format!("data/models/{name}")) else {
                return;
            };
            let opened = RewardFolder::open(&path, None).unwrap();
            assert_eq!(opened.config, RewardConfig::default());
            let model = opened.model(DType::F32, &Device::Cpu).unwrap();
            let text = std::fs::read_to_string(path.join("reference.json")).unwrap();
            let reference: Value = serde_json::from_str(&text).unwrap();
            let numbers = |key: &str| -> Vec<Vec<u32>> {
                serde_json::from_value(reference[key].clone()).unwrap()
            };
            let kept: Vec<Vec<u32>> = numbers("ids")
                .iter()
                .zip(numbers("attention_mask"))
                .map(|(ids, mask)| ids[..mask.iter().sum::<u32>() as usize].to_vec())
                .collect();
            let sequences: Vec<Sequence<'_>> = kept
                .iter()
                .map(|ids| Sequence {
                    prompt: &[],
                    completion: ids,
                })
                .collect();
            let scores = model.score(&sequences).unwrap().squeeze(1).unwrap();
            let expected: Vec<f32> = serde_json::from_value(reference["scores"].clone()).unwrap();
            close(&scores.to_vec1::<f32>().unwrap(), &expected, 1e-4);
        }
    }

    #[test]
    fn a_saved_model_is_the_same_model() {
        let source = policy_folder();
        let like = ModelFolder::open(source.path(), None).unwrap();
        for config in configs() {
            let model = reward(&tiny_model(8, 1), config);
            let target = tempfile::tempdir().unwrap();
            model.save(target.path(), &like).unwrap();
            let opened = RewardFolder::open(target.path(), None).unwrap();
            assert_eq!(opened.config, config);
            let again = opened.model(DType::F32, &Device::Cpu).unwrap();
            assert_eq!(again.digest().unwrap(), model.digest().unwrap());
            assert_eq!(again.parameter_count(), model.parameter_count());
            let scores = |model: &RewardModel| {
                let scores = model.score(&SEQUENCES).unwrap();
                scores.to_vec2::<f32>().unwrap()
            };
            assert_eq!(scores(&again), scores(&model));
            // Saved again from what was loaded, nothing changes.
            again.save(target.path(), &opened.folder).unwrap();
            let third = RewardFolder::open(target.path(), None).unwrap();
            assert_eq!(third.folder.config.raw, opened.folder.config.raw);
        }
    }

    #[test]
    fn a_head_follows_from_its_seed_and_the_digest_from_all() {
        let trunk = tiny_model(8, 1);
        let fresh = |config: RewardConfig, seed: u64| {
            let model = RewardModel::from_trunk(&trunk, config, Seed(seed)).unwrap();
            model.digest().unwrap()
        };
        let config = RewardConfig::default();
        assert_eq!(fresh(config, 1), fresh(config, 1));
        assert_ne!(fresh(config, 1), fresh(config, 2));
        let mut digests: Vec<String> = configs()
            .into_iter()
            .map(|config| fresh(config, 1).to_string())
            .collect();
        digests.sort();
        digests.dedup();
        assert_eq!(digests.len(), configs().len());
        let none = RewardConfig {
            kind: RewardKind::Pairwise { planes: 0 },
            ..config
        };
        let refused = RewardModel::from_trunk(&trunk, none, Seed(1)).unwrap_err();
        assert!(
            refused.to_string().contains("at least one plane"),
            "{refused}"
        );
    }

    #[test]
    fn every_variable_is_trained_and_the_trunk_it_came_from_is_not() {
        let settings = AdamWSettings {
            beta1: 0.9,
            beta2: 0.99,
            epsilon: 1e-8,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
        };
        let trunk = tiny_model(8, 1);
        let before = trunk.weights().digest().unwrap();
        for config in configs() {
            let (model, vars) = reward(&trunk, config).trainable().unwrap();
            let mut optimizer = Optimizer::new(vars, settings).unwrap();
            let margin = |model: &RewardModel| {
                let features = model.score(&SEQUENCES).unwrap();
                model
                    .margins(&features, &[0], &[1])
                    .unwrap()
                    .sum_all()
                    .unwrap()
            };
            let first = margin(&model);
            for _ in 0..5 {
                let loss = margin(&model).neg().unwrap();
                let gradients = crate::ops::backward(&loss).unwrap();
                let norm = optimizer.norm(&gradients).unwrap();
                optimizer.step(&gradients, norm, 1e-3).unwrap();
            }
            let [first, last] = [first, margin(&model)].map(|m| m.to_scalar::<f32>().unwrap());
            assert!(last > first + 1e-3, "{config:?}: from {first} to {last}");
        }
        assert_eq!(trunk.weights().digest().unwrap(), before);
    }

    #[test]
    fn a_policy_is_no_reward_model_and_a_reward_model_no_policy() {
        let policy = policy_folder();
        let error = RewardFolder::open(policy.path(), None)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("LlamaForCausalLM") && error.contains("Qwen3ForSequenceClassification"),
            "{error}"
        );
        let mut raw = config_json(8);
        raw["architectures"] = serde_json::json!(["LlamaForSequenceClassification"]);
        std::fs::write(policy.path().join("config.json"), raw.to_string()).unwrap();
        let error = ModelFolder::open(policy.path(), None)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("ForSequenceClassification")
                && error.contains("supported are LlamaForCausalLM"),
            "{error}"
        );
        let headless = RewardFolder::open(policy.path(), None).unwrap();
        let error = headless
            .model(DType::F32, &Device::Cpu)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("score.weight of shape [1, 8] is missing"),
            "{error}"
        );
    }
}
