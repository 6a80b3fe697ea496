//! Pairs from files that are trained on: read as tokens, in an order by seed and pass, and drawn into batches.
//!
//! Promises that the pair at a place of the order is the same in every run with the same files and seed, so that a cursor
//! suffices to resume. Does not know where the other pairs of a batch come from.

mod rows;
mod share;
mod source;
mod unusual_pairs;

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
};

use dataset::{Column, Columns, DatasetError, FileLimits, LabelColumns, Mix, shuffled};
use messages::{
    Completion, Dialogue, Digest, Finish, JudgeVersion, Label, LabelledPair, Pair, Probability,
    Prompt, PromptBatch, PromptId, Purpose, Seed, WeightsVersion,
};
use model::Tokenizer;
use settings::{FilePairsSettings, PairLabelSource, TooLong};

use crate::{
    error::LearnerError,
    pair_selection::has_margin,
    prompts::{PromptRow, PromptSet},
};

pub use rows::{PairAnswer, PairCounts, PairLimit, PairRow, visit_pairs};
pub use share::{BatchShare, planned_steps};
pub(crate) use source::{
    FileBatch, FilePairs, FilePairsParts, FilePairsState, Judging, LabelArrival,
};

/// First id of pairs from files; those of APO follow.
const FILE_IDS: u64 = 1 << 61;

/// First id that is not of a pair from a file.
const FILE_IDS_END: u64 = 1 << 62;

/// Bits of an id that hold the index of the pair; the pass over the pairs is above them.
const INDEX_BITS: u32 = 32;

/// RNG stream id of the order of files in the mix.
const MIX_STREAM: u64 = 0x3f1e;

/// RNG stream id of the order of pairs in a file.
const ORDER_STREAM: u64 = 0x0f11e;

/// RNG stream id of the pairs' seeds.
const SEED_STREAM: u64 = 0x5f11e;

/// Name in the place of an actor's and a judge's.
const FROM_FILE: &str = "file";

/// Id in the first pass of the pair at `index` among all pairs of the files.
#[must_use]
pub fn file_pair_id(index: u64) -> PromptId {
    PromptId(FILE_IDS | index)
}

/// Whether an id is of a pair from a file.
pub(crate) fn is_from_file(id: PromptId) -> bool {
    (FILE_IDS..FILE_IDS_END).contains(&id.0)
}

/// Index of a pair among all pairs of the files, from its id in any pass.
pub(crate) fn index_of(id: PromptId) -> u64 {
    id.0 & ((1 << INDEX_BITS) - 1)
}

/// Id that the label noise of a pair derives from: of a pair from a file the same in every pass, like a mistake in the
/// file.
pub(crate) fn label_id(id: PromptId) -> PromptId {
    match is_from_file(id) {
        true => file_pair_id(index_of(id)),
        false => id,
    }
}

/// Pairs of files: mixed by weight, each file in a new order in every pass.
#[derive(Debug)]
pub struct PairFiles {
    /// Pairs of each file.
    files: Vec<Vec<FilePair>>,
    /// Path of each file.
    paths: Vec<PathBuf>,
    mix: Mix,
    shuffles: bool,
    seed: Seed,
    digest: Digest,
}

/// A pair and its label.
#[derive(Debug, Clone, PartialEq)]
struct FilePair {
    row: PairRow,
    /// Probability that the chosen response is preferred.
    p: Probability,
}

/// A place in the order of the pairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FilePlace {
    file: usize,
    row: usize,
    /// Index among all pairs.
    pub(crate) index: u64,
    /// Pass over the file, from 0.
    pass: u64,
}

impl FilePlace {
    /// Id of the pair in this pass.
    fn id(self) -> PromptId {
        PromptId(FILE_IDS | self.pass << INDEX_BITS | self.index)
    }
}

