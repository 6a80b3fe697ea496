//! Reward-model folders in the Hugging Face layout: a classifier, or a PEFT adapter of one.
//!
//! An adapter's folder has the trained tensors and the name of the base. Its reward configuration is in a separate
//! file, since PEFT's configuration cannot contain it.

use std::path::Path;

use candle_core::{DType, Device};
use serde_json::json;

use crate::reward::{
    RewardConfig, RewardModel,
    config::{COEFFICIENT, HEAD as SCORE, from_disk},
};
use crate::{
    config::{ModelConfig, ModelTask, SUPPORTED_REWARD_ARCHITECTURES, read_json},
    error::ModelError,
    folder::{ModelFolder, save_folder, write},
    lora::{AdapterFolder, ClassifierHead, save_adapter},
    shards::{ExpectedTensors, HEAD, Shards},
    transformer::LanguageModel,
    weights::Weights,
};

/// Reward configuration in an adapter's folder.
const CONFIG: &str = "reward_config.json";

/// A reward model on disk: configuration and tokenizer, with weights loaded on request.
#[derive(Debug, Clone)]
pub struct RewardFolder {
    /// Folder of the backbone: the model's own, or its base's.
    pub folder: ModelFolder,
    /// Reward configuration.
    pub config: RewardConfig,
    /// The adapter, if the model is one.
    adapter: Option<AdapterFolder>,
}

impl RewardFolder {
    /// Opens the reward model in the folder `path`: a `…ForSequenceClassification` with one label, a PEFT adapter of
    /// one, or a model saved by [`RewardModel::save`]; `chat_template` overrides its chat template.
    ///
    /// # Errors
    /// When the folder or a file in it is missing or contradicts the others, the model is not a reward model, or an
    /// adapter's base is missing.
    pub fn open(path: &Path, chat_template: Option<&Path>) -> Result<Self, ModelError> {
        Self::open_with_base(path, None, chat_template)
    }

    /// As [`Self::open`], with the folder `base`, if given, as an adapter's base.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_with_base(
        path: &Path,
        base: Option<&Path>,
        chat_template: Option<&Path>,
    ) -> Result<Self, ModelError> {
        let is_adapter = AdapterFolder::is_at(path);
        let adapter = is_adapter
            .then(|| AdapterFolder::open_for(ModelTask::Reward, path))
            .transpose()?;
        let backbone = match (&adapter, base) {
            (Some(_), Some(base)) => base.to_owned(),
            (Some(adapter), None) => adapter.base()?,
            (None, _) => path.to_owned(),
        };
        // The base of an adapter is a language model, or a reward model whose head the adapter replaces.
        let task = match adapter {
            Some(_) if !is_classifier(&backbone)? => ModelTask::Language,
            _ => ModelTask::Reward,
        };
        let mut folder = match &adapter {
            Some(adapter) => adapter.open_base(task, &backbone, chat_template)?,
            None => ModelFolder::open_for(task, &backbone, chat_template)?,
        };
        let config_path = path.join(CONFIG);
        let config = match task {
            _ if adapter.is_some() && config_path.exists() => RewardConfig::load(&config_path)?,
            ModelTask::Reward => {
                RewardConfig::read(&folder.config.raw, &backbone.join("config.json"))?
            }
            ModelTask::Language => RewardConfig::default(),
        };
        folder.config = config.without_language_head(folder.config);
        Ok(Self {
            folder,
            config,
            adapter,
        })
    }

    /// Validates the weights, and those of an adapter's base, by the headers of their files.
    ///
    /// # Errors
    /// As [`Self::model`], as far as the headers show.
    pub fn check_weights(&self) -> Result<(), ModelError> {
        if let Some(adapter) = &self.adapter {
            let shape = &self.folder.config;
            adapter.check_with(&self.config.head(shape), shape)?;
        }
        Shards::open(&self.folder.path)?.check(&self.expected_tensors())
    }

    /// Tensors that the backbone's folder must contain.
    fn expected_tensors(&self) -> ExpectedTensors {
        let shape = &self.folder.config;
        let mut expected = shape.expected_tensors();
        match self.adapter {
            None => expected.tensors.extend(self.config.head(shape)),
            Some(_) => expected.ignorable.extend([SCORE, COEFFICIENT]),
        }
        // The language-model head, unless the log-likelihood feature uses it.
        expected.ignorable.push(HEAD);
        expected
    }

    /// Whether the model is an adapter that was trained on these weights, as its fingerprint of them shows.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn is_adapter_of(&self, weights: &Weights) -> Result<bool, ModelError> {
        match (&self.adapter, self.backbone_in(weights)) {
            (Some(adapter), Some(base)) => adapter.matches_fingerprint(&base),
            _ => Ok(false),
        }
    }

    /// The tensors of the backbone among `weights`; `None` if one is missing or of another shape.
    fn backbone_in(&self, weights: &Weights) -> Option<Weights> {
        weights.subset(self.folder.config.tensors()).ok()
    }

    /// Path of the model's folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.adapter
            .as_ref()
            .map_or(&self.folder.path, |adapter| &adapter.path)
    }

    /// Folder with the chat template in use: an adapter's own, or that of the backbone.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn template_folder(&self) -> Result<&Path, ModelError> {
        let backbone = self.folder.path.as_path();
        match &self.adapter {
            Some(adapter) if adapter.has_own_template(backbone)? => Ok(&adapter.path),
            _ => Ok(backbone),
        }
    }

    /// Loads the model as `dtype` onto `device`. An adapter shares the weights `loaded_base` if it was trained on them;
    /// otherwise its base is loaded too.
    ///
    /// # Errors
    /// When a file is missing or truncated, a tensor is missing or of another shape, or an adapter belongs to another
    /// base.
    pub fn model(
        &self,
        dtype: DType,
        device: &Device,
        loaded_base: Option<&Weights>,
    ) -> Result<RewardModel, ModelError> {
        let (config, shape) = (self.config, &self.folder.config);
        let Some(adapter) = &self.adapter else {
            let all =
                Weights::load_expected(&self.folder.path, &self.expected_tensors(), dtype, device)?;
            return RewardModel::new(shape, config, &all);
        };
        let base = match loaded_base.and_then(|weights| self.backbone_in(weights)) {
            Some(base) if base.all_on(dtype, device) && adapter.matches_fingerprint(&base)? => base,
            _ => {
                Weights::load_expected(&self.folder.path, &self.expected_tensors(), dtype, device)?
            }
        };
        let base = LanguageModel::new(shape.clone(), base)?;
        let (adapter, head) = adapter.adapter_with(config.head(shape), &self.folder, &base)?;
        Ok(RewardModel {
            config,
            backbone: base.with_adapter(adapter)?,
            head,
        })
    }
}

