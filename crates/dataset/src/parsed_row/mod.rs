//! Parser of the common formats of prompts, fine-tuning examples and preferences.
//!
//! | format | columns | prompt | answers |
//! |---|---|---|---|
//! | text | `prompt`, and `completion` or `chosen`, `rejected`, all text | the text unchanged | the texts |
//! | messages | the same, with the prompt or an answer as messages | the dialogue; a text prompt is a user turn | text, or one assistant turn |
//! | complete dialogues | `chosen`, `rejected` (or `completion`) that include the prompt, with or without a `prompt` | the common turns | the last turn of each |
//! | dialogue | `messages`, `conversations` or `conversation` | the turns before the last assistant turn | that turn, or `completion`, `chosen`, `rejected` |
//! | instruction | `instruction` with `input`, `question`, `system`, `history` (Alpaca, Orca) | a dialogue | `output`, `response`, `answer`, `chosen`, `rejected` |
//! | texts with an implicit prompt | `chosen`, `rejected` alone (Anthropic's HH) | the common prefix | the rest |
//! | text only | `text` | none | the text |
//!
//! With `chat`, a text prompt is a dialogue: the turns of a `Human:` and an `Assistant:`, or one of the user.
//!
//! The formats are tried in this order. The reference is TRL's documentation of data-set formats (`is_conversational`,
//! `maybe_extract_prompt`, `maybe_convert_to_chatml`, `apply_chat_template`), and LLaMA-Factory's for ShareGPT and
//! Alpaca. In a prompt column a final assistant turn is continued by the completion; in a column of complete dialogues
//! it is the answer.

mod answers;
mod label;
mod prompt_forms;
mod row_view;
mod transcript;

use std::collections::BTreeSet;

use messages::{Message, PromptText};
use serde_json::{Map, Value};

use crate::{
    columns::{Column, Columns, LABEL, TEXT},
    parsed_row::{
        label::label_of,
        prompt_forms::RawPrompt,
        row_view::RowView,
        transcript::{first_turn, has_later_turns, has_speakers},
    },
    turn::{answer, check_trained_on, shortened},
};

/// A prompt and its answer.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptAnswer {
    /// The prompt.
    pub prompt: PromptText,
    /// The answer.
    pub answer: String,
}

/// A prompt with a preferred and a rejected response.
#[derive(Debug, Clone, PartialEq)]
pub struct PreferencePair {
    /// The prompt.
    pub prompt: PromptText,
    /// The preferred response; may be empty, as in real data sets.
    pub chosen: String,
    /// The rejected response.
    pub rejected: String,
    /// Whether a response has further turns in it, as where the texts of two dialogues part before their last turn.
    pub has_later_turns: bool,
}

pub use label::PairLabel;
pub use transcript::dialogue;

/// A row in a recognised format.
#[derive(Debug, Clone)]
pub struct ParsedRow<'a> {
    row: RowView<'a>,
    content: PromptContent,
    /// Columns that the format reads, some of which the row may lack.
    read: BTreeSet<&'a str>,
}

/// The prompt of a row, with an answer where the format includes one.
#[derive(Debug, Clone)]
enum PromptContent {
    /// A prompt.
    Prompt(PromptText),
    /// A prompt and the answer at the end of its dialogue.
    WithAnswer(PromptText, Message),
    /// The common prefix of two texts, whose remainders are the answers.
    Implicit(PreferencePair),
    /// No prompt: the row is a text.
    TextOnly(String),
}

/// Kind of a row's prompt, for consistency checks of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum PromptKind {
    Text,
    Dialogue,
    /// A dialogue that ends with an assistant turn, in a prompt column named by the settings.
    Continued,
    /// No prompt: the row is a text.
    TextOnly,
}

impl<'a> ParsedRow<'a> {
    /// Parses a row.
    ///
    /// # Errors
    /// When a column is missing or malformed; the message names the setting of the column.
    pub fn of(row: &'a Map<String, Value>, columns: &'a Columns) -> Result<Self, String> {
        let row = RowView { row, columns };
        row.reject_media()?;
        let mut read = row.read_in_every_format();
        let content = match row.find(&mut read)? {
            RawPrompt::Text(text) => row.of_text(text, &mut read)?,
            RawPrompt::Turns(turns, answer) => {
                let prompt = row.in_context(turns)?;
                match answer {
                    None => PromptContent::Prompt(prompt),
                    Some(answer) => PromptContent::WithAnswer(prompt, answer),
                }
            }
            RawPrompt::Implicit(turns, mut pair) => {
                match turns {
                    Some(turns) => pair.prompt = row.in_context(turns)?,
                    None => row.reject_context()?,
                }
                PromptContent::Implicit(pair)
            }
            RawPrompt::TextOnly(text) => row.of_text_only(text)?,
        };
        // Two texts with an implicit prompt are all of their format.
        if !matches!(content, PromptContent::Implicit(_)) {
            read.extend(row.answer_name());
        }
        Ok(Self { row, content, read })
    }

