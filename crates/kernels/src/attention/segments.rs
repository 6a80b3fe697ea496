//! Rows of the sequences of a packed batch, some of which share a prefix.

use std::ops::Range;

/// A shared prefix and the branches that continue it, in consecutive packed rows: first the prefix, then each branch.
/// A token of a branch attends to the prefix and to the earlier tokens of its branch, not to other branches. A single
/// sequence is a prefix without branches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Rows of the shared prefix; may be empty.
    pub prefix: Range<usize>,
    /// Rows of each branch; any may be empty.
    pub branches: Vec<Range<usize>>,
}

impl Segment {
    /// Packed rows of the prefix and all branches.
    pub fn rows(&self) -> Range<usize> {
        let end = self
            .branches
            .last()
            .map_or(self.prefix.end, |last| last.end);
        self.prefix.start..end
    }

    /// Rows of every whole sequence: the prefix and one branch, or the prefix alone if there is none.
    pub(super) fn paths(&self) -> impl Iterator<Item = impl Iterator<Item = usize>> {
        let end = self.prefix.end;
        let alone = self.branches.is_empty().then_some(end..end);
        let branches = self.branches.iter().cloned().chain(alone);
        branches.map(|branch| self.prefix.clone().chain(branch))
    }

    /// Tokens in the longest branch; 0 if there is none.
    pub(super) fn longest_branch(&self) -> usize {
        self.branches.iter().map(Range::len).max().unwrap_or(0)
    }
}

/// Segments of a packed batch, end to end without padding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segments {
    segments: Vec<Segment>,
}

impl Segments {
    /// Sequences of these lengths, in tokens, in this order, without shared prefixes. A length may be 0.
    pub fn new(lengths: &[usize]) -> Self {
        Self::branching(lengths.iter().map(|&length| (length, Vec::new())))
    }

    /// Segments given by the length of their prefix and of each branch, in tokens, in this order. A length may be 0.
    pub fn branching(lengths: impl IntoIterator<Item = (usize, Vec<usize>)>) -> Self {
        let mut end = 0;
        let mut next = |length: usize| {
            end += length;
            end - length..end
        };
        let segment = |(prefix, branches): (usize, Vec<usize>)| Segment {
            prefix: next(prefix),
            branches: branches.into_iter().map(&mut next).collect(),
        };
        Self {
            segments: lengths.into_iter().map(segment).collect(),
        }
    }

    /// Number of segments.
    pub fn count(&self) -> usize {
        self.segments.len()
    }

    /// The segments in order.
    pub fn iter(&self) -> impl Iterator<Item = &Segment> {
        self.segments.iter()
    }

    /// Packed rows of segment `index`; panics if there is no such segment.
    pub fn range(&self, index: usize) -> Range<usize> {
        self.segments[index].rows()
    }

    /// Packed rows of each segment, in order.
    pub fn ranges(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        self.iter().map(Segment::rows)
    }

    /// Number of packed tokens; those of a shared prefix count once.
    pub fn total(&self) -> usize {
        self.segments.last().map_or(0, |last| last.rows().end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_sequences_without_shared_prefixes() {
        let segments = Segments::new(&[3, 0, 5]);
        assert_eq!(segments.count(), 3);
        let ranges: Vec<_> = segments.ranges().collect();
        assert_eq!(ranges, [0..3, 3..3, 3..8]);
        assert_eq!((segments.range(2), segments.total()), (3..8, 8));
        let none = Segments::new(&[]);
        assert_eq!((none.count(), none.total()), (0, 0));
    }

    #[test]
    fn rows_of_prefixes_and_branches() {
        let segments = Segments::branching([(3, vec![2, 0, 1]), (2, vec![]), (0, vec![2, 1])]);
        let expected = [
            (0..3, vec![3..5, 5..5, 5..6]),
            (6..8, vec![]),
            (8..8, vec![8..10, 10..11]),
        ];
        for (segment, (prefix, branches)) in segments.iter().zip(expected) {
            assert_eq!((&segment.prefix, &segment.branches), (&prefix, &branches));
        }
        let ranges: Vec<_> = segments.ranges().collect();
        assert_eq!(ranges, [0..6, 6..8, 8..11]);
        let paths: Vec<Vec<usize>> = segments
            .iter()
            .flat_map(|segment| segment.paths().map(Iterator::collect))
            .collect();
        let expected: [&[usize]; 6] = [
            &[0, 1, 2, 3, 4],
            &[0, 1, 2],
            &[0, 1, 2, 5],
            &[6, 7],
            &[8, 9],
            &[10],
        ];
        assert_eq!(paths, expected);
        let longest: Vec<_> = segments.iter().map(Segment::longest_branch).collect();
        assert_eq!(longest, [2, 0, 2]);
    }
}
