//! Counts, per file, pairs that are trained on but seldom meant, and logs them.

use std::{collections::HashSet, path::Path};

use messages::Digest;

use crate::file_pairs::PairRow;

/// Pairs of a file that are trained on and seldom meant.
#[derive(Debug, Default)]
pub(super) struct UnusualPairs {
    /// Prompt, preferred and rejected response of every pair so far.
    seen: HashSet<[Digest; 3]>,
    repeated: usize,
    contradictory: usize,
    later_turns: usize,
}

impl UnusualPairs {
    /// Counts a pair.
    pub(super) fn count(&mut self, row: &PairRow) {
        let digest = |ids: &[u32]| {
            let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
            Digest::of(&bytes)
        };
        let [prompt, chosen, rejected] =
            [&row.prompt, &row.chosen.ids, &row.rejected.ids].map(|ids| digest(ids));
        self.contradictory += usize::from(self.seen.contains(&[prompt, rejected, chosen]));
        self.repeated += usize::from(!self.seen.insert([prompt, chosen, rejected]));
    }

    /// Counts a pair of texts that part before their last turn.
    pub(super) fn count_later_turns(&mut self) {
        self.later_turns += 1;
    }

    /// Logs the counts of the file at `path`.
    pub(super) fn log(&self, path: &Path) {
        for warning in self.warnings() {
            tracing::warn!(path = %path.display(), "{warning}");
        }
    }

    fn warnings(&self) -> Vec<String> {
        let warnings = [
            (
                self.repeated,
                "pairs are equal to an earlier one: they count as often as they occur",
            ),
            (
                self.contradictory,
                "pairs have the responses of an earlier one the other way round: without a column of labels they \
                 contradict it",
            ),
            (
                self.later_turns,
                "pairs part before their last turn: the further turns in their responses are trained on, as in TRL; \
                 shorten such dialogues to the turn in which they differ (chat = true leaves them out)",
            ),
        ];
        let warnings = warnings.into_iter().filter(|(count, _)| *count > 0);
        warnings
            .map(|(count, text)| format!("{count} {text}"))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file_pairs::PairAnswer;

    #[test]
    fn pairs_that_are_seldom_meant_are_counted() {
        let answer = |text: &str| PairAnswer {
            ids: text.bytes().map(u32::from).collect(),
            text: text.into(),
        };
        let row = |prompt: u32, chosen: &str, rejected: &str| PairRow {
            prompt: vec![prompt],
            text: String::new(),
            dialogue: None,
            chosen: answer(chosen),
            rejected: answer(rejected),
            label: None,
            golden: None,
            route: None,
        };
        let mut counts = UnusualPairs::default();
        for pair in [row(1, "a", "b"), row(2, "b", "a"), row(1, "a", "c")] {
            counts.count(&pair);
        }
        assert!(counts.warnings().is_empty());
        for pair in [row(1, "a", "b"), row(1, "b", "a")] {
            counts.count(&pair);
        }
        counts.count_later_turns();
        let warnings = counts.warnings();
        assert_eq!(warnings.len(), 3, "{warnings:?}");
        for (warning, start) in warnings.iter().zip([
            "1 pairs are equal",
            "1 pairs have the responses",
            "1 pairs part before",
        ]) {
            assert!(warning.starts_with(start), "{warning}");
        }
    }
}
