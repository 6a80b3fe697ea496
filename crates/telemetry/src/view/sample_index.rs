//! Paginated samples: an index of byte offsets into `samples.jsonl`.
//!
//! The index has the filterable fields and takes about forty bytes per row; texts stay in the file. Pages are
//! selected from the index alone. Only a text search reads texts, at most [`MAX_SEARCHED_ROWS`] per query.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::verdicts::{PairChoice, PairHash, SampleKey, is_pair};
use crate::view::tail::{LineSink, Tail};
use crate::{error::TelemetryError, run_dir::samples::SampleRow};

/// Maximum number of rows whose texts one query searches before it returns a partial page.
const MAX_SEARCHED_ROWS: usize = 20_000;

/// Maximum number of indexed rows; the index then takes about 220 MB.
const MAX_ROWS: usize = 4_000_000;

/// Index of one `samples.jsonl`.
#[derive(Debug)]
pub struct SampleIndex {
    tail: Tail,
    entries: IndexEntries,
}

#[derive(Debug, Default)]
struct IndexEntries {
    rows: Vec<IndexEntry>,
    unreadable: u64,
}

/// Indexed fields of a row.
#[derive(Debug, Clone, Copy)]
struct IndexEntry {
    offset: u64,
    key: SampleKey,
    length: u32,
    /// Length of the longest completion, in tokens.
    longest: u32,
    /// |2p − 1|; NaN without a label.
    confidence: f32,
    /// The same of the judge's own p; NaN if no judge gave the label.
    certainty: f32,
    /// The pair of the first two completions.
    pair: PairHash,
}

/// The fields of a row that are parsed for the index.
#[derive(Deserialize)]
struct IndexedFields<'a> {
    step: u64,
    #[serde(borrow, default)]
    prompt: Cow<'a, str>,
    #[serde(default)]
    encoded_prompt: Option<String>,
    #[serde(borrow, default)]
    completions: Vec<Cow<'a, str>>,
    #[serde(default)]
    judge_p: Option<f32>,
    #[serde(default)]
    prompt_id: u64,
    #[serde(default)]
    p: Option<f32>,
    #[serde(default)]
    lengths: Vec<u32>,
}

/// The fields of a row that are searched.
#[derive(Deserialize)]
struct SearchedFields<'a> {
    #[serde(borrow)]
    prompt: Cow<'a, str>,
    completions: Vec<Cow<'a, str>>,
}

/// Filter and page of samples, newest first.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SampleQuery {
    /// Only rows before this row number, counted from 0 in file order: the end of the previous page.
    pub before: Option<usize>,
    /// Maximum number of rows of the page.
    pub limit: usize,
    /// Minimum learner step.
    pub first_step: Option<u64>,
    /// Maximum learner step.
    pub last_step: Option<u64>,
    /// Minimum confidence of the label, |2p − 1|; above 0, rows without a label are excluded.
    pub least_confidence: f32,
    /// Maximum confidence of the label.
    pub most_confidence: f32,
    /// Minimum length of the longest completion, in tokens.
    pub shortest: u32,
    /// Maximum length of the longest completion, in tokens.
    pub longest: Option<u32>,
    /// Substring of the prompt or a completion, case-insensitive; empty: any.
    pub search: String,
}

/// A page of samples.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SamplePage {
    /// Rows with their row numbers, newest first.
    pub rows: Vec<(usize, SampleRow)>,
    /// Value of `before` for the next page; `None` on the last page.
    pub next: Option<usize>,
    /// Number of rows of the run.
    pub total: usize,
    /// Number of rows that pass the filters, without the text search.
    pub matching: usize,
}

impl Default for SampleQuery {
    fn default() -> Self {
        Self {
            before: None,
            limit: 20,
            first_step: None,
            last_step: None,
            least_confidence: 0.0,
            most_confidence: 1.0,
            shortest: 0,
            longest: None,
            search: String::new(),
        }
    }
}

