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

/// Rows of one kind.
#[derive(Debug, Default, Clone, Copy)]
struct Count {
    rows: usize,
    /// Position of the first.
    first: Option<RowPosition>,
}

impl Count {
    fn add(&mut self, position: RowPosition) {
        self.rows += 1;
        self.first.get_or_insert(position);
    }
}

impl Tally {
    /// Counts a row.
    pub(crate) fn count(&mut self, kind: PromptKind, position: RowPosition) {
        self.rows.entry(kind).or_default().add(position);
    }

    /// Counts a row whose answers begin with the prompt.
    pub(crate) fn count_repeated(&mut self, position: RowPosition) {
        self.repeated.add(position);
    }

    /// Counts a row whose prompt is one turn although it looks like several.
    pub(crate) fn count_stray_speakers(&mut self, position: RowPosition) {
        self.stray_speakers.add(position);
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
        let (texts, continued) = (of(PromptKind::Text), of(PromptKind::Continued));
        let both = [of(PromptKind::Dialogue), continued];
        let firsts = both.iter().filter_map(|count| count.first);
        let first_dialogue = firsts.min_by_key(|position| position.number());
        let mut warnings = Vec::new();
        if let (Some(first_text), Some(first_dialogue)) = (texts.first, first_dialogue) {
            warnings.push(format!(
                "{} rows are text, the first at {first_text}, and {} are dialogues, the first at {first_dialogue}: only \
                 dialogues go through the chat template; give every row the same columns (an empty system or input column \
                 instead of a missing one)",
                texts.rows,
                both[0].rows + both[1].rows
            ));
        }
        if let Some(first) = continued.first {
            warnings.push(format!(
                "{} prompts of column {column:?} end with a turn of the assistant, the first at {first}: completions \
                 continue that turn; in a column \"messages\" that turn is the answer and not part of the prompt",
                continued.rows
            ));
        }
        let (all, repeated) = (self.rows.values().map(|count| count.rows), self.repeated);
        if let Some(first) = repeated.first
            && repeated.rows * 2 > all.sum()
        {
            warnings.push(format!(
                "{} answers begin with their prompt, the first at {first}: the prompt is then repeated; remove it from the \
                 answers, or leave the column {column:?} out of pairs",
                repeated.rows
            ));
        }
        let stray = self.stray_speakers;
        if let Some(first) = stray.first {
            warnings.push(format!(
                "{} text prompts have a line that begins with \"Human:\" or \"Assistant:\", the first at {first}, and are \
                 one turn of the user: the turns of a dialogue begin with \"Human:\", and each follows an empty line",
                stray.rows
            ));
        }
        warnings
    }
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
