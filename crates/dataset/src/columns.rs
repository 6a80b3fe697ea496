//! Column names: those of the settings, and the common ones of data sets.

use crate::limits::FileLimits;

/// Columns of complete dialogues, whose last assistant turn is the answer.
pub(crate) const DIALOGUES: [&str; 3] = ["messages", "conversations", "conversation"];
/// Columns of a single answer; the first that exists is used.
pub(crate) const ANSWERS: [&str; 4] = ["completion", "output", "response", "answer"];
/// Columns of a user's question (Alpaca, Orca); the first that exists is used.
pub(crate) const QUESTIONS: [&str; 3] = ["instruction", "question", "input"];
/// Columns that are appended to an `instruction` (Alpaca, Dolly).
pub(crate) const INPUTS: [&str; 2] = ["input", "context"];
/// Columns of the system message (Orca, OpenOrca).
pub(crate) const SYSTEMS: [&str; 2] = ["system", "system_prompt"];
/// Columns of media, which text models cannot read.
pub(crate) const MEDIA: [&str; 6] = ["images", "image", "videos", "video", "audios", "audio"];
/// Column of the tools' JSON schemas.
pub(crate) const TOOLS: &str = "tools";
/// Column of additional chat-template variables.
pub(crate) const TEMPLATE_KWARGS: &str = "chat_template_kwargs";
/// Column of turns before an `instruction` (Alpaca).
pub(crate) const HISTORY: &str = "history";
/// Column of text without a prompt (TRL's standard language-modelling format).
pub(crate) const TEXT: &str = "text";
/// Column with the label of a completion (TRL's unpaired preferences).
pub(crate) const LABEL: &str = "label";

/// A column name and the setting that determines it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    /// Name of the column.
    pub name: String,
    /// Setting or option that determines the name; `None` if fixed.
    pub setting: Option<&'static str>,
}

/// Columns with the label of a pair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LabelColumns {
    /// Probability that the chosen response is preferred.
    Probability(Column),
    /// Scores of both responses.
    Scores {
        /// Score of the chosen response.
        chosen: Column,
        /// Score of the rejected response.
        rejected: Column,
    },
}

impl LabelColumns {
    /// The columns.
    fn all(&self) -> impl Iterator<Item = &Column> {
        let (first, second) = match self {
            Self::Probability(column) => (column, None),
            Self::Scores { chosen, rejected } => (chosen, Some(rejected)),
        };
        [first].into_iter().chain(second)
    }
}

/// Column names by role, what a text prompt is, and the limits of the files that have them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Columns {
    /// Prompt; optional in many formats.
    pub prompt: Column,
    /// Single answer; with the name `completion`, its common synonyms are accepted too.
    pub answer: Column,
    /// Golden answer, which does not affect the format of a row; `None`: not read.
    pub golden: Option<Column>,
    /// Value by which a judge is chosen, which does not affect the format of a row; `None`: not read.
    pub route: Option<Column>,
    /// Preferred response, or the dialogue that ends with it.
    pub chosen: Column,
    /// Rejected response, or the dialogue that ends with it.
    pub rejected: Column,
    /// Label of a pair, which does not affect the format of a row; `None`: not read.
    pub label: Option<LabelColumns>,
    /// Whether a text prompt is a dialogue, which goes through the chat template: the turns of a `Human:` and an
    /// `Assistant:`, or one of the user.
    pub chat: bool,
    /// Limits of each file.
    pub limits: FileLimits,
}

impl Column {
    /// A column whose name is determined by `setting`.
    #[must_use]
    pub fn named(name: &str, setting: &'static str) -> Self {
        Self {
            name: name.to_owned(),
            setting: Some(setting),
        }
    }

    /// A column that `setting` may leave unnamed: `None` if the name is empty.
    #[must_use]
    pub fn optional(name: &str, setting: &'static str) -> Option<Self> {
        (!name.is_empty()).then(|| Self::named(name, setting))
    }

    /// A column with a fixed name.
    fn fixed(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            setting: None,
        }
    }

    /// Suffix of error messages that names the setting; empty without one.
    pub(crate) fn remedy(&self) -> String {
        self.setting
            .map(|setting| format!("; set {setting} to use another column"))
            .unwrap_or_default()
    }
}

impl Default for Columns {
    fn default() -> Self {
        Self {
            prompt: Column::fixed("prompt"),
            answer: Column::fixed("completion"),
            golden: None,
            route: None,
            chosen: Column::fixed("chosen"),
            rejected: Column::fixed("rejected"),
            label: None,
            chat: false,
            limits: FileLimits::default(),
        }
    }
}

impl Columns {
    /// Whether some format may read the column `name`, depending on the other columns of the row.
    pub(crate) fn may_read(&self, name: &str) -> bool {
        self.is_known(name)
            || [&QUESTIONS[..], &INPUTS].concat().contains(&name)
            || [HISTORY, TEXT].contains(&name)
    }

    /// Whether rows with these columns may be texts with an implicit prompt, which depend on all other texts of the
    /// row.
    pub(crate) fn may_be_implicit(&self, names: &[&str]) -> bool {
        let has = |name: &str| names.contains(&name);
        has(&self.chosen.name)
            && has(&self.rejected.name)
            && !has(&self.prompt.name)
            && !DIALOGUES.iter().chain(&QUESTIONS).any(|name| has(name))
    }

    /// Whether the column `name` is the golden answer's.
    pub(crate) fn is_golden(&self, name: &str) -> bool {
        (self.golden.as_ref()).is_some_and(|column| column.name == name)
    }

    /// The columns that do not affect the format of a row: golden answer, route and label.
    pub(crate) fn beside(&self) -> impl Iterator<Item = &Column> {
        let label = self.label.iter().flat_map(LabelColumns::all);
        self.golden.iter().chain(&self.route).chain(label)
    }

    /// Whether some format reads the column `name`.
    pub(crate) fn is_known(&self, name: &str) -> bool {
        let of_format = [&self.prompt, &self.answer, &self.chosen, &self.rejected];
        let mut named = of_format.into_iter().chain(self.beside());
        named.any(|column| column.name == name)
            || [&DIALOGUES[..], &ANSWERS, &SYSTEMS, &MEDIA]
                .concat()
                .contains(&name)
            || [TOOLS, TEMPLATE_KWARGS, LABEL].contains(&name)
    }
}
