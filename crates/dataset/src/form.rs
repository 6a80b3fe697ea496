//! The forms in which the field writes prompts, examples and preferences: one table, for every reader of rows.
//!
//! | form | columns | prompt | answers |
//! |---|---|---|---|
//! | text | `prompt`, and `completion` or `chosen`, `rejected`, all text | the text as it stands | the texts |
//! | messages | the same, the prompt or an answer as messages | the dialogue; a text prompt is a user's turn | text, or one turn of the assistant |
//! | whole dialogues | `chosen`, `rejected` (or `completion`) that begin with what was asked, with or without a `prompt` | the turns that they share | the last turn of each |
//! | dialogue | `messages`, `conversations` or `conversation` | the turns before the assistant's last | that turn, or `completion`, `chosen`, `rejected` |
//! | instruction | `instruction` with `input`, `question`, `system`, `history` (Alpaca, Orca) | a dialogue | `output`, `response`, `answer`, `chosen`, `rejected` |
//! | texts with an implicit prompt | `chosen`, `rejected` alone (Anthropic's HH) | what both begin with | the rest |
//! | text alone | `text` | none | the text |
//!
//! The rows of a table are tried in this order. TRL's documentation of its data-set formats is the reference
//! (`is_conversational`, `maybe_extract_prompt`, `maybe_convert_to_chatml`, `apply_chat_template`), LLaMA-Factory's for
//! ShareGPT and Alpaca. In a column that is a prompt a last turn of the assistant is continued; in one of whole
//! dialogues it is the answer.

use std::collections::BTreeSet;

use messages::{Message, PromptText};
use serde_json::{Map, Value};

use crate::{
    columns::{
        ANSWERS, Column, Columns, DIALOGUES, HISTORY, INPUTS, LABEL, MEDIA, QUESTIONS, SYSTEMS,
        TEMPLATE_KWARGS, TEXT, TOOLS,
    },
    turn::{answer, asked, first_role, is_messages, present, shortened, turns},
};

/// Where an assistant's turn begins in dialogues written as text (Anthropic's HH).
const ASSISTANT: &str = "\n\nAssistant:";
/// Where a user's turn begins there.
const HUMAN: &str = "\n\nHuman:";

/// A prompt and what is to be answered.
#[derive(Debug, Clone, PartialEq)]
pub struct Answered {
    /// What was asked.
    pub prompt: PromptText,
    /// The answer.
    pub answer: String,
}

/// One prompt, a preferred response and another.
#[derive(Debug, Clone, PartialEq)]
pub struct Pair {
    /// What was asked.
    pub prompt: PromptText,
    /// The preferred response; it may be empty, as some in real data are.
    pub chosen: String,
    /// The other.
    pub rejected: String,
}

/// A row whose form is known.
#[derive(Debug, Clone)]
pub struct Form<'a> {
    row: Given<'a>,
    asked: Asked,
    read: BTreeSet<&'static str>,
}

/// What is asked in a row.
#[derive(Debug, Clone)]
enum Asked {
    /// This.
    Prompt(PromptText),
    /// This, and the row's dialogue has an answer to it.
    Answered(PromptText, Message),
    /// What two texts begin with; their rests are the answers.
    Implicit(Pair),
    /// Nothing: the row is a text.
    Nothing(String),
}

/// What a row asks, as far as it matters that a file's rows are alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Text,
    /// Text with which all answers beside it begin.
    Repeated,
    Dialogue,
    /// A dialogue in a column that the settings name, with a last turn of the assistant.
    Continued,
    /// The row is a text without a prompt.
    Nothing,
}

/// What stands where a prompt is looked for, before the columns beside it are heeded.
enum Found {
    /// A prompt column's text.
    Text(String),
    /// Turns of a dialogue, and its answer where the column has one.
    Turns(Vec<Message>, Option<Message>),
    Implicit(Pair),
    Nothing(String),
}

/// A row, and the columns that the settings name.
#[derive(Debug, Clone, Copy)]
struct Given<'a> {
    row: &'a Map<String, Value>,
    columns: &'a Columns,
}

impl<'a> Form<'a> {
    /// Recognises the form of a row.
    ///
    /// # Errors
    /// What is missing or malformed, in words, with the setting that names the column.
    pub fn of(row: &'a Map<String, Value>, columns: &'a Columns) -> Result<Self, String> {
        let row = Given { row, columns };
        row.refuse_media()?;
        let mut read = BTreeSet::new();
        let asked = match row.find(&mut read)? {
            Found::Text(text) => row.of_text(text, &mut read)?,
            Found::Turns(turns, answer) => {
                let prompt = row.in_context(turns, &mut read)?;
                match answer {
                    None => Asked::Prompt(prompt),
                    Some(answer) => Asked::Answered(prompt, answer),
                }
            }
            Found::Implicit(pair) => Asked::Implicit(pair),
            Found::Nothing(text) => Asked::Nothing(text),
        };
        Ok(Self { row, asked, read })
    }

    /// The prompt.
    ///
    /// # Errors
    /// When the row has none.
    pub fn prompt(&self) -> Result<PromptText, String> {
        match &self.asked {
            Asked::Prompt(prompt) | Asked::Answered(prompt, _) => Ok(prompt.clone()),
            Asked::Implicit(pair) => Ok(pair.prompt.clone()),
            Asked::Nothing(_) => Err(format!(
                "a row of {TEXT:?} alone has no prompt{}: naming it there has the text continued",
                self.row.columns.prompt.remedy()
            )),
        }
    }

    /// The answer in the column that the settings name for it; none when they name none.
    ///
    /// # Errors
    /// When it is missing, or is neither text nor messages that end with the assistant's turn.
    pub fn golden(&self) -> Result<Option<String>, String> {
        let column = self.row.columns.golden.as_ref();
        column.map(|column| self.row.response(column)).transpose()
    }

