//! Reward models: a decoder with a head that scores what was answered.
//!
//! On disk they are classifiers in the layout of Hugging Face, with a key of our own in `config.json`; those that
//! transformers cannot compute bear an architecture of our own there. In memory they are differentiable over packed ragged batches,
//! by the same network as the language model. They promise that exchanging two responses exactly
//! exchanges their odds. How a score is trained, and what is done with it, they do not know.

mod architecture;
mod config;
mod folder;
mod preference;
mod score;

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};
use messages::{Digest, Seed};
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use serde_json::json;

pub use architecture::RewardArchitecture;
use config::HEAD;
pub(crate) use config::from_disk;
pub use config::{Pooling, RewardConfig, RewardKind};
pub use folder::RewardFolder;

use crate::{LanguageModel, ModelConfig, ModelError, Precision, Weights, weights::normal};

/// The likelihood's coefficient before it is trained.
const FIRST_COEFFICIENT: f32 = 0.05;
/// Deviation of a fresh head's scores, of hidden states of unit mean square.
const SCORE_DEVIATION: f64 = 0.02;
/// The same of its embeddings. Nothing would ever move one that starts at zero: the skew form is flat
/// there.
const EMBEDDING_DEVIATION: f64 = 1.0;

/// A decoder with a head that scores. Clones share the weights.
///
/// Where the trunk has an adapter, the trunk itself stays as it is and may be shared with other models:
/// the adapter and the head are all that is trained, and saved.
#[derive(Debug, Clone)]
pub struct RewardModel {
    config: RewardConfig,
    trunk: LanguageModel,
    /// `[outputs, hidden_size]` and, where the likelihood is a feature, its coefficient `[1]`.
    head: Weights,
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

    /// The same model as training runs it: see [`LanguageModel::dropping`].
    #[must_use]
    pub fn dropping(&self, seed: Seed) -> Self {
        Self {
            trunk: self.trunk.dropping(seed),
            ..self.clone()
        }
    }

