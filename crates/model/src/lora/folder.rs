//! Adapter folders in PEFT's layout, and policies opened from a model or adapter folder.
//!
//! The metadata of the safetensors file also has a fingerprint of the base weights. PEFT ignores it; here an adapter
//! with a fingerprint is refused for any other base.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor};
use messages::Digest;
use safetensors::SafeTensors;

use crate::lora::{Adapter, LoraConfig, base_model::NAME, config};
use crate::{
    config::{ModelConfig, ModelTask, read_json},
    error::ModelError,
    folder::{ModelFolder, copy_tokenizer_files, create_folder, save_folder, sync, write},
    shards::{read_weights, shapes},
    transformer::LanguageModel,
    weights::{Weights, not_safetensors},
};

pub(super) const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";
/// Metadata key of the base's fingerprint.
const FINGERPRINT: &str = "base_print";
/// Number of leading values of each tensor that enter the fingerprint.
const FINGERPRINT_VALUES: usize = 16;

/// An adapter on disk: its configuration, with tensors loaded on request.
#[derive(Debug, Clone)]
pub struct AdapterFolder {
    /// Path of the folder.
    pub path: PathBuf,
    /// LoRA configuration.
    pub config: LoraConfig,
}

impl AdapterFolder {
    /// Whether the folder `path` holds an adapter.
    #[must_use]
    pub fn is_at(path: &Path) -> bool {
        path.join(CONFIG).exists()
    }

