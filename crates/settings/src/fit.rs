//! `[preference.fit]` and `[preference.apo]`: how preference models are made, and made again.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{LrSchedulerType, ModelSource};

/// How a preference model is fitted to pairs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FitSettings {
    /// What it becomes.
    pub head: Head,
    /// The trunk it starts from; without it, the policy at the start.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<ModelSource>,
    /// The rank of the adapter that is trained in place of the trunk, which is then shared; 0: none.
    pub lora_rank: usize,
    /// What its product is scaled by, over its rank.
    pub lora_alpha: f64,
    /// The share of its inputs that training leaves out.
    pub lora_dropout: f64,
    /// The modules that it stands beside.
    pub target_modules: Vec<String>,
    /// How the response's hidden states become the head's input.
    pub pooling: PoolingSetting,
    /// Whether the trunk's own mean log-likelihood of the response is a feature.
    pub likelihood: bool,
    /// Planes of the pairwise head: it has twice as many embedding numbers.
    pub planes: usize,
    /// How often every pair is read.
    pub epochs: usize,
    /// Pairs in a step.
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
    /// Labels move this share of the way to ½.
    pub label_smoothing: f64,
    /// Tokens of prompt and response together; longer pairs are left out and counted.
    pub max_length: usize,
    /// The share of the pairs that is held out, when they do not come with a file of their own.
    pub validation: f64,
    /// Annotated pairs.
    pub pairs: PairsSettings,
}

/// What a fitted preference model is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Head {
    /// One score; p = σ(r − r′).
    BradleyTerry,
    /// A score and a skew-symmetric form of embeddings; it can hold cycles.
    Pairwise,
}

/// How the response's hidden states become the head's input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PoolingSetting {
    /// The last token's.
    Last,
    /// Their mean.
    Mean,
    /// Their sum, an eighth of it.
    Sum,
}

/// Annotated pairs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum PairsSettings {
    /// Two completions of the base for each of fresh posts, labelled by a noisy annotator.
    Playground(PlaygroundPairs),
    /// A file of pairs.
    Dataset(DatasetPairs),
}

/// Generated pairs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlaygroundPairs {
    /// How many.
    pub count: usize,
    /// The share of the labels that is flipped.
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
    /// The column of the prompt; where rows have none, it is what both dialogues begin with.
    pub prompt_column: String,
    /// The column of the preferred response or dialogue.
    pub chosen_column: String,
    /// The column of the other.
    pub rejected_column: String,
    /// The pairs of validation; empty: those of a share of the prompts of `path`.
    pub validation_path: PathBuf,
}

/// The adversarial game: the preference model is fitted again on the policy's own samples.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ApoSettings {
    /// Learner steps between two rounds; 0: no rounds.
    pub refresh_steps: u64,
    /// Rounds in all; 0: as many as there are steps for.
    pub max_rounds: u64,
    /// Golden prompts answered in a round.
    pub prompts: usize,
    /// The policy's samples for each of them: k.
    pub samples: usize,
    /// Weight of the golden answers' term against the annotated pairs': c.
    pub coef: f64,
    /// The golden answers' term.
    pub form: ApoForm,
    /// Whether labels wait for the round's model, which keeps rounds at their steps; without it the model before
    /// judges until the new one is there.
    pub wait: bool,
    /// Whether the annotated pairs take part; without them the game has no finite optimum.
    pub annotated: bool,
    /// A model whose accuracy on held-out annotated pairs is below this is refused.
    pub min_accuracy: f64,
    /// A model whose calibration error on them is above this is refused.
    pub max_ece: f64,
}

/// The golden answers' term.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ApoForm {
    /// `−log σ(r_gold − r_sample)`.
    Ranking,
    /// `r_sample − r_gold`.
    Linear,
}
