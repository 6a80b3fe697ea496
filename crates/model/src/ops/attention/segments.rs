//! Where one sequence ends and the next begins in a packed batch.

use std::ops::Range;

/// Lengths of sequences laid end to end without padding, as their running sum.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segments {
    /// 0, then the end of each segment.
    bounds: Vec<usize>,
}

impl Segments {
    /// Segments of these lengths, in tokens, in this order. A length may be 0.
    pub fn new(lengths: &[usize]) -> Self {
        let mut bounds = Vec::with_capacity(lengths.len() + 1);
        bounds.push(0);
        let mut end = 0;
        for length in lengths {
            end += length;
            bounds.push(end);
        }
        Self { bounds }
    }

    /// How many segments there are.
    pub fn count(&self) -> usize {
        self.bounds.len() - 1
    }

    /// The packed rows of segment `index`; panics if there is no such segment.
    pub fn range(&self, index: usize) -> Range<usize> {
        self.bounds[index]..self.bounds[index + 1]
    }

    /// The packed rows of each segment in turn.
    pub fn ranges(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        self.bounds.windows(2).map(|ends| ends[0]..ends[1])
    }

    /// Tokens in all segments together.
    pub fn total(&self) -> usize {
        self.bounds[self.count()]
    }

    /// Tokens in the longest segment; 0 if there is none.
    pub fn longest(&self) -> usize {
        self.ranges().map(|range| range.len()).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_of_packed_sequences() {
        let segments = Segments::new(&[3, 0, 5]);
        assert_eq!(segments.count(), 3);
        let ranges: Vec<_> = segments.ranges().collect();
        assert_eq!(ranges, [0..3, 3..3, 3..8]);
        assert_eq!(segments.range(2), 3..8);
        assert_eq!((segments.total(), segments.longest()), (8, 5));
        let none = Segments::new(&[]);
        assert_eq!((none.count(), none.total(), none.longest()), (0, 0, 0));
    }
}
