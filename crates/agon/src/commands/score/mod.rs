//! `agon score`: what a model says of given tokens. Rows in, rows out.
//!
//! Rows are read, grouped and answered group by group, so that a file of any size passes through, and
//! answers keep the order of the rows ([`rows`]). What is asked of a model is the log-probability of every
//! token ([`log_probabilities`]) or one score ([`reward`]). A row that cannot be answered is an error with
//! its line, never a gap.

mod log_probabilities;
mod reward;
mod rows;

use std::{path::PathBuf, process::ExitCode};

use model::{DType, Device, LanguageModel, ModelError, ModelFolder, open_policy};
use settings::ModelSource;

use crate::model_hub::{self, Located};

/// Log-probabilities or scores of given tokens under a model, from JSONL to JSONL.
///
/// A row {"ids": [...]} is answered by {"logprobs": [...]} with one entry less: entry t is
/// log p(ids[t+1] | ids[..=t]), in nats. A row {"prompt": ..., "completion": "..."}, the prompt being
/// text or a list of messages, is answered by {"logprobs": [...], "ids": [...]} with one entry for
/// every token of the completion; no end-of-text token is added. Other columns are ignored. One answer
/// a row, in their order; a row that cannot be answered ends the command with its line.
///
/// With --reward the same rows are answered by {"score": ...}, for a reward model: a decoder
/// (...ForSequenceClassification of Llama, Mistral, Qwen2 or Qwen3, or one that was fitted here), or
/// an encoder (DeBERTa-v2 and -v3, ModernBERT). "ids" are then scored as they are; an encoder reads
/// prompt and completion as one text, with a new line between them. To a decoder a completion has no
/// end-of-text token; in a run its judge reads a completion that ended by itself with one, and so does
/// --closed.
///
/// Example: echo '{"prompt": "Once upon", "completion": " a time"}' | agon score --model models/base
///
/// Example: agon score --reward --model models/judge --input rows.jsonl
#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    /// The model is a reward model: one score a row.
    #[arg(long)]
    reward: bool,
    /// Close every completion of text with the token that ends one, as the judge of a run reads it.
    #[arg(long, requires = "reward")]
    closed: bool,
    /// The rows, one JSON object a line, packed by gzip or zstd or not; `-` is standard input.
    #[arg(long, value_name = "FILE", default_value = "-")]
    input: PathBuf,
}

// No doc comment: clap would show it in place of the command's own.
#[derive(clap::Args)]
pub(crate) struct ModelArguments {
    /// The model: a Hugging Face folder, such as a run's checkpoint, or hf:ORG/NAME@REVISION.
    #[arg(long, value_name = "MODEL")]
    model: ModelSource,
    /// A PEFT folder: a LoRA adapter beside the model. A run's checkpoint that is one names its model.
    #[arg(long, value_name = "MODEL")]
    adapter: Option<ModelSource>,
    /// Where to compute: `cpu`, `cuda`, `cuda:N` or `metal`.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// The numbers to compute in.
    #[arg(long, value_enum, default_value = "f32")]
    dtype: Dtype,
}

/// A number format for weights and activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Dtype {
    /// 32-bit floating point.
    F32,
    /// 16-bit brain floating point.
    Bf16,
}

impl From<Dtype> for DType {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self::F32,
            Dtype::Bf16 => Self::BF16,
        }
    }
}

impl ModelArguments {
    /// Whether an adapter is named beside the model.
    pub(crate) fn has_adapter(&self) -> bool {
        self.adapter.is_some()
    }

    /// The reward model that is named: where an adapter is, that one beside the model, whatever base it names.
    fn find_reward(&self) -> anyhow::Result<FoundModel> {
        let model = match &self.adapter {
            None => Located::find(&self.model, &|| false)?,
            Some(adapter) => Located::beside(
                model_hub::folder(adapter, &|| false)?,
                model_hub::folder(&self.model, &|| false)?,
            ),
        };
        Ok(FoundModel {
            model,
            adapter: None,
            device: model::device(&self.device)?,
            dtype: self.dtype,
        })
    }

    /// The model that is named, fetched first where it is the hub's.
    pub(crate) fn find(&self) -> anyhow::Result<FoundModel> {
        let adapter = self.adapter.as_ref();
        let adapter = adapter.map(|source| model_hub::folder(source, &|| false));
        Ok(FoundModel {
            model: Located::find(&self.model, &|| false)?,
            adapter: adapter.transpose()?,
            device: model::device(&self.device)?,
            dtype: self.dtype,
        })
    }
}

/// A model in a folder, and how to compute with it.
pub(crate) struct FoundModel {
    model: Located,
    adapter: Option<PathBuf>,
    device: Device,
    dtype: Dtype,
}

impl FoundModel {
    /// Reads it as a language model.
    pub(crate) fn open(&self) -> Result<(ModelFolder, LanguageModel), ModelError> {
        let numbers = (self.dtype.into(), &self.device);
        match &self.adapter {
            None => self.model.policy(None, numbers),
            Some(adapter) => open_policy(&self.model.path, Some(adapter), None, numbers),
        }
    }
}

impl Arguments {
    fn ending(&self) -> rows::Ending {
        match self.closed {
            true => rows::Ending::Closed,
            false => rows::Ending::Written,
        }
    }
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let (name, input) = rows::open_input(&arguments.input)?;
    match arguments.reward {
        true => {
            let model = arguments.model.find_reward()?;
            reward::run(&model, arguments.ending(), (&name, input))
        }
        false => log_probabilities::run(&arguments.model.find()?, &name, input),
    }
}
