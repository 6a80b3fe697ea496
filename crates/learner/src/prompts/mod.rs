//! Prompt sets: prompts by index, from files or any other source.

mod held_out;

use std::{collections::HashSet, path::Path};

use dataset::{Column, Columns, DatasetError, FileLimits, Mix, ParsedRow, shuffled};
use messages::{
    Dialogue, Digest, Prompt, PromptBatch, PromptId, PromptText, Purpose, Seed, WeightsVersion,
};
use model::{AnswerBoundary, ModelError, Tokenizer};
use settings::{DatasetPrompts, TooLong};

use crate::{boundary_counts::BoundaryCounts, error::LearnerError, prompts::held_out::HeldOut};

/// A prompt of a set.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptRow {
    /// Prompt tokens, special tokens included.
    pub ids: Vec<u32>,
    /// Prompt text for display: the given text, or for a dialogue the decoded tokens.
    pub text: String,
    /// Dialogue that `ids` were rendered from; none if the prompt was text.
    pub dialogue: Option<Dialogue>,
    /// Tokens of the golden answer, end-of-text included.
    pub golden: Option<Vec<u32>>,
    /// Text of the golden answer.
    pub answer: Option<String>,
    /// Value of the column that a routing judge reads.
    pub route: Option<String>,
}

impl PromptRow {
    /// The prompt of an evaluation by itself, which belongs to no run.
    #[must_use]
    pub fn held_out_prompt(self, id: PromptId, seed: Seed) -> Prompt {
        Prompt {
            id,
            prompt_batch: PromptBatch::single(id),
            purpose: Purpose::Evaluate,
            version: WeightsVersion::REFERENCE,
            seed,
            ids: self.ids,
            text: self.text,
            dialogue: self.dialogue,
            golden: self.golden,
            answer: self.answer,
            route: self.route,
        }
    }
}

/// A set of prompts. An index always gives the same prompt, so that a cursor suffices to resume.
pub trait PromptSet: Send + Sync {
    /// Training prompt `index`.
    fn train(&self, index: u64) -> PromptRow;
    /// Held-out prompt `index`; never a training prompt.
    fn held_out(&self, index: u64) -> PromptRow;
    /// Number of distinct held-out prompts, at indices `0..count`; after those they repeat. `None` if every index is an
    /// independent draw.
    fn held_out_count(&self) -> Option<usize>;
    /// Number of distinct training prompts, of which indices `0..count` have each once. `None` if there is no such number:
    /// every index is an independent draw, or prompts are mixed by weight.
    fn train_count(&self) -> Option<usize> {
        None
    }
    /// Digests by name of everything that the set can return; none if the settings alone determine it.
    fn digests(&self) -> Vec<(&'static str, Digest)> {
        Vec::new()
    }
}

/// The prompts of a run that samples nothing: none.
#[derive(Debug, Clone, Copy)]
pub struct NoPrompts;

impl PromptSet for NoPrompts {
    /// An empty prompt, which no actor would answer; nothing asks for it.
    fn train(&self, _index: u64) -> PromptRow {
        PromptRow {
            ids: Vec::new(),
            text: String::new(),
            dialogue: None,
            golden: None,
            answer: None,
            route: None,
        }
    }

    fn held_out(&self, index: u64) -> PromptRow {
        self.train(index)
    }

    fn held_out_count(&self) -> Option<usize> {
        Some(0)
    }
}

/// Prompts of files: mixed by weight, each file shuffled anew every epoch.
#[derive(Debug)]
pub struct PromptFiles {
    /// Training rows of each file.
    files: Vec<Vec<PromptRow>>,
    held_out: HeldOut,
    mix: Mix,
    /// Sampling weight of each file.
    weights: Vec<f64>,
    shuffle: Option<Seed>,
}

