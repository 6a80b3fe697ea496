//! `[prompts]`: sources of prompts.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{checks::Checks, fit::PairsSettings, settings::Settings};

/// Source of prompts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum PromptsSettings {
    /// Generated posts of the synthetic summarisation task, a new one for every prompt.
    Playground {
        /// Golden answer of a post, for `rpo` and for adversarial preference optimisation.
        golden: PlaygroundGolden,
    },
    /// The single prompt of a bandit.
    Bandit {},
    /// Files of prompts.
    Dataset(DatasetPrompts),
}

/// Golden answer of a post.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PlaygroundGolden {
    /// The golden summary.
    Summary,
    /// The chosen answer of the annotated pairs; the posts are then those of `[preference.fit.pairs]`.
    Chosen,
}

/// Files of prompts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DatasetPrompts {
    /// A file, a folder of shards or a glob; empty: the files of `mix`.
    pub path: PathBuf,
    /// Several files, sampled in proportion to their weights.
    pub mix: Vec<MixedFile>,
    /// Column of the prompt, as text or as messages.
    pub prompt_column: String,
    /// Column of the golden answer; empty: none.
    pub golden_column: String,
    /// Column by whose value a judge of the kind "route" chooses its member; empty: none. Where it is the golden column,
    /// rows may be without a golden answer.
    pub route_column: String,
    /// Whether a text prompt is a dialogue, which goes through the chat template: the turns of a `Human:` and an
    /// `Assistant:`, or one of the user.
    pub chat: bool,
    /// Maximum size of a file's rows in bytes: decompressed, and in Parquet of the columns that are read.
    pub max_file_bytes: u64,
    /// Maximum number of rows of a file.
    pub max_rows: u64,
    /// Prompts of evaluations; empty: the last `held_out` distinct prompts.
    pub held_out_path: PathBuf,
    /// Number of distinct held-out prompts when `held_out_path` is empty, in proportion to the weights of several files.
    pub held_out: usize,
    /// Whether every epoch is shuffled.
    pub shuffle: bool,
    /// Whether duplicate prompts are removed.
    pub deduplicate: bool,
    /// Minimum length of a prompt in tokens; shorter ones are removed.
    pub min_length: usize,
    /// Handling of prompts of more than `actor.max_prompt_length` tokens.
    pub too_long: TooLong,
    /// Frequency of a prompt after the first epoch.
    pub curriculum: CurriculumSetting,
    /// Weight of a prompt without signal, relative to the signal of certain labels.
    pub curriculum_floor: f64,
}

/// Frequency of a prompt after the first epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CurriculumSetting {
    /// Once per epoch.
    None,
    /// In proportion to `curriculum_floor` plus the mean |2p − 1| of its last labels.
    Signal,
}

/// One file of a mix.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MixedFile {
    /// A file, a folder of shards or a glob.
    pub path: PathBuf,
    /// Sampling weight relative to the other files.
    #[serde(default = "one")]
    pub weight: f64,
}

/// The default weight of a file.
pub(crate) fn one() -> f64 {
    1.0
}

/// Handling of prompts that are too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TooLong {
    /// An error.
    Refuse,
    /// Removed and counted.
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

    /// Whether rows may be without a golden answer: the routing judge distinguishes them.
    #[must_use]
    pub fn has_optional_golden(&self) -> bool {
        !self.golden_column.is_empty() && self.golden_column == self.route_column
    }

    fn check(&self, settings: &Settings, checks: &mut Checks) {
        checks.require(
            self.path.as_os_str().is_empty() != self.mix.is_empty(),
            "prompts.path",
            "name the file of prompts, or several in prompts.mix, not both",
        );
        for file in &self.mix {
            checks.positive(file.weight, "prompts.mix");
        }
        let holds_out = self.held_out > 0 || !self.held_out_path.as_os_str().is_empty();
        checks.require(
            holds_out || settings.evaluation.prompts == 0,
            "prompts.held_out",
            "0 leaves no prompts for evaluations: hold some out, name prompts.held_out_path, or set evaluation.prompts = 0",
        );
        checks.require(
            self.curriculum == CurriculumSetting::None || self.mix.len() < 2,
            "prompts.curriculum",
            "\"signal\" draws from one set of prompts, and prompts.mix has weights of its own: name prompts.path, or set \
             it to \"none\"",
        );
        checks.positive(self.curriculum_floor, "prompts.curriculum_floor");
        checks.ratio(self.curriculum_floor, "prompts.curriculum_floor");
        checks.require(
            settings.model.path.is_some(),
            "model.path",
            "prompts.kind = \"dataset\" needs a model: name a Hugging Face folder, or hf:ORG/NAME",
        );
    }
}

impl PromptsSettings {
    /// Whether every prompt has a golden answer.
    pub(crate) fn has_golden(&self) -> bool {
        match self {
            Self::Playground { .. } => true,
            Self::Bandit {} => false,
            Self::Dataset(dataset) => {
                !dataset.golden_column.is_empty() && !dataset.has_optional_golden()
            }
        }
    }

    /// Whether some prompts may have a golden answer.
    pub(crate) fn may_have_golden(&self) -> bool {
        match self {
            Self::Dataset(dataset) => !dataset.golden_column.is_empty(),
            other => other.has_golden(),
        }
    }

    /// Whether prompts have a column by which a judge can be chosen.
    pub(crate) fn has_routes(&self) -> bool {
        matches!(self, Self::Dataset(dataset) if !dataset.route_column.is_empty())
    }

    pub(crate) fn check(&self, settings: &Settings, checks: &mut Checks) {
        match self {
            Self::Playground { golden } => checks.require(
                *golden != PlaygroundGolden::Chosen
                    || matches!(settings.preference.fit.pairs, PairsSettings::Playground(_)),
                "prompts.golden",
                "\"chosen\" refers to the playground's annotated pairs: set preference.fit.pairs.kind = \"playground\"",
            ),
            Self::Bandit {} => checks.require(
                settings.actor.max_new_tokens == 1,
                "actor.max_new_tokens",
                "a bandit's completion is one arm: set it to 1",
            ),
            Self::Dataset(dataset) => dataset.check(settings, checks),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::checks::tests::assert_reported;

    #[test]
    fn a_dataset_needs_a_model() {
        assert_reported(&[("[prompts]\nkind = \"dataset\"\npath = \"x\"", "model.path")]);
    }

    #[test]
    fn contradictions_of_the_curriculum_are_reported() {
        let of = |keys: &str| {
            format!(
                "[model]\npath = \"m\"\n[prompts]\nkind = \"dataset\"\ncurriculum = \"signal\"\n{keys}"
            )
        };
        let mix = of("mix = [{ path = \"a\" }, { path = \"b\" }]");
        let floor = of("path = \"a\"\ncurriculum_floor = 0");
        assert_reported(&[
            (&mix, "prompts.curriculum: \"signal\" draws from one set"),
            (&floor, "prompts.curriculum_floor: 0 must be greater than 0"),
        ]);
    }
}