    /// The prompt and its answer: `completion` or its like, the chosen one of a pair, the end of a dialogue. A row
    /// of text alone answers an empty prompt.
    ///
    /// # Errors
    /// What is missing or malformed, in words.
    pub fn answered(&self) -> Result<Answered, String> {
        if self.row.value(LABEL) == Some(&Value::Bool(false)) {
            return Err(format!(
                "{LABEL:?} is false: the completion is not wanted; leave such rows out"
            ));
        }
        let chosen = &self.row.columns.chosen;
        let chosen = self.row.has(&chosen.name).then(|| chosen.clone());
        let given = self.row.answer_column().or(chosen);
        let answer = match (&self.asked, given) {
            (Asked::Nothing(text), _) => {
                return Ok(Answered {
                    prompt: PromptText::Text(String::new()),
                    answer: text.clone(),
                });
            }
            (Asked::Implicit(pair), _) => pair.chosen.clone(),
            (_, Some(column)) => {
                let answer = self.row.response(&column)?;
                self.agrees(&[&answer])?;
                answer
            }
            (Asked::Answered(_, turn), None) => self::answer(turn)?,
            (Asked::Prompt(_), None) => return Err(self.row.no_answer()),
        };
        Ok(Answered {
            prompt: self.prompt()?,
            answer,
        })
    }

    /// The prompt and two responses.
    ///
    /// # Errors
    /// What is missing or malformed, in words.
    pub fn pair(&self) -> Result<Pair, String> {
        if let Asked::Implicit(pair) = &self.asked {
            return Ok(pair.clone());
        }
        let Columns {
            chosen, rejected, ..
        } = self.row.columns;
        let (chosen, rejected) = (self.row.response(chosen)?, self.row.response(rejected)?);
        self.agrees(&[&chosen, &rejected])?;
        Ok(Pair {
            prompt: self.prompt()?,
            chosen,
            rejected,
        })
    }

    /// What is asked, for those who count.
    pub(crate) fn kind(&self) -> Kind {
        let columns = self.row.columns;
        let named = columns.prompt.name.as_str();
        match &self.asked {
            Asked::Nothing(_) => Kind::Nothing,
            Asked::Prompt(PromptText::Dialogue(dialogue))
                if named != "prompt" && dialogue.continues_final_message() =>
            {
                Kind::Continued
            }
            Asked::Prompt(PromptText::Text(text)) if self.row.repeat(text) => Kind::Repeated,
            Asked::Prompt(PromptText::Text(_)) | Asked::Implicit(_) => Kind::Text,
            _ => Kind::Dialogue,
        }
    }

    /// The columns of the row that its form does not read.
    #[must_use]
    pub fn unread(&self) -> Vec<&'a str> {
        let Given { row, columns } = self.row;
        let names = row.keys().map(String::as_str);
        let unread = names.filter(|name| !columns.knows(name) && !self.read.contains(name));
        unread.collect()
    }

    /// That a dialogue does not end with another answer than those that stand beside it.
    fn agrees(&self, answers: &[&String]) -> Result<(), String> {
        let Asked::Answered(_, turn) = &self.asked else {
            return Ok(());
        };
        let said = answer(turn)?;
        match answers.contains(&&said) {
            true => Ok(()),
            false => Err(format!(
                "the dialogue ends with an answer of its own ({}): leave it out, or the answer beside it",
                shortened(&said.into())
            )),
        }
    }
}