impl PromptFiles {
    /// Reads and tokenises all files; logs how many rows were left out and why. No prompt is both held out and trained
    /// on, even if it occurs several times or in several files.
    ///
    /// # Errors
    /// If a file cannot be read, or a row is malformed, has no prompt, or exceeds `limits` without `prompts.too_long =
    /// "drop"`: with file and line.
    pub fn load(
        settings: &DatasetPrompts,
        seed: Seed,
        limits: PromptLimits,
        tokenizer: &Tokenizer,
    ) -> Result<Self, LearnerError> {
        let named = settings.files();
        let weights: Vec<f64> = named.iter().map(|file| file.weight).collect();
        let mix =
            Mix::new(&weights, seed.derive(MIX_STREAM)).map_err(|reason| DatasetError::File {
                path: named[0].path.clone(),
                reason: format!("prompts.mix: {reason}"),
            })?;
        let mut reader = PromptReader {
            settings,
            columns: columns(settings),
            limits,
            tokenizer,
            seen: HashSet::new(),
        };
        // Read first, so that none of them is trained on.
        let mut held_out = match settings.held_out_path.as_os_str().is_empty() {
            true => Vec::new(),
            false => vec![reader.rows(&settings.held_out_path)?],
        };
        let splits = held_out.is_empty();
        let mut files = Vec::new();
        for (index, file) in named.iter().enumerate() {
            let train = reader.rows(&file.path)?;
            if splits {
                let share = mix.share(index);
                held_out.push(last_distinct(&train, settings, share, &file.path)?);
            }
            files.push(train);
        }
        held_out.resize(files.len(), Vec::new());
        remove_held_out(&mut files, &held_out, settings)?;
        Ok(Self {
            files,
            held_out: HeldOut::interleaved(&mut held_out, &mix),
            mix,
            weights,
            shuffle: settings.shuffle.then_some(seed),
        })
    }
}

/// Columns of prompts, golden answers and routes.
fn columns(settings: &DatasetPrompts) -> Columns {
    Columns {
        prompt: Column::named(&settings.prompt_column, "prompts.prompt_column"),
        golden: Column::optional(&settings.golden_column, "prompts.golden_column"),
        route: Column::optional(&settings.route_column, "prompts.route_column"),
        chat: settings.chat,
        limits: FileLimits {
            max_file_bytes: settings.max_file_bytes,
            max_rows: settings.max_rows,
            section: Some("prompts"),
        },
        ..Columns::default()
    }
}

/// Held-out prompts of a file: its last distinct ones, by its share of the mix.
fn last_distinct(
    rows: &[PromptRow],
    settings: &DatasetPrompts,
    share: f64,
    path: &Path,
) -> Result<Vec<PromptRow>, DatasetError> {
    let count = (settings.held_out as f64 * share).ceil() as usize;
    let mut seen = HashSet::new();
    let last = rows.iter().rev().filter(|row| seen.insert(&row.ids));
    let mut held_out: Vec<PromptRow> = last.take(count).cloned().collect();
    held_out.reverse();
    let all: HashSet<&Vec<u32>> = rows.iter().map(|row| &row.ids).collect();
    match count > 0 && count >= all.len() {
        false => Ok(held_out),
        true => Err(nothing_left(settings, all.len(), path)),
    }
}

fn nothing_left(settings: &DatasetPrompts, prompts: usize, path: &Path) -> DatasetError {
    DatasetError::File {
        path: path.to_owned(),
        reason: format!(
            "prompts.held_out = {} leaves nothing of {prompts} distinct prompts: hold out fewer, or name prompts.held_out_path",
            settings.held_out,
        ),
    }
}

/// Removes from the training rows of each file what is held out, in any file.
fn remove_held_out(
    files: &mut [Vec<PromptRow>],
    held_out: &[Vec<PromptRow>],
    settings: &DatasetPrompts,
) -> Result<(), DatasetError> {
    let ids: HashSet<&Vec<u32>> = held_out.iter().flatten().map(|row| &row.ids).collect();
    let are_from_files = settings.held_out_path.as_os_str().is_empty();
    let mut repeated = 0;
    for (index, (train, named)) in files.iter_mut().zip(settings.files()).enumerate() {
        let rows = train.len();
        train.retain(|row| !ids.contains(&row.ids));
        let moved = if are_from_files {
            held_out[index].len()
        } else {
            0
        };
        repeated += rows - train.len() - moved;
        if train.is_empty() {
            return Err(DatasetError::File {
                path: named.path,
                reason: format!(
                    "all of its {rows} prompts are held out, and none is left to train on"
                ),
            });
        }
    }
    if repeated > 0 {
        tracing::warn!(
            rows = repeated,
            "prompts were left out: they repeat a held-out one"
        );
    }
    Ok(())
}