impl RewardModel {
    /// Saves the model, whose backbone is `base` or was trained from it, in the folder `to`, created if missing, with
    /// the tokenizer files of `base`: as a classifier for transformers or, with an adapter, as a PEFT adapter of
    /// `base`. Models that transformers cannot compute, which supports a single score of the last token only, get
    /// architecture names that it refuses. Existing files of the same names are replaced, others kept.
    ///
    /// # Errors
    /// When a file cannot be read or written, or a tensor cannot be read from its device.
    pub fn save(&self, to: &Path, base: &ModelFolder) -> Result<(), ModelError> {
        let Some(adapter) = self.backbone.adapter() else {
            let from = ModelFolder {
                path: base.path.clone(),
                config: self.config.saved(self.backbone.config()),
                tokenizer: base.tokenizer.clone(),
                base_model: base.base_model.clone(),
            };
            return save_folder(to, &from, &self.weights());
        };
        let adapter = adapter.clone().with_base_model(base.base_model.clone());
        let weights = self.backbone.weights();
        let head = ClassifierHead {
            weights: &self.head,
            peft_compatible: self.config.is_transformers(),
        };
        save_adapter(to, base, &adapter, weights, Some(&head))?;
        let config = format!("{:#}\n", json!(self.config));
        write(&to.join(CONFIG), config.as_bytes())
    }
}

impl RewardConfig {
    /// The backbone's configuration with the `config.json` to save.
    fn saved(self, backbone: &ModelConfig) -> ModelConfig {
        let mut saved = backbone.clone();
        saved.raw = self.to_disk(saved.raw);
        saved
    }

    /// Loads the reward configuration of an adapter.
    fn load(path: &Path) -> Result<Self, ModelError> {
        Self::parse(&read_json(path)?, path, "")
    }
}

/// Whether the model in the folder `path` is a classifier.
fn is_classifier(path: &Path) -> Result<bool, ModelError> {
    let raw = from_disk(read_json(&path.join("config.json"))?);
    let named = raw["architectures"][0].as_str();
    Ok(named.is_some_and(|named| SUPPORTED_REWARD_ARCHITECTURES.contains(&named)))
}
