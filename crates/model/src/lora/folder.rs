//! An adapter as a folder, in the layout of PEFT, and a policy as whichever folder it is.
//!
//! The safetensors file also holds a print of the base's weights. PEFT passes over it; here an adapter
//! that has one is refused beside any other base.

use std::{
    fs,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor};
use messages::Digest;
use safetensors::SafeTensors;

use super::{Adapter, LoraConfig, base_model::NAME, config};
use crate::{
    LanguageModel, ModelConfig, ModelError, ModelFolder, Weights,
    config::{Task, read_json},
    folder::{copy_beside, make, save_folder, sync, write},
    shards::{missing, shapes},
    weights::torn,
};

pub(super) const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";
/// Where the base's print stands in the metadata.
const PRINT: &str = "base_print";
/// Numbers of each tensor that go into the print.
const PRINTED: usize = 16;

/// An adapter on disk: all of it but the tensors.
#[derive(Debug, Clone)]
pub struct AdapterFolder {
    /// Where it lies.
    pub path: PathBuf,
    /// How it is shaped and scaled.
    pub config: LoraConfig,
}

impl AdapterFolder {
    /// Whether the folder `path` is an adapter's.
    #[must_use]
    pub fn is_at(path: &Path) -> bool {
        path.join(CONFIG).exists()
    }

