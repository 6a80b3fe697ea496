//! A reward model as a folder, in the layout of Hugging Face: a classifier, or PEFT's adapter of one.
//!
//! An adapter's folder holds what was trained and names its base. What the model gives and how stands in
//! a file of its own there, since PEFT has no place for it.

use std::path::Path;

use candle_core::{DType, Device};
use serde_json::json;

use super::{
    RewardConfig, RewardModel,
    config::{COEFFICIENT, HEAD as SCORE, from_disk},
};
use crate::{
    AdapterFolder, LanguageModel, ModelConfig, ModelError, ModelFolder,
    SUPPORTED_REWARD_ARCHITECTURES, Weights,
    config::{Task, read_json},
    folder::{save_folder, write},
    lora::{ClassifierHead, save_adapter},
    shards::{HEAD, Shards, Wanted},
};

/// Beside an adapter: what the model gives and how.
const CONFIG: &str = "reward_config.json";

/// A reward model on disk: all of it but the weights.
#[derive(Debug, Clone)]
pub struct RewardFolder {
    /// Where its trunk lies, the shape of that and its tokens: the model's own folder, or its base's.
    pub folder: ModelFolder,
    /// What it gives and how.
    pub config: RewardConfig,
    /// What was trained, where it is not all.
    adapter: Option<AdapterFolder>,
}

impl RewardFolder {
    /// Opens the reward model in the folder `path`: a `…ForSequenceClassification` with one label, PEFT's
    /// adapter of one, or what [`RewardModel::save`] wrote; with another chat template than its own when
    /// `chat_template` names a file.
    ///
    /// # Errors
    /// When the folder or a file in it is missing, does not fit the others, or is no reward model; or an
    /// adapter's base is not where it says.
    pub fn open(path: &Path, chat_template: Option<&Path>) -> Result<Self, ModelError> {
        Self::open_on(path, None, chat_template)
    }

    /// As [`Self::open`]; an adapter's base is in the folder `base` where that is given.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_on(
        path: &Path,
        base: Option<&Path>,
        chat_template: Option<&Path>,
    ) -> Result<Self, ModelError> {
        let is_adapter = AdapterFolder::is_at(path);
        let adapter = is_adapter
            .then(|| AdapterFolder::open_for(Task::Reward, path))
            .transpose()?;
        let place = match (&adapter, base) {
            (Some(_), Some(base)) => base.to_owned(),
            (Some(adapter), None) => adapter.base()?,
            (None, _) => path.to_owned(),
        };
        // An adapter's base is a language model, or a reward model whose head the adapter replaces.
        let task = match adapter {
            Some(_) if !is_classifier(&place)? => Task::Language,
            _ => Task::Reward,
        };
        let mut folder = ModelFolder::open_for(task, &place, chat_template)?;
        let own = path.join(CONFIG);
        let config = match task {
            _ if adapter.is_some() && own.exists() => RewardConfig::read_beside(&own)?,
            Task::Reward => RewardConfig::read(&folder.config.raw, &place.join("config.json"))?,
            Task::Language => RewardConfig::default(),
        };
        folder.config = config.headless(folder.config);
        Ok(Self {
            folder,
            config,
            adapter,
        })
    }

    /// Checks the weights by the headers of their files, and of an adapter those of its base.
    ///
    /// # Errors
    /// As [`Self::model`].
    pub fn check_weights(&self) -> Result<(), ModelError> {
        if let Some(adapter) = &self.adapter {
            let shape = &self.folder.config;
            adapter.check_with(&self.config.head(shape), shape)?;
        }
        Shards::open(&self.folder.path)?.check(&self.wanted())
    }

    /// What the folder of the trunk has to hold.
    fn wanted(&self) -> Wanted {
        let shape = &self.folder.config;
        let mut wanted = shape.wanted();
        match self.adapter {
            None => wanted.tensors.extend(self.config.head(shape)),
            Some(_) => wanted.spare.extend([SCORE, COEFFICIENT]),
        }
        // A head for the next token that no score is made of.
        wanted.spare.push(HEAD);
        wanted
    }

    /// Where the model lies.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.adapter
            .as_ref()
            .map_or(&self.folder.path, |adapter| &adapter.path)
    }

    /// Reads the model as `dtype` onto `device`. An adapter that was trained beside the weights `at_hand`
    /// shares them; else its base is read too.
    ///
    /// # Errors
    /// When a file is missing or torn, a tensor is missing or of another shape, or an adapter belongs to
    /// another base.
    pub fn model(
        &self,
        dtype: DType,
        device: &Device,
        at_hand: Option<&Weights>,
    ) -> Result<RewardModel, ModelError> {
        let (config, shape) = (self.config, &self.folder.config);
        let Some(adapter) = &self.adapter else {
            let all = Weights::load_wanted(&self.folder.path, &self.wanted(), dtype, device)?;
            return RewardModel::new(shape, config, &all);
        };
        let base = match at_hand.and_then(|weights| weights.part(shape.tensors()).ok()) {
            Some(base) if base.are(dtype, device) && adapter.was_trained_beside(&base)? => base,
            _ => Weights::load_wanted(&self.folder.path, &self.wanted(), dtype, device)?,
        };
        let base = LanguageModel::new(shape.clone(), base)?;
        let (adapter, head) = adapter.adapter_and(config.head(shape), &base)?;
        Ok(RewardModel {
            config,
            trunk: base.with_adapter(adapter)?,
            head,
        })
    }
}

impl RewardModel {
    /// Saves the model, whose trunk is that of `like` or was trained from it, in the folder `to`, which is made
    /// when it is missing, with the tokenizer's files of `like`: as a classifier that transformers loads or,
    /// where the trunk has an adapter, as PEFT's adapter of one beside `like`. What they cannot compute, since they
    /// know no more than one score of the last token, has names of our own there that they refuse. Files that are there
    /// are replaced; others stay.
    ///
    /// # Errors
    /// When a file cannot be read or written, or a tensor cannot be read from its device.
    pub fn save(&self, to: &Path, like: &ModelFolder) -> Result<(), ModelError> {
        let Some(adapter) = self.trunk.adapter() else {
            let from = ModelFolder {
                path: like.path.clone(),
                config: self.config.saved(self.trunk.config()),
                tokenizer: like.tokenizer.clone(),
                base_model: like.base_model.clone(),
            };
            return save_folder(to, &from, &self.weights());
        };
        let adapter = adapter.clone().with_base_model(like.base_model.clone());
        let trained = (self.trunk.weights(), &adapter);
        let head = ClassifierHead {
            weights: &self.head,
            is_pefts: self.config.is_transformers(),
        };
        save_adapter(to, like, trained, Some(&head))?;
        let config = format!("{:#}\n", json!(self.config));
        write(&to.join(CONFIG), config.as_bytes())
    }
}

impl RewardConfig {
    /// The shape `trunk` with the `config.json` that is saved of it.
    fn saved(self, trunk: &ModelConfig) -> ModelConfig {
        let mut saved = trunk.clone();
        saved.raw = self.to_disk(saved.raw);
        saved
    }

    /// What the file at `path` says, beside an adapter.
    fn read_beside(path: &Path) -> Result<Self, ModelError> {
        Self::parse(&read_json(path)?, path, "")
    }
}

/// Whether the model in the folder `path` is a classifier.
fn is_classifier(path: &Path) -> Result<bool, ModelError> {
    let raw = from_disk(read_json(&path.join("config.json"))?);
    let named = raw["architectures"][0].as_str();
    Ok(named.is_some_and(|named| SUPPORTED_REWARD_ARCHITECTURES.contains(&named)))
}
