//! Reward models: a decoder with a head that scores responses.
//!
//! On disk they are Hugging Face classifiers with an additional key in `config.json`; those that transformers cannot
//! compute have an architecture name of their own. They are differentiable over ragged batches and share the network of
//! the language model. They promise that swapping two responses exactly inverts their odds. Do not know how scores are
//! trained or used.

mod architecture;
mod config;
mod folder;
mod forward;
mod preference;

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

use crate::{
    config::ModelConfig,
    error::ModelError,
    sampling::Precision,
    transformer::LanguageModel,
    weights::{HeadForm, Weights, normal},
};

/// Initial coefficient of the log-likelihood feature.
const INITIAL_COEFFICIENT: f32 = 0.05;
/// Standard deviation of the initial scores, for hidden states of unit mean square.
const SCORE_DEVIATION: f64 = 0.02;
/// Standard deviation of the initial embeddings. A zero embedding would never be trained, since the skew-symmetric form
/// has a zero gradient there.
const EMBEDDING_DEVIATION: f64 = 1.0;

/// A decoder with a scoring head. Clones share the weights.
///
/// With an adapter the backbone is frozen and may be shared with other models: only the adapter and the head are
/// trained and saved.
#[derive(Debug, Clone)]
pub struct RewardModel {
    config: RewardConfig,
    backbone: LanguageModel,
    /// Head weight `[outputs, hidden_size]` and, with the log-likelihood feature, its coefficient `[1]`.
    head: Weights,
}

impl RewardModel {
    /// The same model, weights not copied, with matmuls in this precision on the CPU.
    #[must_use]
    pub fn with_precision(&self, precision: Precision) -> Self {
        Self {
            backbone: self.backbone.with_precision(precision),
            ..self.clone()
        }
    }

    /// The same model, whose backbone nothing trains but its adapter, with that packed: see [`LanguageModel::packed`].
    ///
    /// # Errors
    /// If a tensor is missing.
    pub fn packed(&self, precision: Precision) -> Result<Self, ModelError> {
        // Without the log-likelihood feature nothing multiplies by the head.
        let head = match self.config.likelihood {
            true => HeadForm::Packed,
            false => HeadForm::Tensor,
        };
        Ok(Self {
            backbone: self.backbone.packed_with(precision, head)?,
            ..self.clone()
        })
    }

    /// The model in training mode: see [`LanguageModel::with_dropout_seed`].
    #[must_use]
    pub fn with_dropout_seed(&self, seed: Seed) -> Self {
        Self {
            backbone: self.backbone.with_dropout_seed(seed),
            ..self.clone()
        }
    }

    /// A newly initialised head on `backbone`, whose tensors and adapter it shares. The initial head is determined by
    /// `seed`.
    ///
    /// # Errors
    /// When the configuration is invalid, or the device cannot hold the head.
    pub fn from_backbone(
        backbone: &LanguageModel,
        config: RewardConfig,
        seed: Seed,
    ) -> Result<Self, ModelError> {
        config
            .check()
            .map_err(|reason| ModelError::Weights { reason })?;
        let shape = config.shape(backbone.config());
        // With an adapter the head is trained in f32, whatever the dtype of the backbone.
        let dtype = match backbone.adapter() {
            Some(_) => DType::F32,
            None => backbone.dtype(),
        };
        let mut head = BTreeMap::new();
        for (name, dims) in config.head(&shape) {
            let values = match name.as_str() {
                HEAD => initial_head(config.kind.outputs(), shape.hidden_size, seed),
                _ => vec![INITIAL_COEFFICIENT],
            };
            let tensor = Tensor::from_vec(values, dims, &Device::Cpu)?.to_dtype(dtype)?;
            head.insert(name, tensor.to_device(backbone.device())?);
        }
        let weights = backbone.weights().subset(shape.tensors())?;
        let mut shared = LanguageModel::new(shape, weights)?;
        if let Some(adapter) = backbone.adapter() {
            shared = shared.with_adapter(adapter.clone())?;
        }
        Ok(Self {
            config,
            backbone: shared,
            head: Weights::of(head),
        })
    }

    /// Builds a model from all weights, including the head's.
    fn new(shape: &ModelConfig, config: RewardConfig, all: &Weights) -> Result<Self, ModelError> {
        let head = all.subset(config.head(shape))?;
        let backbone = LanguageModel::new(shape.clone(), all.subset(shape.tensors())?)?;
        Ok(Self {
            config,
            backbone,
            head,
        })
    }

    /// Reward configuration.
    #[must_use]
    pub fn config(&self) -> RewardConfig {
        self.config
    }

