//! The answers of a row: their columns and forms.

use serde_json::Value;

use crate::{
    columns::{ANSWERS, Column, Columns, DIALOGUES},
    parsed_row::row_view::RowView,
    turn::{answer, first_role, turns},
};

impl<'a> RowView<'a> {
    /// The column of the single answer, if the row has one.
    pub(super) fn answer_column(self) -> Option<Column> {
        Some(Column {
            name: self.answer_name()?.to_owned(),
            setting: self.columns.answer.setting,
        })
    }

    /// Name of the column of the single answer, if the row has one.
    pub(super) fn answer_name(self) -> Option<&'a str> {
        let named = self.columns.answer.name.as_str();
        if self.has(named) {
            return Some(named);
        }
        let others = if named == "completion" {
            &ANSWERS[..]
        } else {
            &[]
        };
        self.first(others).map(|(name, _)| name)
    }

    pub(super) fn has_answer(self) -> bool {
        let Columns {
            chosen, rejected, ..
        } = self.columns;
        self.answer_column().is_some() || self.has(&chosen.name) || self.has(&rejected.name)
    }

    /// The answer in a column: text, one assistant turn, or a complete dialogue that ends with it.
    pub(super) fn response(self, column: &Column) -> Result<String, String> {
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
    pub(super) fn is_dialogue_start(self, value: &Value) -> bool {
        let is_prompt = |column: Result<Option<&Value>, String>| matches!(column, Ok(Some(_)));
        !is_prompt(self.prompt_column()) && first_role(value).is_some_and(|(_, count)| count > 1)
    }

    /// Error message for a row without an answer.
    pub(super) fn no_answer(self) -> String {
        let dialogue = self.first(&DIALOGUES).and_then(|(name, value)| {
            let (role, _) = first_role(value.as_array()?.last()?)?;
            Some(format!(
                "the last turn of {name:?} is the {role}'s, not an answer of the assistant"
            ))
        });
        dialogue.unwrap_or_else(|| self.missing(&self.columns.answer))
    }
}
