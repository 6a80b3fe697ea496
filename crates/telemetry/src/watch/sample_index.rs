//! Samples, page by page: an index of byte offsets into `samples.jsonl`.
//!
//! The index holds what can be filtered by and takes some thirty bytes a row; texts stay in the file. A
//! page of a hundred thousand rows is chosen from the index alone. Only a search reads texts, and no more
//! of them at a time than [`SEARCHED_AT_ONCE`].

use std::borrow::Cow;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::tail::{Follow, Tail};
use crate::{Error, SampleRow};

/// Rows whose texts one search reads at most, before it gives what it found and where to go on.
const SEARCHED_AT_ONCE: usize = 20_000;

/// The index of one `samples.jsonl`.
#[derive(Debug)]
pub struct SampleIndex {
    tail: Tail,
    entries: Entries,
}

#[derive(Debug, Default)]
struct Entries {
    rows: Vec<Entry>,
    unreadable: u64,
}

/// What is known of a row without reading it again.
#[derive(Debug, Clone, Copy)]
struct Entry {
    offset: u64,
    step: u64,
    length: u32,
    /// The longest completion in tokens.
    longest: u32,
    /// |2p − 1|; not a number when the judge gave no label.
    confidence: f32,
}

/// The part of a row that is indexed.
#[derive(Deserialize)]
struct Glance {
    step: u64,
    #[serde(default)]
    p: Option<f32>,
    #[serde(default)]
    lengths: Vec<u32>,
}

/// The part of a row that is searched.
#[derive(Deserialize)]
struct Words<'a> {
    #[serde(borrow)]
    prompt: Cow<'a, str>,
    completions: Vec<Cow<'a, str>>,
}

/// Which samples are wanted: the newest first.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SampleQuery {
    /// Only rows before this one, counted from 0 in the file's order: where the last page ended.
    pub before: Option<usize>,
    /// How many rows a page has.
    pub limit: usize,
    /// The first learner step.
    pub first_step: Option<u64>,
    /// The last learner step.
    pub last_step: Option<u64>,
    /// The least confidence of the label, |2p − 1|; rows without a label are left out when it is above 0.
    pub least_confidence: f32,
    /// The greatest confidence of the label.
    pub most_confidence: f32,
    /// The least length of the longest completion, in tokens.
    pub shortest: u32,
    /// Its greatest length.
    pub longest: Option<u32>,
    /// A text that the prompt or a completion holds, in upper or lower case; empty: anything.
    pub search: String,
}

/// A page of samples.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SamplePage {
    /// The rows with their places in the file, the newest first.
    pub rows: Vec<(usize, SampleRow)>,
    /// Where the next page begins; `None` when nothing is left to look at.
    pub next: Option<usize>,
    /// Rows of the run.
    pub total: usize,
    /// Rows that the filters let through, the search not applied.
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
    /// An index of the file at `path`, which need not be there yet. Nothing is read before
    /// [`Self::refresh`].
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self {
            tail: Tail::new(path),
            entries: Entries::default(),
        }
    }

    /// Reads what was appended since the last time.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn refresh(&mut self) -> Result<(), Error> {
        let read = self.tail.follow(&mut self.entries);
        read.map_err(Error::file("read", self.tail.path()))
    }

    /// How many rows there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.rows.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.rows.is_empty()
    }

    /// A page of what was read so far. A search that found too little in twenty thousand rows gives
    /// what it found and where to go on.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn page(&self, query: &SampleQuery) -> Result<SamplePage, Error> {
        let rows = &self.entries.rows;
        let mut page = SamplePage {
            rows: Vec::new(),
            next: None,
            total: rows.len(),
            matching: rows.iter().filter(|entry| query.admits(entry)).count(),
        };
        if rows.is_empty() {
            return Ok(page);
        }
        let path = self.tail.path();
        let file = File::open(path).map_err(Error::file("open", path))?;
        let needle = query.search.trim().to_lowercase();
        let mut searched = 0;
        let end = query.before.unwrap_or(rows.len()).min(rows.len());
        for number in (0..end).rev() {
            let entry = &rows[number];
            if !query.admits(entry) {
                continue;
            }
            if page.rows.len() == query.limit || searched == SEARCHED_AT_ONCE {
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

/// The row of an entry, when it holds the needle. A row that is no longer there is passed over: the file
/// has just been cut back, and the next look begins anew.
fn read(file: &File, path: &Path, entry: &Entry, needle: &str) -> Result<Option<SampleRow>, Error> {
    let mut line = vec![0; entry.length as usize];
    match file.read_exact_at(&mut line, entry.offset) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(source) => return Err(Error::file("read", path)(source)),
    }
    if !needle.is_empty() && !holds(&line, needle) {
        return Ok(None);
    }
    Ok(serde_json::from_slice(&line).ok())
}

fn holds(line: &[u8], needle: &str) -> bool {
    let Ok(words) = serde_json::from_slice::<Words<'_>>(line) else {
        return false;
    };
    let found = |text: &str| text.to_lowercase().contains(needle);
    found(&words.prompt) || words.completions.iter().any(|text| found(text))
}

impl SampleQuery {
    fn admits(&self, entry: &Entry) -> bool {
        let is_in = |value: u64, low: Option<u64>, high: Option<u64>| {
            low.is_none_or(|low| value >= low) && high.is_none_or(|high| value <= high)
        };
        let all = self.least_confidence <= 0.0 && self.most_confidence >= 1.0;
        is_in(entry.step, self.first_step, self.last_step)
            && entry.longest >= self.shortest
            && self.longest.is_none_or(|most| entry.longest <= most)
            && (all || (self.least_confidence..=self.most_confidence).contains(&entry.confidence))
    }
}

impl Follow for Entries {
    fn restart(&mut self) {
        *self = Self::default();
    }

    fn line(&mut self, offset: u64, line: &[u8]) {
        let (Ok(glance), Ok(length)) = (
            serde_json::from_slice::<Glance>(line),
            u32::try_from(line.len()),
        ) else {
            self.unreadable += 1;
            return;
        };
        self.rows.push(Entry {
            offset,
            step: glance.step,
            length,
            longest: glance.lengths.iter().copied().max().unwrap_or_default(),
            confidence: glance.p.map_or(f32::NAN, |p| (2.0 * p - 1.0).abs()),
        });
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
        let mut index = SampleIndex::new(path);
        index.refresh().unwrap();
        (directory, index)
    }

    fn steps(page: &SamplePage) -> Vec<u64> {
        page.rows.iter().map(|(_, row)| row.step).collect()
    }

    #[test]
    fn pages_are_filtered_by_the_index_and_searched_in_any_case() {
        let (_directory, index) = index(&[
            row(1, Some(0.5), [3, 4], "A \"Dog\"\nruns"),
            row(2, Some(0.9), [9, 2], "a cat"),
            row(3, None, [1, 1], "ÜBER the dog"),
            row(4, Some(0.0), [5, 6], "<script>"),
        ]);
        // As a browser asks: the names of the fields are part of the page.
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
    fn one_page_follows_another_without_a_gap() {
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
    fn a_hundred_thousand_rows_are_paged_from_the_index_and_searched_in_parts() {
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
    fn rows_that_are_gone_are_passed_over() {
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
