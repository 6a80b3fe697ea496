//! Where prompts come from: any set that can be asked for its n-th prompt, and files as one.

mod held_out;

use std::{collections::HashSet, path::Path};

use dataset::{Column, Columns, DatasetError, Mix, Sourced, shuffled};
use messages::{Dialogue, PromptText, Seed};
use model::{ModelError, Seam, Tokenizer};
use settings::{DatasetPrompts, TooLong};

use crate::{LearnerError, seams::Seams};
use held_out::HeldOut;

/// A prompt of a set.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptRow {
    /// Its tokens, special tokens included.
    pub ids: Vec<u32>,
    /// The same for people: a text as it was given, of a dialogue what the tokens say.
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
    /// Reads all files, tokenises every row, and says how many were left out and why. No prompt is both held out
    /// and trained on, however often it occurs in whatever file.
    ///
    /// # Errors
    /// When a file cannot be read, or a row is malformed, has no prompt, or has a prompt of more than
    /// `max_prompt_length` tokens that is not to be dropped: with file and line.
    pub fn load(
        settings: &DatasetPrompts,
        seed: Seed,
        limits: Limits,
        tokenizer: &Tokenizer,
    ) -> Result<Self, LearnerError> {
        let named = settings.files();
        let weights: Vec<f64> = named.iter().map(|file| file.weight).collect();
        let mix = Mix::new(&weights, seed.derive(MIX)).map_err(|reason| DatasetError::File {
            path: named[0].path.clone(),
            reason: format!("prompts.mix: {reason}"),
        })?;
        let mut reader = Reader {
            settings,
            columns: columns(settings),
            limits,
            tokenizer,
            seen: HashSet::new(),
        };
        // First, so that none of them is trained on.
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
        keep_apart(&mut files, &held_out, settings)?;
        Ok(Self {
            files,
            held_out: HeldOut::interleaved(&mut held_out, &mix),
            mix,
            shuffle: settings.shuffle.then_some(seed),
        })
    }
}

/// Where the settings say that prompts and golden answers are.
fn columns(settings: &DatasetPrompts) -> Columns {
    let golden = settings.golden_column.as_str();
    Columns {
        prompt: Column::named(&settings.prompt_column, "prompts.prompt_column"),
        golden: (!golden.is_empty()).then(|| Column::named(golden, "prompts.golden_column")),
        ..Columns::default()
    }
}

/// A file's share of the held-out prompts: the last distinct ones.
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
    match count == 0 || count >= all.len() {
        false => Ok(held_out),
        true => Err(leaves_nothing(settings, all.len(), path)),
    }
}

fn leaves_nothing(settings: &DatasetPrompts, prompts: usize, path: &Path) -> DatasetError {
    DatasetError::File {
        path: path.to_owned(),
        reason: format!(
            "prompts.held_out = {} leaves nothing of {prompts} distinct prompts: hold out fewer, or name prompts.held_out_path",
            settings.held_out,
        ),
    }
}

/// Takes out of the training rows of each file what is held out, from whatever file.
fn keep_apart(
    files: &mut [Vec<PromptRow>],
    held_out: &[Vec<PromptRow>],
    settings: &DatasetPrompts,
) -> Result<(), DatasetError> {
    let ids: HashSet<&Vec<u32>> = held_out.iter().flatten().map(|row| &row.ids).collect();
    let are_of_files = settings.held_out_path.as_os_str().is_empty();
    let mut repeated = 0;
    for (index, (train, named)) in files.iter_mut().zip(settings.files()).enumerate() {
        let rows = train.len();
        train.retain(|row| !ids.contains(&row.ids));
        let moved = if are_of_files {
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
            "prompts were left out: they repeat one that is held out"
        );
    }
    Ok(())
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

/// The longest rows that a run can use, in tokens.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Of a prompt: `actor.max_prompt_length`.
    pub prompt: usize,
    /// Of a prompt with its golden answer, where a model reads both: its positions.
    pub with_golden: Option<usize>,
}

impl Limits {
    /// What is wrong with a row that is too long, and the remedy.
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

struct Reader<'a> {
    settings: &'a DatasetPrompts,
    columns: Columns,
    limits: Limits,
    tokenizer: &'a Tokenizer,
    /// The prompts that came before, in any file.
    seen: HashSet<Vec<u32>>,
}

/// How many rows of a file were left out, by reason.
#[derive(Debug, Default)]
struct LeftOut {
    duplicates: usize,
    short: usize,
    long: usize,
    /// Their golden answers are empty.
    unanswered: usize,
}