    /// The decoder below the head.
    #[must_use]
    pub fn backbone(&self) -> &LanguageModel {
        &self.backbone
    }

    /// All weights by name: backbone, adapter if any, and head.
    #[must_use]
    pub fn weights(&self) -> Weights {
        self.backbone.weights().union(&self.trained())
    }

    /// The trained tensors: the adapter's and the head's if there is an adapter, otherwise all.
    #[must_use]
    pub fn trained(&self) -> Weights {
        self.backbone.trained().union(&self.head)
    }

    /// Device of the weights.
    #[must_use]
    pub fn device(&self) -> &Device {
        self.backbone.device()
    }

    /// Number of parameters.
    #[must_use]
    pub fn parameter_count(&self) -> usize {
        self.weights().parameter_count()
    }

    /// Digest of the weights and of [`Self::config`]. On backbones of the same configuration, equal digests imply equal
    /// scores.
    ///
    /// # Errors
    /// When a tensor cannot be read from its device.
    pub fn digest(&self) -> Result<Digest, ModelError> {
        let mut bytes = self.weights().to_blob()?;
        bytes.extend_from_slice(json!(self.config).to_string().as_bytes());
        Ok(Digest::of(&bytes))
    }

    /// The model with a copy of [`Self::trained`] as variables, and these variables by name for an
    /// [`crate::Optimizer`]. Every variable gets a gradient from [`Self::rewards`]; frozen weights are shared.
    ///
    /// # Errors
    /// When the device cannot hold them.
    pub fn trainable(&self) -> Result<(Self, BTreeMap<String, Var>), ModelError> {
        let (backbone, mut vars) = self.backbone.trainable()?;
        let (head, head_vars) = self.head.trainable()?;
        vars.extend(head_vars);
        let config = self.config;
        Ok((
            Self {
                config,
                backbone,
                head,
            },
            vars,
        ))
    }

    /// The model of the same weights once they are no longer trained: its forward passes keep nothing for gradients.
    ///
    /// # Errors
    /// When the backbone cannot be put together again.
    pub fn detached(&self) -> Result<Self, ModelError> {
        let trained = self.backbone.trained().detached();
        Ok(Self {
            config: self.config,
            backbone: self.backbone.with_trained(trained)?,
            head: self.head.detached(),
        })
    }
}

