//! Where prompts come from: any set that can be asked for its n-th prompt, and a JSONL file as one.

use std::path::Path;

use dataset::{DatasetError, read_rows, shuffled};
use messages::{PromptText, Seed};
use model::Tokenizer;
use serde_json::Value;
use settings::JsonlPrompts;

use crate::LearnerError;

/// A prompt of a set.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptRow {
    /// Its tokens, special tokens included.
    pub ids: Vec<u32>,
    /// The same for people.
    pub text: String,
    /// The golden answer's tokens, end-of-text included.
    pub golden: Option<Vec<u32>>,
    /// The same as text.
    pub answer: Option<String>,
}

/// A set of prompts: the same number always gives the same prompt, so that a cursor is all there is to
/// resume.
pub trait PromptSet: Send + Sync {
    /// The prompt at place `index` of training.
    fn train(&self, index: u64) -> PromptRow;
    /// The prompt at place `index` of evaluation; never one of training.
    fn held_out(&self, index: u64) -> PromptRow;
}

/// The prompts of a file, in a new order every epoch.
#[derive(Debug)]
pub struct Jsonl {
    train: Vec<PromptRow>,
    held_out: Vec<PromptRow>,
    shuffle: Option<Seed>,
}

impl Jsonl {
    /// Reads the file, or both files, and tokenises every row.
    ///
    /// # Errors
    /// When a file cannot be read, or a row is malformed, has no prompt, or has a prompt of more than
    /// `max_prompt_length` tokens: with file and line.
    pub fn load(
        settings: &JsonlPrompts,
        seed: Seed,
        max_prompt_length: usize,
        tokenizer: &Tokenizer,
        eos: Option<u32>,
    ) -> Result<Self, LearnerError> {
        let reader = Reader {
            settings,
            max_prompt_length,
            tokenizer,
            eos,
        };
        let mut train = reader.rows(&settings.path)?;
        let held_out = if settings.held_out_path.as_os_str().is_empty() {
            if settings.held_out == 0 || settings.held_out >= train.len() {
                let reason = format!(
                    "prompts.held_out = {} leaves nothing of {} rows: hold out fewer, or name prompts.held_out_path",
                    settings.held_out,
                    train.len()
                );
                return Err(DatasetError::Row {
                    path: settings.path.clone(),
                    line: train.len(),
                    reason,
                }
                .into());
            }
            train.split_off(train.len() - settings.held_out)
        } else {
            reader.rows(&settings.held_out_path)?
        };
        Ok(Self {
            train,
            held_out,
            shuffle: settings.shuffle.then_some(seed),
        })
    }
}

impl PromptSet for Jsonl {
    fn train(&self, index: u64) -> PromptRow {
        let count = self.train.len() as u64;
        let place = match self.shuffle {
            Some(seed) => shuffled(index, count, seed),
            None => index % count,
        };
        self.train[place as usize].clone()
    }

    fn held_out(&self, index: u64) -> PromptRow {
        self.held_out[(index % self.held_out.len() as u64) as usize].clone()
    }
}

struct Reader<'a> {
    settings: &'a JsonlPrompts,
    max_prompt_length: usize,
    tokenizer: &'a Tokenizer,
    eos: Option<u32>,
}

impl Reader<'_> {
    fn rows(&self, path: &Path) -> Result<Vec<PromptRow>, DatasetError> {
        let rows = read_rows(path)?
            .into_iter()
            .map(|(line, row)| {
                self.row(&row).map_err(|reason| DatasetError::Row {
                    path: path.to_owned(),
                    line,
                    reason,
                })
            })
            .collect::<Result<Vec<_>, _>>()?;
        if rows.is_empty() {
            let reason = "the file holds no prompts".into();
            return Err(DatasetError::Row {
                path: path.to_owned(),
                line: 1,
                reason,
            });
        }
        Ok(rows)
    }

    fn row(&self, row: &Value) -> Result<PromptRow, String> {
        let column = self.settings.prompt_column.as_str();
        let prompt = row
            .get(column)
            .ok_or_else(|| format!("there is no column {column:?}; see prompts.prompt_column"))?;
        let prompt: PromptText = serde_json::from_value(prompt.clone())
            .map_err(|_| format!("{column:?} is neither text nor messages"))?;
        let ids = self
            .tokenizer
            .encode_prompt(&prompt)
            .map_err(|error| error.to_string())?;
        if ids.len() > self.max_prompt_length {
            return Err(format!(
                "the prompt has {} tokens, more than actor.max_prompt_length = {}",
                ids.len(),
                self.max_prompt_length
            ));
        }
        let golden = self.settings.golden_column.as_str();
        let answer = match (golden, row.get(golden)) {
            ("", _) => None,
            (_, Some(Value::String(answer))) => Some(answer.clone()),
            _ => {
                return Err(format!(
                    "there is no text in column {golden:?}; see prompts.golden_column"
                ));
            }
        };
        let golden = answer
            .as_ref()
            .map(|answer| self.tokenizer.encode_completion(&prompt, &ids, answer))
            .transpose()
            .map_err(|error| error.to_string())?
            .map(|answer| answer.into_iter().chain(self.eos).collect());
        Ok(PromptRow {
            text: self.tokenizer.decode(&ids),
            ids,
            golden,
            answer,
        })
    }
}