    /// Opens the adapter of a language model in the folder `path`.
    ///
    /// # Errors
    /// When the folder or its configuration is missing, malformed or requires an unsupported feature.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        Self::open_for(ModelTask::Language, path)
    }

    /// As [`Self::open`], for an adapter of a model with the head of `task`.
    pub(crate) fn open_for(task: ModelTask, path: &Path) -> Result<Self, ModelError> {
        let file = path.join(CONFIG);
        let config = LoraConfig::read(&read_json(&file)?, &file, task)?;
        Ok(Self {
            path: path.to_owned(),
            config,
        })
    }

    /// Folder of the base model.
    ///
    /// # Errors
    /// When there is no model at the path that the adapter names.
    pub fn base(&self) -> Result<PathBuf, ModelError> {
        let base = &self.config.base_model;
        let path = self.path.display();
        let no_base = |reason: String| ModelError::Adapter {
            reason: format!(
                "{reason}; name the base's folder as the model and this one as the adapter, or set {NAME} in \
                 {CONFIG} to the base's folder"
            ),
        };
        match base.folder(&self.path) {
            Some(folder) => Ok(folder),
            None if base.name.is_empty() => Err(no_base(format!("{path} names no base model"))),
            None => Err(no_base(format!(
                "the base model {:?} of {path} was not found",
                base.name
            ))),
        }
    }

    /// Checks names and shapes of the tensors against the base configuration, by the header of their file.
    ///
    /// # Errors
    /// As [`Self::adapter`], as far as names and shapes show.
    pub fn check(&self, base: &ModelConfig) -> Result<(), ModelError> {
        self.check_with(&[], base)
    }

    /// As [`Self::check`], with additional full tensors in the file, such as a classifier head.
    pub(crate) fn check_with(
        &self,
        extra: &[(String, Vec<usize>)],
        base: &ModelConfig,
    ) -> Result<(), ModelError> {
        let found = shapes(&self.path.join(TENSORS))?;
        let expected = self.expected(extra, base)?;
        config::check_shapes(&found, &expected).map_err(|error| self.with_base_name(&error))
    }

    /// Names and shapes of all tensors of the file; `extra` are full tensors by their names in the base model.
    fn expected(
        &self,
        extra: &[(String, Vec<usize>)],
        base: &ModelConfig,
    ) -> Result<Vec<(String, Vec<usize>)>, ModelError> {
        let mut expected = self.config.tensors(base)?;
        let extra = extra.iter();
        expected.extend(extra.map(|(name, shape)| (prefixed(name), shape.clone())));
        Ok(expected)
    }

    /// Loads the tensors for the model `base`, onto its device.
    ///
    /// # Errors
    /// When the file is missing or truncated, or the adapter belongs to another base.
    pub fn adapter(&self, base: &LanguageModel) -> Result<Adapter, ModelError> {
        self.check(base.config())?;
        Ok(self.adapter_from(&self.tensors()?, Vec::new(), base)?.0)
    }

    /// As [`Self::adapter`], for the model `base` of `folder`. Warns if nothing shows that the adapter was trained on it:
    /// there is no fingerprint, and the adapter names another base.
    ///
    /// # Errors
    /// As [`Self::adapter`].
    pub fn adapter_of(
        &self,
        folder: &ModelFolder,
        base: &LanguageModel,
    ) -> Result<Adapter, ModelError> {
        Ok(self.adapter_with(Vec::new(), folder, base)?.0)
    }

    /// As [`Self::adapter_of`], with additional full tensors from the file, given by their names in the base model and
    /// their shapes.
    pub(crate) fn adapter_with(
        &self,
        extra: Vec<(String, Vec<usize>)>,
        folder: &ModelFolder,
        base: &LanguageModel,
    ) -> Result<(Adapter, Weights), ModelError> {
        self.check_with(&extra, base.config())?;
        let bytes = self.tensors()?;
        let loaded = self.adapter_from(&bytes, extra, base)?;
        if !self.is_known_for(&bytes, folder) {
            tracing::warn!(
                adapter = %self.path.display(),
                made_for = self.config.base_model.name,
                base = folder.base_model.name,
                "the adapter was made for a model of another name and has no fingerprint of its weights: it could not be \
                 verified that it belongs to this base"
            );
        }
        Ok(loaded)
    }

    /// Whether the tensors' file has a fingerprint of its base, which was compared, or the adapter names this model or none.
    pub(super) fn is_known_for(&self, bytes: &[u8], folder: &ModelFolder) -> bool {
        saved_fingerprint(bytes).is_some() || self.names(folder)
    }

    /// Whether the adapter names this model as its base, or none. Of two paths the last components are compared, since
    /// a folder can be moved.
    fn names(&self, folder: &ModelFolder) -> bool {
        let named = &self.config.base_model;
        let last = |name: &str| Path::new(name).file_name().map(OsStr::to_owned);
        let path = folder.path.to_string_lossy();
        let known = [folder.base_model.name.as_str(), &path];
        let is_same = |name: &&str| *name == named.name || last(name) == last(&named.name);
        let same_folder = || {
            let found = named.folder(&self.path)?;
            Some(found.canonicalize().ok()? == folder.path.canonicalize().ok()?)
        };
        named.name.is_empty() || known.iter().any(is_same) || same_folder() == Some(true)
    }

    /// As [`Self::adapter_with`], from the bytes of the tensors' file, whose names and shapes are checked.
    fn adapter_from(
        &self,
        bytes: &[u8],
        extra: Vec<(String, Vec<usize>)>,
        base: &LanguageModel,
    ) -> Result<(Adapter, Weights), ModelError> {
        let truncated = |error: &candle_core::Error| ModelError::Malformed {
            path: self.path.join(TENSORS),
            reason: not_safetensors(error),
        };
        let found = candle_core::safetensors::load_buffer(bytes, base.device())
            .map_err(|error| truncated(&error))?;
        let to_f32 = |(name, tensor): (String, Tensor)| Ok((name, tensor.to_dtype(DType::F32)?));
        let tensors = found.into_iter().map(to_f32);
        let mut weights = Weights::of(tensors.collect::<Result<_, candle_core::Error>>()?);
        if let Some(saved) = saved_fingerprint(bytes)
            && saved != fingerprint(base.weights())?
        {
            let reason = "the model's weights are not those it was trained on".into();
            return Err(self.with_base_name(&ModelError::Adapter { reason }));
        }
        let extra = extra.into_iter().filter_map(|(name, _)| {
            let tensor = weights.tensors.remove(&prefixed(&name))?;
            Some((name, tensor))
        });
        let extra = Weights::of(extra.collect());
        let config = self.config.clone();
        Ok((Adapter { config, weights }, extra))
    }

    /// Whether the adapter has a fingerprint and it matches these base weights.
    ///
    /// # Errors
    /// When its file is missing, or a tensor cannot be read from its device.
    pub(crate) fn matches_fingerprint(&self, weights: &Weights) -> Result<bool, ModelError> {
        match saved_fingerprint(&self.tensors()?) {
            Some(saved) => Ok(saved == fingerprint(weights)?),
            None => Ok(false),
        }
    }

    fn tensors(&self) -> Result<Vec<u8>, ModelError> {
        read_weights(&self.path.join(TENSORS))
    }

    /// Adds the name of the adapter's base to an error.
    fn with_base_name(&self, error: &ModelError) -> ModelError {
        let (path, base) = (self.path.display(), &self.config.base_model.name);
        match error {
            ModelError::Adapter { reason } => ModelError::Adapter {
                reason: format!("{reason} ({path} was made for {base:?})"),
            },
            other => ModelError::Adapter {
                reason: other.to_string(),
            },
        }
    }
}

/// Opens a policy from disk: the model in the folder `path` with the adapter in the folder `adapter`, or the adapter in
/// `path` with the base that it names. The returned folder is the base's, with the chat template and the stop tokens of
/// the adapter's folder where that has its own.
///
/// # Errors
/// When a folder or a file in it is missing, or adapter and base do not match.
pub fn open_policy(
    path: &Path,
    adapter: Option<&Path>,
    chat_template: Option<&Path>,
    dtype: DType,
    device: &Device,
) -> Result<(ModelFolder, LanguageModel), ModelError> {
    let (base, adapter) = match adapter {
        Some(adapter) => (path.to_owned(), Some(AdapterFolder::open(adapter)?)),
        None if AdapterFolder::is_at(path) => {
            let adapter = AdapterFolder::open(path)?;
            (adapter.base()?, Some(adapter))
        }
        None => (path.to_owned(), None),
    };
    let folder = match &adapter {
        Some(adapter) => adapter.open_base(ModelTask::Language, &base, chat_template)?,
        None => ModelFolder::open(&base, chat_template)?,
    };
    let weights = folder.weights(dtype, device)?;
    let mut model = LanguageModel::new(folder.config.clone(), weights)?;
    if let Some(adapter) = adapter {
        model = model.with_adapter(adapter.adapter_of(&folder, &model)?)?;
    }
    Ok((folder, model))
}

