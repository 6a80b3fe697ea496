//! A language model in memory: its folder and its weights.

use std::{path::Path, sync::Arc};

use hub::CancelToken;
use model::{Adapter, DType, Device, LanguageModel, ModelFolder, Precision, Weights};
use settings::{
    DtypeSetting, EngineSettings, JudgeSettings, PrecisionSetting, PromptsSettings, Settings,
};

use crate::assembly::playground;

/// Warning for a model without stop tokens.
pub(crate) const NO_STOP_TOKENS: &str = "the model names no stop token: every completion is as long as the limit of new tokens; set eos_token in tokenizer_config.json or eos_token_id in generation_config.json";

/// Logs a warning if the model has no stop tokens.
pub(crate) fn warn_without_stop_tokens(folder: &ModelFolder) {
    if folder.config.stops.is_empty() {
        tracing::warn!(model = %folder.path.display(), "{NO_STOP_TOKENS}");
    }
}

/// Device and dtype of the settings.
pub(crate) fn device(settings: &Settings) -> anyhow::Result<(Device, DType)> {
    let device = model::device(&settings.model.device)?;
    Ok((device, dtype(settings.model.dtype)))
}

/// Dtype of a setting.
pub(crate) fn dtype(setting: DtypeSetting) -> DType {
    match setting {
        DtypeSetting::F32 => DType::F32,
        DtypeSetting::Bf16 => DType::BF16,
    }
}

/// Precision in which a run packs the weights that nothing trains: that of the learner's products. Actors' decoders read
/// them too, or convert them to a coarser precision. `None` if they stay as they were read:
/// - on a GPU, and for mistral.rs, which makes files of them;
/// - if anything exact is made of weights that bf16 would round: samples in f32, or a fitted preference model;
/// - if models are trained from them: in adversarial preference optimisation, or as a reference that moves;
/// - beside a policy that is trained in bf16 as a whole, since its reference has all roundings in common with it.
pub(crate) fn frozen_precision(settings: &Settings, has_adapter: bool) -> Option<Precision> {
    let precision = model::training_precision(settings.learner.precision);
    let samples_exactly =
        settings.needs_samples() && settings.actor.precision == PrecisionSetting::F32;
    let needs_exact = samples_exactly || fits_preference_model(settings);
    let stays_at_start =
        has_adapter || (!settings.reference.moves() && settings.model.dtype == DtypeSetting::F32);
    let is_packed = settings.model.device == "cpu"
        && matches!(settings.actor.engine, EngineSettings::Own {})
        && (precision == Precision::F32 || !needs_exact)
        && settings.preference.apo.refresh_steps == 0
        && stays_at_start;
    is_packed.then_some(precision)
}

/// Whether a judge is a preference model that is fitted when the run begins.
fn fits_preference_model(settings: &Settings) -> bool {
    let is_fitted = |judge: &JudgeSettings| match judge {
        JudgeSettings::BradleyTerry { path } | JudgeSettings::Pairwise { path } => path.is_empty(),
        _ => false,
    };
    let judges = settings.evaluation.judge.values();
    std::iter::once(&settings.preference.judge)
        .chain(judges)
        .any(|judge| judge.any(&is_fitted))
}

/// A model's folder and its weights. Clones share both.
#[derive(Clone)]
pub(crate) struct LoadedModel {
    /// Configuration, tokenizer and path.
    pub(crate) folder: Arc<ModelFolder>,
    /// Weights on the device of the settings.
    pub(crate) weights: Weights,
    /// Seconds of supervised fine-tuning, if the model is a playground base that was trained just now.
    pub(crate) base_seconds: Option<f64>,
}

impl LoadedModel {
    /// A model of this folder with these weights.
    pub(crate) fn new(folder: ModelFolder, weights: Weights) -> Self {
        Self {
            folder: Arc::new(folder),
            weights,
            base_seconds: None,
        }
    }

    /// Loads the base model of the settings, after downloading or training it if need be. Blocks; ends early once
    /// `cancel` is cancelled.
    pub(crate) fn open(settings: &Settings, cancel: &CancelToken) -> anyhow::Result<Self> {
        let mut base_seconds = None;
        let path = match (&settings.model.path, &settings.prompts) {
            (Some(source), _) => hub::folder(source, cancel)?,
            (None, PromptsSettings::Bandit {}) => playground::bandit_model(settings)?,
            (None, _) => {
                let base = playground::base_model(settings, cancel)?;
                base_seconds = base.seconds;
                base.path
            }
        };
        let mut model = Self::read(settings, &path)?;
        if settings.model.path.is_some() {
            warn_without_stop_tokens(&model.folder);
        }
        model.base_seconds = base_seconds;
        Ok(model)
    }

    /// Reads the model in the folder `path` with the chat template, device and dtype of the settings.
    pub(crate) fn read(settings: &Settings, path: &Path) -> anyhow::Result<Self> {
        let (device, dtype) = device(settings)?;
        let folder = ModelFolder::open(path, settings.model.chat_template.as_deref())?;
        let weights = folder.weights(dtype, &device)?;
        Ok(Self::new(folder, weights))
    }

    /// The model with its weights, which nothing trains, packed in this precision; unchanged without one.
    pub(crate) fn packed(&self, precision: Option<Precision>) -> anyhow::Result<Self> {
        let Some(precision) = precision else {
            return Ok(self.clone());
        };
        let packed = self.language_model()?.packed(precision)?;
        Ok(Self {
            weights: packed.weights().clone(),
            ..self.clone()
        })
    }

    /// A language model that shares the weights.
    pub(crate) fn language_model(&self) -> anyhow::Result<LanguageModel> {
        let config = self.folder.config.clone();
        Ok(LanguageModel::new(config, self.weights.clone())?)
    }

    /// The policy: the language model, with `adapter` if there is one.
    pub(crate) fn policy(&self, adapter: Option<Adapter>) -> anyhow::Result<LanguageModel> {
        let model = self.language_model()?;
        Ok(match adapter {
            Some(adapter) => model.with_adapter(adapter)?,
            None => model,
        })
    }
}