impl LeftOut {
    /// Logs what was left out beside `kept` rows of the file.
    ///
    /// # Errors
    /// When nothing was kept.
    fn say(self, path: &Path, kept: usize) -> Result<(), DatasetError> {
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

/// What a row asks, and its golden answer.
struct Asked {
    prompt: PromptText,
    golden: Option<String>,
}

impl Reader<'_> {
    fn rows(&mut self, path: &Path) -> Result<Vec<PromptRow>, DatasetError> {
        let asked = dataset::read(path, &self.columns, |form| {
            let (prompt, golden) = (form.prompt()?, form.golden()?);
            Ok(Asked { prompt, golden })
        })?;
        let prompts: Vec<&PromptText> = asked.iter().map(|asked| &asked.value.prompt).collect();
        say_how_dialogues_are_used(path, &prompts, self.tokenizer);
        let (mut kept, mut left_out) = (Vec::new(), LeftOut::default());
        let mut seams = Seams::default();
        for Sourced { source, value } in asked {
            if value
                .golden
                .as_ref()
                .is_some_and(|answer| answer.trim().is_empty())
            {
                left_out.unanswered += 1;
                continue;
            }
            let row = self
                .row(value, &mut seams)
                .map_err(|error| source.refuse(error.to_string()))?;
            let length = row.ids.len();
            if let Some(reason) = self.limits.exceeded(&row) {
                if self.settings.too_long == TooLong::Refuse {
                    return Err(source.refuse(reason));
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
        seams.say(path);
        left_out.say(path, kept.len())?;
        Ok(kept)
    }

    fn row(
        &self,
        Asked { prompt, golden }: Asked,
        seams: &mut Seams,
    ) -> Result<PromptRow, ModelError> {
        let ids = self.tokenizer.encode_prompt(&prompt)?;
        let answer = golden;
        let golden = answer
            .as_ref()
            .map(|answer| self.golden(&prompt, &ids, answer, seams))
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
        })
    }

    /// The tokens of a golden answer, which follows the very prompt that the policy is asked.
    fn golden(
        &self,
        prompt: &PromptText,
        ids: &[u32],
        answer: &str,
        seams: &mut Seams,
    ) -> Result<Vec<u32>, ModelError> {
        let read = self.tokenizer.encode_answered(prompt, &[answer])?;
        if read.prompt == ids {
            seams.count(read.seam);
            return Ok(read.answers.concat());
        }
        seams.count(Seam::Given);
        self.tokenizer.encode_closed(prompt, ids, answer)
    }
}

/// Logs, once for a set of prompts, what is not seen in its rows: that completions continue a last turn of the
/// assistant, and that the chat template leaves the tools out.
pub fn say_how_dialogues_are_used(path: &Path, prompts: &[&PromptText], tokenizer: &Tokenizer) {
    let dialogues = prompts.iter().filter_map(|prompt| match prompt {
        PromptText::Dialogue(dialogue) => Some(dialogue),
        PromptText::Text(_) => None,
    });
    let continued = dialogues
        .clone()
        .filter(|dialogue| dialogue.continues_final_message())
        .count();
    if continued > 0 {
        tracing::info!(
            path = %path.display(),
            prompts = continued,
            "prompts end with a turn of the assistant, which completions continue"
        );
    }
    let with_tools = dialogues
        .clone()
        .find(|dialogue| !dialogue.tools.is_empty());
    if with_tools.is_some_and(|dialogue| !heeds_tools(tokenizer, dialogue)) {
        tracing::warn!(
            path = %path.display(),
            "the chat template does not use the tools of the column \"tools\""
        );
    }
}

/// Whether the chat template renders the tools; a dialogue that it refuses is an error elsewhere.
fn heeds_tools(tokenizer: &Tokenizer, dialogue: &Dialogue) -> bool {
    let bare = Dialogue {
        tools: Vec::new(),
        ..dialogue.clone()
    };
    match (tokenizer.render(dialogue), tokenizer.render(&bare)) {
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
            held_out_path: "".into(),
            held_out,
            shuffle: false,
            deduplicate: false,
            min_length: 0,
            too_long: TooLong::Refuse,
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
        keep_apart(&mut files, &[held_out], &settings).expect("some are left");
        assert_eq!(files[0], rows(&[1, 2, 1]));

        let too_many = last_distinct(&rows(&[1, 1, 1, 2]), &settings, 1.0, path);
        let error = too_many.expect_err("two prompts").to_string();
        assert!(
            error.contains("prompts.held_out = 2 leaves nothing of 2 distinct prompts"),
            "{error}"
        );
    }

    #[test]
    fn a_row_is_too_long_by_its_prompt_or_with_its_golden_answer() {
        let row = |prompt: usize, golden: Option<usize>| PromptRow {
            ids: vec![1; prompt],
            golden: golden.map(|length| vec![1; length]),
            ..rows(&[1]).remove(0)
        };
        let limits = |with_golden| Limits {
            prompt: 4,
            with_golden,
        };
        for (row, with_golden, says) in [
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
            match says {
                None => assert_eq!(exceeded, None),
                Some(says) => assert!(
                    exceeded.as_ref().is_some_and(|e| e.contains(says)),
                    "{exceeded:?}"
                ),
            }
        }
    }

    #[test]
    fn no_file_trains_on_what_another_holds_out() {
        let mixed = |name: &str| MixedFile {
            path: name.into(),
            weight: 1.0,
        };
        let settings = DatasetPrompts {
            mix: vec![mixed("a.jsonl"), mixed("b.jsonl")],
            ..holding_out(1)
        };
        let mut files = [rows(&[1, 2, 3]), rows(&[3, 4, 5])];
        keep_apart(&mut files, &[rows(&[3]), rows(&[5])], &settings).expect("some are left");
        assert_eq!(files, [rows(&[1, 2]), rows(&[4])]);
        let mut files = [rows(&[1, 2]), rows(&[2])];
        let held_out = [rows(&[2]), rows(&[1])];
        let error = keep_apart(&mut files, &held_out, &settings).expect_err("nothing is left");
        assert!(error.to_string().contains("none is left to train on"));
    }
}
