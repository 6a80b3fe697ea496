//! Warnings about inconsistent rows, once per file.

use std::{collections::BTreeMap, path::Path};

use crate::{error::RowPosition, parsed_row::PromptKind};

/// Number of rows of a file by kind of prompt, with the position of the first of each.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    rows: BTreeMap<PromptKind, Count>,
    /// Rows whose answers begin with the prompt.
    repeated: Count,
    /// Rows whose prompt is one turn although it looks like several.
    stray_speakers: Count,
}

/// Number of rows, and the position of the first.
type Count = (usize, Option<RowPosition>);

impl Tally {
    /// Counts a row.
    pub(crate) fn count(&mut self, kind: PromptKind, position: RowPosition) {
        add(self.rows.entry(kind).or_default(), position);
    }

    /// Counts a row whose answers begin with the prompt.
    pub(crate) fn count_repeated(&mut self, position: RowPosition) {
        add(&mut self.repeated, position);
    }

    /// Counts a row whose prompt is one turn although it looks like several.
    pub(crate) fn count_stray_speakers(&mut self, position: RowPosition) {
        add(&mut self.stray_speakers, position);
    }

    /// Logs warnings about the file `path`, whose prompts are in `column`.
    pub(crate) fn log(&self, path: &Path, column: &str) {
        for warning in self.warnings(column) {
            tracing::warn!(path = %path.display(), "{warning}");
        }
    }

    /// Warning texts.
    fn warnings(&self, column: &str) -> Vec<String> {
        let of = |kind| self.rows.get(&kind).copied().unwrap_or_default();
        let texts = of(PromptKind::Text);
        let both = [PromptKind::Dialogue, PromptKind::Continued].map(of);
        let firsts = both.iter().filter_map(|(_, first)| *first);
        let first = firsts.min_by_key(|position| position.number());
        let dialogues = (both[0].0 + both[1].0, first);
        let mut warnings = Vec::new();
        if let ((text, Some(a)), (dialogue, Some(b))) = (texts, dialogues) {
            warnings.push(format!(
                "{text} rows are text, the first at {a}, and {dialogue} are dialogues, the first at {b}: only dialogues \
                 go through the chat template; give every row the same columns (an empty system or input column instead of a \
                 missing one)"
            ));
        }
        if let (continued, Some(first)) = of(PromptKind::Continued) {
            warnings.push(format!(
                "{continued} prompts of column {column:?} end with a turn of the assistant, the first at {first}: completions \
                 continue that turn; in a column \"messages\" that turn is the answer and not part of the prompt"
            ));
        }
        let rows: usize = self.rows.values().map(|(count, _)| count).sum();
        let (repeated, first) = self.repeated;
        if let Some(first) = first.filter(|_| repeated * 2 > rows) {
            warnings.push(format!(
                "{repeated} answers begin with their prompt, the first at {first}: the prompt is then repeated; remove it \
                 from the answers, or leave the column {column:?} out of pairs"
            ));
        }
        if let (stray, Some(first)) = self.stray_speakers {
            warnings.push(format!(
                "{stray} text prompts have a line that begins with \"Human:\" or \"Assistant:\", the first at {first}, and \
                 are one turn of the user: the turns of a dialogue begin with \"Human:\", and each follows an empty line"
            ));
        }
        warnings
    }
}

fn add((count, first): &mut Count, position: RowPosition) {
    *count += 1;
    first.get_or_insert(position);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_name_the_count_and_the_first_line() {
        use PromptKind::{Continued, Dialogue, Text, TextOnly};
        for (kinds, repeated, expected) in [
            (&[Text, Text, Text][..], &[3][..], &[][..]),
            (&[Dialogue, Dialogue], &[], &[]),
            (&[TextOnly, TextOnly], &[], &[]),
            (
                &[Dialogue, Text, Text],
                &[],
                &["2 rows are text, the first at line 2, and 1 are dialogues, the first at line 1"],
            ),
            (
                &[Continued, Continued],
                &[],
                &[
                    "2 prompts of column \"dialog\" end with a turn of the assistant, the first at line 1",
                ],
            ),
            (
                &[Text, Text, Text],
                &[2, 3],
                &[
                    "2 answers begin with their prompt, the first at line 2",
                    "1 text prompts have a line that begins with \"Human:\" or \"Assistant:\", the first at line 3",
                ],
            ),
        ] {
            let mut tally = Tally::default();
            for (line, kind) in (1..).zip(kinds) {
                tally.count(*kind, RowPosition::Line(line));
            }
            for line in repeated {
                tally.count_repeated(RowPosition::Line(*line));
            }
            if repeated == [2, 3] {
                tally.count_stray_speakers(RowPosition::Line(3));
            }
            let warnings = tally.warnings("dialog");
            assert_eq!(warnings.len(), expected.len(), "{warnings:?}");
            for (warning, text) in warnings.iter().zip(expected) {
                assert!(warning.contains(text), "{warning}");
            }
        }
    }
}