    /// Opens the adapter of a language model in the folder `path`.
    ///
    /// # Errors
    /// When the folder or its configuration is missing or malformed, or wants what is not supported.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        Self::open_for(Task::Language, path)
    }

    /// As [`Self::open`], an adapter of a model that is for `task`.
    pub(crate) fn open_for(task: Task, path: &Path) -> Result<Self, ModelError> {
        let file = path.join(CONFIG);
        let config = LoraConfig::read(&read_json(&file)?, &file, task)?;
        Ok(Self {
            path: path.to_owned(),
            config,
        })
    }

    /// The folder of the model that it was made for.
    ///
    /// # Errors
    /// When there is none at the path that it names.
    pub fn base(&self) -> Result<PathBuf, ModelError> {
        let base = &self.config.base_model;
        let path = self.path.display();
        let lacks = |reason: String| ModelError::Adapter {
            reason: format!(
                "{reason}; name the base's folder as the model and this one as the adapter, or set {NAME} in \
                 {CONFIG} to the base's folder"
            ),
        };
        match base.folder(&self.path) {
            Some(folder) => Ok(folder),
            None if base.name.is_empty() => Err(lacks(format!("{path} names no base model"))),
            None => Err(lacks(format!(
                "the base model {:?} of {path} is not there",
                base.name
            ))),
        }
    }

    /// Checks by the header of their file that the tensors are those of an adapter beside a model of this shape.
    ///
    /// # Errors
    /// As [`Self::adapter`], as far as names and shapes say.
    pub fn check(&self, base: &ModelConfig) -> Result<(), ModelError> {
        self.check_with(&[], base)
    }

    /// As [`Self::check`], with the tensors `whole` beside it.
    pub(crate) fn check_with(
        &self,
        whole: &[(String, Vec<usize>)],
        base: &ModelConfig,
    ) -> Result<(), ModelError> {
        let found = shapes(&self.path.join(TENSORS))?;
        let expected = self.expected(whole, base)?;
        config::fits(&found, &expected).map_err(|error| self.made_for(&error))
    }

    /// The names and shapes of all tensors of the file, those of `whole` by the base's names among them.
    fn expected(
        &self,
        whole: &[(String, Vec<usize>)],
        base: &ModelConfig,
    ) -> Result<Vec<(String, Vec<usize>)>, ModelError> {
        let mut expected = self.config.tensors(base)?;
        let beside = whole.iter();
        expected.extend(beside.map(|(name, shape)| (prefixed(name), shape.clone())));
        Ok(expected)
    }

    /// Reads the tensors, for the model `base`, onto its device.
    ///
    /// # Errors
    /// When the file is missing or torn, or the adapter belongs to another base.
    pub fn adapter(&self, base: &LanguageModel) -> Result<Adapter, ModelError> {
        Ok(self.adapter_and(Vec::new(), base)?.0)
    }

    /// As [`Self::adapter`], with the tensors that lie beside it: `whole`, by the base's names for them and
    /// their shapes.
    pub(crate) fn adapter_and(
        &self,
        whole: Vec<(String, Vec<usize>)>,
        base: &LanguageModel,
    ) -> Result<(Adapter, Weights), ModelError> {
        let bytes = self.tensors()?;
        let torn = |error: &candle_core::Error| ModelError::Malformed {
            path: self.path.join(TENSORS),
            reason: torn(error),
        };
        let found = candle_core::safetensors::load_buffer(&bytes, base.device())
            .map_err(|error| torn(&error))?;
        let expected = self.expected(&whole, base.config())?;
        let narrow = |(name, tensor): (String, Tensor)| Ok((name, tensor.to_dtype(DType::F32)?));
        let tensors = found.into_iter().map(narrow);
        let mut weights = Weights {
            tensors: tensors.collect::<Result<_, candle_core::Error>>()?,
        };
        config::fits(&weights.shapes(), &expected).map_err(|error| self.made_for(&error))?;
        if let Some(saved) = saved_print(&bytes)
            && saved != print(base.weights())?
        {
            let reason = "the model's weights are not those it was trained beside".into();
            return Err(self.made_for(&ModelError::Adapter { reason }));
        }
        let beside = whole.into_iter().filter_map(|(name, _)| {
            let tensor = weights.tensors.remove(&prefixed(&name))?;
            Some((name, tensor))
        });
        let beside = Weights::of(beside.collect());
        let config = self.config.clone();
        Ok((Adapter { config, weights }, beside))
    }

    /// Whether it is known to have been trained beside these weights.
    ///
    /// # Errors
    /// When its file is missing, or a tensor cannot be read from its device.
    pub(crate) fn was_trained_beside(&self, weights: &Weights) -> Result<bool, ModelError> {
        match saved_print(&self.tensors()?) {
            Some(saved) => Ok(saved == print(weights)?),
            None => Ok(false),
        }
    }

    fn tensors(&self) -> Result<Vec<u8>, ModelError> {
        let path = self.path.join(TENSORS);
        fs::read(&path).map_err(|source| missing(&path, source))
    }

    /// The error with the name of the base.
    fn made_for(&self, error: &ModelError) -> ModelError {
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

/// A policy from disk: the model in the folder `path` with the adapter in the folder `adapter`, or the
/// adapter in `path` with the base that it names. The folder that comes back is the base's.
///
/// # Errors
/// When a folder or a file in it is missing, or the two do not belong together.
pub fn open_policy(
    path: &Path,
    adapter: Option<&Path>,
    chat_template: Option<&Path>,
    (dtype, device): (DType, &Device),
) -> Result<(ModelFolder, LanguageModel), ModelError> {
    let (base, adapter) = match adapter {
        Some(adapter) => (path.to_owned(), Some(AdapterFolder::open(adapter)?)),
        None if AdapterFolder::is_at(path) => {
            let adapter = AdapterFolder::open(path)?;
            (adapter.base()?, Some(adapter))
        }
        None => (path.to_owned(), None),
    };
    let folder = ModelFolder::open(&base, chat_template)?;
    let weights = folder.weights(dtype, device)?;
    let mut model = LanguageModel::new(folder.config.clone(), weights)?;
    if let Some(adapter) = adapter {
        model = model.with_adapter(adapter.adapter(&model)?)?;
    }
    Ok((folder, model))
}

/// Saves the policy `model`, whose base is `from`, in the folder `to`: its adapter in PEFT's layout
/// where it has one, with the tokenizer's files; else as [`save_folder`] does.
///
/// # Errors
/// When a file cannot be read or written, or a tensor cannot be read from its device.
pub fn save_policy(to: &Path, from: &ModelFolder, model: &LanguageModel) -> Result<(), ModelError> {
    match model.adapter() {
        None => save_folder(to, from, model.weights()),
        Some(adapter) => save_adapter(to, from, (model.weights(), adapter), None),
    }
}

/// The head of a classifier that is saved whole beside an adapter.
pub(crate) struct ClassifierHead<'a> {
    /// Its tensors, by the base's names.
    pub(crate) weights: &'a Weights,
    /// Whether PEFT computes the score; else it is kept from reading the folder.
    pub(crate) is_pefts: bool,
}