    /// The prompt.
    ///
    /// # Errors
    /// When the row has none.
    pub fn prompt(&self) -> Result<PromptText, String> {
        match &self.content {
            PromptContent::Prompt(prompt) | PromptContent::WithAnswer(prompt, _) => {
                Ok(prompt.clone())
            }
            PromptContent::Implicit(pair) => Ok(pair.prompt.clone()),
            PromptContent::TextOnly(_) => Err(format!(
                "a row with {TEXT:?} only has no prompt{}: with {TEXT:?} there, completions continue the text",
                self.row.columns.prompt.remedy()
            )),
        }
    }

    /// The golden answer; `None` when the settings name no column for it.
    ///
    /// # Errors
    /// When it is missing, or is neither text nor messages that end with an assistant turn.
    pub fn golden(&self) -> Result<Option<String>, String> {
        let Columns {
            golden,
            chosen,
            rejected,
            ..
        } = self.row.columns;
        let Some(golden) = golden else {
            return Ok(None);
        };
        let answer = match &self.content {
            PromptContent::Implicit(pair) if golden.name == chosen.name => &pair.chosen,
            PromptContent::Implicit(pair) if golden.name == rejected.name => &pair.rejected,
            _ => return self.single_response(golden).map(Some),
        };
        Ok(Some(first_turn(answer)))
    }

