//! `[preference.fit]`: training of reward models on pairs.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{
    checks::Checks,
    lora::LoraSettings,
    model::DtypeSetting,
    optimizer::{LrSchedulerType, OptimizerSettings},
    source::ModelSource,
    source::check_source,
};

/// Training of a reward model on pairs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FitSettings {
    /// Head of the reward model.
    pub head: Head,
    /// Source of the backbone; without it, the initial policy.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<ModelSource>,
    /// Rank of the LoRA adapter, with which the frozen backbone is shared; 0: all weights are trained.
    pub lora_rank: usize,
    /// LoRA scaling numerator: the update is scaled by `lora_alpha / lora_rank`.
    pub lora_alpha: f64,
    /// Dropout probability of the adapter's inputs during training.
    pub lora_dropout: f64,
    /// Modules that the adapter is attached to.
    pub target_modules: Vec<String>,
    /// Pooling of the response's hidden states.
    pub pooling: PoolingSetting,
    /// Whether the backbone's mean log-likelihood of the response is a feature of the head.
    pub likelihood: bool,
    /// Number of planes of the pairwise head, whose embeddings have twice as many dimensions.
    pub planes: usize,
    /// Passes over the pairs.
    pub epochs: usize,
    /// Pairs per step.
    pub train_batch_size: usize,
    /// Maximum number of tokens per pass of a step; 0: no limit.
    pub max_tokens_per_micro_batch: usize,
    /// Precision of matrix products with weights in training, on the CPU.
    pub precision: DtypeSetting,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Decay of the learning rate after warm-up.
    pub lr_scheduler_type: LrSchedulerType,
    /// Fraction of the steps spent on linear warm-up.
    pub warmup_ratio: f64,
    /// Final learning rate, as a fraction of the peak.
    pub min_lr_ratio: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Decay rate of the first moment.
    pub adam_beta1: f64,
    /// Decay rate of the second moment.
    pub adam_beta2: f64,
    /// Maximum gradient norm.
    pub max_grad_norm: f64,
    /// Label smoothing: the fraction of the distance to ½ that labels are moved.
    pub label_smoothing: f64,
    /// Maximum number of tokens of prompt and response together; longer pairs are removed and counted.
    pub max_length: usize,
    /// Fraction of the pairs held out for validation, when there is no separate file.
    pub validation: f64,
    /// Source of annotated pairs.
    pub pairs: PairsSettings,
}

/// Head of a reward model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Head {
    /// One score; p = σ(r − r′).
    BradleyTerry,
    /// A score plus a skew-symmetric form of embeddings, which can represent cyclic preferences.
    Pairwise,
}

/// Pooling of the response's hidden states.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PoolingSetting {
    /// Hidden state of the last token.
    Last,
    /// Mean.
    Mean,
    /// Sum, divided by eight.
    Sum,
}

/// Source of annotated pairs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum PairsSettings {
    /// Two completions of the base policy for each of fresh posts, labelled by a noisy annotator.
    Playground(PlaygroundPairs),
    /// A file of pairs.
    Dataset(DatasetPairs),
}

/// Generated pairs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlaygroundPairs {
    /// Number of pairs.
    pub count: usize,
    /// Fraction of the labels that is flipped.
    pub flip: f64,
    /// Strength of the annotator's cyclic preference between styles.
    pub cycle: f64,
}

/// A file of pairs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DatasetPairs {
    /// A file, a folder of shards or a glob: JSON Lines, a JSON list or Parquet.
    pub path: PathBuf,
    /// Column of the prompt; in rows without it, the prompt is the common prefix of both dialogues.
    pub prompt_column: String,
    /// Column of the preferred response or dialogue.
    pub chosen_column: String,
    /// Column of the rejected response or dialogue.
    pub rejected_column: String,
    /// Whether a text prompt is a dialogue, which goes through the chat template: the turns of a `Human:` and an
    /// `Assistant:`, or one of the user.
    pub chat: bool,
    /// Maximum size of a file's rows in bytes: decompressed, and in Parquet of the columns that are read.
    pub max_file_bytes: u64,
    /// Maximum number of rows of a file.
    pub max_rows: u64,
    /// Pairs for validation; empty: the pairs of a fraction of the prompts of `path`.
    pub validation_path: PathBuf,
}

impl FitSettings {
    /// Optimiser and learning-rate schedule.
    #[must_use]
    pub fn optimizer(&self) -> OptimizerSettings {
        OptimizerSettings {
            learning_rate: self.learning_rate,
            lr_scheduler_type: self.lr_scheduler_type,
            warmup_ratio: self.warmup_ratio,
            min_lr_ratio: self.min_lr_ratio,
            weight_decay: self.weight_decay,
            adam_beta1: self.adam_beta1,
            adam_beta2: self.adam_beta2,
            adam_epsilon: OptimizerSettings::DEFAULT_EPSILON,
            max_grad_norm: self.max_grad_norm,
        }
    }

    pub(crate) fn check(&self, checks: &mut Checks) {
        let path = |key: &str| format!("preference.fit.{key}");
        check_source(&path("path"), self.path.as_ref(), checks);
        let lora = LoraSettings {
            rank: self.lora_rank,
            alpha: self.lora_alpha,
            dropout: self.lora_dropout,
            target_modules: &self.target_modules,
        };
        lora.check("preference.fit", checks);
        checks.at_least(self.planes as u64, 1, &path("planes"));
        checks.at_least(self.epochs as u64, 1, &path("epochs"));
        checks.at_least(self.train_batch_size as u64, 1, &path("train_batch_size"));
        checks.at_least(self.max_length as u64, 2, &path("max_length"));
        self.optimizer().check("preference.fit", checks);
        checks.positive(self.max_grad_norm, &path("max_grad_norm"));
        checks.ratio(self.label_smoothing, &path("label_smoothing"));
        checks.require(
            self.validation > 0.0 && self.validation < 1.0,
            &path("validation"),
            format!("{} must be between 0 and 1", self.validation),
        );
        self.pairs.check(checks);
    }
}

impl PairsSettings {
    fn check(&self, checks: &mut Checks) {
        let path = |key: &str| format!("preference.fit.pairs.{key}");
        match self {
            Self::Playground(pairs) => {
                checks.at_least(pairs.count as u64, 10, &path("count"));
                checks.ratio(pairs.flip, &path("flip"));
                checks.finite(pairs.cycle, &path("cycle"));
            }
            Self::Dataset(file) => checks.require(
                !file.path.as_os_str().is_empty(),
                &path("path"),
                "name the file of pairs",
            ),
        }
    }
}
