//! `[prompts]`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Where prompts come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum PromptsSettings {
    /// Posts of the synthetic summarisation world, a fresh one for every prompt.
    Playground {
        /// What is held up as the answer to a post, for `rpo` and for the adversarial game.
        golden: PlaygroundGolden,
    },
    /// The one prompt of a bandit.
    Bandit {},
    /// Files of prompts.
    Dataset(DatasetPrompts),
}

/// What is held up as the answer to a post.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PlaygroundGolden {
    /// The golden summary.
    Summary,
    /// The annotated pairs' chosen one; the posts are then those of `[preference.fit.pairs]`.
    Chosen,
}

/// Files of prompts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DatasetPrompts {
    /// A file, a folder of shards or a glob; empty: those of `mix`.
    pub path: PathBuf,
    /// Several files, each as often as it weighs.
    pub mix: Vec<MixedFile>,
    /// The column that holds the prompt, as text or as messages.
    pub prompt_column: String,
    /// The column with the golden answer; empty: none.
    pub golden_column: String,
    /// The prompts of evaluations; empty: the last `held_out` distinct prompts.
    pub held_out_path: PathBuf,
    /// How many distinct prompts are held out when `held_out_path` is empty: of several files, of each its share.
    pub held_out: usize,
    /// Whether every epoch has an order of its own.
    pub shuffle: bool,
    /// Whether a prompt that came before is left out.
    pub deduplicate: bool,
    /// Prompts of fewer tokens are left out.
    pub min_length: usize,
    /// What becomes of a prompt of more than `actor.max_prompt_length` tokens.
    pub too_long: TooLong,
}

/// A file among several.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MixedFile {
    /// A file, a folder of shards or a glob.
    pub path: PathBuf,
    /// How often its prompts are asked, against the other files' weights.
    #[serde(default = "one")]
    pub weight: f64,
}

fn one() -> f64 {
    1.0
}

/// What becomes of a prompt that is too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TooLong {
    /// It is an error.
    Refuse,
    /// It is left out and counted.
    Drop,
}

impl DatasetPrompts {
    /// All files of training prompts, with their weights.
    #[must_use]
    pub fn files(&self) -> Vec<MixedFile> {
        if !self.mix.is_empty() {
            return self.mix.clone();
        }
        vec![MixedFile {
            path: self.path.clone(),
            weight: one(),
        }]
    }
}

impl PromptsSettings {
    /// Whether every prompt comes with a golden answer.
    pub(crate) fn has_golden(&self) -> bool {
        match self {
            Self::Playground { .. } => true,
            Self::Bandit {} => false,
            Self::Dataset(dataset) => !dataset.golden_column.is_empty(),
        }
    }
}
