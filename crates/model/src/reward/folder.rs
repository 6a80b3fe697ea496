//! A reward model as a folder, in the layout of Hugging Face.

use std::path::Path;

use candle_core::{DType, Device};

use super::{RewardConfig, RewardModel};
use crate::{ModelError, ModelFolder, Weights, config::Task};

/// A reward model on disk: all of it but the weights.
#[derive(Debug, Clone)]
pub struct RewardFolder {
    /// Where it lies, the shape of its trunk and its tokens.
    pub folder: ModelFolder,
    /// What it gives and how.
    pub config: RewardConfig,
}

impl RewardFolder {
    /// Opens the reward model in the folder `path`, a `…ForSequenceClassification` with one label, or one
    /// that [`RewardModel::save`] wrote; with another chat template than its own when `chat_template`
    /// names a file.
    ///
    /// # Errors
    /// When the folder or a file in it is missing, does not fit the others, or is no reward model.
    pub fn open(path: &Path, chat_template: Option<&Path>) -> Result<Self, ModelError> {
        let mut folder = ModelFolder::open_for(Task::Reward, path, chat_template)?;
        let config = RewardConfig::read(&folder.config.raw, &path.join("config.json"))?;
        folder.config = config.headless(folder.config);
        Ok(Self { folder, config })
    }

    /// Reads the model as `dtype` onto `device`.
    ///
    /// # Errors
    /// When a file is missing or torn, or a tensor is missing or of another shape.
    pub fn model(&self, dtype: DType, device: &Device) -> Result<RewardModel, ModelError> {
        let trunk = &self.folder.config;
        let tensors = self.config.tensors(trunk);
        let weights = Weights::load_tensors(&self.folder.path, tensors, dtype, device)?;
        RewardModel::new(trunk.clone(), self.config, weights)
    }
}