impl PairFiles {
    /// Reads and tokenises all files; logs how many rows were left out and why. A pair has at most `positions` tokens,
    /// those of the model, and `pairs.max_length`. Pairs whose label in the file has a |p − ½| below `min_margin` are left
    /// out; labels of the judge are not known yet.
    ///
    /// # Errors
    /// If a file cannot be read or has no pairs to train on, or a row is malformed, does not tokenise, has a label outside its range,
    /// or is too long without `pairs.too_long = "drop"`: with file and line.
    pub fn load(
        settings: &FilePairsSettings,
        min_margin: f64,
        seed: Seed,
        positions: usize,
        tokenizer: &Tokenizer,
    ) -> Result<Self, LearnerError> {
        let named = settings.files();
        let weights: Vec<f64> = named.iter().map(|file| file.weight).collect();
        let Some(first) = named.first() else {
            let path = settings.path.clone();
            let reason = "no file of pairs is named: name pairs.path or pairs.mix".into();
            return Err(DatasetError::File { path, reason }.into());
        };
        let mix =
            Mix::new(&weights, seed.derive(MIX_STREAM)).map_err(|reason| DatasetError::File {
                path: first.path.clone(),
                reason: format!("pairs.mix: {reason}"),
            })?;
        let files: Result<Vec<_>, LearnerError> = named
            .iter()
            .map(|file| {
                let pairs = read(&file.path, settings, positions, tokenizer)?;
                match settings.label {
                    PairLabelSource::Judge => Ok(pairs),
                    _ => with_margin(&file.path, pairs, min_margin),
                }
            })
            .collect();
        let files = files?;
        Ok(Self {
            digest: digest(&files, &weights),
            files,
            paths: named.into_iter().map(|file| file.path).collect(),
            mix,
            shuffles: settings.shuffle,
            seed,
        })
    }

    /// Removes the pairs whose prompts are held out of `prompts`; logs their number.
    ///
    /// # Errors
    /// If none of a file's remains.
    pub fn remove_held_out(
        &mut self,
        settings: &FilePairsSettings,
        prompts: &dyn PromptSet,
    ) -> Result<(), LearnerError> {
        let held_out = prompts.held_out_count().unwrap_or(0) as u64;
        if held_out == 0 {
            return Ok(());
        }
        let held_out: Vec<PromptRow> = (0..held_out).map(|index| prompts.held_out(index)).collect();
        let ids: HashSet<&[u32]> = held_out.iter().map(|row| row.ids.as_slice()).collect();
        // Where a template renders an answered dialogue differently, its prompt has other tokens.
        let contents: HashSet<String> = (held_out.iter())
            .map(|row| content(&row.text, row.dialogue.as_ref()))
            .collect();
        let mut removed = 0;
        for (pairs, path) in self.files.iter_mut().zip(&self.paths) {
            let before = pairs.len();
            pairs.retain(|FilePair { row, .. }| {
                let content = content(&row.text, row.dialogue.as_ref());
                !ids.contains(row.prompt.as_slice()) && !contents.contains(&content)
            });
            removed += before - pairs.len();
            if pairs.is_empty() {
                let reason = "the prompts of all its pairs are held out: hold out fewer (prompts.held_out), or name other \
                              prompts (prompts.held_out_path)";
                return Err(DatasetError::File {
                    path: path.clone(),
                    reason: reason.into(),
                }
                .into());
            }
        }
        if removed > 0 {
            tracing::warn!(
                removed,
                kept = self.count(),
                "pairs with held-out prompts were left out"
            );
            let weights: Vec<f64> = settings.files().iter().map(|file| file.weight).collect();
            self.digest = digest(&self.files, &weights);
        }
        Ok(())
    }