    /// A fresh head on the decoder of `trunk`, whose tensors it shares, with the trunk's adapter where it has
    /// one. The head's first numbers are small and depend on `seed` alone.
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
        let shape = config.shape(trunk.config());
        // Beside an adapter it is what is trained, whatever numbers the trunk is kept in.
        let dtype = match trunk.adapter() {
            Some(_) => DType::F32,
            None => trunk.dtype(),
        };
        let mut head = BTreeMap::new();
        for (name, dims) in config.head(&shape) {
            let numbers = match name.as_str() {
                HEAD => fresh_head(config.kind.outputs(), shape.hidden_size, seed),
                _ => vec![FIRST_COEFFICIENT],
            };
            let tensor = Tensor::from_vec(numbers, dims, &Device::Cpu)?.to_dtype(dtype)?;
            head.insert(name, tensor.to_device(trunk.device())?);
        }
        let weights = trunk.weights().part(shape.tensors())?;
        let mut own = LanguageModel::new(shape, weights)?;
        if let Some(adapter) = trunk.adapter() {
            own = own.with_adapter(adapter.clone())?;
        }
        Ok(Self {
            config,
            trunk: own,
            head: Weights::of(head),
        })
    }

    /// A model of these weights, those of the head among them.
    fn new(shape: &ModelConfig, config: RewardConfig, all: &Weights) -> Result<Self, ModelError> {
        let head = all.part(config.head(shape))?;
        let trunk = LanguageModel::new(shape.clone(), all.part(shape.tensors())?)?;
        Ok(Self {
            config,
            trunk,
            head,
        })
    }

    /// What it gives and how.
    #[must_use]
    pub fn config(&self) -> RewardConfig {
        self.config
    }

    /// Its trunk, of the trunk's own shape.
    #[must_use]
    pub fn trunk(&self) -> &LanguageModel {
        &self.trunk
    }

    /// All weights under their names: those of the trunk, of its adapter where it has one, of the head.
    #[must_use]
    pub fn weights(&self) -> Weights {
        self.trunk.weights().and(&self.trained())
    }

    /// The tensors that training moves: all or, where there is an adapter, the adapter's and the head's.
    #[must_use]
    pub fn trained(&self) -> Weights {
        self.trunk.trained().and(&self.head)
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

    /// The same model with [`Self::trained`] copied, to be differentiated and moved, and its variables for
    /// an [`crate::Optimizer`]. Every variable gets a gradient from [`Self::score`]; what is not trained is
    /// shared.
    ///
    /// # Errors
    /// When the device cannot hold them.
    pub fn trainable(&self) -> Result<(Self, BTreeMap<String, Var>), ModelError> {
        let (trunk, mut vars) = self.trunk.trainable()?;
        let (head, of_head) = self.head.trainable()?;
        vars.extend(of_head);
        let config = self.config;
        Ok((
            Self {
                config,
                trunk,
                head,
            },
            vars,
        ))
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
        AdamWSettings, Adapter, DType, ModelFolder, Optimizer, Sequence,
        fixtures::{adapted, config_json, folder as policy_folder, shared, tiny_model},
    };

    /// A reward model whose head has opinions.
    pub(crate) fn reward(trunk: &LanguageModel, config: RewardConfig) -> RewardModel {
        let mut fresh = RewardModel::from_trunk(trunk, config, Seed(3)).unwrap();
        fresh.head = fresh.head.scaled(HEAD, 4.0);
        fresh
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
            let model = opened.model(DType::F32, &Device::Cpu, None).unwrap();
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
            let sequences: Vec<Sequence<'_>> = kept.iter().map(|ids| alone(ids)).collect();
            let scores = model.score(&sequences).unwrap().squeeze(1).unwrap();
            let expected: Vec<f32> = serde_json::from_value(reference["scores"].clone()).unwrap();
            close(&scores.to_vec1::<f32>().unwrap(), &expected, 1e-4);
            // Padding that is given as tokens is passed over, as there.
            let padded = numbers("ids");
            let sequences: Vec<Sequence<'_>> = padded.iter().map(|ids| alone(ids)).collect();
            let scores = model.score(&sequences).unwrap().squeeze(1).unwrap();
            close(&scores.to_vec1::<f32>().unwrap(), &expected, 1e-4);
        }
    }

    /// A sequence without a prompt.
    fn alone(ids: &[u32]) -> Sequence<'_> {
        Sequence {
            prompt: &[],
            completion: ids,
        }
    }

    #[test]
    fn padding_at_the_end_is_passed_over_where_transformers_does() {
        let trunk = |padding: Value| {
            let mut shape = tiny_model(8, 1).config().clone();
            shape.raw["pad_token_id"] = padding;
            LanguageModel::new(shape, tiny_model(8, 1).weights().clone()).unwrap()
        };
        let of = |padding: Value, config: RewardConfig, prompt: &[u32], completion: &[u32]| {
            let model = reward(&trunk(padding), config);
            let sequence = Sequence { prompt, completion };
            let scores = model.score(&[sequence]).unwrap();
            scores.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        let plain = RewardConfig::default();
        let end = serde_json::json!(1);
        let whole = of(Value::Null, plain, &[1, 3], &[4, 2, 1]);
        let without = of(Value::Null, plain, &[1, 3], &[4, 2]);
        assert!((whole[0] - without[0]).abs() > 1e-4);
        let padded = |completion: &[u32]| of(end.clone(), plain, &[1, 3], completion);
        close(&padded(&[4, 2, 1]), &without, 1e-6);
        close(&padded(&[4, 2, 1, 1, 1]), &without, 1e-6);
        // Padding within the text is read; back to the prompt it goes where nothing else is left.
        let within = of(Value::Null, plain, &[1, 3], &[1, 2]);
        close(&padded(&[1, 2]), &within, 1e-6);
        let prompt = of(Value::Null, plain, &[], &[1, 3]);
        close(&padded(&[1]), &prompt, 1e-6);
        let all = of(end.clone(), plain, &[1], &[1, 1]);
        close(&all, &of(Value::Null, plain, &[], &[1]), 1e-6);
        // A head that transformers does not know reads the end.
        let own = RewardConfig {
            kind: RewardKind::Pairwise { planes: 1 },
            ..plain
        };
        assert_eq!(
            of(end.clone(), own, &[1, 3], &[4, 2, 1]),
            of(Value::Null, own, &[1, 3], &[4, 2, 1])
        );
        let trunk = trunk(end);
        let blind = |config: RewardConfig| config.passes_over_the_end(trunk.config());
        assert_eq!([plain, own].map(blind), [true, false]);
    }

    #[test]
    fn what_others_cannot_compute_has_names_that_they_refuse() {
        let source = policy_folder();
        let like = ModelFolder::open(source.path(), None).unwrap();
        let saved = |model: &RewardModel, file: &str| {
            let target = tempfile::tempdir().unwrap();
            model.save(target.path(), &like).unwrap();
            let refused = crate::ModelFolder::open(target.path(), None);
            assert!(refused.is_err(), "a reward model is no policy");
            crate::config::read_json(&target.path().join(file)).unwrap()
        };
        for config in configs() {
            let is_plain = config == RewardConfig::default();
            let whole = saved(&reward(&tiny_model(8, 1), config), "config.json");
            let (architecture, kind) = match is_plain {
                true => ("LlamaForSequenceClassification", "llama"),
                false => ("AgonLlamaRewardModel", "agon_llama"),
            };
            assert_eq!(whole["architectures"], serde_json::json!([architecture]));
            assert_eq!(whole["model_type"], kind);
            let adapter = saved(&beside(config, &like).0, "adapter_config.json");
            let kind = if is_plain { "LORA" } else { "AGON_LORA" };
            assert_eq!(adapter["peft_type"], kind, "{config:?}");
            assert_eq!(adapter["task_type"], "SEQ_CLS");
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
            let again = opened.model(DType::F32, &Device::Cpu, None).unwrap();
            assert_eq!(again.digest().unwrap(), model.digest().unwrap());
            assert_eq!(again.parameter_count(), model.parameter_count());
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
        for trunk in [tiny_model(8, 1), adapted(8, 1, &["all-linear"])] {
            let before = trunk.weights().digest().unwrap();
            for config in configs() {
                let (model, vars) = reward(&trunk, config).trainable().unwrap();
                let first = margin(&model);
                step(&model, vars);
                let [first, last] = [first, margin(&model)].map(|m| m.to_scalar::<f32>().unwrap());
                assert!(last > first + 1e-3, "{config:?}: from {first} to {last}");
            }
            assert_eq!(trunk.weights().digest().unwrap(), before);
        }
    }

    /// By how much the first of the sequences is preferred to the second.
    fn margin(model: &RewardModel) -> Tensor {
        let features = model.score(&SEQUENCES).unwrap();
        let margins = model.margins(&features, &[0], &[1]).unwrap();
        margins.sum_all().unwrap()
    }

    /// Five steps toward a larger margin.
    fn step(model: &RewardModel, vars: BTreeMap<String, Var>) {
        let settings = AdamWSettings {
            beta1: 0.9,
            beta2: 0.99,
            epsilon: 1e-8,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
        };
        let mut optimizer = Optimizer::new(vars, settings).unwrap();
        for _ in 0..5 {
            let gradients = crate::ops::backward(&margin(model).neg().unwrap()).unwrap();
            let norm = optimizer.norm(&gradients).unwrap();
            optimizer.step(&gradients, norm, 1e-3).unwrap();
        }
    }

    /// A reward model with an adapter, of the policy in a folder, and that policy's weights.
    fn beside(config: RewardConfig, like: &ModelFolder) -> (RewardModel, Weights) {
        let weights = like.weights(DType::F32, &Device::Cpu).unwrap();
        let trunk = LanguageModel::new(like.config.clone(), weights.clone()).unwrap();
        let shape = crate::fixtures::lora_config(&["all-linear"]);
        let adapter = Adapter::fresh(shape, &like.config, Seed(4), &Device::Cpu).unwrap();
        let trunk = trunk.with_adapter(adapter).unwrap();
        (reward(&trunk, config), weights)
    }

    fn scores(model: &RewardModel) -> Vec<Vec<f32>> {
        model.score(&SEQUENCES).unwrap().to_vec2().unwrap()
    }

    #[test]
    fn an_adapter_and_the_head_are_saved_and_the_trunk_is_shared() {
        let source = policy_folder();
        let like = ModelFolder::open(source.path(), None).unwrap();
        for config in configs() {
            let (fresh, weights) = beside(config, &like);
            let (model, vars) = fresh.trainable().unwrap();
            assert!(
                vars.keys()
                    .all(|name| name.contains("lora_") || !weights.tensors.contains_key(name))
            );
            step(&model, vars);
            assert_ne!(scores(&model), scores(&fresh));
            let target = tempfile::tempdir().unwrap();
            model.save(target.path(), &like).unwrap();
            assert!(!target.path().join("model.safetensors").exists());
            assert_eq!(
                RewardArchitecture::of(target.path()).unwrap(),
                RewardArchitecture::Decoder
            );

            let opened = RewardFolder::open(target.path(), None).unwrap();
            assert_eq!((opened.config, opened.path()), (config, target.path()));
            let open = |at_hand: Option<&Weights>| {
                opened.model(DType::F32, &Device::Cpu, at_hand).unwrap()
            };
            let other = Weights::initialise(&like.config, Seed(8), DType::F32, &Device::Cpu);
            let narrow = weights.to_dtype(DType::BF16).unwrap();
            for (at_hand, shares) in [
                (None, false),
                (Some(&weights), true),
                (Some(&other.unwrap()), false),
                (Some(&narrow), false),
            ] {
                let again = open(at_hand);
                assert_eq!(scores(&again), scores(&model));
                assert_eq!(again.digest().unwrap(), model.digest().unwrap());
                let name = "model.layers.0.mlp.up_proj.weight";
                let same = again.weights().tensors[name].id() == weights.tensors[name].id();
                assert_eq!(same, shares);
            }
            // Saved again from what was loaded, nothing changes.
            open(Some(&weights))
                .save(target.path(), &opened.folder)
                .unwrap();
            let third = RewardFolder::open(target.path(), None).unwrap();
            assert_eq!(
                scores(&third.model(DType::F32, &Device::Cpu, None).unwrap()),
                scores(&model)
            );
        }
    }

    #[test]
    fn an_adapter_of_another_house_is_a_classifier_and_one_of_another_base_is_refused() {
        let source = policy_folder();
        let like = ModelFolder::open(source.path(), None).unwrap();
        let (model, _) = beside(RewardConfig::default(), &like);
        let target = tempfile::tempdir().unwrap();
        model.save(target.path(), &like).unwrap();
        let file = target.path().join("reward_config.json");
        std::fs::write(&file, "{\"kind\": \"bradley-terry\", \"pooling\": \"max\"}").unwrap();
        let refused = RewardFolder::open(target.path(), None)
            .unwrap_err()
            .to_string();
        assert!(
            refused.contains("reward_config.json") && refused.contains("`max`"),
            "{refused}"
        );
        std::fs::remove_file(file).unwrap();
        let opened = RewardFolder::open(target.path(), None).unwrap();
        assert_eq!(opened.config, RewardConfig::default());
        let open = || opened.model(DType::F32, &Device::Cpu, None);
        assert_eq!(scores(&open().unwrap()), scores(&model));
        // It is no policy, and a policy's adapter is no reward model.
        let numbers = (DType::F32, &Device::Cpu);
        let refused = crate::open_policy(target.path(), None, None, numbers).unwrap_err();
        assert!(
            refused.to_string().contains("task_type is SEQ_CLS"),
            "{refused}"
        );
        let policy = tempfile::tempdir().unwrap();
        crate::save_policy(policy.path(), &like, model.trunk()).unwrap();
        for refused in [
            RewardFolder::open(policy.path(), None).unwrap_err(),
            RewardArchitecture::of(policy.path()).unwrap_err(),
        ] {
            let refused = refused.to_string();
            assert!(refused.contains("task_type is CAUSAL_LM"), "{refused}");
        }
        // The base's weights have moved since.
        let moved = Weights::initialise(&like.config, Seed(8), DType::F32, &Device::Cpu).unwrap();
        crate::save_folder(source.path(), &like, &moved).unwrap();
        let refused = open().unwrap_err().to_string();
        assert!(
            refused.contains("not those it was trained beside"),
            "{refused}"
        );
        std::fs::remove_file(source.path().join("config.json")).unwrap();
        let refused = RewardFolder::open(target.path(), None)
            .unwrap_err()
            .to_string();
        assert!(
            refused.contains("the base model") && refused.contains("is not there"),
            "{refused}"
        );
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
            .model(DType::F32, &Device::Cpu, None)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("score.weight of shape [1, 8] is missing"),
            "{error}"
        );
    }
}
