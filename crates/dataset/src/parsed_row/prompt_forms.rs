//! The prompt of a row: the forms in which it may be written, tried in order, and the columns of its context.

use std::collections::BTreeSet;

use messages::{Message, PromptText};
use serde_json::Value;

use crate::{
    columns::{
        ANSWERS, Column, Columns, DIALOGUES, HISTORY, INPUTS, QUESTIONS, SYSTEMS, TEMPLATE_KWARGS,
        TEXT, TOOLS,
    },
    parsed_row::{
        PreferencePair, PromptContent,
        row_view::RowView,
        transcript::{self, has_assistant, is_transcript},
    },
    turn::{answer, first_role, is_messages, prompt_of, shortened, turns},
};

/// The content of the prompt column, before system, tools and other context columns are applied.
pub(super) enum RawPrompt {
    /// Text.
    Text(String),
    /// Turns of a dialogue, and its answer if the column includes one.
    Turns(Vec<Message>, Option<Message>),
    /// Two texts with a common prompt, and with `chat` its turns.
    Implicit(Option<Vec<Message>>, PreferencePair),
    TextOnly(String),
}

impl<'a> RowView<'a> {
    /// Tries the formats in order, and adds the columns of the prompt to `read`.
    pub(super) fn find(self, read: &mut BTreeSet<&'a str>) -> Result<RawPrompt, String> {
        let name = self.columns.prompt.name.as_str();
        let prompt = self.prompt_column()?;
        let dialogue = self.complete_dialogue(prompt.is_some())?;
        match (prompt, dialogue) {
            (Some(Value::String(_)) | None, Some(shared)) => Ok(RawPrompt::Turns(shared, None)),
            (Some(prompt), Some(shared)) => {
                read.insert(name);
                self.prompt_within(prompt, shared)
            }
            (Some(Value::String(text)), None) => self.text_prompt(text, read),
            (Some(prompt), None) => {
                read.insert(name);
                let turns = turns(prompt).map_err(|reason| self.prompt_error(&reason))?;
                Ok(RawPrompt::Turns(turns, None))
            }
            (None, None) => self.without_prompt(read),
        }
    }

