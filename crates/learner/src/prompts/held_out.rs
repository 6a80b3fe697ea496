//! Held-out prompts of files: every distinct prompt once, in order of evaluation.
//!
//! Confidence intervals treat prompts as independent draws; a second copy of a prompt is not independent.

use std::collections::HashSet;

use dataset::Mix;

use crate::prompts::PromptRow;

/// Maximum number of positions of the mix per prompt; what is left then is appended in the files' order, since a file
/// of small weight needs many positions.
const POSITIONS_PER_PROMPT: u64 = 8;

/// Distinct held-out prompts of all files.
#[derive(Debug)]
pub(super) struct HeldOut {
    rows: Vec<PromptRow>,
}

impl HeldOut {
    /// Interleaves the held-out rows of the files in the order of `mix`; of rows with the same tokens the first is
    /// kept.
    pub(super) fn interleaved(files: &mut [Vec<PromptRow>], mix: &Mix) -> Self {
        let count: usize = files.iter().map(Vec::len).sum();
        let mut files: Vec<_> = files
            .iter_mut()
            .map(|rows| std::mem::take(rows).into_iter())
            .collect();
        let mut rows = Vec::with_capacity(count);
        let positions = 0..POSITIONS_PER_PROMPT * count as u64;
        rows.extend(positions.filter_map(|index| files[mix.place(index).0].next()));
        rows.extend(files.into_iter().flatten());
        let mut seen = HashSet::new();
        rows.retain(|row: &PromptRow| seen.insert(row.ids.clone()));
        if rows.len() < count {
            tracing::warn!(
                distinct = rows.len(),
                rows = count,
                "held-out prompts occur more than once: each is evaluated once"
            );
        }
        Self { rows }
    }

    /// Number of distinct prompts.
    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }

    /// All prompts in order of evaluation.
    pub(super) fn rows(&self) -> &[PromptRow] {
        &self.rows
    }

    /// The prompt at `index`, modulo the number of prompts.
    pub(super) fn row(&self, index: u64) -> PromptRow {
        self.rows[(index % self.rows.len() as u64) as usize].clone()
    }
}

#[cfg(test)]
mod tests {
    use messages::Seed;

    use super::*;

    fn rows(ids: &[u32]) -> Vec<PromptRow> {
        let row = |&id: &u32| PromptRow {
            ids: vec![id],
            text: id.to_string(),
            dialogue: None,
            golden: None,
            answer: None,
            route: None,
        };
        ids.iter().map(row).collect()
    }

    /// Held-out prompts of files, weights of the files, and the number of distinct prompts.
    type Case = (&'static [&'static [u32]], &'static [f64], usize);

    #[test]
    fn every_distinct_prompt_occurs_once() {
        let cases: [Case; 4] = [
            (&[&[1, 2, 3]], &[1.0], 3),
            (&[&[1, 2, 1, 2]], &[1.0], 2),
            // One file holds all, as with prompts.held_out_path.
            (&[&[1, 2, 3, 4], &[]], &[1.0, 3.0], 4),
            // Held out by share: the row of the small file comes last at the latest.
            (&[&[1, 2, 3, 4, 5], &[6], &[5]], &[0.9, 0.098, 0.002], 6),
        ];
        for (files, weights, distinct) in cases {
            let mut files: Vec<_> = files.iter().map(|ids| rows(ids)).collect();
            let mix = Mix::new(weights, Seed(1)).unwrap();
            let held_out = HeldOut::interleaved(&mut files, &mix);
            assert_eq!(held_out.len(), distinct);
            let seen: HashSet<_> = (0..distinct as u64)
                .map(|index| held_out.row(index).ids)
                .collect();
            assert_eq!(seen.len(), distinct, "{files:?}");
            assert_eq!(held_out.row(distinct as u64), held_out.row(0));
        }
    }
}