    /// The value by which a judge is chosen, as text: of text itself, of a number or a truth value its JSON. `None` when
    /// it is missing, null or blank, or when the settings name no column for it.
    ///
    /// # Errors
    /// When it is a list or an object and not the golden answer as messages.
    pub fn route(&self) -> Result<Option<String>, String> {
        let Some(column) = self.row.columns.route.as_ref() else {
            return Ok(None);
        };
        let value = match self.row.value(&column.name) {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::String(text)) => text.clone(),
            Some(value @ (Value::Number(_) | Value::Bool(_))) => value.to_string(),
            Some(_) if self.row.columns.is_golden(&column.name) => self.response(column)?,
            Some(Value::Array(_) | Value::Object(_)) => {
                return Err(format!(
                    "column {:?} is neither text nor a number{}",
                    column.name,
                    column.remedy()
                ));
            }
        };
        Ok(Some(value).filter(|text| !text.trim().is_empty()))
    }

    /// The prompt and its answer: `completion` or a synonym, the chosen response of a pair, or the end of a dialogue. A
    /// row with text only has an empty prompt.
    ///
    /// # Errors
    /// When a column is missing or malformed, or when the row or the turn of the answer says that the answer is not to be
    /// trained on.
    pub fn answered(&self) -> Result<PromptAnswer, String> {
        if self.row.value(LABEL) == Some(&Value::Bool(false)) {
            return Err(format!(
                "{LABEL:?} is false: the completion is not wanted; remove such rows"
            ));
        }
        let chosen = &self.row.columns.chosen;
        let chosen = self.row.has(&chosen.name).then(|| chosen.clone());
        let column = self.row.answer_column().or(chosen);
        let answer = match (&self.content, column) {
            (PromptContent::TextOnly(text), _) => {
                return Ok(PromptAnswer {
                    prompt: PromptText::Text(String::new()),
                    answer: text.clone(),
                });
            }
            (PromptContent::Implicit(pair), _) => first_turn(&pair.chosen),
            (_, Some(column)) => {
                self.check_trained_on(self.row.filled(&column.name))?;
                self.check_trained_on(self.own_answer())?;
                let answer = self.single_response(&column)?;
                self.check_agreement(&[&answer])?;
                answer
            }
            (PromptContent::WithAnswer(_, turn), None) => {
                self.check_trained_on(self.own_answer())?;
                self::answer(turn)?
            }
            (PromptContent::Prompt(_), None) => return Err(self.row.no_answer()),
        };
        Ok(PromptAnswer {
            prompt: self.prompt()?,
            answer,
        })
    }

    /// The prompt and two responses.
    ///
    /// # Errors
    /// When a column is missing or malformed.
    pub fn pair(&self) -> Result<PreferencePair, String> {
        if let PromptContent::Implicit(pair) = &self.content {
            return Ok(pair.clone());
        }
        let Columns {
            chosen, rejected, ..
        } = self.row.columns;
        let (chosen_text, rejected_text) = (self.response(chosen)?, self.response(rejected)?);
        self.check_agreement(&[&chosen_text, &rejected_text])?;
        let later =
            |column: &Column, text: &str| self.is_chat_text(column) && has_later_turns(text);
        Ok(PreferencePair {
            prompt: self.prompt()?,
            has_later_turns: later(chosen, &chosen_text) || later(rejected, &rejected_text),
            chosen: chosen_text,
            rejected: rejected_text,
        })
    }

    /// The label of the pair; `None` when the settings name no column for it.
    ///
    /// # Errors
    /// When a column is missing, or has no number, a probability outside `[0, 1]`, or a score that is not finite.
    pub fn label(&self) -> Result<Option<PairLabel>, String> {
        let columns = self.row.columns.label.as_ref();
        let number = |column: &Column| self.row.number(column);
        columns.map(|columns| label_of(columns, number)).transpose()
    }

    /// Kind of the prompt.
    pub(crate) fn kind(&self) -> PromptKind {
        let columns = self.row.columns;
        let named = columns.prompt.name.as_str();
        match &self.content {
            PromptContent::TextOnly(_) => PromptKind::TextOnly,
            PromptContent::Prompt(PromptText::Dialogue(dialogue))
                if named != "prompt" && dialogue.continues_final_message() =>
            {
                PromptKind::Continued
            }
            PromptContent::Prompt(PromptText::Text(_))
            | PromptContent::Implicit(PreferencePair {
                prompt: PromptText::Text(_),
                ..
            }) => PromptKind::Text,
            _ => PromptKind::Dialogue,
        }
    }

    /// Whether all answers begin with the text of the prompt.
    pub(crate) fn repeats_prompt(&self) -> bool {
        let prompt = self.row.prompt_column().ok().flatten();
        let text = prompt.and_then(Value::as_str);
        text.is_some_and(|text| self.row.answers_repeat(text))
    }

    /// Whether the prompt is a text that is one turn of the user, although its lines begin as those of a dialogue.
    pub(crate) fn has_stray_speakers(&self) -> bool {
        let Columns { prompt, chat, .. } = self.row.columns;
        let is_read = self.read.contains(prompt.name.as_str());
        let prompt = self.row.prompt_column().ok().flatten();
        let text = prompt.filter(|_| is_read).and_then(Value::as_str);
        text.is_some_and(|text| *chat && !transcript::is_transcript(text) && has_speakers(text))
    }

    /// Columns of the row that its format does not read; of those that other formats read, the ones that are not null.
    #[must_use]
    pub fn unread(&self) -> Vec<&'a str> {
        let RowView { row, columns } = self.row;
        let is_unread = |name: &&str| {
            !self.read.contains(name) && (self.row.has(name) || !columns.is_known(name))
        };
        row.keys().map(String::as_str).filter(is_unread).collect()
    }

    /// The answer in a column. A text after a turn of a user that was text is without the white space around it.
    fn response(&self, column: &Column) -> Result<String, String> {
        let answer = self.row.response(column)?;
        match &self.content {
            PromptContent::Prompt(PromptText::Dialogue(dialogue)) if self.is_chat_text(column) => {
                if transcript::is_transcript(&answer) {
                    return Err(format!(
                        "column {:?} has a whole dialogue beside a prompt: leave {:?} out of such rows",
                        column.name, self.row.columns.prompt.name
                    ));
                }
                match dialogue.continues_final_message() {
                    true => Ok(answer),
                    false => Ok(answer.trim().to_owned()),
                }
            }
            _ => Ok(answer),
        }
    }

    /// The answer in a column that is not compared with another one: of a text its first turn.
    fn single_response(&self, column: &Column) -> Result<String, String> {
        let answer = self.response(column)?;
        match self.is_chat_text(column) {
            true => Ok(first_turn(&answer)),
            false => Ok(answer),
        }
    }

    /// Whether an answer and the prompt are text that is read as a dialogue.
    fn is_chat_text(&self, column: &Column) -> bool {
        let is_text = |name: &str| self.row.value(name).is_some_and(Value::is_string);
        self.row.columns.chat && is_text(&column.name) && is_text(&self.row.columns.prompt.name)
    }

    /// The column of the dialogue whose last turn is the answer.
    fn own_answer(&self) -> Option<(&'a str, &'a Value)> {
        match &self.content {
            PromptContent::WithAnswer(..) => self.row.dialogue_column(),
            _ => None,
        }
    }

    /// Checks that the answer in a column is not marked as one that is not trained on.
    fn check_trained_on(&self, column: Option<(&str, &Value)>) -> Result<(), String> {
        let Some((name, value)) = column else {
            return Ok(());
        };
        check_trained_on(value).map_err(|reason| format!("column {name:?}: {reason}"))
    }

    /// Checks that an answer at the end of the dialogue equals one of the separate answers.
    fn check_agreement(&self, answers: &[&String]) -> Result<(), String> {
        let PromptContent::WithAnswer(_, turn) = &self.content else {
            return Ok(());
        };
        let own = answer(turn)?;
        match answers.contains(&&own) {
            true => Ok(()),
            false => Err(format!(
                "the dialogue ends with a different answer ({}): remove it, or the separate answer",
                shortened(&own.into())
            )),
        }
    }
}

#[cfg(test)]
mod tests;
