//! `[model]`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::ModelSource;

/// Which language model is trained, in which numbers, where.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSettings {
    /// Where it comes from. Without it the world of `prompts.kind` makes the model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<ModelSource>,
    /// The reference probabilities of a bandit's arms.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reference_probabilities: Option<Vec<f64>>,
    /// The numbers of the weights.
    pub dtype: DtypeSetting,
    /// `cpu`, `cuda`, `cuda:N` or `metal`.
    pub device: String,
    /// A chat template in place of the tokenizer's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chat_template: Option<PathBuf>,
    /// The rank of the adapter that is trained in place of the weights; 0: none.
    pub lora_rank: usize,
    /// What a fresh adapter's product is scaled by, over its rank.
    pub lora_alpha: f64,
    /// The share of its inputs that training leaves out.
    pub lora_dropout: f64,
    /// The modules that a fresh adapter stands beside.
    pub target_modules: Vec<String>,
    /// Where the adapter to start from comes from, in place of a fresh one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter: Option<ModelSource>,
}

/// A number format for weights and activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DtypeSetting {
    /// 32-bit floating point.
    F32,
    /// 16-bit brain floating point.
    Bf16,
}
