//! Verdicts of people on pairs of completions that a run logged, given on its page.
//!
//! Promises that a verdict which was answered for is on the disk, in `verdicts.jsonl` of the run directory, whatever ends
//! the page or the run; that pages of several processes can write at once; and that `annotated_pairs.jsonl`, pairs in
//! the form of TRL, follows from it: it is written anew when a page opens or a run resumes, if it was lost. Independent of the client and of how a pair is shown.

mod agreement;
mod journal;
mod pairs;

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use messages::Dialogue;
use serde::{Deserialize, Serialize};

use crate::error::TelemetryError;
use crate::run_dir::{atomic::write_atomically, files::RunFiles, samples::SampleRow};
use crate::verdicts::journal::{Line, MAX_BYTES, VerdictJournal};

pub(crate) use agreement::VerdictSummary;

/// Pairs for training preference models and policies, in the run directory.
pub const HUMAN_VERDICT_PAIRS_FILE: &str = "annotated_pairs.jsonl";

/// A person's verdict on two completions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum HumanVerdict {
    /// The first completion is better.
    First,
    /// The second completion is better.
    Second,
    /// Both are equally good.
    Tie,
    /// Neither is acceptable.
    BothBad,
}

/// Selection of a pair for a verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum PairChoice {
    /// The pair about which the judge is least certain: the most informative one, on which people agree with the judge
    /// less often than on others.
    Uncertain,
    /// A pair drawn at random: agreement on these estimates agreement on all pairs.
    Random,
}

/// A logged pair, by the learner step and the prompt of its row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct SampleKey {
    /// Learner step that received the pair.
    pub(crate) step: u64,
    /// Index of the prompt.
    pub(crate) prompt_id: u64,
}

/// Hash of a prompt and two completions in either order. A pair of a file is logged anew in every pass, under another step
/// and prompt number; its hash is the same. Not stored: it depends on the build.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct PairHash(u64);

impl PairHash {
    /// Of a prompt as it is encoded, and the texts of both completions.
    pub(crate) fn of(prompt: &str, completions: [&str; 2]) -> Self {
        let [first, second] = completions;
        let mut hasher = DefaultHasher::new();
        (prompt, first.min(second), first.max(second)).hash(&mut hasher);
        Self(hasher.finish())
    }
}

/// A verdict with the pair that it is about.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct VerdictRow {
    /// Number of the verdict in its run, from 1.
    pub(crate) id: u64,
    /// The pair's row.
    #[serde(flatten)]
    pub(crate) sample: SampleKey,
    /// The verdict.
    pub(crate) verdict: HumanVerdict,
    /// Whether the second completion was shown in the first place.
    pub(crate) swapped: bool,
    /// Selection of the pair.
    pub(crate) choice: PairChoice,
    /// The judge's own probability that the first completion is better, before penalties of the label; `None` if no judge
    /// gave the label.
    pub(crate) p: Option<f32>,
    /// The judge's name.
    pub(crate) judge: String,
    /// The judge's version.
    pub(crate) judge_version: u64,
    /// The prompt's text, as it is encoded.
    pub(crate) prompt: String,
    /// The prompt's dialogue, if it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) dialogue: Option<Dialogue>,
    /// Texts of both completions.
    pub(crate) completions: [String; 2],
}

/// A verdict as it is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct GivenVerdict {
    /// Learner step of the pair's row.
    pub(crate) step: u64,
    /// Prompt of the pair's row.
    pub(crate) prompt_id: u64,
    /// The verdict.
    pub(crate) verdict: HumanVerdict,
    /// Whether the second completion was shown in the first place.
    pub(crate) swapped: bool,
    /// Selection of the pair.
    pub(crate) choice: PairChoice,
}

/// Reason why a verdict was not taken.
#[derive(Debug)]
pub(crate) enum VerdictError {
    /// The pair has one already.
    Judged,
    /// The verdict to withdraw is not the last one.
    NotLast,
    /// The row has no two different completions.
    NoPair,
    /// A file could not be read or written.
    File(TelemetryError),
}

impl From<TelemetryError> for VerdictError {
    fn from(error: TelemetryError) -> Self {
        Self::File(error)
    }
}

/// The verdicts of one run.
#[derive(Debug)]
pub(crate) struct RunVerdicts {
    root: PathBuf,
}

impl RunVerdicts {
    /// The verdicts in the run directory `root`. Nothing is read or written yet.
    pub(crate) fn new(root: &Path) -> Self {
        let root = root.to_owned();
        Self { root }
    }

    /// The verdicts that stand, oldest first.
    pub(crate) fn read(&self) -> Result<Vec<VerdictRow>, TelemetryError> {
        Ok(current(journal::read(&self.root)?))
    }