/// Saves the adapter of a model with these weights, made from `from`, in the folder `to`, with the
/// tokenizer's files; with the `head` of a classifier where there is one.
pub(crate) fn save_adapter(
    to: &Path,
    from: &ModelFolder,
    (base, adapter): (&Weights, &Adapter),
    head: Option<&ClassifierHead<'_>>,
) -> Result<(), ModelError> {
    make(to)?;
    let mut weights = adapter.weights.clone();
    let head_tensors = head.iter().flat_map(|head| &head.weights.tensors);
    let beside = head_tensors.map(|(name, tensor)| (prefixed(name), tensor.clone()));
    weights.tensors.extend(beside);
    let print = [(PRINT, print(base)?)];
    write(&to.join(TENSORS), &weights.to_blob_saying(&print)?)?;
    copy_beside(to, from)?;
    let task = head.map_or(Task::Language, |_| Task::Reward);
    let mut config = adapter.config.to_json(&from.config, task);
    if head.is_some_and(|head| !head.is_pefts) {
        config::hide_from_peft(&mut config);
    }
    write(&to.join(CONFIG), format!("{config:#}\n").as_bytes())?;
    sync(to)
}

impl LanguageModel {
    /// What [`Self::trained`] is in the folder that [`save_policy`] wrote of this model at another time.
    ///
    /// # Errors
    /// When a file is missing or torn, or belongs to another model.
    pub fn read_trained(&self, folder: &Path) -> Result<Weights, ModelError> {
        if self.adapter().is_none() {
            return Weights::load(folder, self.config(), self.dtype(), self.device());
        }
        let saved = AdapterFolder::open(folder)?.adapter(self)?;
        let expected = self
            .adapter()
            .map(|adapter| adapter.config.tensors(self.config()));
        config::fits(
            &saved.weights.shapes(),
            &expected.transpose()?.unwrap_or_default(),
        )?;
        Ok(saved.weights)
    }

    /// The same model as it was when [`save_policy`] wrote it to `folder`.
    ///
    /// # Errors
    /// As [`Self::read_trained`].
    pub fn as_saved(&self, folder: &Path) -> Result<Self, ModelError> {
        self.with_trained(self.read_trained(folder)?)
    }
}

/// PEFT's name for a tensor that is whole in the file.
fn prefixed(name: &str) -> String {
    format!("{}{name}", config::PREFIX)
}

/// The base's print in the bytes of an adapter's file, if it was saved.
fn saved_print(bytes: &[u8]) -> Option<String> {
    let (_, header) = SafeTensors::read_metadata(bytes).ok()?;
    header.metadata().as_ref()?.get(PRINT).cloned()
}

/// A print of weights: the digest of the names, shapes and first numbers of all tensors, as bf16, so
/// that weights have one print in whatever numbers they are read.
fn print(weights: &Weights) -> Result<String, ModelError> {
    let mut bytes = Vec::new();
    for (name, tensor) in &weights.tensors {
        let flat = tensor.flatten_all()?;
        let first = flat.narrow(0, 0, flat.dim(0)?.min(PRINTED))?;
        let first = first.to_dtype(DType::BF16)?.to_dtype(DType::F32)?;
        bytes.extend_from_slice(format!("{name} {:?} ", tensor.dims()).as_bytes());
        for number in first.to_vec1::<f32>()? {
            bytes.extend(number.to_le_bytes());
        }
    }
    Ok(Digest::of(&bytes).to_string())
}
