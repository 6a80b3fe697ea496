//! `[playground]` and `[sft]`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::LrSchedulerType;

/// The base policy of the synthetic summarisation world.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlaygroundSettings {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Transformer blocks.
    pub layers: usize,
    /// Attention heads.
    pub heads: usize,
    /// Width of the feed-forward part.
    pub intermediate_size: usize,
    /// Where bases are kept.
    pub base_dir: PathBuf,
}

/// Supervised fine-tuning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SftSettings {
    /// Rows of prompt and completion: a file, a folder of shards or a glob; without it the playground's own
    /// examples.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// The column of the prompt.
    pub prompt_column: String,
    /// The column of the completion.
    pub completion_column: String,
    /// Optimiser steps.
    pub steps: u64,
    /// Rows in a step.
    pub train_batch_size: usize,
    /// The learning rate at its height.
    pub learning_rate: f64,
    /// How it falls.
    pub lr_scheduler_type: LrSchedulerType,
    /// Share of the steps over which it rises.
    pub warmup_ratio: f64,
    /// The share of it that is left at the end.
    pub min_lr_ratio: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Decay of the gradient's mean.
    pub adam_beta1: f64,
    /// Decay of the squared gradient's mean.
    pub adam_beta2: f64,
    /// The gradient's norm is clipped to it.
    pub max_grad_norm: f64,
    /// Tokens of prompt and completion together.
    pub max_length: usize,
}