impl SampleIndex {
    /// An index of `samples.jsonl` in the directory `root`, which need not exist yet. Nothing is read before
    /// [`Self::refresh`].
    #[must_use]
    pub fn new(root: &Path) -> Self {
        Self {
            tail: Tail::new(root, "samples.jsonl"),
            entries: IndexEntries::default(),
        }
    }

    /// Indexes the rows appended since the last refresh.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn refresh(&mut self) -> Result<(), TelemetryError> {
        let read = self.tail.follow(&mut self.entries);
        read.map_err(TelemetryError::file("read", self.tail.path()))
    }

    /// Number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.rows.len()
    }

    /// Number of lines that are not rows, and of rows beyond the size of the index.
    #[must_use]
    pub fn unreadable(&self) -> u64 {
        self.entries.unreadable
    }

    /// Whether there are no rows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.rows.is_empty()
    }

    /// A page of the rows indexed so far. A text search returns a partial page after `MAX_SEARCHED_ROWS` rows.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn page(&self, query: &SampleQuery) -> Result<SamplePage, TelemetryError> {
        let rows = &self.entries.rows;
        let mut page = SamplePage {
            rows: Vec::new(),
            next: None,
            total: rows.len(),
            matching: rows.iter().filter(|entry| query.matches(entry)).count(),
        };
        if rows.is_empty() {
            return Ok(page);
        }
        let path = self.tail.path();
        let file = self
            .tail
            .open()
            .map_err(TelemetryError::file("open", path))?;
        let needle = query.search.trim().to_lowercase();
        let mut searched = 0;
        let end = query.before.unwrap_or(rows.len()).min(rows.len());
        for number in (0..end).rev() {
            let entry = &rows[number];
            if !query.matches(entry) {
                continue;
            }
            if page.rows.len() == query.limit || searched == MAX_SEARCHED_ROWS {
                page.next = Some(number + 1);
                break;
            }
            searched += usize::from(!needle.is_empty());
            if let Some(row) = read(&file, path, entry, &needle)? {
                page.rows.push((number, row));
            }
        }
        Ok(page)
    }
}

impl SampleIndex {
    /// The row of a logged pair; `None` if there is none.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub(crate) fn row(&self, key: SampleKey) -> Result<Option<SampleRow>, TelemetryError> {
        let rows = &self.entries.rows;
        let entry = rows.iter().rev().find(|entry| entry.key == key);
        entry.map_or(Ok(None), |entry| self.read_entry(entry))
    }

    /// A labelled pair for a person's verdict, of those that `judged` does not have: the least certain one, or the first
    /// from the place `start` on, counted modulo their number.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub(crate) fn candidate(
        &self,
        choice: PairChoice,
        start: u64,
        judged: &HashSet<PairHash>,
    ) -> Result<Option<(SampleKey, SampleRow)>, TelemetryError> {
        let is_open =
            |entry: &&IndexEntry| !entry.confidence.is_nan() && !judged.contains(&entry.pair);
        let mut open: Vec<&IndexEntry> = self.entries.rows.iter().filter(is_open).collect();
        match choice {
            // Those that no judge labelled are the last.
            PairChoice::Uncertain => open.sort_by(|a, b| a.certainty.total_cmp(&b.certainty)),
            PairChoice::Random if open.is_empty() => {}
            PairChoice::Random => {
                let place = start % open.len() as u64;
                open.rotate_left(usize::try_from(place).unwrap_or(0));
            }
        }
        for entry in open.into_iter().take(MAX_SEARCHED_ROWS) {
            if let Some(row) = self.read_entry(entry)?.filter(is_pair) {
                return Ok(Some((entry.key, row)));
            }
        }
        Ok(None)
    }

    fn read_entry(&self, entry: &IndexEntry) -> Result<Option<SampleRow>, TelemetryError> {
        let path = self.tail.path();
        let file = self
            .tail
            .open()
            .map_err(TelemetryError::file("open", path))?;
        read(&file, path, entry, "")
    }
}