/// Saves the policy `model`, whose base is `from`, in the folder `to`: its adapter, if any, in PEFT's layout with the
/// tokenizer files; otherwise as [`save_folder`] does.
///
/// # Errors
/// When a file cannot be read or written, or a tensor cannot be read from its device.
pub fn save_policy(to: &Path, from: &ModelFolder, model: &LanguageModel) -> Result<(), ModelError> {
    match model.adapter() {
        None => save_folder(to, from, model.weights()),
        Some(adapter) => save_adapter(to, from, adapter, model.weights(), None),
    }
}

/// Classifier head saved in full with an adapter.
pub(crate) struct ClassifierHead<'a> {
    /// Tensors by their names in the base model.
    pub(crate) weights: &'a Weights,
    /// Whether PEFT computes the same score; otherwise the folder is marked so that PEFT refuses it.
    pub(crate) peft_compatible: bool,
}

/// Saves an adapter of the model `from` with the weights `base` in the folder `to`, with the tokenizer files and an
/// optional classifier head.
pub(crate) fn save_adapter(
    to: &Path,
    from: &ModelFolder,
    adapter: &Adapter,
    base: &Weights,
    head: Option<&ClassifierHead<'_>>,
) -> Result<(), ModelError> {
    create_folder(to)?;
    let mut weights = adapter.weights.clone();
    let head_tensors = head.iter().flat_map(|head| &head.weights.tensors);
    let head_tensors = head_tensors.map(|(name, tensor)| (prefixed(name), tensor.clone()));
    weights.tensors.extend(head_tensors);
    let metadata = [(FINGERPRINT, fingerprint(base)?)];
    write(
        &to.join(TENSORS),
        &weights.to_blob_with_metadata(&metadata)?,
    )?;
    copy_tokenizer_files(to, from)?;
    let task = head.map_or(ModelTask::Language, |_| ModelTask::Reward);
    let mut config = adapter.config.to_json(&from.config, task);
    if head.is_some_and(|head| !head.peft_compatible) {
        config::mark_incompatible_with_peft(&mut config);
    }
    write(&to.join(CONFIG), format!("{config:#}\n").as_bytes())?;
    sync(to)
}

impl LanguageModel {
    /// Loads [`Self::trained`] from a folder that [`save_policy`] wrote for this model.
    ///
    /// # Errors
    /// When a file is missing or truncated, or belongs to another model.
    pub fn read_saved_weights(&self, folder: &Path) -> Result<Weights, ModelError> {
        if self.adapter().is_none() {
            return Weights::load(folder, self.config(), self.dtype(), self.device());
        }
        let saved = AdapterFolder::open(folder)?.adapter(self)?;
        let expected = self
            .adapter()
            .map(|adapter| adapter.config.tensors(self.config()));
        config::check_shapes(
            &saved.weights.shapes(),
            &expected.transpose()?.unwrap_or_default(),
        )?;
        Ok(saved.weights)
    }

    /// The model with the trained tensors that [`save_policy`] wrote to `folder`.
    ///
    /// # Errors
    /// As [`Self::read_saved_weights`].
    pub fn with_saved_weights(&self, folder: &Path) -> Result<Self, ModelError> {
        self.with_trained(self.read_saved_weights(folder)?)
    }
}

/// PEFT's name for a full tensor of the base model.
fn prefixed(name: &str) -> String {
    format!("{}{name}", config::PREFIX)
}

/// Fingerprint of the base in the bytes of an adapter file, if present.
fn saved_fingerprint(bytes: &[u8]) -> Option<String> {
    let (_, header) = SafeTensors::read_metadata(bytes).ok()?;
    header.metadata().as_ref()?.get(FINGERPRINT).cloned()
}

/// Fingerprint of weights: digest of the names, shapes and leading values of all tensors, rounded to bf16 so that it
/// does not depend on the dtype.
fn fingerprint(weights: &Weights) -> Result<String, ModelError> {
    let mut bytes = Vec::new();
    for (name, shape) in weights.shapes() {
        bytes.extend_from_slice(format!("{name} {shape:?} ").as_bytes());
        let first = weights.leading_values(&name, FINGERPRINT_VALUES)?;
        let first = Tensor::new(first, &Device::Cpu)?.to_dtype(DType::BF16)?;
        for value in first.to_dtype(DType::F32)?.to_vec1::<f32>()? {
            bytes.extend(value.to_le_bytes());
        }
    }
    Ok(Digest::of(&bytes).to_string())
}