impl<'a> Given<'a> {
    /// What stands in a column, when it is not null.
    fn value(self, name: &str) -> Option<&'a Value> {
        present(self.row, name)
    }

    fn has(self, name: &str) -> bool {
        self.value(name).is_some()
    }

    /// The first of these columns that the row has.
    fn first(self, names: &[&'static str]) -> Option<(&'static str, &'a Value)> {
        names
            .iter()
            .find_map(|name| Some((*name, self.value(name)?)))
    }

    /// Whether the row has answers, all of them text that begins with `prompt`.
    fn repeat(self, prompt: &str) -> bool {
        let Columns {
            chosen, rejected, ..
        } = self.columns;
        let answer = self.answer_column();
        let answers = [Some(chosen), Some(rejected), answer.as_ref()];
        let answers = answers.into_iter().flatten();
        let mut said = answers.filter_map(|column| self.value(&column.name));
        let begins = |value: &Value| value.as_str().is_some_and(|text| text.starts_with(prompt));
        !prompt.is_empty() && said.clone().next().is_some() && said.all(begins)
    }

    fn refuse_media(self) -> Result<(), String> {
        let holds = |value: &Value| match value {
            Value::Array(all) => !all.is_empty(),
            Value::String(text) => !text.is_empty(),
            _ => true,
        };
        match self.first(&MEDIA) {
            Some((name, value)) if holds(value) => Err(format!(
                "column {name:?} holds something, and the models here read text alone: leave such rows out"
            )),
            _ => Ok(()),
        }
    }

    /// The table of forms, in its order.
    fn find(self, read: &mut BTreeSet<&'static str>) -> Result<Found, String> {
        let prompt = self.prompt_column()?;
        let whole = self.whole(prompt.is_some())?;
        match (prompt, whole) {
            (Some(Value::String(_)) | None, Some(shared)) => Ok(Found::Turns(shared, None)),
            (Some(prompt), Some(shared)) => self.within(prompt, shared),
            (Some(Value::String(text)), None) => self.beside_text(text, read),
            (Some(prompt), None) => {
                let turns = turns(prompt).map_err(|reason| self.of_prompt(&reason))?;
                Ok(Found::Turns(turns, None))
            }
            (None, None) => self.without_prompt(read),
        }
    }

    /// What the prompt column holds; none when it is one of whole dialogues, or of answers that are.
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

    /// What two dialogues share, or one has before its answer, where answers are written as whole dialogues.
    fn whole(self, has_prompt: bool) -> Result<Option<Vec<Message>>, String> {
        let has_prompt = has_prompt || self.first(&DIALOGUES).or(self.first(&QUESTIONS)).is_some();
        let is_whole = |column: &Column| {
            let first = self.value(&column.name).and_then(first_role);
            first.is_some_and(|(role, count)| role != "assistant" || (count > 1 && !has_prompt))
        };
        if let Some(column) = self.answer_column().filter(is_whole) {
            return self.before_answer(&column).map(Some);
        }
        let Columns {
            chosen,
            rejected,
            golden,
            ..
        } = self.columns;
        match (is_whole(chosen), is_whole(rejected)) {
            (false, false) => {
                let golden = golden.as_ref().filter(|column| is_whole(column));
                let golden = golden.filter(|column| !DIALOGUES.contains(&column.name.as_str()));
                golden.map(|column| self.before_answer(column)).transpose()
            }
            (true, true) => self.shared().map(Some),
            (true, false) if !self.has(&rejected.name) => self.before_answer(chosen).map(Some),
            (false, true) if !self.has(&chosen.name) => self.before_answer(rejected).map(Some),
            _ => Err(format!(
                "one of {:?} and {:?} is a whole dialogue and the other an answer alone",
                chosen.name, rejected.name
            )),
        }
    }

    /// The turns of a column, of which the last is the assistant's.
    fn dialogue(self, column: &Column) -> Result<Vec<Message>, String> {
        let of = |reason| format!("column {:?}: {reason}", column.name);
        let value = self
            .value(&column.name)
            .ok_or_else(|| self.missing(column))?;
        let turns = turns(value).map_err(of)?;
        turns.last().map_or(Ok(String::new()), answer).map_err(of)?;
        Ok(turns)
    }

    fn before_answer(self, column: &Column) -> Result<Vec<Message>, String> {
        let mut turns = self.dialogue(column)?;
        turns.pop();
        Ok(turns)
    }

    /// The turns that the chosen and the rejected dialogue share: all but the last (TRL: `extract_prompt`).
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

    /// Messages as the prompt, beside answers that are whole dialogues: they must hold the prompt.
    fn within(self, prompt: &Value, shared: Vec<Message>) -> Result<Found, String> {
        let turns = turns(prompt).map_err(|reason| self.of_prompt(&reason))?;
        match shared.ends_with(&turns) {
            true => Ok(Found::Turns(shared, None)),
            false => Err(format!(
                "column {:?} and the dialogues beside it do not ask the same; take one of them out",
                self.columns.prompt.name
            )),
        }
    }

    /// A text prompt, beside answers that are none of them whole dialogues.
    fn beside_text(self, text: &str, read: &mut BTreeSet<&'static str>) -> Result<Found, String> {
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
            return Ok(Found::Turns(vec![Message::new("user", text)], None));
        }
        if self.columns.prompt.name == "instruction" {
            read.insert("instruction");
        }
        Ok(Found::Text(text.to_owned()))
    }

    /// `messages` and its like: what is asked, and the answer where the last turn is the assistant's.
    fn in_dialogue_column(self) -> Result<Option<Found>, String> {
        let named = DIALOGUES
            .into_iter()
            .filter(|name| **name == self.columns.prompt.name);
        let list =
            |name: &'static str| Some((name, self.value(name).filter(|value| value.is_array())?));
        let Some((name, value)) = named.chain(DIALOGUES).find_map(list) else {
            return Ok(None);
        };
        let mut turns = turns(value).map_err(|reason| format!("column {name:?}: {reason}"))?;
        let answered = turns.last().is_some_and(|turn| turn.role == "assistant");
        let answer = if answered { turns.pop() } else { None };
        Ok(Some(Found::Turns(turns, answer)))
    }

    fn without_prompt(self, read: &mut BTreeSet<&'static str>) -> Result<Found, String> {
        if let Some(found) = self.in_dialogue_column()? {
            return Ok(found);
        }
        if let Some((name, value)) = self.first(&QUESTIONS) {
            read.insert(name);
            let text = self.text(name, value)?;
            let turns = self.question(name, text, read)?;
            return Ok(Found::Turns(turns, None));
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
                .map(Found::Implicit)
                .map_err(missing);
        }
        match (self.value(TEXT), self.first(&DIALOGUES)) {
            (Some(Value::String(text)), _) if !self.has_answer() => {
                read.insert(TEXT);
                Ok(Found::Nothing(text.clone()))
            }
            (_, Some((name, value))) => Err(format!(
                "column {name:?} is not a list of messages but {}{}",
                shortened(value),
                as_list(value)
            )),
            _ => Err(self.missing(&self.columns.prompt)),
        }
    }

    /// Two texts whose prompt is what they begin with. Where a third text stands beside them, which may be a prompt
    /// under a name that nobody knows, only dialogues with turns of their own are taken.
    fn implicit(self, chosen: &str, rejected: &str) -> Result<Pair, String> {
        let is_dialogue = chosen.contains(ASSISTANT);
        let is_other =
            |(name, value): &(&String, &Value)| value.is_string() && !self.columns.knows(name);
        match self.row.iter().find(is_other) {
            Some((name, _)) if !is_dialogue => Err(format!(
                "{name:?} may hold it: what two texts begin with is their prompt only where no other text is"
            )),
            _ => implicit(chosen, rejected),
        }
    }

    fn text(self, name: &str, value: &'a Value) -> Result<&'a str, String> {
        let text = value.as_str();
        text.ok_or_else(|| format!("column {name:?} is not text but {}", shortened(value)))
    }

    /// A text prompt as it stands, or as a dialogue where columns beside it belong to one.
    fn of_text(self, text: String, read: &mut BTreeSet<&'static str>) -> Result<Asked, String> {
        let of_instruction = match read.contains("instruction") {
            true => &INPUTS[..],
            false => &[],
        };
        let beside = [&SYSTEMS[..], of_instruction].concat();
        let has_context = beside.iter().any(|name| self.row.contains_key(*name));
        if has_context || self.value(HISTORY).is_some_and(Value::is_array) {
            let name = self.columns.prompt.name.as_str();
            let turns = self.question(name, &text, read)?;
            return self.in_context(turns, read).map(Asked::Prompt);
        }
        match [TOOLS, TEMPLATE_KWARGS]
            .into_iter()
            .find(|name| self.is_filled(name))
        {
            None => Ok(Asked::Prompt(PromptText::Text(text))),
            Some(name) => Err(format!(
                "column {name:?} is for a chat template, which a prompt of text does not go through: write the prompt as messages"
            )),
        }
    }

    /// What a user asks in the column `name`, after what was said before (Alpaca, as LLaMA-Factory reads it).
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
        let mut asked = text.to_owned();
        for more in INPUTS.into_iter().filter(|_| name == "instruction") {
            read.insert(more);
            let input = self
                .value(more)
                .map(|value| self.text(more, value))
                .transpose()?;
            if let Some(input) = input.filter(|input| !input.is_empty()) {
                let seam = if asked.is_empty() { "" } else { "\n" };
                asked = format!("{asked}{seam}{input}");
            }
        }
        turns.push(Message::new("user", &asked));
        Ok(turns)
    }

    /// A dialogue with the system's turn, the tools and the template's variables that stand beside it.
    fn in_context(
        self,
        mut turns: Vec<Message>,
        read: &mut BTreeSet<&'static str>,
    ) -> Result<PromptText, String> {
        if let Some((name, value)) = self.first(&SYSTEMS) {
            read.insert(name);
            let text = self.text(name, value)?;
            let own = turns.first().filter(|turn| turn.role == "system");
            match own {
                Some(turn) if turn.content != *text && !text.is_empty() => {
                    return Err(format!(
                        "column {name:?} and the dialogue's own turn of the system differ: take one of them out"
                    ));
                }
                None if !text.is_empty() => turns.insert(0, Message::new("system", text)),
                _ => {}
            }
        }
        let mut prompt = asked(turns)?;
        if let PromptText::Dialogue(dialogue) = &mut prompt {
            dialogue.tools = self.tools()?;
            dialogue.template_kwargs = self.template_kwargs()?;
        }
        Ok(prompt)
    }

    /// The JSON schemas of the tools, as a list or as text of one.
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

    /// A column of JSON, which Parquet's users write as text.
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

    /// Whether a column of JSON holds something.
    fn is_filled(self, name: &str) -> bool {
        match self.json(name) {
            Ok(None) => false,
            Ok(Some(Value::Array(all))) => !all.is_empty(),
            Ok(Some(Value::Object(all))) => !all.is_empty(),
            Ok(Some(_)) | Err(_) => true,
        }
    }

    /// The column of the one answer, if the row has it.
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

    /// The answer in a column: text, one turn of the assistant, or a whole dialogue that ends with it.
    fn response(self, column: &Column) -> Result<String, String> {
        let of = |reason| format!("column {:?}: {reason}", column.name);
        match self.value(&column.name) {
            None => Err(self.missing(column)),
            Some(Value::String(text)) => Ok(text.clone()),
            Some(value) => {
                let turns = turns(value).map_err(of)?;
                match turns.as_slice() {
                    [first, _, ..]
                        if first.role == "assistant" && !self.is_dialogue_start(value) =>
                    {
                        Err(of(format!(
                            "the answer has {} turns, and one of the assistant is needed",
                            turns.len()
                        )))
                    }
                    [.., last] => answer(last).map_err(of),
                    [] => Err(of("there is no turn".into())),
                }
            }
        }
    }

    /// Whether messages that begin with the assistant are a whole dialogue: the row has no other prompt.
    fn is_dialogue_start(self, value: &Value) -> bool {
        let is_prompt = |column: Result<Option<&Value>, String>| matches!(column, Ok(Some(_)));
        !is_prompt(self.prompt_column()) && first_role(value).is_some_and(|(_, count)| count > 1)
    }

    fn no_answer(self) -> String {
        let dialogue = self.first(&DIALOGUES).and_then(|(name, value)| {
            let (role, _) = first_role(value.as_array()?.last()?)?;
            Some(format!(
                "the last turn of {name:?} is the {role}'s, not an answer of the assistant"
            ))
        });
        dialogue.unwrap_or_else(|| self.missing(&self.columns.answer))
    }

    fn of_prompt(self, reason: &str) -> String {
        let prompt = &self.columns.prompt;
        format!("column {:?}: {reason}{}", prompt.name, prompt.remedy())
    }

    /// That a column is not there, or is null, and which ones are.
    fn missing(self, column: &Column) -> String {
        let name = &column.name;
        let remedy = column.remedy();
        if self.row.contains_key(name) {
            return format!("the value of column {name:?} is null{remedy}");
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

/// The remedy for a list that was written as text.
fn as_list(value: &Value) -> &'static str {
    let list = value.as_str().map(serde_json::from_str::<Vec<Value>>);
    match list {
        Some(Ok(_)) => ": it is JSON within a text; write the list itself (json.loads)",
        _ => "",
    }
}

/// Alpaca's `history`: what was asked and answered before, in pairs.
fn history(pairs: &[Value]) -> Result<Vec<Message>, String> {
    let mut turns = Vec::new();
    for pair in pairs {
        let Some([Value::String(asked), Value::String(answered)]) =
            pair.as_array().map(Vec::as_slice)
        else {
            return Err(format!(
                "column {HISTORY:?} has {} where [asked, answered] is needed",
                shortened(pair)
            ));
        };
        turns.extend([
            Message::new("user", asked),
            Message::new("assistant", answered),
        ]);
    }
    Ok(turns)
}

/// The prompt that two texts begin with: up to the last turn of an `Assistant:` that they share (Anthropic's HH); of
/// texts without such turns the characters they share, but for a space at the end (TRL: `extract_prompt`).
fn implicit(chosen: &str, rejected: &str) -> Result<Pair, String> {
    let marks = chosen
        .match_indices(ASSISTANT)
        .map(|(place, _)| place + ASSISTANT.len());
    let turn = marks
        .take_while(|&cut| rejected.get(..cut) == chosen.get(..cut))
        .last();
    let cut = match turn {
        Some(cut) => cut,
        None if chosen.contains(ASSISTANT) || rejected.contains(ASSISTANT) => {
            return Err("the dialogues share no turn of an \"Assistant:\"".into());
        }
        None => shared_text(chosen, rejected),
    };
    if cut == 0 {
        return Err("the two texts share no beginning that could be one".into());
    }
    let rest = |text: &str| match text[cut..].rfind(HUMAN) > text[cut..].rfind(ASSISTANT) {
        true => Err("the last turn of a dialogue is the Human's, not an answer of the Assistant"),
        false => Ok(text[cut..].to_owned()),
    };
    Ok(Pair {
        prompt: PromptText::Text(chosen[..cut].to_owned()),
        chosen: rest(chosen)?,
        rejected: rest(rejected)?,
    })
}

fn shared_text(chosen: &str, rejected: &str) -> usize {
    let both = chosen.char_indices().zip(rejected.chars());
    let mut last = 0;
    for ((place, a), b) in both {
        last = place;
        if a != b {
            let before = &chosen[..place];
            return place - usize::from(before.ends_with(' '));
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use messages::Dialogue;
    use serde_json::json;

    use super::*;

    /// The page that shows every form.
    const PAGE: &str = include_str!("../../../docs/data.md");

    fn with<T>(
        row: &Value,
        columns: &Columns,
        take: impl Fn(&Form<'_>) -> Result<T, String>,
    ) -> Result<T, String> {
        let row = row.as_object().expect("a row is an object");
        take(&Form::of(row, columns)?)
    }

    fn pair(row: &Value) -> Result<(PromptText, String, String), String> {
        let pair = with(row, &Columns::default(), |form| form.pair())?;
        Ok((pair.prompt, pair.chosen, pair.rejected))
    }

    fn answered(row: &Value) -> Result<(PromptText, String), String> {
        let Answered { prompt, answer } = with(row, &Columns::default(), |form| form.answered())?;
        Ok((prompt, answer))
    }

    fn prompt(row: &Value) -> Result<PromptText, String> {
        with(row, &Columns::default(), |form| form.prompt())
    }

    fn prompt_in(column: &str) -> Columns {
        Columns {
            prompt: Column::named(column, "prompts.prompt_column"),
            ..Columns::default()
        }
    }

    fn turn(role: &str, content: &str) -> Value {
        json!({"role": role, "content": content})
    }

    fn dialogue(turns: &[(&str, &str)]) -> PromptText {
        let turns = turns.iter().map(|(role, text)| Message::new(role, text));
        PromptText::Dialogue(Dialogue::new(turns.collect()))
    }

    fn text(text: &str) -> PromptText {
        PromptText::Text(text.into())
    }

    #[test]
    fn every_example_of_the_documentation_is_read() {
        let mut examples = 0;
        for block in PAGE.split("\n```json ").skip(1) {
            let (kinds, rest) = block.split_once('\n').expect("a line of kinds");
            let (rows, _) = rest.split_once("\n```").expect("an end");
            for row in rows.lines() {
                let value: Value =
                    serde_json::from_str(row).unwrap_or_else(|e| panic!("{e}: {row}"));
                let all = [
                    ("prompt", prompt(&value).map(|_| ())),
                    ("answered", answered(&value).map(|_| ())),
                    ("pair", pair(&value).map(|_| ())),
                ];
                for (kind, read) in all {
                    let expected = kinds.split(' ').any(|name| name == kind);
                    // A dialogue of which the answer cannot be learned is still a prompt.
                    if expected || kind != "prompt" {
                        assert_eq!(read.is_ok(), expected, "as {kind}: {read:?} of {row}");
                    }
                }
                examples += 1;
            }
        }
        assert!(examples >= 25, "{examples} examples");
    }

    #[test]
    fn pairs_are_read_in_every_form() {
        let user = turn("user", "q");
        let says = |what: &str| turn("assistant", what);
        let asked = dialogue(&[("user", "q")]);
        let told = dialogue(&[("system", "s"), ("user", "q")]);
        let many = dialogue(&[("user", "first?"), ("assistant", "x"), ("user", "q")]);
        let whole = |answer: &str| json!([turn("user", "first?"), says("x"), user, says(answer)]);
        let ab = |prompt: &PromptText| (prompt.clone(), "a".to_owned(), "b".to_owned());
        let cases = [
            (
                json!({"prompt": "q", "chosen": "a", "rejected": "b"}),
                ab(&text("q")),
            ),
            (
                json!({"prompt": [user], "chosen": [says("a")], "rejected": [says("b")]}),
                ab(&asked),
            ),
            (
                json!({"prompt": [user], "chosen": "a", "rejected": says("b")}),
                ab(&asked),
            ),
            (
                json!({"chosen": [user, says("a")], "rejected": [user, says("b")]}),
                ab(&asked),
            ),
            // UltraFeedback: what the text lacks is in the dialogues.
            (
                json!({"prompt": "first?", "chosen": whole("a"), "rejected": whole("b"), "messages": whole("a")}),
                ab(&many),
            ),
            (
                json!({"prompt": [user], "chosen": [turn("system", "s"), user, says("a")],
                    "rejected": [turn("system", "s"), user, says("b")]}),
                ab(&told),
            ),
            (
                json!({"prompt": "q", "chosen": [says("a")], "rejected": [says("b")]}),
                ab(&asked),
            ),
            (
                json!({"conversations": [{"from": "human", "value": "q"}],
                    "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}}),
                ab(&asked),
            ),
            (
                json!({"messages": [user, says("a")], "chosen": "a", "rejected": "b"}),
                ab(&asked),
            ),
            (
                json!({"system": "s", "question": "q", "chosen": "a", "rejected": "b"}),
                ab(&told),
            ),
            (
                json!({"system": "", "question": "q", "chosen": "a", "rejected": "b"}),
                ab(&asked),
            ),
            (
                json!({"system": "s", "prompt": "q", "chosen": "a", "rejected": "b"}),
                ab(&told),
            ),
            (
                json!({"instruction": "do", "input": "this", "chosen": "a", "rejected": "b"}),
                ab(&dialogue(&[("user", "do\nthis")])),
            ),
        ];
        for (row, expected) in cases {
            assert_eq!(pair(&row), Ok(expected), "{row}");
            // The same prompt, whatever the row is read for.
            assert_eq!(prompt(&row), pair(&row).map(|(prompt, ..)| prompt), "{row}");
            assert_eq!(
                answered(&row).map(|(_, answer)| answer),
                Ok("a".into()),
                "{row}"
            );
        }
    }

    #[test]
    fn texts_have_their_prompt_where_they_part() {
        let hh =
            |tail: &str| format!("\n\nHuman: q\n\nAssistant: x\n\nHuman: r\n\nAssistant: {tail}");
        for (chosen, rejected, cut) in [
            (
                hh("a"),
                hh("b"),
                "\n\nHuman: q\n\nAssistant: x\n\nHuman: r\n\nAssistant:",
            ),
            (
                "\n\nHuman: q\n\nAssistant: a".into(),
                "\n\nHuman: q\n\nAssistant: b\n\nHuman: r\n\nAssistant: c".into(),
                "\n\nHuman: q\n\nAssistant:",
            ),
            (
                hh("a"),
                hh("a"),
                "\n\nHuman: q\n\nAssistant: x\n\nHuman: r\n\nAssistant:",
            ),
            // TRL's own example, as extract_prompt gives it.
            (
                "The sky is blue.".into(),
                "The sky is green.".into(),
                "The sky is",
            ),
            ("Où est-ce?".into(), "Où est-il?".into(), "Où est-"),
        ] {
            let row = json!({"chosen": chosen, "rejected": rejected});
            let expected = (
                text(cut),
                chosen[cut.len()..].to_owned(),
                rejected[cut.len()..].to_owned(),
            );
            assert_eq!(pair(&row), Ok(expected), "{row}");
        }
    }

    #[test]
    fn answers_are_read_in_every_form() {
        let user = turn("user", "2 + 2?");
        let assistant = turn("assistant", "4");
        let asked = dialogue(&[("user", "2 + 2?")]);
        let parts = json!([{"type": "text", "text": "4", "image": null}]);
        for row in [
            json!({"prompt": user, "completion": [assistant]}),
            json!({"prompt": [user], "completion": "4"}),
            json!({"prompt": user, "chosen": assistant}),
            json!({"prompt": "2 + 2?", "completion": [assistant]}),
            json!({"prompt": "2 + 2?", "completion": [user, assistant]}),
            json!({"prompt": "2 + 2?", "messages": [user, assistant]}),
            json!({"completion": [user, assistant]}),
            json!({"messages": [user, assistant]}),
            json!({"messages": [user, {"role": "assistant", "content": parts}]}),
            json!({"messages": [user], "completion": "4"}),
            json!({"conversation": [user, assistant]}),
            json!({"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}),
            json!({"instruction": "2 + 2?", "input": "", "output": "4"}),
            json!({"instruction": "", "input": "2 + 2?", "output": "4"}),
            json!({"question": "2 + 2?", "answer": "4"}),
            json!({"system_prompt": null, "question": "2 + 2?", "response": "4"}),
        ] {
            assert_eq!(answered(&row), Ok((asked.clone(), "4".into())), "{row}");
            assert_eq!(prompt(&row), Ok(asked.clone()), "{row}");
        }
        let plain = json!({"prompt": "2 + 2?", "completion": "4", "messages": [user]});
        assert_eq!(answered(&plain), Ok((text("2 + 2?"), "4".into())));
        let history = json!({"instruction": "and 3?", "output": "6", "history": [["2 + 2?", "4"]], "system": "add"});
        let turns = [
            ("system", "add"),
            ("user", "2 + 2?"),
            ("assistant", "4"),
            ("user", "and 3?"),
        ];
        assert_eq!(answered(&history), Ok((dialogue(&turns), "6".into())));
        let alone = json!({"text": "the sky"});
        assert_eq!(answered(&alone), Ok((text(""), "the sky".into())));
        assert!(prompt(&alone).is_err_and(|why| why.contains("has no prompt")));
    }

    #[test]
    fn a_named_column_leaks_no_answer() {
        let (user, assistant) = (turn("user", "hi"), turn("assistant", "ANSWER"));
        let asked = dialogue(&[("user", "hi")]);
        let share = json!([{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ANSWER"}]);
        for (column, row) in [
            ("messages", json!({"messages": [user, assistant]})),
            (
                "messages",
                json!({"prompt": "hi", "messages": [user, assistant]}),
            ),
            (
                "conversations",
                json!({"conversations": share, "messages": null}),
            ),
            (
                "chosen",
                json!({"chosen": [user, assistant], "rejected": [user, turn("assistant", "no")]}),
            ),
            ("chosen", json!({"chosen": [user, assistant]})),
            ("completion", json!({"completion": [user, assistant]})),
        ] {
            let columns = prompt_in(column);
            assert_eq!(
                with(&row, &columns, |form| form.prompt()),
                Ok(asked.clone()),
                "{row}"
            );
        }
        // What stands in a column of prompts is one, and is continued.
        let row = json!({"prompt": [user, assistant], "mine": [user, assistant]});
        let prefix = dialogue(&[("user", "hi"), ("assistant", "ANSWER")]);
        for column in ["prompt", "mine"] {
            assert_eq!(
                with(&row, &prompt_in(column), |form| form.prompt()),
                Ok(prefix.clone())
            );
        }
    }

    #[test]
    fn columns_that_are_named_work_in_every_form() {
        let text_row = json!({"question": "q", "good": "a", "bad": "b", "gold": "c"});
        let columns = Columns {
            prompt: Column::named("question", "prompts.prompt_column"),
            answer: Column::named("good", "sft.completion_column"),
            golden: Some(Column::named("gold", "prompts.golden_column")),
            chosen: Column::named("good", "chosen_column"),
            rejected: Column::named("bad", "rejected_column"),
        };
        let read = with(&text_row, &columns, |form| form.pair()).expect("a pair");
        assert_eq!((read.prompt, read.rejected.as_str()), (text("q"), "b"));
        assert_eq!(
            with(&text_row, &columns, |form| Ok(form.answered()?.answer)),
            Ok("a".into())
        );
        assert_eq!(
            with(&text_row, &columns, |form| form.golden()),
            Ok(Some("c".into()))
        );
        let whole = |answer: &str| json!([turn("user", "q"), turn("assistant", answer)]);
        let row =
            json!({"question": "q", "good": whole("a"), "bad": whole("b"), "gold": whole("c")});
        let read = with(&row, &columns, |form| form.pair()).expect("a pair");
        assert_eq!(
            (read.prompt, read.chosen.as_str()),
            (dialogue(&[("user", "q")]), "a")
        );
        assert_eq!(
            with(&row, &columns, |form| form.golden()),
            Ok(Some("c".into()))
        );
        // Orca and Alpaca under the names that they have anyway lose nothing.
        let orca = json!({"system": "s", "question": "q", "chosen": "a", "rejected": "b"});
        let told = dialogue(&[("system", "s"), ("user", "q")]);
        assert_eq!(
            with(&orca, &prompt_in("question"), |form| form.prompt()),
            Ok(told)
        );
        let alpaca = json!({"instruction": "do", "input": "this", "chosen": "a", "rejected": "b"});
        let both = dialogue(&[("user", "do\nthis")]);
        assert_eq!(
            with(&alpaca, &prompt_in("instruction"), |form| form.prompt()),
            Ok(both)
        );
        // A golden answer is no part of the form.
        let golden = Columns {
            golden: Some(Column::named("messages", "prompts.golden_column")),
            ..Columns::default()
        };
        let row = json!({"messages": [turn("user", "q"), turn("assistant", "a")], "golden": "b"});
        assert_eq!(
            with(&row, &golden, |form| form.golden()),
            Ok(Some("a".into()))
        );
        assert_eq!(
            with(&row, &golden, |form| form.prompt()),
            Ok(dialogue(&[("user", "q")]))
        );
    }

    #[test]
    fn tools_and_variables_go_with_the_dialogue() {
        let tool = json!({"type": "function", "function": {"name": "now", "parameters": {}}});
        for tools in [json!([tool]), json!(json!([tool]).to_string())] {
            let row = json!({"prompt": [turn("user", "q")], "tools": tools,
                "chat_template_kwargs": {"enable_thinking": false}});
            let Ok(PromptText::Dialogue(read)) = prompt(&row) else {
                panic!("{row} is a dialogue")
            };
            assert_eq!(read.tools, std::slice::from_ref(&tool));
            assert_eq!(read.template_kwargs["enable_thinking"], json!(false));
        }
        let defaulted = json!({"type": "function", "function": {"name": "now", "parameters": {"default": null}}});
        let row = json!({"prompt": [turn("user", "q")], "tools": [defaulted]});
        let Ok(PromptText::Dialogue(read)) = prompt(&row) else {
            panic!("{row} is a dialogue")
        };
        assert_eq!(read.tools, [defaulted], "a default may be null");
        for none in [json!(null), json!([]), json!("")] {
            let row = json!({"prompt": [turn("user", "q")], "tools": none});
            assert_eq!(prompt(&row), Ok(dialogue(&[("user", "q")])), "{row}");
            assert_eq!(
                prompt(&json!({"prompt": "q", "tools": none})),
                Ok(text("q"))
            );
        }
        let whole = json!([turn("user", "q"), turn("assistant", "a")]);
        let row = json!({"messages": whole, "tools": [tool]});
        let (prompt, _) = answered(&row).expect("an answer");
        assert!(matches!(prompt, PromptText::Dialogue(read) if read.tools.len() == 1));
    }

    #[test]
    fn rows_are_told_apart_by_what_they_ask() {
        let (user, assistant) = (turn("user", "hi"), turn("assistant", "ANSWER"));
        let whole = json!([user, assistant]);
        for (column, row, expected) in [
            (
                "prompt",
                json!({"prompt": "hi", "completion": " you"}),
                Kind::Text,
            ),
            (
                "prompt",
                json!({"prompt": "hi", "completion": "hi you"}),
                Kind::Repeated,
            ),
            (
                "prompt",
                json!({"prompt": "hi", "chosen": "hi a", "rejected": "hi b"}),
                Kind::Repeated,
            ),
            (
                "prompt",
                json!({"prompt": "hi", "chosen": "hi a", "rejected": "b"}),
                Kind::Text,
            ),
            (
                "prompt",
                json!({"chosen": "hi a", "rejected": "hi b"}),
                Kind::Text,
            ),
            (
                "prompt",
                json!({"prompt": "hi", "system": "s"}),
                Kind::Dialogue,
            ),
            ("prompt", json!({"prompt": whole}), Kind::Dialogue),
            ("prompt", json!({"messages": whole}), Kind::Dialogue),
            ("dialog", json!({"dialog": whole}), Kind::Continued),
            ("messages", json!({"messages": whole}), Kind::Dialogue),
            ("prompt", json!({"text": "hi"}), Kind::Nothing),
        ] {
            let kind = with(&row, &prompt_in(column), |form| Ok(form.kind()));
            assert_eq!(kind, Ok(expected), "{row}");
        }
    }

    #[test]
    fn columns_without_a_meaning_are_named() {
        let columns = Columns::default();
        let row =
            json!({"prompt": "q", "completion": "a", "score": 1, "input": "x", "system": null});
        let unread = with(&row, &columns, |form| {
            Ok(form
                .unread()
                .into_iter()
                .map(str::to_owned)
                .collect::<Vec<_>>())
        });
        assert_eq!(unread, Ok(vec!["score".to_owned(), "input".into()]));
        let row = json!({"instruction": "q", "input": "x", "output": "a"});
        assert_eq!(with(&row, &columns, |form| Ok(form.unread().len())), Ok(0));
    }

    fn refused(cases: &[(Value, &str)]) {
        for (row, expected) in cases {
            let error = pair(row).expect_err(expected);
            assert!(error.contains(expected), "{row}: {error}");
        }
    }

    #[test]
    fn what_is_missing_of_a_pair_is_said() {
        let user = turn("user", "q");
        let says = |what: &str| turn("assistant", what);
        refused(&[
            (
                json!({"prompt": "q", "chosen": "a"}),
                "no column \"rejected\" among \"prompt\", \"chosen\"",
            ),
            (
                json!({"prompt": "q", "chosen": null, "rejected": "b"}),
                "the value of column \"chosen\" is null",
            ),
            (
                json!({"prompt": 1, "chosen": "a", "rejected": "b"}),
                "column \"prompt\": 1 is neither text nor messages",
            ),
            (
                json!({"prompt": [], "chosen": "a", "rejected": "b"}),
                "the list of messages is empty",
            ),
            (
                json!({"chosen": "a", "rejected": "b"}),
                "share no beginning",
            ),
            (
                json!({"query": "q", "chosen": "The a", "rejected": "The b"}),
                "\"query\" may hold it",
            ),
            (
                json!({"chosen": [user], "rejected": [user]}),
                "the last turn is the user's (\"q\")",
            ),
            (
                json!({"chosen": [user, says("a")], "rejected": "b"}),
                "a whole dialogue and the other an answer alone",
            ),
            (
                json!({"prompt": "q", "chosen": 3, "rejected": "b"}),
                "column \"chosen\": 3 is neither text nor messages",
            ),
        ]);
    }

    #[test]
    fn a_pair_of_other_dialogues_is_refused() {
        let user = turn("user", "q");
        let says = |what: &str| turn("assistant", what);
        refused(&[
            (
                json!({"prompt": "q", "chosen": [user, says("a"), turn("user", "thanks")],
                    "rejected": [user, says("b"), turn("user", "thanks")]}),
                "column \"chosen\": the last turn is the user's (\"thanks\"), not an answer",
            ),
            (
                json!({"chosen": [user, says("a"), user, says("c")], "rejected": [user, says("b"), user, says("d")]}),
                "differ from turn 2 on",
            ),
            (
                json!({"prompt": [user], "chosen": [says("a"), user, says("c")], "rejected": [says("b")]}),
                "the answer has 3 turns",
            ),
            (
                json!({"prompt": [turn("user", "other")], "chosen": [user, says("a")], "rejected": [user, says("b")]}),
                "do not ask the same",
            ),
            (
                json!({"messages": [user, says("c")], "chosen": "a", "rejected": "b"}),
                "an answer of its own (\"c\")",
            ),
            (
                json!({"chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: thanks", "rejected": "\n\nHuman: q\n\nAssistant: b"}),
                "the Human's",
            ),
            (
                json!({"prompt": [turn("system", "s")], "chosen": "a", "rejected": "b"}),
                "the system's",
            ),
            (
                json!({"system": "t", "prompt": [turn("system", "s"), user], "chosen": "a", "rejected": "b"}),
                "\"system\" and the dialogue's own turn of the system differ",
            ),
            (
                json!({"prompt": "q", "images": ["x.png"], "chosen": "a", "rejected": "b"}),
                "column \"images\"",
            ),
            (
                json!({"prompt": "q", "tools": [{}], "chosen": "a", "rejected": "b"}),
                "column \"tools\" is for a chat template",
            ),
        ]);
    }

    #[test]
    fn what_is_missing_names_its_setting() {
        let columns = prompt_in("question");
        for (row, says) in [
            (
                json!({"text": "a"}),
                "no column \"question\" among \"text\"; prompts.prompt_column names another",
            ),
            (
                json!({"question": null}),
                "the value of column \"question\" is null",
            ),
            (json!({"question": 3}), "column \"question\": 3 is neither"),
        ] {
            let why = with(&row, &columns, |form| form.prompt()).expect_err(says);
            assert!(why.contains(says), "{why}");
        }
        for (row, says) in [
            (json!({}), "the row is empty"),
            (json!({"messages": "a"}), "\"messages\" is not a list"),
            (
                json!({"messages": "[{\"role\": \"user\", \"content\": \"hi\"}]"}),
                "it is JSON within a text; write the list itself",
            ),
            (
                json!({"messages": [turn("assistant", "4")]}),
                "no turn before the answer",
            ),
        ] {
            let why = prompt(&row).expect_err(says);
            assert!(why.contains(says), "{why}");
        }
        for (row, says) in [
            (json!({"prompt": "a"}), "no column \"completion\""),
            (
                json!({"messages": [turn("user", "4")]}),
                "the last turn of \"messages\" is the user's",
            ),
            (
                json!({"prompt": "a", "completion": "b", "label": false}),
                "\"label\" is false",
            ),
        ] {
            let why = answered(&row).expect_err(says);
            assert!(why.contains(says), "{why}");
        }
    }
}