/// Reads the row of an entry if it contains the needle. A row that no longer exists is skipped: the file has just
/// been truncated, and the next refresh starts over.
fn read(
    file: &File,
    path: &Path,
    entry: &IndexEntry,
    needle: &str,
) -> Result<Option<SampleRow>, TelemetryError> {
    let mut line = vec![0; entry.length as usize];
    match file.read_exact_at(&mut line, entry.offset) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(source) => return Err(TelemetryError::file("read", path)(source)),
    }
    if !needle.is_empty() && !contains(&line, needle) {
        return Ok(None);
    }
    Ok(serde_json::from_slice(&line).ok())
}

fn contains(line: &[u8], needle: &str) -> bool {
    let Ok(row) = serde_json::from_slice::<SearchedFields<'_>>(line) else {
        return false;
    };
    let found = |text: &str| text.to_lowercase().contains(needle);
    found(&row.prompt) || row.completions.iter().any(|text| found(text))
}

impl SampleQuery {
    fn matches(&self, entry: &IndexEntry) -> bool {
        let in_range = |value: u64, low: Option<u64>, high: Option<u64>| {
            low.is_none_or(|low| value >= low) && high.is_none_or(|high| value <= high)
        };
        let any_confidence = self.least_confidence <= 0.0 && self.most_confidence >= 1.0;
        in_range(entry.key.step, self.first_step, self.last_step)
            && entry.longest >= self.shortest
            && self.longest.is_none_or(|longest| entry.longest <= longest)
            && (any_confidence
                || (self.least_confidence..=self.most_confidence).contains(&entry.confidence))
    }
}

/// |2p − 1|; NaN without p.
fn confidence(p: Option<f32>) -> f32 {
    p.map_or(f32::NAN, |p| (2.0 * p - 1.0).abs())
}

impl IndexedFields<'_> {
    fn pair(&self) -> PairHash {
        let prompt = self.encoded_prompt.as_deref().unwrap_or(&self.prompt);
        let text = |index: usize| self.completions.get(index).map_or("", |text| text.as_ref());
        PairHash::of(prompt, [text(0), text(1)])
    }
}

impl LineSink for IndexEntries {
    fn reset(&mut self) {
        *self = Self::default();
    }

    fn line(&mut self, offset: u64, line: &[u8]) {
        let (Ok(fields), Ok(length)) = (
            serde_json::from_slice::<IndexedFields<'_>>(line),
            u32::try_from(line.len()),
        ) else {
            self.unreadable += 1;
            return;
        };
        if self.rows.len() == MAX_ROWS {
            self.unreadable += 1;
            return;
        }
        self.rows.push(IndexEntry {
            offset,
            key: SampleKey {
                step: fields.step,
                prompt_id: fields.prompt_id,
            },
            length,
            longest: fields.lengths.iter().copied().max().unwrap_or_default(),
            confidence: confidence(fields.p),
            certainty: confidence(fields.judge_p),
            pair: fields.pair(),
        });
    }

    fn overlong(&mut self) {
        self.unreadable += 1;
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn row(step: u64, p: Option<f32>, lengths: [usize; 2], text: &str) -> SampleRow {
        SampleRow {
            step,
            prompt: format!("prompt {step}"),
            completions: vec![text.to_owned(), "other".into()],
            lengths: lengths.to_vec(),
            p,
            ..SampleRow::default()
        }
    }

    fn index(rows: &[SampleRow]) -> (tempfile::TempDir, SampleIndex) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("samples.jsonl");
        let lines = rows
            .iter()
            .map(|row| serde_json::to_string(row).unwrap() + "\n");
        fs::write(&path, lines.collect::<String>()).unwrap();
        let mut index = SampleIndex::new(directory.path());
        index.refresh().unwrap();
        (directory, index)
    }

