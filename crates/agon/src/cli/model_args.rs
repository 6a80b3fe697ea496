//! Arguments that name a model and how to compute with it.

use std::path::PathBuf;

use hub::CancelToken;
use model::{DType, Device, LanguageModel, ModelError, ModelFolder, open_policy};
use settings::ModelSource;

use crate::assembly::ModelLocation;

// No doc comment: clap would show it in place of the command's own.
#[derive(clap::Args)]
pub(crate) struct ModelArguments {
    /// The model: a Hugging Face folder, such as a run's checkpoint, a GGUF file, or hf:ORG/NAME@REVISION.
    #[arg(long, value_name = "MODEL")]
    model: ModelSource,
    /// A PEFT folder with a LoRA adapter for the model. A checkpoint that is an adapter names its model itself.
    #[arg(long, value_name = "MODEL")]
    adapter: Option<ModelSource>,
    /// The device: `cpu`, `cuda`, `cuda:N` or `metal`.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Dtype of weights and activations.
    #[arg(long, value_enum, default_value = "f32")]
    dtype: DtypeArgument,
}

/// Dtype of weights and activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum DtypeArgument {
    /// 32-bit floating point.
    F32,
    /// 16-bit brain floating point.
    Bf16,
}

impl DtypeArgument {
    /// Its name on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }
}

impl From<DtypeArgument> for DType {
    fn from(dtype: DtypeArgument) -> Self {
        match dtype {
            DtypeArgument::F32 => Self::F32,
            DtypeArgument::Bf16 => Self::BF16,
        }
    }
}

impl ModelArguments {
    /// Whether an adapter is given.
    pub(crate) fn has_adapter(&self) -> bool {
        self.adapter.is_some()
    }

    /// Location of the language model, downloaded first if it is on the Hub.
    pub(crate) fn locate(&self) -> anyhow::Result<LocatedModel> {
        let never = CancelToken::never();
        let adapter = self.adapter.as_ref();
        let adapter = adapter.map(|source| hub::folder(source, &never));
        Ok(LocatedModel {
            location: ModelLocation::resolve(&self.model, &never)?,
            adapter: adapter.transpose()?,
            device: model::device(&self.device)?,
            dtype: self.dtype,
        })
    }

    /// Location of the reward model: the adapter on the given model if there is an adapter, whatever base it names.
    pub(crate) fn locate_reward(&self) -> anyhow::Result<LocatedModel> {
        let never = CancelToken::never();
        let location = match &self.adapter {
            None => ModelLocation::resolve(&self.model, &never)?,
            Some(adapter) => ModelLocation::with_base(
                hub::folder(adapter, &never)?,
                hub::folder(&self.model, &never)?,
            ),
        };
        Ok(LocatedModel {
            location,
            adapter: None,
            device: model::device(&self.device)?,
            dtype: self.dtype,
        })
    }
}

/// A local model, and how to compute with it.
pub(crate) struct LocatedModel {
    /// Folder of the model.
    pub(crate) location: ModelLocation,
    /// Folder of an adapter for the language model.
    pub(crate) adapter: Option<PathBuf>,
    /// Device of the weights.
    pub(crate) device: Device,
    /// Dtype of the weights.
    pub(crate) dtype: DtypeArgument,
}

impl LocatedModel {
    /// Reads the language model.
    pub(crate) fn open(&self) -> Result<(ModelFolder, LanguageModel), ModelError> {
        let (dtype, device) = (self.dtype.into(), &self.device);
        match &self.adapter {
            None => self.location.policy(None, dtype, device),
            Some(adapter) => open_policy(&self.location.path, Some(adapter), None, dtype, device),
        }
    }
}
