//! A language model in memory: its folder and its weights.

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use hub::CancelToken;
use model::{Adapter, DType, Device, HeadForm, LanguageModel, ModelFolder, Precision, Weights};
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
/// - if something else is made of them than they would be packed as: samples in f32 beside bf16, or a fitted preference model;
/// - if models are trained from them: in adversarial preference optimisation, or as a reference that moves;
/// - beside a policy that is trained in bf16 as a whole, since its reference has all roundings in common with it.
pub(crate) fn frozen_precision(settings: &Settings, has_adapter: bool) -> Option<Precision> {
    let precision = model::training_precision(settings.learner.precision);
    let is_f32 = settings.model.dtype == DtypeSetting::F32;
    let samples_finer = settings.needs_samples()
        && settings.actor.precision == PrecisionSetting::F32
        && precision == Precision::Bf16;
    let changes_fit = precision == Precision::Bf16 || !is_f32;
    let stays_at_start = has_adapter || (!settings.reference.moves() && is_f32);
    let is_packed = settings.model.device == "cpu"
        && matches!(settings.actor.engine, EngineSettings::Own {})
        && !samples_finer
        && !(changes_fit && fits_preference_model(settings))
        && settings.preference.apo.refresh_steps == 0
        && stays_at_start;
    is_packed.then_some(precision)
}

/// Whether the judge, or a member of it, is a preference model that is fitted when the run begins.
fn fits_preference_model(settings: &Settings) -> bool {
    settings.preference.judge.any(&|judge| match judge {
        JudgeSettings::BradleyTerry { path } | JudgeSettings::Pairwise { path } => path.is_empty(),
        _ => false,
    })
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
    /// The weights packed for judges, once one asked for them.
    judging: Arc<Mutex<Option<Weights>>>,
}

impl LoadedModel {
    /// A model of this folder with these weights.
    pub(crate) fn new(folder: ModelFolder, weights: Weights) -> Self {
        Self {
            folder: Arc::new(folder),
            weights,
            base_seconds: None,
            judging: Arc::default(),
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

    /// The model with its weights, which nothing trains, packed in this precision; unchanged without one. Weights that nothing
    /// else holds are released meanwhile.
    pub(crate) fn packed(self, precision: Option<Precision>) -> anyhow::Result<Self> {
        let Some(precision) = precision else {
            return Ok(self);
        };
        let config = &self.folder.config;
        Ok(Self {
            weights: self
                .weights
                .packed_in(config, precision, HeadForm::Packed)?,
            ..self
        })
    }

    /// The weights as the backbone of judges that multiply in this precision, packed once for all of them; `None` if they are
    /// held with the roundings of another precision, so that a judge reads its own.
    pub(crate) fn judging_backbone(&self, precision: Precision) -> anyhow::Result<Option<Weights>> {
        match self.weights.packed_precision() {
            Some(held) if held == precision => return Ok(Some(self.weights.clone())),
            Some(Precision::Bf16 | Precision::Int8) => return Ok(None),
            Some(Precision::F32) | None => {}
        }
        let mut kept = self.judging.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(weights) = kept
            .as_ref()
            .filter(|w| w.packed_precision() == Some(precision))
        {
            return Ok(Some(weights.clone()));
        }
        let weights = self.clone().packed(Some(precision))?.weights;
        *kept = Some(weights.clone());
        Ok(Some(weights))
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

#[cfg(test)]
mod tests {
    use settings::Override;

    use super::*;

    fn precision(sets: &[&str], has_adapter: bool) -> Option<Precision> {
        let sets: Vec<Override> = sets.iter().map(|set| set.parse().unwrap()).collect();
        let settings = settings::resolve("", "test", &sets).unwrap().settings;
        frozen_precision(&settings, has_adapter)
    }

    #[test]
    fn weights_are_packed_where_nothing_needs_more_of_them() {
        const TRAINED: &str = "learner.precision=bf16";
        const SAMPLED: &str = "actor.precision=bf16";
        const FITTED: &str = "preference.judge.kind=pairwise";
        let (f32, bf16) = (Some(Precision::F32), Some(Precision::Bf16));
        let member = "preference.judge={ kind = \"ensemble\", members = [{ kind = \"pairwise\" }, { kind = \"gold\" }] }";
        for (sets, whole, adapter) in [
            (&[][..], f32, f32),
            (&[SAMPLED], f32, f32),
            (&["actor.precision=int8"], f32, f32),
            (&[TRAINED, SAMPLED], bf16, bf16),
            (&[TRAINED, "actor.precision=int8"], bf16, bf16),
            // Samples in f32 are of the exact weights.
            (&[TRAINED], None, None),
            // So are preference models that are fitted from them, one of several too.
            (&[FITTED], f32, f32),
            (&[TRAINED, SAMPLED, FITTED], None, None),
            (&[TRAINED, SAMPLED, member], None, None),
            (&["model.dtype=bf16", FITTED], None, None),
            // A policy that is trained in bf16 as a whole has a reference like it.
            (&["model.dtype=bf16"], None, f32),
            (&["model.dtype=bf16", TRAINED, SAMPLED], None, bf16),
            (
                &["reference.kind=every", "reference.every_steps=2"],
                None,
                f32,
            ),
            (&["preference.apo.refresh_steps=2", FITTED], None, None),
            (&["actor.engine.kind=mistral"], None, None),
            (&["model.device=cuda"], None, None),
        ] {
            assert_eq!(precision(sets, false), whole, "{sets:?}");
            assert_eq!(precision(sets, true), adapter, "{sets:?}, with an adapter");
        }
    }
}