    /// Records a verdict on the pair of this row; returns all that stand.
    pub(crate) fn add(
        &self,
        given: GivenVerdict,
        row: SampleRow,
    ) -> Result<Vec<VerdictRow>, VerdictError> {
        if !is_pair(&row) {
            return Err(VerdictError::NoPair);
        }
        let mut journal = VerdictJournal::lock(&self.root)?;
        let lines = journal.lines()?;
        let id = 1 + lines.iter().map(Line::id).max().unwrap_or(0);
        let mut rows = current(lines);
        let row = VerdictRow::of(id, given, row);
        if rows.iter().any(|other| other.pair() == row.pair()) {
            return Err(VerdictError::Judged);
        }
        let line = Line::Verdict(Box::new(row.clone()));
        journal.append(&line)?;
        rows.push(row);
        self.write_pairs(&rows)?;
        Ok(rows)
    }

    /// Withdraws the last verdict, `id`; returns all that stand.
    pub(crate) fn withdraw(&self, id: u64) -> Result<Vec<VerdictRow>, VerdictError> {
        let mut journal = VerdictJournal::lock(&self.root)?;
        let mut rows = current(journal.lines()?);
        if rows.pop().is_none_or(|last| last.id != id) {
            return Err(VerdictError::NotLast);
        }
        journal.append(&Line::Withdrawn { id })?;
        self.write_pairs(&rows)?;
        Ok(rows)
    }

    /// Writes the pairs anew if they are not those of the journal: they were lost, or a process died before it had written
    /// them. Without a journal nothing is changed.
    ///
    /// # Errors
    /// When the journal cannot be read or locked, or the pairs cannot be written.
    pub(crate) fn restore_pairs(&self) -> Result<(), TelemetryError> {
        if journal::read(&self.root)?.is_empty() {
            return Ok(());
        }
        let mut journal = VerdictJournal::lock(&self.root)?;
        let rows = current(journal.lines()?);
        let written = RunFiles::new(&self.root).read(HUMAN_VERDICT_PAIRS_FILE, MAX_BYTES);
        // A link or a file that is too large is none of ours: it is replaced.
        let written = written.ok().flatten();
        if written.as_deref() == Some(pairs::lines(&rows).as_bytes()) {
            return Ok(());
        }
        let (path, verdicts) = (self.root.join(HUMAN_VERDICT_PAIRS_FILE), rows.len());
        tracing::info!(path = %path.display(), verdicts, "the pairs of people's verdicts are written anew");
        self.write_pairs(&rows)
    }

    /// Writes the pairs anew, while the journal is locked.
    fn write_pairs(&self, rows: &[VerdictRow]) -> Result<(), TelemetryError> {
        write_atomically(
            &self.root.join(HUMAN_VERDICT_PAIRS_FILE),
            pairs::lines(rows).as_bytes(),
        )
    }
}

/// Writes the pairs of people's verdicts in the run directory `root` anew from the journal, if they were lost or are stale.
/// Without a journal nothing is changed.
///
/// # Errors
/// When the journal cannot be read or locked, or the pairs cannot be written.
pub fn restore_human_verdict_pairs(root: &Path) -> Result<(), TelemetryError> {
    RunVerdicts::new(root).restore_pairs()
}

impl VerdictRow {
    /// The pair that it is about.
    fn pair(&self) -> PairHash {
        PairHash::of(
            &self.prompt,
            self.completions.each_ref().map(String::as_str),
        )
    }

    fn of(id: u64, given: GivenVerdict, row: SampleRow) -> Self {
        let mut texts = row.completions.into_iter();
        let mut text = || texts.next().unwrap_or_default();
        Self {
            id,
            sample: SampleKey {
                step: given.step,
                prompt_id: given.prompt_id,
            },
            verdict: given.verdict,
            swapped: given.swapped,
            choice: given.choice,
            p: row.judge_p,
            judge: row.judge,
            judge_version: row.judge_version,
            prompt: row.encoded_prompt.unwrap_or(row.prompt),
            dialogue: row.dialogue,
            completions: [text(), text()],
        }
    }
}

/// Whether a row has two different completions to choose from.
pub(crate) fn is_pair(row: &SampleRow) -> bool {
    matches!(row.completions.as_slice(), [first, second, ..] if first != second)
}

/// Pairs that have a verdict.
pub(crate) fn judged(rows: &[VerdictRow]) -> HashSet<PairHash> {
    rows.iter().map(VerdictRow::pair).collect()
}

/// The verdicts that were not withdrawn.
fn current(lines: Vec<Line>) -> Vec<VerdictRow> {
    let mut rows: Vec<VerdictRow> = Vec::new();
    for line in lines {
        match line {
            Line::Verdict(row) => rows.push(*row),
            Line::Withdrawn { id } => rows.retain(|row| row.id != id),
        }
    }
    rows
}

#[cfg(test)]
mod tests;