impl PromptSet for PromptFiles {
    fn train(&self, index: u64) -> PromptRow {
        let (file, position) = self.mix.place(index);
        let rows = &self.files[file];
        let count = rows.len() as u64;
        let row = match self.shuffle {
            Some(seed) if self.files.len() > 1 => {
                shuffled(position, count, seed.derive(file as u64))
            }
            Some(seed) => shuffled(position, count, seed),
            None => position % count,
        };
        rows[row as usize].clone()
    }

    fn held_out(&self, index: u64) -> PromptRow {
        self.held_out.row(index)
    }

    fn held_out_count(&self) -> Option<usize> {
        Some(self.held_out.len())
    }

    fn train_count(&self) -> Option<usize> {
        match &self.files[..] {
            [rows] => Some(rows.len()),
            _ => None,
        }
    }

    fn digests(&self) -> Vec<(&'static str, Digest)> {
        let mut train = format!("{:?}", self.weights).into_bytes();
        for rows in &self.files {
            train.extend(rows_digest(rows).0);
        }
        vec![
            ("rows of the training prompts", Digest::of(&train)),
            (
                "rows of the held-out prompts",
                rows_digest(self.held_out.rows()),
            ),
        ]
    }
}

/// Digest of the tokens of prompts and golden answers, and of their routes.
fn rows_digest(rows: &[PromptRow]) -> Digest {
    let row = |row: &PromptRow| {
        let golden = row.golden.as_deref().unwrap_or_default();
        let lengths = [row.ids.len() as u32, golden.len() as u32];
        let all = lengths.iter().chain(&row.ids).chain(golden);
        let mut bytes: Vec<u8> = all.flat_map(|id| id.to_le_bytes()).collect();
        bytes.extend(row.route.as_deref().unwrap_or_default().as_bytes());
        Digest::of(&bytes).0
    };
    Digest::of(&rows.iter().flat_map(row).collect::<Vec<u8>>())
}

/// RNG stream id of the order of files in the mix.
const MIX_STREAM: u64 = 0x313;

/// Length limits of prompts, in tokens.
#[derive(Debug, Clone, Copy)]
pub struct PromptLimits {
    /// Maximum length of a prompt: `actor.max_prompt_length`.
    pub prompt: usize,
    /// Maximum length of a prompt with its golden answer, if a model reads both: its number of positions.
    pub with_golden: Option<usize>,
}

impl PromptLimits {
    /// Error message for a row that is too long.
    fn exceeded(self, row: &PromptRow) -> Option<String> {
        let (length, golden) = (row.ids.len(), row.golden.as_ref().map_or(0, Vec::len));
        let drop = "prompts.too_long = \"drop\" leaves such rows out";
        if length > self.prompt {
            let most = self.prompt;
            return Some(format!(
                "the prompt has {length} tokens, more than actor.max_prompt_length = {most}; {drop}"
            ));
        }
        let most = self.with_golden.filter(|&most| length + golden > most)?;
        Some(format!(
            "the prompt and its golden answer have {length} + {golden} tokens, more than the model's {most} positions; {drop}"
        ))
    }
}

struct PromptReader<'a> {
    settings: &'a DatasetPrompts,
    columns: Columns,
    limits: PromptLimits,
    tokenizer: &'a Tokenizer,
    /// Digests of the tokens of the prompts read before, in any file.
    seen: HashSet<Digest>,
}

/// Number of rows of a file that were left out, by reason.
#[derive(Debug, Default)]
struct SkippedRows {
    duplicates: usize,
    short: usize,
    long: usize,
    /// Rows with an empty golden answer.
    unanswered: usize,
}

