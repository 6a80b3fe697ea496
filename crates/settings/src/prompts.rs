//! `[prompts]`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Where prompts come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum PromptsSettings {
    /// Posts of the synthetic summarisation world, a fresh one for every prompt.
    Playground {
        /// What is held up as the answer to a post, for `rpo` and for the adversarial game.
        golden: PlaygroundGolden,
    },
    /// The one prompt of a bandit.
    Bandit {},
    /// A file of prompts, one JSON object a line.
    Jsonl(JsonlPrompts),
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

/// A file of prompts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JsonlPrompts {
    /// The file; `.gz` is read too.
    pub path: PathBuf,
    /// The column that holds the prompt, as text or as messages.
    pub prompt_column: String,
    /// The column with the golden answer; empty: none.
    pub golden_column: String,
    /// The prompts of evaluations; empty: the last `held_out` rows of `path`.
    pub held_out_path: PathBuf,
    /// How many rows of `path` are held out when `held_out_path` is empty.
    pub held_out: usize,
    /// Whether every epoch has an order of its own.
    pub shuffle: bool,
}

impl PromptsSettings {
    /// Whether every prompt comes with a golden answer.
    pub(crate) fn has_golden(&self) -> bool {
        match self {
            Self::Playground { .. } => true,
            Self::Bandit {} => false,
            Self::Jsonl(jsonl) => !jsonl.golden_column.is_empty(),
        }
    }
}
