//! Which columns of a row hold what, and the names under which the field knows them.

/// Columns that hold a whole dialogue, whose last turn of the assistant is the answer.
pub(crate) const DIALOGUES: [&str; 3] = ["messages", "conversations", "conversation"];
/// Columns that hold one answer; the first that a row has is taken.
pub(crate) const ANSWERS: [&str; 4] = ["completion", "output", "response", "answer"];
/// Columns that hold what a user asks (Alpaca, Orca); the first that a row has is taken.
pub(crate) const QUESTIONS: [&str; 3] = ["instruction", "question", "input"];
/// Columns that go on with an `instruction` (Alpaca, Dolly).
pub(crate) const INPUTS: [&str; 2] = ["input", "context"];
/// Columns that hold the system's turn (Orca, OpenOrca).
pub(crate) const SYSTEMS: [&str; 2] = ["system", "system_prompt"];
/// Columns whose content no model here can read.
pub(crate) const MEDIA: [&str; 6] = ["images", "image", "videos", "video", "audios", "audio"];
/// The column of JSON schemas of functions.
pub(crate) const TOOLS: &str = "tools";
/// The column of further variables of the chat template.
pub(crate) const TEMPLATE_KWARGS: &str = "chat_template_kwargs";
/// The column of turns before an `instruction` (Alpaca).
pub(crate) const HISTORY: &str = "history";
/// The column of text without a prompt (TRL's standard language-modelling form).
pub(crate) const TEXT: &str = "text";
/// The column that says whether a completion is wanted (TRL's unpaired preferences).
pub(crate) const LABEL: &str = "label";

/// A column, and the setting that names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    /// Its name.
    pub name: String,
    /// The setting or option that names it; `None` where nothing does.
    pub setting: Option<&'static str>,
}

/// Which columns of a row hold what, where the settings name them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Columns {
    /// The prompt; many forms need none.
    pub prompt: Column,
    /// The one answer of a row; where it is `completion`, the field's other names for it are tried too.
    pub answer: Column,
    /// A golden answer, which is no part of a row's form; `None`: none is read.
    pub golden: Option<Column>,
    /// The preferred response, or the dialogue that ends with it.
    pub chosen: Column,
    /// The other.
    pub rejected: Column,
}

impl Column {
    /// A column that `setting` names.
    #[must_use]
    pub fn named(name: &str, setting: &'static str) -> Self {
        Self {
            name: name.to_owned(),
            setting: Some(setting),
        }
    }

    /// A column that no setting names.
    fn fixed(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            setting: None,
        }
    }

    /// What an error adds about the setting; empty without one.
    pub(crate) fn remedy(&self) -> String {
        self.setting
            .map(|setting| format!("; {setting} names another column"))
            .unwrap_or_default()
    }
}

impl Default for Columns {
    fn default() -> Self {
        Self {
            prompt: Column::fixed("prompt"),
            answer: Column::fixed("completion"),
            golden: None,
            chosen: Column::fixed("chosen"),
            rejected: Column::fixed("rejected"),
        }
    }
}

impl Columns {
    /// Whether `name` is among the columns that some form reads.
    pub(crate) fn knows(&self, name: &str) -> bool {
        let named = [&self.prompt, &self.answer, &self.chosen, &self.rejected];
        let mut named = named.into_iter().chain(&self.golden);
        named.any(|column| column.name == name)
            || [&DIALOGUES[..], &ANSWERS, &SYSTEMS, &MEDIA]
                .concat()
                .contains(&name)
            || [TOOLS, TEMPLATE_KWARGS, LABEL].contains(&name)
    }
}