impl SkippedRows {
    /// Logs the counts for a file of which `kept` rows were kept.
    ///
    /// # Errors
    /// If no row was kept.
    fn log(self, path: &Path, kept: usize) -> Result<(), DatasetError> {
        let Self {
            duplicates,
            short,
            long,
            unanswered,
        } = self;
        let out = duplicates + short + long + unanswered;
        if kept == 0 {
            let reason = format!(
                "the file holds no prompts: of {out} rows {duplicates} came before, {short} are too short, {long} too \
                 long and {unanswered} have an empty golden answer"
            );
            return Err(DatasetError::File {
                path: path.to_owned(),
                reason,
            });
        }
        if out > 0 {
            tracing::warn!(
                path = %path.display(),
                kept,
                duplicates,
                too_short = short,
                too_long = long,
                empty_golden_answer = unanswered,
                "prompts were left out"
            );
        }
        Ok(())
    }
}

/// Prompt, golden answer and route of a row.
struct ParsedPrompt {
    prompt: PromptText,
    golden: Option<String>,
    route: Option<String>,
}

/// Counts over the rows of a file.
#[derive(Default)]
struct FileCounts {
    skipped: SkippedRows,
    boundaries: BoundaryCounts,
    template: TemplateUse,
}

impl PromptReader<'_> {
    /// Reads row after row, so that only what is kept takes memory.
    fn rows(&mut self, path: &Path) -> Result<Vec<PromptRow>, DatasetError> {
        let (mut kept, mut counts) = (Vec::new(), FileCounts::default());
        let columns = self.columns.clone();
        dataset::visit(path, &columns, |source, row| {
            let row = self.kept(row, &mut counts);
            kept.extend(row.map_err(|reason| source.refuse(reason))?);
            Ok(())
        })?;
        counts.template.log(path, &self.columns, self.tokenizer);
        counts.boundaries.log(path);
        counts.skipped.log(path, kept.len())?;
        Ok(kept)
    }

    /// The prompt of a row, unless it is left out.
    fn kept(
        &mut self,
        row: &ParsedRow<'_>,
        counts: &mut FileCounts,
    ) -> Result<Option<PromptRow>, String> {
        let (prompt, route) = (row.prompt()?, row.route()?);
        let golden = match route.is_none() && self.settings.has_optional_golden() {
            true => None,
            false => row.golden()?,
        };
        counts.template.count(&prompt);
        let skipped = &mut counts.skipped;
        if golden
            .as_ref()
            .is_some_and(|answer| answer.trim().is_empty())
        {
            skipped.unanswered += 1;
            return Ok(None);
        }
        let parsed = ParsedPrompt {
            prompt,
            golden,
            route,
        };
        let row = self.row(parsed, &mut counts.boundaries);
        let row = row.map_err(|error| error.to_string())?;
        if let Some(reason) = self.limits.exceeded(&row) {
            if self.settings.too_long == TooLong::Refuse {
                return Err(reason);
            }
            skipped.long += 1;
        } else if row.ids.len() < self.settings.min_length {
            skipped.short += 1;
        } else if self.settings.deduplicate && !self.seen.insert(digest(&row.ids)) {
            skipped.duplicates += 1;
        } else {
            return Ok(Some(row));
        }
        Ok(None)
    }

    fn row(
        &self,
        ParsedPrompt {
            prompt,
            golden,
            route,
        }: ParsedPrompt,
        boundaries: &mut BoundaryCounts,
    ) -> Result<PromptRow, ModelError> {
        let ids = self.tokenizer.encode_prompt(&prompt)?;
        let answer = golden;
        let golden = answer
            .as_ref()
            .map(|answer| self.golden(&prompt, &ids, answer, boundaries))
            .transpose()?;
        let (text, dialogue) = match prompt {
            PromptText::Text(text) => (text, None),
            PromptText::Dialogue(dialogue) => (self.tokenizer.decode(&ids), Some(dialogue)),
        };
        Ok(PromptRow {
            text,
            ids,
            dialogue,
            golden,
            answer,
            route,
        })
    }

    /// Tokens of a golden answer to exactly the prompt that the policy receives.
    fn golden(
        &self,
        prompt: &PromptText,
        ids: &[u32],
        answer: &str,
        boundaries: &mut BoundaryCounts,
    ) -> Result<Vec<u32>, ModelError> {
        let read = self.tokenizer.encode_answers(prompt, &[answer])?;
        if read.prompt == ids {
            boundaries.count(read.boundary);
            return Ok(read.answers.concat());
        }
        boundaries.count(AnswerBoundary::Verbatim);
        self.tokenizer.encode_closed(prompt, ids, answer)
    }
}