/// Initial head weights, row-major: the score's row, then the embedding's.
fn initial_head(outputs: usize, hidden_size: usize, seed: Seed) -> Vec<f32> {
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
        DType,
        fixtures::{adapted, config_json, folder as policy_folder, shared, tiny_model},
        folder::ModelFolder,
        lora::Adapter,
        optimizer::{AdamWSettings, Optimizer},
        ragged::Sequence,
    };

    /// A reward model with a scaled head, for distinct scores.
    pub(crate) fn reward(backbone: &LanguageModel, config: RewardConfig) -> RewardModel {
        let mut model = RewardModel::from_backbone(backbone, config, Seed(3)).unwrap();
        model.head = model.head.scaled(HEAD, 4.0);
        model
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
    fn scores_match_transformers() {
        for name in ["random-llama-reward", "random-qwen2-reward"] {
            let Some(path) = shared(&format!("data/models/{name}")) else {
                return;
            };
            let opened = RewardFolder::open(&path, None).unwrap();
            assert_eq!(opened.config, RewardConfig::default());
            let model = opened.model(DType::F32, &Device::Cpu, None).unwrap();
            let text = std::fs::read_to_string(path.join("reference.json")).unwrap();
            let parity: Value = serde_json::from_str(&text).unwrap();
            let rows = |key: &str| -> Vec<Vec<u32>> {
                serde_json::from_value(parity[key].clone()).unwrap()
            };
            let unpadded: Vec<Vec<u32>> = rows("ids")
                .iter()
                .zip(rows("attention_mask"))
                .map(|(ids, mask)| ids[..mask.iter().sum::<u32>() as usize].to_vec())
                .collect();
            let sequences: Vec<Sequence<'_>> =
                unpadded.iter().map(|ids| without_prompt(ids)).collect();
            let scores = model.rewards(&sequences).unwrap().squeeze(1).unwrap();
            let expected: Vec<f32> = serde_json::from_value(parity["scores"].clone()).unwrap();
            close(&scores.to_vec1::<f32>().unwrap(), &expected, 1e-4);
            // Trailing padding tokens are skipped, as in transformers.
            let padded = rows("ids");
            let sequences: Vec<Sequence<'_>> =
                padded.iter().map(|ids| without_prompt(ids)).collect();
            let scores = model.rewards(&sequences).unwrap().squeeze(1).unwrap();
            close(&scores.to_vec1::<f32>().unwrap(), &expected, 1e-4);
        }
    }

    /// A sequence without a prompt.
    fn without_prompt(ids: &[u32]) -> Sequence<'_> {
        Sequence {
            prompt: &[],
            completion: ids,
        }
    }

    #[test]
    fn trailing_padding_is_skipped_as_in_transformers() {
        let backbone = |padding: Value| {
            let mut shape = tiny_model(8, 1).config().clone();
            shape.raw["pad_token_id"] = padding;
            LanguageModel::new(shape, tiny_model(8, 1).weights().clone()).unwrap()
        };
        let of = |padding: Value, config: RewardConfig, prompt: &[u32], completion: &[u32]| {
            let model = reward(&backbone(padding), config);
            let sequence = Sequence { prompt, completion };
            let scores = model.rewards(&[sequence]).unwrap();
            scores.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        let plain = RewardConfig::default();
        let end = serde_json::json!(1);
        let full = of(Value::Null, plain, &[1, 3], &[4, 2, 1]);
        let without = of(Value::Null, plain, &[1, 3], &[4, 2]);
        assert!((full[0] - without[0]).abs() > 1e-4);
        let padded = |completion: &[u32]| of(end.clone(), plain, &[1, 3], completion);
        close(&padded(&[4, 2, 1]), &without, 1e-6);
        close(&padded(&[4, 2, 1, 1, 1]), &without, 1e-6);
        // Padding inside the text counts; if the response is all padding, the last prompt token is used.
        let within = of(Value::Null, plain, &[1, 3], &[1, 2]);
        close(&padded(&[1, 2]), &within, 1e-6);
        let prompt = of(Value::Null, plain, &[], &[1, 3]);
        close(&padded(&[1]), &prompt, 1e-6);
        let all = of(end.clone(), plain, &[1], &[1, 1]);
        close(&all, &of(Value::Null, plain, &[], &[1]), 1e-6);
        // Heads unknown to transformers do not skip padding.
        let own = RewardConfig {
            kind: RewardKind::Pairwise { planes: 1 },
            ..plain
        };
        assert_eq!(
            of(end.clone(), own, &[1, 3], &[4, 2, 1]),
            of(Value::Null, own, &[1, 3], &[4, 2, 1])
        );
        let backbone = backbone(end);
        let ignores_end = |config: RewardConfig| config.ignores_end_of_text(backbone.config());
        assert_eq!([plain, own].map(ignores_end), [true, false]);
    }

    #[test]
    fn models_incompatible_with_transformers_have_names_that_it_refuses() {
        let source = policy_folder();
        let base = ModelFolder::open(source.path(), None).unwrap();
        let saved = |model: &RewardModel, file: &str| {
            let target = tempfile::tempdir().unwrap();
            model.save(target.path(), &base).unwrap();
            let refused = crate::ModelFolder::open(target.path(), None);
            assert!(refused.is_err(), "a reward model is not a policy");
            crate::config::read_json(&target.path().join(file)).unwrap()
        };
        for config in configs() {
            let is_plain = config == RewardConfig::default();
            let full = saved(&reward(&tiny_model(8, 1), config), "config.json");
            let (architecture, kind) = match is_plain {
                true => ("LlamaForSequenceClassification", "llama"),
                false => ("AgonLlamaRewardModel", "agon_llama"),
            };
            assert_eq!(full["architectures"], serde_json::json!([architecture]));
            assert_eq!(full["model_type"], kind);
            let adapter = saved(&with_adapter_on(config, &base).0, "adapter_config.json");
            let kind = if is_plain { "LORA" } else { "AGON_LORA" };
            assert_eq!(adapter["peft_type"], kind, "{config:?}");
            assert_eq!(adapter["task_type"], "SEQ_CLS");
        }
    }

    #[test]
    fn a_saved_model_round_trips() {
        let source = policy_folder();
        let base = ModelFolder::open(source.path(), None).unwrap();
        for config in configs() {
            let model = reward(&tiny_model(8, 1), config);
            let target = tempfile::tempdir().unwrap();
            model.save(target.path(), &base).unwrap();
            let opened = RewardFolder::open(target.path(), None).unwrap();
            assert_eq!(opened.config, config);
            let again = opened.model(DType::F32, &Device::Cpu, None).unwrap();
            assert_eq!(again.digest().unwrap(), model.digest().unwrap());
            assert_eq!(again.parameter_count(), model.parameter_count());
            assert_eq!(rewards(&again), rewards(&model));
            // Saving the loaded model again changes nothing.
            again.save(target.path(), &opened.folder).unwrap();
            let third = RewardFolder::open(target.path(), None).unwrap();
            assert_eq!(third.folder.config.raw, opened.folder.config.raw);
        }
    }

    #[test]
    fn the_head_is_determined_by_its_seed_and_the_digest_by_everything() {
        let backbone = tiny_model(8, 1);
        let fresh = |config: RewardConfig, seed: u64| {
            let model = RewardModel::from_backbone(&backbone, config, Seed(seed)).unwrap();
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
        let refused = RewardModel::from_backbone(&backbone, none, Seed(1)).unwrap_err();
        assert!(
            refused.to_string().contains("at least one plane"),
            "{refused}"
        );
    }

    #[test]
    fn every_variable_is_trained_and_the_original_backbone_is_not() {
        for backbone in [tiny_model(8, 1), adapted(8, 1, &["all-linear"])] {
            let before = backbone.weights().digest().unwrap();
            for config in configs() {
                let (model, vars) = reward(&backbone, config).trainable().unwrap();
                let first = margin(&model);
                step(&model, vars);
                let [first, last] = [first, margin(&model)].map(|m| m.to_scalar::<f32>().unwrap());
                assert!(last > first + 1e-3, "{config:?}: from {first} to {last}");
            }
            assert_eq!(backbone.weights().digest().unwrap(), before);
        }
    }

    /// Preference margin of the first sequence over the second.
    fn margin(model: &RewardModel) -> Tensor {
        let features = model.rewards(&SEQUENCES).unwrap();
        let margins = model.margins(&features, &[0], &[1]).unwrap();
        margins.sum_all().unwrap()
    }

    /// Takes five optimiser steps that increase the margin.
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
            let gradients = kernels::backward(&margin(model).neg().unwrap()).unwrap();
            let norm = optimizer.norm(&gradients).unwrap();
            optimizer.step(&gradients, norm, 1e-3).unwrap();
        }
    }

    /// A reward model with an adapter on the policy in a folder, and that policy's weights.
    fn with_adapter_on(config: RewardConfig, base: &ModelFolder) -> (RewardModel, Weights) {
        let weights = base.weights(DType::F32, &Device::Cpu).unwrap();
        let backbone = LanguageModel::new(base.config.clone(), weights.clone()).unwrap();
        let shape = crate::fixtures::lora_config(&["all-linear"]);
        let adapter = Adapter::fresh(shape, &base.config, Seed(4), &Device::Cpu).unwrap();
        let backbone = backbone.with_adapter(adapter).unwrap();
        (reward(&backbone, config), weights)
    }

    fn rewards(model: &RewardModel) -> Vec<Vec<f32>> {
        model.rewards(&SEQUENCES).unwrap().to_vec2().unwrap()
    }

    #[test]
    fn an_adapter_and_the_head_are_saved_and_the_backbone_is_shared() {
        let source = policy_folder();
        let base = ModelFolder::open(source.path(), None).unwrap();
        for config in configs() {
            let (fresh, weights) = with_adapter_on(config, &base);
            let (model, vars) = fresh.trainable().unwrap();
            assert!(
                vars.keys()
                    .all(|name| name.contains("lora_") || !weights.tensors.contains_key(name))
            );
            step(&model, vars);
            assert_ne!(rewards(&model), rewards(&fresh));
            let target = tempfile::tempdir().unwrap();
            model.save(target.path(), &base).unwrap();
            assert!(!target.path().join("model.safetensors").exists());
            assert_eq!(
                RewardArchitecture::of(target.path()).unwrap(),
                RewardArchitecture::Decoder
            );

            let opened = RewardFolder::open(target.path(), None).unwrap();
            assert_eq!((opened.config, opened.path()), (config, target.path()));
            let open = |loaded_base: Option<&Weights>| {
                opened.model(DType::F32, &Device::Cpu, loaded_base).unwrap()
            };
            let other = Weights::initialise(&base.config, Seed(8), DType::F32, &Device::Cpu);
            let bf16 = weights.to_dtype(DType::BF16).unwrap();
            for (loaded_base, shares) in [
                (None, false),
                (Some(&weights), true),
                (Some(&other.unwrap()), false),
                (Some(&bf16), false),
            ] {
                let again = open(loaded_base);
                assert_eq!(rewards(&again), rewards(&model));
                assert_eq!(again.digest().unwrap(), model.digest().unwrap());
                let name = "model.layers.0.mlp.up_proj.weight";
                let is_shared = again.weights().tensors[name].id() == weights.tensors[name].id();
                assert_eq!(is_shared, shares);
            }
            // Saving the loaded model again changes nothing.
            open(Some(&weights))
                .save(target.path(), &opened.folder)
                .unwrap();
            let third = RewardFolder::open(target.path(), None).unwrap();
            assert_eq!(
                rewards(&third.model(DType::F32, &Device::Cpu, None).unwrap()),
                rewards(&model)
            );
        }
    }

    #[test]
    fn a_foreign_adapter_is_a_classifier_and_one_of_another_base_is_refused() {
        let source = policy_folder();
        let base = ModelFolder::open(source.path(), None).unwrap();
        let (model, _) = with_adapter_on(RewardConfig::default(), &base);
        let target = tempfile::tempdir().unwrap();
        model.save(target.path(), &base).unwrap();
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
        assert_eq!(rewards(&open().unwrap()), rewards(&model));
        // It is not a policy, and a policy's adapter is not a reward model.
        let opened = crate::open_policy(target.path(), None, None, DType::F32, &Device::Cpu);
        let refused = opened.unwrap_err();
        assert!(
            refused.to_string().contains("task_type is SEQ_CLS"),
            "{refused}"
        );
        let policy = tempfile::tempdir().unwrap();
        crate::save_policy(policy.path(), &base, model.backbone()).unwrap();
        for refused in [
            RewardFolder::open(policy.path(), None).unwrap_err(),
            RewardArchitecture::of(policy.path()).unwrap_err(),
        ] {
            let refused = refused.to_string();
            assert!(refused.contains("task_type is CAUSAL_LM"), "{refused}");
        }
        // The base's weights have changed since.
        let changed = Weights::initialise(&base.config, Seed(8), DType::F32, &Device::Cpu).unwrap();
        crate::save_folder(source.path(), &base, &changed).unwrap();
        let refused = open().unwrap_err().to_string();
        assert!(refused.contains("not those it was trained on"), "{refused}");
        std::fs::remove_file(source.path().join("config.json")).unwrap();
        let refused = RewardFolder::open(target.path(), None)
            .unwrap_err()
            .to_string();
        assert!(
            refused.contains("the base model") && refused.contains("was not found"),
            "{refused}"
        );
    }

    /// As of a policy's adapter: the dialogues that it has learned.
    #[test]
    fn the_chat_template_of_an_adapter_is_its_own() {
        const OWN: &str = "{% for message in messages %}<{{ message.content }}>{% endfor %}";
        let (source, target) = (policy_folder(), tempfile::tempdir().unwrap());
        std::fs::write(source.path().join("chat_template.jinja"), "of the base").unwrap();
        let given = source.path().join("given.jinja");
        std::fs::write(&given, OWN).unwrap();
        let base = ModelFolder::open(source.path(), Some(&given)).unwrap();
        let (model, _) = with_adapter_on(RewardConfig::default(), &base);
        model.save(target.path(), &base).unwrap();
        let check = |case: &str, own: bool| {
            let opened = RewardFolder::open(target.path(), None).unwrap();
            let digest = opened.folder.tokenizer.chat_template_digest();
            let is_own = digest == base.tokenizer.chat_template_digest();
            assert_eq!(is_own, own, "{case}");
            let folder = opened.template_folder().unwrap();
            assert_eq!(folder == target.path(), own, "{case}");
        };
        check("in a file", true);
        std::fs::remove_file(target.path().join("chat_template.jinja")).unwrap();
        let raw = json!({ "chat_template": OWN }).to_string();
        let config = target.path().join("tokenizer_config.json");
        std::fs::write(&config, raw).unwrap();
        check("in tokenizer_config.json", true);
        std::fs::remove_file(config).unwrap();
        check("without one", false);
        // Another vocabulary is not the base's.
        let tokenizer = target.path().join("tokenizer.json");
        let text = std::fs::read_to_string(&tokenizer).unwrap();
        let mut other: Value = serde_json::from_str(&text).unwrap();
        let vocabulary = other["model"]["vocab"].as_object_mut().unwrap();
        let (name, id) = vocabulary.iter().next().unwrap();
        let (name, id) = (name.clone(), id.clone());
        vocabulary.remove(&name);
        vocabulary.insert(format!("{name}-"), id);
        std::fs::write(tokenizer, other.to_string()).unwrap();
        let refused = RewardFolder::open(target.path(), None).unwrap_err();
        let expected = "its tokens are not those of the base's";
        assert!(refused.to_string().contains(expected), "{refused}");
    }

    #[test]
    fn policies_and_reward_models_are_not_interchangeable() {
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
        let without_head = RewardFolder::open(policy.path(), None).unwrap();
        let error = without_head
            .model(DType::F32, &Device::Cpu, None)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("score.weight of shape [1, 8] is missing"),
            "{error}"
        );
    }
}