    /// Number of pairs.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.files.iter().map(|rows| rows.len() as u64).sum()
    }

    /// Path of each file, and digest of the tokens and labels of its pairs.
    #[must_use]
    pub fn files(&self) -> Vec<(&Path, Digest)> {
        let digests = self
            .files
            .iter()
            .map(|pairs| digest(std::slice::from_ref(pairs), &[]));
        self.paths
            .iter()
            .map(PathBuf::as_path)
            .zip(digests)
            .collect()
    }

    /// Paths of the files, for messages.
    pub(crate) fn paths(&self) -> String {
        let paths = self.paths.iter().map(|path| path.display().to_string());
        paths.collect::<Vec<_>>().join(", ")
    }

    /// Digest of the tokens and labels of all pairs, and of the files' weights.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// The place of the pair that is drawn as the one with number `cursor`.
    pub(crate) fn place(&self, cursor: u64) -> FilePlace {
        let (file, position) = self.mix.place(cursor);
        let count = self.files[file].len() as u64;
        let seed = self.seed.derive(ORDER_STREAM).derive(file as u64);
        let row = match self.shuffles {
            true => shuffled(position, count, seed),
            false => position % count,
        };
        let before = self.files[..file].iter().map(|rows| rows.len() as u64);
        FilePlace {
            file,
            row: row as usize,
            index: before.sum::<u64>() + row,
            pass: position / count,
        }
    }

    /// The pair at a place, as a message of `session` with the file's label.
    pub(crate) fn message(&self, place: FilePlace, session: u64) -> LabelledPair {
        let FilePair { row, p } = &self.files[place.file][place.row];
        // Of no weights that were trained; the session is that of the learner.
        let version = WeightsVersion { session, step: 0 };
        let prompt = Prompt {
            id: place.id(),
            prompt_batch: PromptBatch::single(place.id()),
            purpose: Purpose::File,
            version,
            seed: self.seed.derive(SEED_STREAM).derive(place.index),
            ids: row.prompt.clone(),
            text: row.text.clone(),
            dialogue: row.dialogue.clone(),
            golden: None,
            answer: row.golden.clone(),
            route: row.route.clone(),
        };
        LabelledPair {
            pair: Pair {
                prompt,
                version,
                completions: vec![completion(&row.chosen), completion(&row.rejected)],
                actor: FROM_FILE.into(),
            },
            labels: vec![Label {
                first: 0,
                second: 1,
                p: *p,
                judged: None,
            }],
            judge: FROM_FILE.into(),
            judge_version: JudgeVersion(0),
            scores: scores(row),
            verdicts: Vec::new(),
        }
    }
}

/// Content of a prompt: its dialogue, or its text.
fn content(text: &str, dialogue: Option<&Dialogue>) -> String {
    let dialogue = dialogue.map(|dialogue| serde_json::json!(dialogue).to_string());
    dialogue.unwrap_or_else(|| text.to_owned())
}

/// A response as a completion of which nothing was recorded.
fn completion(answer: &PairAnswer) -> Completion {
    Completion::unrecorded(answer.ids.clone(), Finish::EndOfText, answer.text.clone())
}

/// Scores of both responses, if the label is made of them.
fn scores(row: &PairRow) -> Option<Vec<f32>> {
    match row.label? {
        dataset::PairLabel::Probability(_) => None,
        dataset::PairLabel::Scores { chosen, rejected } => {
            let scores = vec![chosen as f32, rejected as f32];
            scores.iter().all(|s| s.is_finite()).then_some(scores)
        }
    }
}

/// Columns of pairs and labels.
fn columns(settings: &FilePairsSettings) -> Columns {
    Columns {
        prompt: Column::named(&settings.prompt_column, "pairs.prompt_column"),
        chosen: Column::named(&settings.chosen_column, "pairs.chosen_column"),
        rejected: Column::named(&settings.rejected_column, "pairs.rejected_column"),
        label: label_columns(settings),
        golden: Column::optional(&settings.golden_column, "pairs.golden_column"),
        route: Column::optional(&settings.route_column, "pairs.route_column"),
        chat: settings.chat,
        limits: FileLimits {
            max_file_bytes: settings.max_file_bytes,
            max_rows: settings.max_rows,
            section: Some("pairs"),
        },
        ..Columns::default()
    }
}

/// Columns with the file's labels, if it has some that are read.
fn label_columns(settings: &FilePairsSettings) -> Option<LabelColumns> {
    if settings.label == PairLabelSource::Judge {
        return None;
    }
    let scores = || {
        Some(LabelColumns::Scores {
            chosen: Column::optional(&settings.chosen_score_column, "pairs.chosen_score_column")?,
            rejected: Column::named(
                &settings.rejected_score_column,
                "pairs.rejected_score_column",
            ),
        })
    };
    let probability = Column::optional(&settings.label_column, "pairs.label_column");
    probability.map(LabelColumns::Probability).or_else(scores)
}

