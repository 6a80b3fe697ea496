//! Query blocks, and the keys each query attends to. Knows positions and rows, but no values.

use std::ops::Range;

use crate::simd::LANES;

/// Queries per block.
pub(super) const QUERY_BLOCK: usize = 64;

/// The prefix of a segment or one of its branches.
#[derive(Clone, Copy)]
pub(super) struct SegmentPart {
    /// First row of the part.
    pub row: usize,
    /// Position of its first token in the sequence: 0, or the prefix's length for a branch.
    pub start: usize,
    /// Position after its last token.
    pub end: usize,
}

impl SegmentPart {
    /// Query blocks of the part, of at most [`QUERY_BLOCK`] queries.
    pub fn blocks(self, window: Option<usize>) -> impl Iterator<Item = QueryBlock> {
        let window = window.unwrap_or(self.end);
        (self.start..self.end)
            .step_by(QUERY_BLOCK)
            .map(move |start| {
                let end = (start + QUERY_BLOCK).min(self.end);
                let first_key = (start + 1).saturating_sub(window) / LANES * LANES;
                QueryBlock {
                    part: self,
                    queries: start..end,
                    keys: first_key..end,
                    window,
                }
            })
    }
}

/// Neighbouring queries of one part, and the keys that any of them attends to, as positions in the sequence.
pub(super) struct QueryBlock {
    pub part: SegmentPart,
    pub queries: Range<usize>,
    pub keys: Range<usize>,
    window: usize,
}

impl QueryBlock {
    /// Row of query `index` of the block.
    pub fn row(&self, index: usize) -> usize {
        self.part.row + (self.queries.start - self.part.start) + index
    }

    /// Keys that query `index` of the block attends to, counted from the block's first key.
    pub fn visible(&self, index: usize) -> Range<usize> {
        let end = self.queries.start + index + 1;
        end.saturating_sub(self.window).max(self.keys.start) - self.keys.start
            ..end - self.keys.start
    }

    /// The keys, counted from the block's first, as spans of consecutive rows, each with its first row: those in the
    /// prefix, then those in the queries' own part.
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

    /// Number of scores, including padding.
    pub fn score_count(&self) -> usize {
        self.queries.len() * self.stride()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A branch of 70 tokens after a prefix of 37, its first row the segment's 50th.
    const BRANCH: SegmentPart = SegmentPart {
        row: 50,
        start: 37,
        end: 107,
    };

    type Spans = Vec<(Range<usize>, usize)>;

    fn blocks(window: Option<usize>) -> Vec<(Range<usize>, Range<usize>, Spans)> {
        let of = |block: QueryBlock| {
            (
                block.queries.clone(),
                block.keys.clone(),
                block.spans().collect(),
            )
        };
        BRANCH.blocks(window).map(of).collect()
    }

    #[test]
    fn a_branch_attends_to_the_prefix_and_itself() {
        let expected = [
            (37..101, 0..101, vec![(0..37, 0), (37..101, 50)]),
            (101..107, 0..107, vec![(0..37, 0), (37..107, 50)]),
        ];
        assert_eq!(blocks(None), expected);
        let last = BRANCH.blocks(None).last().unwrap();
        assert_eq!((last.row(0), last.visible(0)), (114, 0..102));
    }

    #[test]
    fn keys_outside_the_window_are_skipped() {
        let expected = [
            (37..101, 16..101, vec![(0..21, 16), (21..85, 50)]),
            (101..107, 80..107, vec![(0..27, 93)]),
        ];
        assert_eq!(blocks(Some(20)), expected);
        let last = BRANCH.blocks(Some(20)).last().unwrap();
        assert_eq!(last.visible(0), 2..22);
    }
}
