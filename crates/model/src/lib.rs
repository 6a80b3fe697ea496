//! The language model: load, tokenise, score, sample, differentiate, save.
//!
//! A [`LanguageModel`] is a decoder-only transformer read from a Hugging Face folder. It has two paths
//! over the same weights: [`LanguageModel::score`] is differentiable and takes packed ragged batches;
//! the cached path of [`decode`] writes one token of many sequences at once, and the [`Sampler`] drives
//! it for a policy and its reference together. An [`Adapter`] stands beside the weights and is trained in their
//! place. Tokens go in, log-probabilities come out. A
//! [`RewardModel`] is the same decoder with a head that gives a score instead; an [`Encoder`] is a ready-made model that gives
//! one. What they are for, and who else has the weights, this crate does not know. Nothing else in the house knows a tensor
//! operation.

mod answered;
mod chat;
mod config;
mod continuing;
pub mod decode;
mod encoder;
mod error;
#[cfg(test)]
mod fixtures;
mod folder;
mod keys;
mod lora;
mod network;
pub mod ops;
mod optimizer;
mod packed;
#[cfg(test)]
mod reference;
mod reward;
pub mod roofline;
mod rope;
pub mod sampling;
mod schedule;
mod score;
mod shards;
mod special;
mod stop_tokens;
mod token_texts;
mod tokenizer;
mod weights;

pub use answered::{AnsweredIds, Seam};
pub use candle_core::{DType, Device, Tensor};
pub use chat::check_chat_template;
pub use config::{
    Architecture, ModelConfig, SUPPORTED_ARCHITECTURES, SUPPORTED_REWARD_ARCHITECTURES,
};
pub use encoder::{Encoder, SUPPORTED_ENCODERS};
pub use error::ModelError;
pub use folder::{ModelFolder, dtype_name, is_licence, save_folder};
pub use lora::{Adapter, AdapterFolder, BaseModel, LoraConfig, open_policy, save_policy};
pub use network::LanguageModel;
pub use ops::Gradients;
pub use optimizer::{AdamWSettings, Optimizer};
pub use packed::{Fork, Packed, Sequence};
pub use reward::{
    Pooling, RewardArchitecture, RewardConfig, RewardFolder, RewardKind, RewardModel,
};
pub use rope::{Llama3, Rope, RopeScaling, Yarn};
pub use sampling::{
    CompletionWriter, Continuation, Finished, Precision, Request, Sampler, SamplingSettings,
};
pub use schedule::Schedule;
pub use score::Scores;
pub use stop_tokens::StopTokens;
pub use tokenizer::Tokenizer;
pub use weights::Weights;

/// The device that a setting names: `cpu`, `cuda`, `cuda:N` or `metal`.
///
/// # Errors
/// When the name is none of these, or the device cannot be had in this build on this machine.
pub fn device(name: &str) -> Result<Device, ModelError> {
    let (kind, ordinal) = name.split_once(':').unwrap_or((name, "0"));
    let unavailable = |reason: String| ModelError::Device {
        name: name.to_owned(),
        reason,
    };
    let ordinal: usize = ordinal
        .parse()
        .map_err(|_| unavailable("the number after ':' is not one".into()))?;
    match kind {
        "cpu" => Ok(Device::Cpu),
        "cuda" => Device::new_cuda(ordinal).map_err(|error| unavailable(error.to_string())),
        "metal" => Device::new_metal(ordinal).map_err(|error| unavailable(error.to_string())),
        _ => Err(unavailable(
            "it is not one of cpu, cuda, cuda:N, metal".into(),
        )),
    }
}