    fn steps(page: &SamplePage) -> Vec<u64> {
        page.rows.iter().map(|(_, row)| row.step).collect()
    }

    #[test]
    fn pages_are_filtered_by_the_index_and_searched_case_insensitively() {
        let (_directory, index) = index(&[
            row(1, Some(0.5), [3, 4], "A \"Dog\"\nruns"),
            row(2, Some(0.9), [9, 2], "a cat"),
            row(3, None, [1, 1], "ÜBER the dog"),
            row(4, Some(0.0), [5, 6], "<script>"),
        ]);
        // Queries as the page's script sends them.
        let cases: [(&str, &[u64], usize); 9] = [
            (r#"{}"#, &[4, 3, 2, 1], 4),
            (r#"{"first_step":2,"last_step":3}"#, &[3, 2], 2),
            (r#"{"least_confidence":0.7}"#, &[4, 2], 2),
            (r#"{"most_confidence":0.5}"#, &[1], 1),
            (r#"{"shortest":4,"longest":6}"#, &[4, 1], 2),
            (r#"{"search":" dog\""}"#, &[1], 4),
            (r#"{"search":"über"}"#, &[3], 4),
            (r#"{"search":"PROMPT 2"}"#, &[2], 4),
            (r#"{"search":"step"}"#, &[], 4),
        ];
        for (query, expected, matching) in cases {
            let page = index.page(&serde_json::from_str(query).unwrap()).unwrap();
            assert_eq!(steps(&page), expected, "{query}");
            let counts = (page.matching, page.total, page.next);
            assert_eq!(counts, (matching, 4, None), "{query}");
        }
    }

    #[test]
    fn consecutive_pages_have_no_gaps() {
        let rows: Vec<_> = (0..50)
            .map(|n| row(n, Some(0.75), [1, 2], "text"))
            .collect();
        let (_directory, index) = index(&rows);
        let (mut seen, mut before) = (Vec::new(), None);
        loop {
            let query = SampleQuery {
                before,
                limit: 7,
                first_step: Some(3),
                ..SampleQuery::default()
            };
            let page = index.page(&query).unwrap();
            seen.extend(steps(&page));
            before = page.next;
            if before.is_none() {
                break;
            }
        }
        assert_eq!(seen, (3..50).rev().collect::<Vec<_>>());
    }

    #[test]
    fn a_large_log_is_paged_by_the_index_and_searched_in_parts() {
        let rows: Vec<_> = (0..100_000)
            .map(|n| row(n, Some(0.75), [1, 2], "text"))
            .collect();
        let (_directory, index) = index(&rows);
        let deep = SampleQuery {
            before: Some(50_000),
            limit: 3,
            ..SampleQuery::default()
        };
        let page = index.page(&deep).unwrap();
        assert_eq!(
            (steps(&page), page.next),
            (vec![49_999, 49_998, 49_997], Some(49_997))
        );
        let rare = SampleQuery {
            search: "prompt 75000".into(),
            ..SampleQuery::default()
        };
        let first = index.page(&rare).unwrap();
        assert_eq!((steps(&first), first.next), (vec![], Some(80_000)));
        let second = index
            .page(&SampleQuery {
                before: first.next,
                ..rare
            })
            .unwrap();
        assert_eq!((steps(&second), second.next), (vec![75_000], Some(60_000)));
    }

    #[test]
    fn rows_of_a_truncated_file_are_skipped() {
        let (_directory, mut index) =
            index(&[row(1, None, [1, 1], "a"), row(2, None, [1, 1], "b")]);
        let path = index.tail.path().to_owned();
        let whole = fs::read_to_string(&path).unwrap();
        fs::write(&path, whole.lines().next().unwrap().to_owned() + "\n").unwrap();
        assert_eq!(steps(&index.page(&SampleQuery::default()).unwrap()), [1]);
        index.refresh().unwrap();
        assert_eq!(index.len(), 1);
    }
}