/// The pairs of one file.
fn read(
    path: &Path,
    settings: &FilePairsSettings,
    positions: usize,
    tokenizer: &Tokenizer,
) -> Result<Vec<FilePair>, LearnerError> {
    let unusable = |reason: String| DatasetError::File {
        path: path.to_owned(),
        reason,
    };
    let limit = PairLimit {
        tokens: settings.max_length.min(positions),
        setting: "pairs.max_length",
        refuses: settings.too_long == TooLong::Refuse,
    };
    let mut rows = Vec::new();
    let counts = visit_pairs(path, &columns(settings), limit, tokenizer, |row| {
        rows.push(row);
    })?;
    if rows.is_empty() {
        let PairCounts { read, .. } = counts;
        let reason = format!("the file holds no pairs to train on: of {read} rows {counts}");
        return Err(unusable(reason).into());
    }
    counts.log(path, rows.len());
    let pair = |row: PairRow| {
        let p = row
            .label
            .map_or(1.0, |label| label.probability(settings.score_temperature));
        let p = Probability::new(p as f32).map_err(|error| unusable(error.to_string()))?;
        Ok(FilePair { row, p })
    };
    rows.into_iter().map(pair).collect()
}

/// The pairs of the file at `path` whose label has this margin; logs the number of the others.
fn with_margin(
    path: &Path,
    mut pairs: Vec<FilePair>,
    min_margin: f64,
) -> Result<Vec<FilePair>, LearnerError> {
    let read = pairs.len();
    pairs.retain(|pair| has_margin(pair.p, min_margin));
    let without_signal = read - pairs.len();
    if pairs.is_empty() {
        let reason = format!(
            "the file holds no pairs to train on: all {read} have a |p - 1/2| below learner.min_margin = {min_margin}"
        );
        let path = path.to_owned();
        return Err(DatasetError::File { path, reason }.into());
    }
    if without_signal > 0 {
        let (path, kept) = (path.display(), pairs.len());
        tracing::warn!(%path, kept, without_signal, "pairs were left out: learner.min_margin");
    }
    Ok(pairs)
}

impl PairCounts {
    /// Logs what was left out of a file of which `kept` pairs were kept.
    fn log(self, path: &Path, kept: usize) {
        if self.read > kept {
            tracing::warn!(
                path = %path.display(),
                kept,
                too_long = self.too_long,
                empty_responses = self.empty,
                equal_responses = self.equal,
                later_turns = self.later_turns,
                "pairs were left out"
            );
        }
    }
}

impl std::fmt::Display for PairCounts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} are too long, {} have an empty response, {} have two equal ones and {} have further turns in one",
            self.too_long, self.empty, self.equal, self.later_turns
        )
    }
}

/// Digest of the tokens and labels of all pairs, and of the files' weights.
fn digest(files: &[Vec<FilePair>], weights: &[f64]) -> Digest {
    let mut all = format!("{weights:?}").into_bytes();
    for pairs in files {
        all.extend((pairs.len() as u64).to_le_bytes());
        for FilePair { row, p } in pairs {
            let parts = [&row.prompt, &row.chosen.ids, &row.rejected.ids];
            let lengths = parts.map(|ids| ids.len() as u32);
            let numbers = lengths.iter().chain(parts.into_iter().flatten());
            let mut bytes: Vec<u8> = numbers.flat_map(|number| number.to_le_bytes()).collect();
            bytes.extend(p.get().to_le_bytes());
            for text in [&row.golden, &row.route].into_iter().flatten() {
                bytes.extend(Digest::of(text.as_bytes()).0);
            }
            all.extend(Digest::of(&bytes).0);
        }
    }
    Digest::of(&all)
}

#[cfg(test)]
pub(crate) mod tests;
