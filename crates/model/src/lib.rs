//! Decoder-only language models and reward models: loading, tokenising, log-probabilities, sampling, training, saving.
//!
//! A [`LanguageModel`] is a decoder-only transformer read from a Hugging Face folder. It has two paths over the same
//! weights: [`LanguageModel::logprobs`] is differentiable and takes ragged batches; [`decode`] extends many sequences
//! by one token each through a KV cache, and the [`MixtureSampler`] runs it for a policy and its reference together. An
//! [`Adapter`] (LoRA) is added to frozen weights and trained in their place. A [`RewardModel`] is the same decoder with
//! a scoring head; an [`Encoder`] is a pretrained classifier with one label. Does not know objectives, judges or who
//! publishes weights.

mod chat;
mod config;
pub mod decode;
mod encoder;
mod error;
#[cfg(test)]
mod fixtures;
mod folder;
mod gguf;
mod guarded_tokenizer;
pub mod input_file;
mod keys;
mod logprobs;
mod lora;
mod mixture;
mod moving_average;
mod optimizer;
mod panels;
mod precision;
mod published;
mod ragged;
mod reward;
pub mod roofline;
mod rope;
pub mod sampling;
mod schedule;
mod shards;
mod special_tokens;
mod stop_tokens;
mod token_texts;
mod tokenizer;
mod transformer;
#[cfg(test)]
mod transformers_parity;
mod weights;

pub use crate::chat::given_answers::{AnswerBoundary, EncodedAnswers};
pub use candle_core::{DType, Device, Tensor};
pub use chat::check_chat_template;
pub use config::{
    Architecture, ModelConfig, SUPPORTED_ARCHITECTURES, SUPPORTED_REWARD_ARCHITECTURES,
};
pub use encoder::{Encoder, SUPPORTED_ENCODERS};
pub use error::ModelError;
pub use folder::{ModelFolder, dtype_name, is_licence, save_folder};
pub use gguf::{GgufModel, is_gguf};
pub use kernels::Gradients;
pub use logprobs::TokenLogprobs;
pub use lora::{Adapter, AdapterFolder, BaseModel, LoraConfig, open_policy, save_policy};
pub use mixture::MixtureInputs;
pub use moving_average::MovingAverage;
pub use optimizer::{AdamWSettings, Optimizer};
pub use precision::{sampling_precision, training_precision};
pub use published::{Published, PublishedForm, PublishedWeights};
pub use ragged::{RaggedBatch, Sequence, SharedPrefix, within_tokens};
pub use reward::{
    Pooling, RewardArchitecture, RewardConfig, RewardFolder, RewardKind, RewardModel,
};
pub use rope::{Llama3, Rope, RopeScaling, Yarn};
pub use sampling::{
    CompletionSampler, Finished, MixtureSampler, Precision, Request, Sampler, SamplingSettings,
};
pub use schedule::Schedule;
pub use shards::indexed_files;
pub use stop_tokens::StopTokens;
pub use tokenizer::Tokenizer;
pub use transformer::LanguageModel;
pub use weights::{HeadForm, Weights};

/// Opens a device by name: `cpu`, `cuda`, `cuda:N` or `metal`.
///
/// # Errors
/// When the name is unknown, or this build or machine does not have the device.
pub fn device(name: &str) -> Result<Device, ModelError> {
    let (kind, ordinal) = name.split_once(':').unwrap_or((name, "0"));
    let unavailable = |reason: String| ModelError::Device {
        name: name.to_owned(),
        reason,
    };
    let ordinal: usize = ordinal
        .parse()
        .map_err(|_| unavailable("the ordinal after ':' is not a number".into()))?;
    match kind {
        "cpu" => Ok(Device::Cpu),
        "cuda" => Device::new_cuda(ordinal).map_err(|error| unavailable(error.to_string())),
        "metal" => Device::new_metal(ordinal).map_err(|error| unavailable(error.to_string())),
        _ => Err(unavailable(
            "it is not one of cpu, cuda, cuda:N, metal".into(),
        )),
    }
}
