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
//! The formats are tried in this order. The reference is TRL's documentation of data-set formats (`is_conversational`,
//! `maybe_extract_prompt`, `maybe_convert_to_chatml`, `apply_chat_template`), and LLaMA-Factory's for ShareGPT and
//! Alpaca. In a prompt column a final assistant turn is continued by the completion; in a column of complete dialogues
//! it is the answer.

mod implicit;
mod label;

use std::collections::BTreeSet;

use messages::{Message, PromptText};
use serde_json::{Map, Value};

use crate::{
    columns::{
        ANSWERS, Column, Columns, DIALOGUES, HISTORY, INPUTS, LABEL, MEDIA, QUESTIONS, SYSTEMS,
        TEMPLATE_KWARGS, TEXT, TOOLS,
    },
    parsed_row::{
        implicit::{ASSISTANT, implicit},
        label::label_of,
    },
    turn::{answer, first_role, is_messages, present, prompt_of, shortened, turns},
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
}

pub use implicit::has_later_turn;
pub use label::PairLabel;

/// A row in a recognised format.
#[derive(Debug, Clone)]
pub struct ParsedRow<'a> {
    row: RowView<'a>,
    content: PromptContent,
    read: BTreeSet<&'static str>,
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
    /// A text that is a prefix of all answers.
    Repeated,
    Dialogue,
    /// A dialogue that ends with an assistant turn, in a prompt column named by the settings.
    Continued,
    /// No prompt: the row is a text.
    TextOnly,
}

/// The content of the prompt column, before system, tools and other context columns are applied.
enum RawPrompt {
    /// Text.
    Text(String),
    /// Turns of a dialogue, and its answer if the column includes one.
    Turns(Vec<Message>, Option<Message>),
    Implicit(PreferencePair),
    TextOnly(String),
}

/// A row with the column names.
#[derive(Debug, Clone, Copy)]
struct RowView<'a> {
    row: &'a Map<String, Value>,
    columns: &'a Columns,
}

