//! Where prompts come from: any set that can be asked for its n-th prompt, and files as one.

mod held_out;

use std::{collections::HashSet, path::Path};

use dataset::{DatasetError, Mix, read_rows, shuffled};
use messages::{Dialogue, PromptText, Seed};
use model::Tokenizer;
use serde_json::Value;
use settings::{DatasetPrompts, TooLong};

use crate::LearnerError;
use held_out::HeldOut;

/// A prompt of a set.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptRow {
    /// Its tokens, special tokens included.
    pub ids: Vec<u32>,
    /// The same for people.
    pub text: String,
    /// The dialogue that `ids` render; none when the prompt was text.
    pub dialogue: Option<Dialogue>,
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
    /// Number of distinct held-out prompts, at places `0..count`; from there on they repeat. `None` when
    /// every place is an independent draw.
    fn held_out_count(&self) -> Option<usize>;
}

/// The prompts of files: mixed by weight, each file in a new order every epoch.
#[derive(Debug)]
pub struct PromptFiles {
    /// The training rows of each file.
    files: Vec<Vec<PromptRow>>,
    held_out: HeldOut,
    mix: Mix,
    shuffle: Option<Seed>,
}

impl PromptFiles {
    /// Reads all files, tokenises every row, and says how many were left out and why.
    ///
    /// # Errors
    /// When a file cannot be read, or a row is malformed, has no prompt, or has a prompt of more than
    /// `max_prompt_length` tokens that is not to be dropped: with file and line.
    pub fn load(
        settings: &DatasetPrompts,
        seed: Seed,
        max_prompt_length: usize,
        (tokenizer, eos): (&Tokenizer, Option<u32>),
    ) -> Result<Self, LearnerError> {
        let mut reader = Reader {
            settings,
            max_prompt_length,
            tokenizer,
            eos,
            seen: HashSet::new(),
        };
        let named = settings.files();
        let weights: Vec<f64> = named.iter().map(|file| file.weight).collect();
        let mix = Mix::new(&weights, seed.derive(MIX)).map_err(|reason| DatasetError::Row {
            path: named[0].path.clone(),
            line: 1,
            reason: format!("prompts.mix: {reason}"),
        })?;
        // First, so that none of them is trained on.
        let mut held_out = match settings.held_out_path.as_os_str().is_empty() {
            true => Vec::new(),
            false => vec![reader.rows(&settings.held_out_path)?],
        };
        let splits = held_out.is_empty();
        let mut files = Vec::new();
        for (index, file) in named.iter().enumerate() {
            let mut train = reader.rows(&file.path)?;
            if splits {
                held_out.push(split(&mut train, settings, mix.share(index), &file.path)?);
            }
            files.push(train);
        }
        held_out.resize(files.len(), Vec::new());
        Ok(Self {
            files,
            held_out: HeldOut::interleaved(&mut held_out, &mix),
            mix,
            shuffle: settings.shuffle.then_some(seed),
        })
    }
}

/// Takes this file's share of the held-out rows off its end.
fn split(
    train: &mut Vec<PromptRow>,
    settings: &DatasetPrompts,
    share: f64,
    path: &Path,
) -> Result<Vec<PromptRow>, DatasetError> {
    let count = (settings.held_out as f64 * share).ceil() as usize;
    if count == 0 || count >= train.len() {
        return Err(DatasetError::Row {
            path: path.to_owned(),
            line: train.len(),
            reason: format!(
                "prompts.held_out = {} leaves nothing of {} rows: hold out fewer, or name prompts.held_out_path",
                settings.held_out,
                train.len()
            ),
        });
    }
    Ok(train.split_off(train.len() - count))
}

impl PromptSet for PromptFiles {
    fn train(&self, index: u64) -> PromptRow {
        let (file, place) = self.mix.place(index);
        let rows = &self.files[file];
        let count = rows.len() as u64;
        let place = match self.shuffle {
            Some(seed) if self.files.len() > 1 => shuffled(place, count, seed.derive(file as u64)),
            Some(seed) => shuffled(place, count, seed),
            None => place % count,
        };
        rows[place as usize].clone()
    }

    fn held_out(&self, index: u64) -> PromptRow {
        self.held_out.row(index)
    }

    fn held_out_count(&self) -> Option<usize> {
        Some(self.held_out.len())
    }
}

/// The seed of the order in which files are read, apart from those of the rows.
const MIX: u64 = 0x313;

struct Reader<'a> {
    settings: &'a DatasetPrompts,
    max_prompt_length: usize,
    tokenizer: &'a Tokenizer,
    eos: Option<u32>,
    /// The prompts that came before, in any file.
    seen: HashSet<Vec<u32>>,
}

/// How many rows of a file were left out, by reason.
#[derive(Debug, Default)]
struct LeftOut {
    duplicates: usize,
    short: usize,
    long: usize,
}

impl Reader<'_> {
    fn rows(&mut self, path: &Path) -> Result<Vec<PromptRow>, DatasetError> {
        let refused = |line, reason| DatasetError::Row {
            path: path.to_owned(),
            line,
            reason,
        };
        let (mut kept, mut left_out) = (Vec::new(), LeftOut::default());
        for (line, row) in read_rows(path)? {
            let row = self.row(&row).map_err(|reason| refused(line, reason))?;
            let length = row.ids.len();
            if length > self.max_prompt_length {
                if self.settings.too_long == TooLong::Refuse {
                    return Err(refused(line, self.too_long(length)));
                }
                left_out.long += 1;
            } else if length < self.settings.min_length {
                left_out.short += 1;
            } else if self.settings.deduplicate && !self.seen.insert(row.ids.clone()) {
                left_out.duplicates += 1;
            } else {
                kept.push(row);
            }
        }
        let LeftOut {
            duplicates,
            short,
            long,
        } = left_out;
        let out = duplicates + short + long;
        if kept.is_empty() {
            let reason = format!(
                "the file holds no prompts: of {out} rows {duplicates} came before, {short} are too short and {long} too long"
            );
            return Err(refused(1, reason));
        }
        if out > 0 {
            tracing::warn!(
                path = %path.display(),
                kept = kept.len(),
                duplicates,
                too_short = short,
                too_long = long,
                "prompts were left out"
            );
        }
        Ok(kept)
    }

    fn too_long(&self, length: usize) -> String {
        format!(
            "the prompt has {length} tokens, more than actor.max_prompt_length = {}; prompts.too_long = \"drop\" leaves such rows out",
            self.max_prompt_length
        )
    }

    fn row(&self, row: &Value) -> Result<PromptRow, String> {
        let settings = self.settings;
        let prompt = dataset::prompt(row, &settings.prompt_column)
            .map_err(|reason| format!("{reason}; see prompts.prompt_column"))?;
        let ids = self
            .tokenizer
            .encode_prompt(&prompt)
            .map_err(|error| error.to_string())?;
        let golden = settings.golden_column.as_str();
        let answer = match golden {
            "" => None,
            golden => Some(
                dataset::response(row, golden)
                    .map_err(|reason| format!("{reason}; see prompts.golden_column"))?,
            ),
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
            dialogue: match prompt {
                PromptText::Dialogue(dialogue) => Some(dialogue),
                PromptText::Text(_) => None,
            },
            golden,
            answer,
        })
    }
}