    /// The value of the prompt column; `None` when it is a column of complete dialogues or answers.
    pub(super) fn prompt_column(self) -> Result<Option<&'a Value>, String> {
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
    pub(super) fn complete_dialogue(
        self,
        has_prompt: bool,
    ) -> Result<Option<Vec<Message>>, String> {
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
    pub(super) fn dialogue(self, column: &Column) -> Result<Vec<Message>, String> {
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
    pub(super) fn before_answer(self, column: &Column) -> Result<Vec<Message>, String> {
        let mut turns = self.dialogue(column)?;
        turns.pop();
        Ok(turns)
    }

    /// The common turns of the chosen and the rejected dialogue: all but the last (TRL: `extract_prompt`).
    pub(super) fn shared(self) -> Result<Vec<Message>, String> {
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
    pub(super) fn prompt_within(
        self,
        prompt: &Value,
        shared: Vec<Message>,
    ) -> Result<RawPrompt, String> {
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
    pub(super) fn text_prompt(
        self,
        text: &str,
        read: &mut BTreeSet<&'a str>,
    ) -> Result<RawPrompt, String> {
        let dialogue = if self.has_answer() {
            None
        } else {
            self.in_dialogue_column(read)?
        };
        if let Some(found) = dialogue {
            return Ok(found);
        }
        let Columns {
            prompt,
            chosen,
            rejected,
            golden,
            ..
        } = self.columns;
        read.insert(&prompt.name);
        let answer = self.answer_column();
        let answers = [
            Some(chosen),
            Some(rejected),
            answer.as_ref(),
            golden.as_ref(),
        ];
        let mut answers = answers.into_iter().flatten();
        if answers.any(|column| self.value(&column.name).and_then(first_role).is_some()) {
            let turns = match self.columns.chat {
                true => transcript::turns(text),
                false => vec![Message::new("user", text)],
            };
            return Ok(RawPrompt::Turns(turns, None));
        }
        Ok(RawPrompt::Text(text.to_owned()))
    }

    /// Whether the row has answers and all of them begin with `prompt`.
    pub(super) fn answers_repeat(self, prompt: &str) -> bool {
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

    /// `messages` or a synonym, if it is a list.
    pub(super) fn dialogue_column(self) -> Option<(&'a str, &'a Value)> {
        let named = DIALOGUES
            .into_iter()
            .filter(|name| **name == self.columns.prompt.name);
        let list =
            |name: &'static str| Some((name, self.value(name).filter(|value| value.is_array())?));
        named.chain(DIALOGUES).find_map(list)
    }

    /// The turns of `messages` or a synonym, and the answer if the last turn is the assistant's.
    pub(super) fn in_dialogue_column(
        self,
        read: &mut BTreeSet<&'a str>,
    ) -> Result<Option<RawPrompt>, String> {
        let Some((name, value)) = self.dialogue_column() else {
            return Ok(None);
        };
        read.insert(name);
        let mut turns = turns(value).map_err(|reason| format!("column {name:?}: {reason}"))?;
        let answered = turns.last().is_some_and(|turn| turn.role() == "assistant");
        let answer = if answered { turns.pop() } else { None };
        Ok(Some(RawPrompt::Turns(turns, answer)))
    }

    /// The formats without a prompt column.
    pub(super) fn without_prompt(self, read: &mut BTreeSet<&'a str>) -> Result<RawPrompt, String> {
        if let Some(found) = self.in_dialogue_column(read)? {
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
        let texts =
            [chosen, rejected].map(|column| self.value(&column.name).and_then(Value::as_str));
        if let [Some(chosen), Some(rejected)] = texts {
            let missing = |reason| format!("{}, and {reason}", self.missing(&self.columns.prompt));
            if self.columns.chat {
                let (turns, pair) =
                    transcript::implicit_dialogue(chosen, rejected).map_err(missing)?;
                return Ok(RawPrompt::Implicit(Some(turns), pair));
            }
            let pair = self.implicit(chosen, rejected).map_err(missing)?;
            return Ok(RawPrompt::Implicit(None, pair));
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
            _ => Err(match texts {
                [Some(_), None] => self.missing_half(rejected),
                [None, Some(_)] => self.missing_half(chosen),
                _ => self.missing(&self.columns.prompt),
            }),
        }
    }

    /// Error message for a row without a prompt, of whose two texts only the other one is there.
    fn missing_half(self, column: &Column) -> String {
        let reason = match self.value(&column.name) {
            Some(value) => {
                let (value, remedy) = (shortened(value), column.remedy());
                format!("column {:?} is not text but {value}{remedy}", column.name)
            }
            None => self.missing(column),
        };
        let prompt = &self.columns.prompt.name;
        format!(
            "{reason}; a row without a column {prompt:?} needs both texts, which begin with the prompt"
        )
    }

    /// Two texts with an implicit prompt. If the row has another text, which may be a prompt in a column of an unknown
    /// name, only texts with explicit turns are accepted.
    pub(super) fn implicit(self, chosen: &str, rejected: &str) -> Result<PreferencePair, String> {
        let is_dialogue = has_assistant(chosen);
        let is_other_text =
            |(name, value): &(&String, &Value)| value.is_string() && !self.columns.is_known(name);
        match self.row.iter().find(is_other_text) {
            Some((name, _)) if !is_dialogue => Err(format!(
                "{name:?} may be the prompt: a common prefix is used as the prompt only in rows without other texts"
            )),
            _ => transcript::implicit(chosen, rejected),
        }
    }

    /// A text prompt, converted to a dialogue with `chat` and if the row has columns of a dialogue.
    pub(super) fn of_text(
        self,
        text: String,
        read: &mut BTreeSet<&'a str>,
    ) -> Result<PromptContent, String> {
        let inputs = match self.columns.prompt.name.as_str() {
            "instruction" => &INPUTS[..],
            _ => &[],
        };
        let context = [&SYSTEMS[..], inputs].concat();
        let has_context = context.iter().any(|name| self.row.contains_key(*name));
        let has_history = self.value(HISTORY).is_some_and(Value::is_array);
        let turns = if self.columns.chat && is_transcript(&text) {
            if has_history {
                return Err(format!(
                    "column {HISTORY:?} stands beside a text with turns of its own: remove one of them"
                ));
            }
            transcript::turns(&text)
        } else if has_context || has_history {
            self.question(&self.columns.prompt.name, &text, read)?
        } else if self.columns.chat {
            transcript::turns(&text)
        } else {
            self.reject_context()?;
            return Ok(PromptContent::Prompt(PromptText::Text(text)));
        };
        self.in_context(turns).map(PromptContent::Prompt)
    }

    /// Rejects columns that only a chat template reads, beside a text that does not go through one.
    pub(super) fn reject_context(self) -> Result<(), String> {
        let of_template = [TOOLS, TEMPLATE_KWARGS].into_iter();
        let mut unread = of_template.filter(|name| self.is_filled(name));
        let system = || {
            let (name, value) = self.first(&SYSTEMS)?;
            (value.as_str() != Some("")).then_some(name)
        };
        match unread.next().or_else(system) {
            None => Ok(()),
            Some(name) => Err(format!(
                "column {name:?} is for a chat template, which a prompt of text does not go through: write the prompt as \
                 messages, or set chat = true"
            )),
        }
    }

    /// A text without a prompt; with `chat`, a transcript is a dialogue and its answer.
    pub(super) fn of_text_only(self, text: String) -> Result<PromptContent, String> {
        if !self.columns.chat || !is_transcript(&text) {
            self.reject_context()?;
            return Ok(PromptContent::TextOnly(text));
        }
        let mut turns = transcript::turns(&text);
        let last = turns.pop_if(|turn| turn.role() == "assistant");
        let last = last.ok_or("the last turn of the text is not an answer of the Assistant")?;
        let prompt = self.in_context(turns)?;
        Ok(PromptContent::WithAnswer(prompt, last))
    }

    /// The question in the column `name`, after the turns of its history (Alpaca, as in LLaMA-Factory).
    pub(super) fn question(
        self,
        name: &str,
        text: &str,
        read: &mut BTreeSet<&'a str>,
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

    /// A dialogue with the system message, tools and template variables of the row.
    pub(super) fn in_context(self, mut turns: Vec<Message>) -> Result<PromptText, String> {
        if let Some((name, value)) = self.first(&SYSTEMS) {
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
