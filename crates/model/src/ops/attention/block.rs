//! Queries that are scored together, and which keys they see. Knows places and rows, no numbers.

use std::ops::Range;

use super::super::vector::LANES;

/// Queries scored at a time.
pub(super) const BLOCK: usize = 64;

/// The prefix of a segment or one of its branches.
#[derive(Clone, Copy)]
pub(super) struct Part {
    /// Its first row.
    pub row: usize,
    /// The place of its first token in the sequence: what a branch sees of the prefix comes before.
    pub start: usize,
    /// The place after its last token.
    pub end: usize,
}

impl Part {
    /// Its queries, up to [`BLOCK`] at a time.
    pub fn blocks(self, window: Option<usize>) -> impl Iterator<Item = Block> {
        let window = window.unwrap_or(self.end);
        (self.start..self.end).step_by(BLOCK).map(move |start| {
            let end = (start + BLOCK).min(self.end);
            let first_key = (start + 1).saturating_sub(window) / LANES * LANES;
            Block {
                part: self,
                queries: start..end,
                keys: first_key..end,
                window,
            }
        })
    }
}

/// Queries of one part, by place in the sequence, and the keys any of them sees.
pub(super) struct Block {
    pub part: Part,
    pub queries: Range<usize>,
    pub keys: Range<usize>,
    window: usize,
}

impl Block {
    /// The row of query `index` of the block.
    pub fn row(&self, index: usize) -> usize {
        self.part.row + (self.queries.start - self.part.start) + index
    }

    /// Keys seen by query `index` of the block, counted from the block's first key.
    pub fn seen(&self, index: usize) -> Range<usize> {
        let end = self.queries.start + index + 1;
        end.saturating_sub(self.window).max(self.keys.start) - self.keys.start
            ..end - self.keys.start
    }

    /// The keys, counted from the block's first, in spans whose rows follow one another, each with its
    /// first row: those in the prefix, then those in the queries' own part.
    pub fn spans(&self) -> impl Iterator<Item = (Range<usize>, usize)> {
        let own = self.keys.start.max(self.part.start);
        let own_row = self.part.row + (own - self.part.start);
        let shared = own - self.keys.start;
        [
            (0..shared, self.keys.start),
            (shared..self.keys.len(), own_row),
        ]
        .into_iter()
        .filter(|(keys, _)| !keys.is_empty())
    }

    /// Row length of the scores: the keys, padded to whole vectors.
    pub fn stride(&self) -> usize {
        self.keys.len().next_multiple_of(LANES)
    }

    /// How many scores there are, padding included.
    pub fn scores(&self) -> usize {
        self.queries.len() * self.stride()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A branch of 70 tokens after a prefix of 37, its first row the segment's 50th.
    const BRANCH: Part = Part {
        row: 50,
        start: 37,
        end: 107,
    };

    type Spans = Vec<(Range<usize>, usize)>;

    fn blocks(window: Option<usize>) -> Vec<(Range<usize>, Range<usize>, Spans)> {
        let of = |block: Block| {
            (
                block.queries.clone(),
                block.keys.clone(),
                block.spans().collect(),
            )
        };
        BRANCH.blocks(window).map(of).collect()
    }

    #[test]
    fn a_branch_sees_the_prefix_and_itself() {
        let expected = [
            (37..101, 0..101, vec![(0..37, 0), (37..101, 50)]),
            (101..107, 0..107, vec![(0..37, 0), (37..107, 50)]),
        ];
        assert_eq!(blocks(None), expected);
        let last = BRANCH.blocks(None).last().unwrap();
        assert_eq!((last.row(0), last.seen(0)), (114, 0..102));
    }

    #[test]
    fn keys_out_of_the_window_are_left_out() {
        let expected = [
            (37..101, 16..101, vec![(0..21, 16), (21..85, 50)]),
            (101..107, 80..107, vec![(0..27, 93)]),
        ];
        assert_eq!(blocks(Some(20)), expected);
        let last = BRANCH.blocks(Some(20)).last().unwrap();
        assert_eq!(last.seen(0), 2..22);
    }
}