fn digest(ids: &[u32]) -> Digest {
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    Digest::of(&bytes)
}

/// Use of the chat template by a set of prompts.
#[derive(Debug, Default)]
pub struct TemplateUse {
    /// Number of texts, which do not go through it.
    texts: usize,
    /// Number of dialogues whose final assistant message is continued.
    continued: usize,
    /// The first dialogue with tools.
    with_tools: Option<Dialogue>,
}

impl TemplateUse {
    /// Counts a prompt.
    pub fn count(&mut self, prompt: &PromptText) {
        let dialogue = match prompt {
            PromptText::Dialogue(dialogue) => dialogue,
            PromptText::Text(text) => {
                self.texts += usize::from(!text.is_empty());
                return;
            }
        };
        self.continued += usize::from(dialogue.continues_final_message());
        if self.with_tools.is_none() && !dialogue.tools.is_empty() {
            self.with_tools = Some(dialogue.clone());
        }
    }

    /// Logs that texts do not go through the chat template of the model, that completions continue a final assistant
    /// message, and that the chat template ignores the tools.
    pub fn log(&self, path: &Path, columns: &Columns, tokenizer: &Tokenizer) {
        if let Some(section) = columns.limits.section
            && self.texts > 0
            && !columns.chat
            && tokenizer.has_chat_template()
        {
            tracing::warn!(
                path = %path.display(),
                prompts = self.texts,
                "text prompts are continued as they stand, although the model has a chat template: with {section}.chat = \
                 true they are dialogues"
            );
        }
        if self.continued > 0 {
            tracing::info!(
                path = %path.display(),
                prompts = self.continued,
                "prompts end with a turn of the assistant, which completions continue"
            );
        }
        let with_tools = self.with_tools.as_ref();
        if with_tools.is_some_and(|dialogue| !renders_tools(tokenizer, dialogue)) {
            tracing::warn!(
                path = %path.display(),
                "the chat template does not use the tools of the column \"tools\""
            );
        }
    }
}