impl<'a> ParsedRow<'a> {
    /// Parses a row.
    ///
    /// # Errors
    /// When a column is missing or malformed; the message names the setting of the column.
    pub fn of(row: &'a Map<String, Value>, columns: &'a Columns) -> Result<Self, String> {
        let row = RowView { row, columns };
        row.reject_media()?;
        let mut read = BTreeSet::new();
        let content = match row.find(&mut read)? {
            RawPrompt::Text(text) => row.of_text(text, &mut read)?,
            RawPrompt::Turns(turns, answer) => {
                let prompt = row.in_context(turns, &mut read)?;
                match answer {
                    None => PromptContent::Prompt(prompt),
                    Some(answer) => PromptContent::WithAnswer(prompt, answer),
                }
            }
            RawPrompt::Implicit(pair) => PromptContent::Implicit(pair),
            RawPrompt::TextOnly(text) => PromptContent::TextOnly(text),
        };
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
        let column = self.row.columns.golden.as_ref();
        column.map(|column| self.row.response(column)).transpose()
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
            Some(_) if self.row.columns.is_golden(&column.name) => self.row.response(column)?,
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
    /// When a column is missing or malformed.
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
            (PromptContent::Implicit(pair), _) => pair.chosen.clone(),
            (_, Some(column)) => {
                let answer = self.row.response(&column)?;
                self.check_agreement(&[&answer])?;
                answer
            }
            (PromptContent::WithAnswer(_, turn), None) => self::answer(turn)?,
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
        let (chosen, rejected) = (self.row.response(chosen)?, self.row.response(rejected)?);
        self.check_agreement(&[&chosen, &rejected])?;
        Ok(PreferencePair {
            prompt: self.prompt()?,
            chosen,
            rejected,
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
            PromptContent::Prompt(PromptText::Text(text)) if self.row.answers_repeat(text) => {
                PromptKind::Repeated
            }
            PromptContent::Prompt(PromptText::Text(_)) | PromptContent::Implicit(_) => {
                PromptKind::Text
            }
            _ => PromptKind::Dialogue,
        }
    }

    /// Columns of the row that its format does not read.
    #[must_use]
    pub fn unread(&self) -> Vec<&'a str> {
        let RowView { row, columns } = self.row;
        // Beside a prompt, a dialogue is not read.
        let has_prompt = matches!(self.row.prompt_column(), Ok(Some(_)));
        let is_unread = |name: &&str| {
            let is_beside = has_prompt && columns.is_dialogue(name) && self.row.has(name);
            (is_beside || !columns.is_known(name)) && !self.read.contains(name)
        };
        row.keys().map(String::as_str).filter(is_unread).collect()
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

impl<'a> RowView<'a> {
    /// The value of a column, if not null.
    fn value(self, name: &str) -> Option<&'a Value> {
        present(self.row, name)
    }

    fn has(self, name: &str) -> bool {
        self.value(name).is_some()
    }

    /// The first of these columns that is not null.
    fn first(self, names: &[&'static str]) -> Option<(&'static str, &'a Value)> {
        names
            .iter()
            .find_map(|name| Some((*name, self.value(name)?)))
    }

    /// Whether the row has answers and all of them begin with `prompt`.
    fn answers_repeat(self, prompt: &str) -> bool {
        let Columns {
            chosen, rejected, ..
        } = self.columns;
        let answer = self.answer_column();
        let answers = [Some(chosen), Some(rejected), answer.as_ref()];
        let answers = answers.into_iter().flatten();
        let mut values = answers.filter_map(|column| self.value(&column.name));
        let begins = |value: &Value| value.as_str().is_some_and(|text| text.starts_with(prompt));
        !prompt.is_empty() && values.clone().next().is_some() && values.all(begins)
    }

    fn reject_media(self) -> Result<(), String> {
        let is_filled = |value: &Value| match value {
            Value::Array(all) => !all.is_empty(),
            Value::String(text) => !text.is_empty(),
            _ => true,
        };
        match self.first(&MEDIA) {
            Some((name, value)) if is_filled(value) => Err(format!(
                "column {name:?} is not empty, and only text is supported: remove such rows"
            )),
            _ => Ok(()),
        }
    }

    /// Tries the formats in order.
    fn find(self, read: &mut BTreeSet<&'static str>) -> Result<RawPrompt, String> {
        let prompt = self.prompt_column()?;
        let dialogue = self.complete_dialogue(prompt.is_some())?;
        match (prompt, dialogue) {
            (Some(Value::String(_)) | None, Some(shared)) => Ok(RawPrompt::Turns(shared, None)),
            (Some(prompt), Some(shared)) => self.prompt_within(prompt, shared),
            (Some(Value::String(text)), None) => self.text_prompt(text, read),
            (Some(prompt), None) => {
                let turns = turns(prompt).map_err(|reason| self.prompt_error(&reason))?;
                Ok(RawPrompt::Turns(turns, None))
            }
            (None, None) => self.without_prompt(read),
        }
    }

    /// The value of the prompt column; `None` when it is a column of complete dialogues or answers.
    fn prompt_column(self) -> Result<Option<&'a Value>, String> {
        let Columns {
            prompt,
            chosen,
            rejected,
            ..
        } = self.columns;
        let value = self.value(&prompt.name);
        let name = prompt.name.as_str();
        let is_answer = ANSWERS.contains(&name) && value.is_some_and(is_messages);
        if is_answer
            || DIALOGUES.contains(&name)
            || [&chosen.name, &rejected.name].contains(&&prompt.name)
        {
            return Ok(None);
        }
        match value {
            None if name != "prompt" => Err(self.missing(prompt)),
            value => Ok(value),
        }
    }

    /// The prompt turns where answers are complete dialogues: the common turns of two, or those before one's answer.
    fn complete_dialogue(self, has_prompt: bool) -> Result<Option<Vec<Message>>, String> {
        let has_prompt = has_prompt || self.first(&DIALOGUES).or(self.first(&QUESTIONS)).is_some();
        let is_complete = |column: &Column| {
            let first = self.value(&column.name).and_then(first_role);
            first.is_some_and(|(role, count)| role != "assistant" || (count > 1 && !has_prompt))
        };
        if let Some(column) = self.answer_column().filter(is_complete) {
            return self.before_answer(&column).map(Some);
        }
        let Columns {
            chosen,
            rejected,
            golden,
            ..
        } = self.columns;
        match (is_complete(chosen), is_complete(rejected)) {
            (false, false) => {
                let golden = golden.as_ref().filter(|column| is_complete(column));
                let golden = golden.filter(|column| !DIALOGUES.contains(&column.name.as_str()));
                golden.map(|column| self.before_answer(column)).transpose()
            }
            (true, true) => self.shared().map(Some),
            (true, false) if !self.has(&rejected.name) => self.before_answer(chosen).map(Some),
            (false, true) if !self.has(&chosen.name) => self.before_answer(rejected).map(Some),
            _ => Err(format!(
                "one of {:?} and {:?} is a complete dialogue and the other only an answer",
                chosen.name, rejected.name
            )),
        }
    }

    /// The turns of a column that ends with an assistant turn.
    fn dialogue(self, column: &Column) -> Result<Vec<Message>, String> {
        let in_column = |reason| format!("column {:?}: {reason}", column.name);
        let value = self
            .value(&column.name)
            .ok_or_else(|| self.missing(column))?;
        let turns = turns(value).map_err(in_column)?;
        turns
            .last()
            .map_or(Ok(String::new()), answer)
            .map_err(in_column)?;
        Ok(turns)
    }

    /// The turns of a column without its answer.
    fn before_answer(self, column: &Column) -> Result<Vec<Message>, String> {
        let mut turns = self.dialogue(column)?;
        turns.pop();
        Ok(turns)
    }

    /// The common turns of the chosen and the rejected dialogue: all but the last (TRL: `extract_prompt`).
    fn shared(self) -> Result<Vec<Message>, String> {
        let Columns {
            chosen, rejected, ..
        } = self.columns;
        let (mut good, mut bad) = (self.dialogue(chosen)?, self.dialogue(rejected)?);
        good.pop();
        bad.pop();
        if good == bad {
            return Ok(good);
        }
        let same = good.iter().zip(&bad).take_while(|(a, b)| a == b).count();
        Err(format!(
            "the dialogues differ from turn {} on, before their last turn: only the last answer may differ",
            same + 1
        ))
    }

    /// A prompt of messages with answers that are complete dialogues, which must include the prompt.
    fn prompt_within(self, prompt: &Value, shared: Vec<Message>) -> Result<RawPrompt, String> {
        let turns = turns(prompt).map_err(|reason| self.prompt_error(&reason))?;
        match shared.ends_with(&turns) {
            true => Ok(RawPrompt::Turns(shared, None)),
            false => Err(format!(
                "column {:?} and the dialogues have different prompts; remove one of them",
                self.columns.prompt.name
            )),
        }
    }

    /// A text prompt with answers that are not complete dialogues.
    fn text_prompt(
        self,
        text: &str,
        read: &mut BTreeSet<&'static str>,
    ) -> Result<RawPrompt, String> {
        let dialogue = if self.has_answer() {
            None
        } else {
            self.in_dialogue_column()?
        };
        if let Some(found) = dialogue {
            return Ok(found);
        }
        let Columns {
            chosen,
            rejected,
            golden,
            ..
        } = self.columns;
        let answer = self.answer_column();
        let answers = [
            Some(chosen),
            Some(rejected),
            answer.as_ref(),
            golden.as_ref(),
        ];
        let mut answers = answers.into_iter().flatten();
        if answers.any(|column| self.value(&column.name).and_then(first_role).is_some()) {
            return Ok(RawPrompt::Turns(vec![Message::new("user", text)], None));
        }
        if self.columns.prompt.name == "instruction" {
            read.insert("instruction");
        }
        Ok(RawPrompt::Text(text.to_owned()))
    }

    /// The turns of `messages` or a synonym, and the answer if the last turn is the assistant's.
    fn in_dialogue_column(self) -> Result<Option<RawPrompt>, String> {
        let named = DIALOGUES
            .into_iter()
            .filter(|name| **name == self.columns.prompt.name);
        let list =
            |name: &'static str| Some((name, self.value(name).filter(|value| value.is_array())?));
        let Some((name, value)) = named.chain(DIALOGUES).find_map(list) else {
            return Ok(None);
        };
        let mut turns = turns(value).map_err(|reason| format!("column {name:?}: {reason}"))?;
        let answered = turns.last().is_some_and(|turn| turn.role() == "assistant");
        let answer = if answered { turns.pop() } else { None };
        Ok(Some(RawPrompt::Turns(turns, answer)))
    }

    /// The formats without a prompt column.
    fn without_prompt(self, read: &mut BTreeSet<&'static str>) -> Result<RawPrompt, String> {
        if let Some(found) = self.in_dialogue_column()? {
            return Ok(found);
        }
        if let Some((name, value)) = self.first(&QUESTIONS) {
            read.insert(name);
            let text = self.text(name, value)?;
            let turns = self.question(name, text, read)?;
            return Ok(RawPrompt::Turns(turns, None));
        }
        let Columns {
            chosen, rejected, ..
        } = self.columns;
        let both =
            [chosen, rejected].map(|column| self.value(&column.name).and_then(Value::as_str));
        if let [Some(chosen), Some(rejected)] = both {
            let missing = |reason| format!("{}, and {reason}", self.missing(&self.columns.prompt));
            return self
                .implicit(chosen, rejected)
                .map(RawPrompt::Implicit)
                .map_err(missing);
        }
        match (self.value(TEXT), self.first(&DIALOGUES)) {
            (Some(Value::String(text)), _) if !self.has_answer() => {
                read.insert(TEXT);
                Ok(RawPrompt::TextOnly(text.clone()))
            }
            (_, Some((name, value))) => Err(format!(
                "column {name:?} is not a list of messages but {}{}",
                shortened(value),
                as_list(value)
            )),
            _ => Err(self.missing(&self.columns.prompt)),
        }
    }

    /// Two texts with an implicit prompt. If the row has another text, which may be a prompt in a column of an unknown
    /// name, only texts with explicit turns are accepted.
    fn implicit(self, chosen: &str, rejected: &str) -> Result<PreferencePair, String> {
        let is_dialogue = chosen.contains(ASSISTANT);
        let is_other_text =
            |(name, value): &(&String, &Value)| value.is_string() && !self.columns.is_known(name);
        match self.row.iter().find(is_other_text) {
            Some((name, _)) if !is_dialogue => Err(format!(
                "{name:?} may be the prompt: a common prefix is used as the prompt only in rows without other texts"
            )),
            _ => implicit(chosen, rejected),
        }
    }

    /// The value as text.
    fn text(self, name: &str, value: &'a Value) -> Result<&'a str, String> {
        let text = value.as_str();
        text.ok_or_else(|| format!("column {name:?} is not text but {}", shortened(value)))
    }

    /// A text prompt, converted to a dialogue if the row has columns of a dialogue.
    fn of_text(
        self,
        text: String,
        read: &mut BTreeSet<&'static str>,
    ) -> Result<PromptContent, String> {
        let inputs = match read.contains("instruction") {
            true => &INPUTS[..],
            false => &[],
        };
        let context = [&SYSTEMS[..], inputs].concat();
        let has_context = context.iter().any(|name| self.row.contains_key(*name));
        if has_context || self.value(HISTORY).is_some_and(Value::is_array) {
            let name = self.columns.prompt.name.as_str();
            let turns = self.question(name, &text, read)?;
            return self.in_context(turns, read).map(PromptContent::Prompt);
        }
        match [TOOLS, TEMPLATE_KWARGS]
            .into_iter()
            .find(|name| self.is_filled(name))
        {
            None => Ok(PromptContent::Prompt(PromptText::Text(text))),
            Some(name) => Err(format!(
                "column {name:?} is for a chat template, which a prompt of text does not go through: write the prompt as messages"
            )),
        }
    }

    /// The question in the column `name`, after the turns of its history (Alpaca, as in LLaMA-Factory).
    fn question(
        self,
        name: &str,
        text: &str,
        read: &mut BTreeSet<&'static str>,
    ) -> Result<Vec<Message>, String> {
        let mut turns = Vec::new();
        if let Some(Value::Array(pairs)) = self.value(HISTORY) {
            read.insert(HISTORY);
            turns = history(pairs)?;
        }
        let mut question = text.to_owned();
        for column in INPUTS.into_iter().filter(|_| name == "instruction") {
            read.insert(column);
            let input = self
                .value(column)
                .map(|value| self.text(column, value))
                .transpose()?;
            if let Some(input) = input.filter(|input| !input.is_empty()) {
                let separator = if question.is_empty() { "" } else { "\n" };
                question = format!("{question}{separator}{input}");
            }
        }
        turns.push(Message::new("user", question));
        Ok(turns)
    }

    /// The number in a column.
    fn number(self, column: &Column) -> Result<f64, String> {
        let value = self.value(&column.name);
        let value = value.ok_or_else(|| self.missing(column))?;
        value.as_f64().ok_or_else(|| {
            let (name, remedy) = (&column.name, column.remedy());
            format!(
                "column {name:?} is not a number but {}{remedy}",
                shortened(value)
            )
        })
    }

    /// A dialogue with the system message, tools and template variables of the row.
    fn in_context(
        self,
        mut turns: Vec<Message>,
        read: &mut BTreeSet<&'static str>,
    ) -> Result<PromptText, String> {
        if let Some((name, value)) = self.first(&SYSTEMS) {
            read.insert(name);
            let text = self.text(name, value)?;
            let own = turns.first().filter(|turn| turn.role() == "system");
            match own {
                Some(turn) if turn.content() != text && !text.is_empty() => {
                    return Err(format!(
                        "column {name:?} and the system message of the dialogue differ: remove one of them"
                    ));
                }
                None if !text.is_empty() => turns.insert(0, Message::new("system", text)),
                _ => {}
            }
        }
        let mut prompt = prompt_of(turns)?;
        if let PromptText::Dialogue(dialogue) = &mut prompt {
            dialogue.tools = self.tools()?;
            dialogue.template_kwargs = self.template_kwargs()?;
        }
        Ok(prompt)
    }

    /// The tools' JSON schemas, from a list or its JSON text.
    fn tools(self) -> Result<Vec<Value>, String> {
        match self.json(TOOLS)? {
            None => Ok(Vec::new()),
            Some(Value::Array(tools)) if tools.iter().all(Value::is_object) => Ok(tools),
            Some(other) => Err(format!(
                "column {TOOLS:?} is not a list of JSON schemas but {}",
                shortened(&other)
            )),
        }
    }

    /// Additional variables of the chat template.
    fn template_kwargs(self) -> Result<Map<String, Value>, String> {
        match self.json(TEMPLATE_KWARGS)? {
            None => Ok(Map::new()),
            Some(Value::Object(kwargs)) => Ok(kwargs),
            Some(other) => Err(format!(
                "column {TEMPLATE_KWARGS:?} is not an object but {}",
                shortened(&other)
            )),
        }
    }

    /// A JSON column, which may be stored as text in Parquet.
    fn json(self, name: &str) -> Result<Option<Value>, String> {
        let value = match self.value(name) {
            None => return Ok(None),
            Some(Value::String(text)) if text.trim().is_empty() => return Ok(None),
            Some(Value::String(text)) => serde_json::from_str(text)
                .map_err(|error| format!("column {name:?} is text and not JSON: {error}"))?,
            Some(other) => other.clone(),
        };
        Ok(Some(value).filter(|value| !value.is_null()))
    }

    /// Whether a JSON column is not empty.
    fn is_filled(self, name: &str) -> bool {
        match self.json(name) {
            Ok(None) => false,
            Ok(Some(Value::Array(all))) => !all.is_empty(),
            Ok(Some(Value::Object(all))) => !all.is_empty(),
            Ok(Some(_)) | Err(_) => true,
        }
    }

    /// The column of the single answer, if the row has one.
    fn answer_column(self) -> Option<Column> {
        let named = &self.columns.answer;
        if self.has(&named.name) {
            return Some(named.clone());
        }
        let others = if named.name == "completion" {
            &ANSWERS[..]
        } else {
            &[]
        };
        let (name, _) = self.first(others)?;
        Some(Column {
            name: name.to_owned(),
            setting: named.setting,
        })
    }

    fn has_answer(self) -> bool {
        let Columns {
            chosen, rejected, ..
        } = self.columns;
        self.answer_column().is_some() || self.has(&chosen.name) || self.has(&rejected.name)
    }

    /// The answer in a column: text, one assistant turn, or a complete dialogue that ends with it.
    fn response(self, column: &Column) -> Result<String, String> {
        let in_column = |reason| format!("column {:?}: {reason}", column.name);
        match self.value(&column.name) {
            None => Err(self.missing(column)),
            Some(Value::String(text)) => Ok(text.clone()),
            Some(value) => {
                let turns = turns(value).map_err(in_column)?;
                match turns.as_slice() {
                    [first, _, ..]
                        if first.role() == "assistant" && !self.is_dialogue_start(value) =>
                    {
                        Err(in_column(format!(
                            "the answer has {} turns instead of one assistant turn",
                            turns.len()
                        )))
                    }
                    [.., last] => answer(last).map_err(in_column),
                    [] => Err(in_column("there is no turn".into())),
                }
            }
        }
    }

    /// Whether messages that begin with an assistant turn are a complete dialogue: the row has no other prompt.
    fn is_dialogue_start(self, value: &Value) -> bool {
        let is_prompt = |column: Result<Option<&Value>, String>| matches!(column, Ok(Some(_)));
        !is_prompt(self.prompt_column()) && first_role(value).is_some_and(|(_, count)| count > 1)
    }

    /// Error message for a row without an answer.
    fn no_answer(self) -> String {
        let dialogue = self.first(&DIALOGUES).and_then(|(name, value)| {
            let (role, _) = first_role(value.as_array()?.last()?)?;
            Some(format!(
                "the last turn of {name:?} is the {role}'s, not an answer of the assistant"
            ))
        });
        dialogue.unwrap_or_else(|| self.missing(&self.columns.answer))
    }

    /// Error message about the prompt column.
    fn prompt_error(self, reason: &str) -> String {
        let prompt = &self.columns.prompt;
        format!("column {:?}: {reason}{}", prompt.name, prompt.remedy())
    }

    /// Error message for a column that is missing, null, or another part of the row.
    fn missing(self, column: &Column) -> String {
        let name = &column.name;
        let remedy = column.remedy();
        match self.row.get(name) {
            None => {}
            Some(Value::Null) => return format!("the value of column {name:?} is null{remedy}"),
            Some(_) => {
                return format!(
                    "column {name:?} holds another part of the row, and cannot be this one too{remedy}"
                );
            }
        }
        let names: Vec<String> = self.row.keys().map(|name| format!("{name:?}")).collect();
        match names.len() {
            0 => format!("there is no column {name:?}: the row is empty"),
            _ => format!(
                "there is no column {name:?} among {}{remedy}",
                names.join(", ")
            ),
        }
    }
}

/// Remedy for a list that was written as JSON text.
fn as_list(value: &Value) -> &'static str {
    let list = value.as_str().map(serde_json::from_str::<Vec<Value>>);
    match list {
        Some(Ok(_)) => ": it is JSON as text; write the list itself (json.loads)",
        _ => "",
    }
}

/// Parses Alpaca's `history`: pairs of question and answer.
fn history(pairs: &[Value]) -> Result<Vec<Message>, String> {
    let mut turns = Vec::new();
    for pair in pairs {
        let Some([Value::String(question), Value::String(answer)]) =
            pair.as_array().map(Vec::as_slice)
        else {
            return Err(format!(
                "column {HISTORY:?} has {} instead of [question, answer]",
                shortened(pair)
            ));
        };
        turns.extend([
            Message::new("user", question.as_str()),
            Message::new("assistant", answer.as_str()),
        ]);
    }
    Ok(turns)
}

#[cfg(test)]
mod tests;
