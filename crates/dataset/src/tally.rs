//! What is said, once for a file, of rows that are not like the others.

use std::{collections::BTreeMap, path::Path};

use crate::{error::Place, form::Kind};

/// How many rows of a file ask what, and where the first of each is.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    rows: BTreeMap<Kind, (usize, Option<Place>)>,
}

impl Tally {
    /// One more row.
    pub(crate) fn count(&mut self, kind: Kind, place: Place) {
        let (count, first) = self.rows.entry(kind).or_default();
        *count += 1;
        first.get_or_insert(place);
    }

    /// Logs what is odd about the file `path`, whose prompts are in `column`.
    pub(crate) fn say(&self, path: &Path, column: &str) {
        for remark in self.remarks(column) {
            tracing::warn!(path = %path.display(), "{remark}");
        }
    }

    /// What is odd, in words.
    fn remarks(&self, column: &str) -> Vec<String> {
        let of = |kinds: [Kind; 2]| {
            let found = kinds.map(|kind| self.rows.get(&kind).copied().unwrap_or_default());
            let firsts = found.into_iter().filter_map(|(_, first)| first);
            let first = firsts.min_by_key(|place| place.number());
            (found[0].0 + found[1].0, first)
        };
        let texts = of([Kind::Text, Kind::Repeated]);
        let dialogues = of([Kind::Dialogue, Kind::Continued]);
        let mut remarks = Vec::new();
        if let ((text, Some(a)), (dialogue, Some(b))) = (texts, dialogues) {
            remarks.push(format!(
                "{text} rows are text, the first at {a}, and {dialogue} are dialogues, the first at {b}: only dialogues \
                 go through the chat template; give every row the same columns (a system or input that is empty, not \
                 missing)"
            ));
        }
        let only = |kind| self.rows.get(&kind).copied().unwrap_or_default();
        if let (continued, Some(first)) = only(Kind::Continued) {
            remarks.push(format!(
                "{continued} prompts of column {column:?} end with a turn of the assistant, the first at {first}: they are \
                 continued there; in a column \"messages\" that turn is the answer and no part of the prompt"
            ));
        }
        let (repeated, first) = only(Kind::Repeated);
        if let Some(first) = first.filter(|_| repeated * 2 > texts.0) {
            remarks.push(format!(
                "{repeated} answers begin with their prompt, the first at {first}: it is then read twice; take it out \
                 of the answers, or leave the column {column:?} out of pairs"
            ));
        }
        remarks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_odd_is_said_once_with_its_first_line() {
        use Kind::{Continued, Dialogue, Nothing, Repeated, Text};
        for (kinds, says) in [
            (&[Text, Text, Repeated][..], &[][..]),
            (&[Dialogue, Dialogue], &[]),
            (&[Nothing, Nothing], &[]),
            (
                &[Dialogue, Text, Text],
                &["2 rows are text, the first at line 2, and 1 are dialogues, the first at line 1"],
            ),
            (
                &[Continued, Continued],
                &[
                    "2 prompts of column \"dialog\" end with a turn of the assistant, the first at line 1",
                ],
            ),
            (
                &[Text, Repeated, Repeated],
                &["2 answers begin with their prompt, the first at line 2"],
            ),
        ] {
            let mut tally = Tally::default();
            for (line, kind) in (1..).zip(kinds) {
                tally.count(*kind, Place::Line(line));
            }
            let remarks = tally.remarks("dialog");
            assert_eq!(remarks.len(), says.len(), "{remarks:?}");
            for (remark, says) in remarks.iter().zip(says) {
                assert!(remark.contains(says), "{remark}");
            }
        }
    }
}