/// Whether the chat template renders the tools; a dialogue that it rejects is reported elsewhere.
fn renders_tools(tokenizer: &Tokenizer, dialogue: &Dialogue) -> bool {
    let without_tools = Dialogue {
        tools: Vec::new(),
        ..dialogue.clone()
    };
    match (tokenizer.render(dialogue), tokenizer.render(&without_tools)) {
        (Ok(with), Ok(without)) => with != without,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use settings::MixedFile;

    use super::*;

    fn row(id: u32) -> PromptRow {
        PromptRow {
            ids: vec![id],
            text: id.to_string(),
            dialogue: None,
            golden: None,
            answer: None,
            route: None,
        }
    }

    fn rows(ids: &[u32]) -> Vec<PromptRow> {
        ids.iter().copied().map(row).collect()
    }

    fn holding_out(held_out: usize) -> DatasetPrompts {
        DatasetPrompts {
            path: "rows.jsonl".into(),
            mix: Vec::new(),
            prompt_column: "prompt".into(),
            golden_column: String::new(),
            route_column: String::new(),
            max_file_bytes: u64::MAX,
            max_rows: u64::MAX,
            chat: false,
            held_out_path: "".into(),
            held_out,
            shuffle: false,
            deduplicate: false,
            min_length: 0,
            too_long: TooLong::Refuse,
            curriculum: settings::CurriculumSetting::None,
            curriculum_floor: 0.1,
        }
    }

    #[test]
    fn held_out_prompts_are_distinct_and_not_trained_on() {
        let settings = holding_out(2);
        let train = rows(&[1, 2, 3, 1, 4, 3, 4, 4]);
        let path = Path::new("rows.jsonl");
        let held_out = last_distinct(&train, &settings, 1.0, path).expect("four distinct prompts");
        assert_eq!(held_out, rows(&[3, 4]));
        let mut files = [train];
        remove_held_out(&mut files, &[held_out], &settings).expect("some are left");
        assert_eq!(files[0], rows(&[1, 2, 1]));

        let none = last_distinct(&rows(&[1, 1]), &holding_out(0), 1.0, path);
        assert_eq!(none.expect("nothing to hold out"), []);
        let too_many = last_distinct(&rows(&[1, 1, 1, 2]), &settings, 1.0, path);
        let error = too_many.expect_err("two prompts").to_string();
        assert!(
            error.contains("prompts.held_out = 2 leaves nothing of 2 distinct prompts"),
            "{error}"
        );
    }

    #[test]
    fn a_digest_is_of_every_token_and_its_place() {
        let golden = |golden: &[u32]| PromptRow {
            golden: Some(golden.to_vec()),
            ..row(1)
        };
        let of = |ids: &[u32]| PromptRow {
            ids: ids.to_vec(),
            ..row(1)
        };
        let all = [
            vec![],
            vec![of(&[1, 2])],
            vec![of(&[1]), of(&[2])],
            vec![of(&[2]), of(&[1])],
            vec![golden(&[2])],
            vec![golden(&[2, 3])],
            vec![PromptRow {
                route: Some("math".into()),
                ..row(1)
            }],
        ];
        let digests: HashSet<_> = all.iter().map(|rows| rows_digest(rows)).collect();
        assert_eq!(digests.len(), all.len());
        assert_eq!(rows_digest(&all[2]), rows_digest(&all[2].clone()));
    }

    #[test]
    fn a_row_can_be_too_long_with_or_without_its_golden_answer() {
        let row = |prompt: usize, golden: Option<usize>| PromptRow {
            ids: vec![1; prompt],
            golden: golden.map(|length| vec![1; length]),
            ..rows(&[1]).remove(0)
        };
        let limits = |with_golden| PromptLimits {
            prompt: 4,
            with_golden,
        };
        for (row, with_golden, message) in [
            (row(4, Some(90)), None, None),
            (row(4, Some(4)), Some(8), None),
            (
                row(5, None),
                Some(8),
                Some("more than actor.max_prompt_length = 4"),
            ),
            (
                row(4, Some(5)),
                Some(8),
                Some("have 4 + 5 tokens, more than the model's 8"),
            ),
        ] {
            let exceeded = limits(with_golden).exceeded(&row);
            match message {
                None => assert_eq!(exceeded, None),
                Some(message) => assert!(
                    exceeded.as_ref().is_some_and(|e| e.contains(message)),
                    "{exceeded:?}"
                ),
            }
        }
    }

    #[test]
    fn prompts_held_out_in_one_file_are_removed_from_all() {
        let mixed = |name: &str| MixedFile {
            path: name.into(),
            weight: 1.0,
        };
        let settings = DatasetPrompts {
            mix: vec![mixed("a.jsonl"), mixed("b.jsonl")],
            ..holding_out(1)
        };
        let mut files = [rows(&[1, 2, 3]), rows(&[3, 4, 5])];
        remove_held_out(&mut files, &[rows(&[3]), rows(&[5])], &settings).expect("some are left");
        assert_eq!(files, [rows(&[1, 2]), rows(&[4])]);
        let mut files = [rows(&[1, 2]), rows(&[2])];
        let held_out = [rows(&[2]), rows(&[1])];
        let error = remove_held_out(&mut files, &held_out, &settings).expect_err("nothing is left");
        assert!(error.to_string().contains("none is left to train on"));
    }
}
