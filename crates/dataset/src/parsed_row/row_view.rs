//! Cells of a row by column name, and the errors about them.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use crate::{
    columns::{Column, Columns, LABEL, MEDIA, SYSTEMS, TEMPLATE_KWARGS, TOOLS},
    turn::{present, shortened},
};

/// A row with the column names.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowView<'a> {
    pub(super) row: &'a Map<String, Value>,
    pub(super) columns: &'a Columns,
}

impl<'a> RowView<'a> {
    /// The value of a column, if not null.
    pub(super) fn value(self, name: &str) -> Option<&'a Value> {
        present(self.row, name)
    }

    pub(super) fn has(self, name: &str) -> bool {
        self.value(name).is_some()
    }

    /// The first of these columns that is not null.
    pub(super) fn first(self, names: &[&'static str]) -> Option<(&'static str, &'a Value)> {
        names
            .iter()
            .find_map(|name| Some((*name, self.value(name)?)))
    }

    /// A column with its value, if not null.
    pub(super) fn filled(self, name: &str) -> Option<(&str, &'a Value)> {
        Some((name, self.value(name)?))
    }

    /// Columns that every format reads or refuses. Which of the answers is used depends on what the row is for.
    pub(super) fn read_in_every_format(self) -> BTreeSet<&'a str> {
        let Columns {
            chosen, rejected, ..
        } = self.columns;
        let mut read = BTreeSet::from(MEDIA);
        read.extend([TOOLS, TEMPLATE_KWARGS, LABEL]);
        read.extend(self.first(&SYSTEMS).map(|(name, _)| name));
        read.extend([chosen.name.as_str(), rejected.name.as_str()]);
        read.extend(self.columns.beside().map(|column| column.name.as_str()));
        read
    }

    pub(super) fn reject_media(self) -> Result<(), String> {
        let is_filled = |value: &Value| match value {
            Value::Array(all) => !all.is_empty(),
            Value::String(text) => !text.is_empty(),
            _ => true,
        };
        match MEDIA
            .into_iter()
            .find(|name| self.value(name).is_some_and(is_filled))
        {
            Some(name) => Err(format!(
                "column {name:?} is not empty, and only text is supported: remove such rows"
            )),
            None => Ok(()),
        }
    }

    /// The value as text.
    pub(super) fn text(self, name: &str, value: &'a Value) -> Result<&'a str, String> {
        let text = value.as_str();
        text.ok_or_else(|| format!("column {name:?} is not text but {}", shortened(value)))
    }

    /// The number in a column.
    pub(super) fn number(self, column: &Column) -> Result<f64, String> {
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

    /// A JSON column, which may be stored as text in Parquet.
    pub(super) fn json(self, name: &str) -> Result<Option<Value>, String> {
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
    pub(super) fn is_filled(self, name: &str) -> bool {
        match self.json(name) {
            Ok(None) => false,
            Ok(Some(Value::Array(all))) => !all.is_empty(),
            Ok(Some(Value::Object(all))) => !all.is_empty(),
            Ok(Some(_)) | Err(_) => true,
        }
    }

    /// The tools' JSON schemas, from a list or its JSON text.
    pub(super) fn tools(self) -> Result<Vec<Value>, String> {
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
    pub(super) fn template_kwargs(self) -> Result<Map<String, Value>, String> {
        match self.json(TEMPLATE_KWARGS)? {
            None => Ok(Map::new()),
            Some(Value::Object(kwargs)) => Ok(kwargs),
            Some(other) => Err(format!(
                "column {TEMPLATE_KWARGS:?} is not an object but {}",
                shortened(&other)
            )),
        }
    }

    /// Error message for a column that is missing, null, or another part of the row.
    pub(super) fn missing(self, column: &Column) -> String {
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

    /// Error message about the prompt column.
    pub(super) fn prompt_error(self, reason: &str) -> String {
        let prompt = &self.columns.prompt;
        format!("column {:?}: {reason}{}", prompt.name, prompt.remedy())
    }
}
