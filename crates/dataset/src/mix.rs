//! Interleaves several data sets in proportion to their weights.

use messages::Seed;

use crate::order::permuted;

/// Length of a block of a mix: every block has the same number of rows from each set.
const BLOCK: u64 = 1000;

/// Endless interleaving of several data sets. The set at an index, and the index within that set, are functions of the
/// index alone: resuming needs the index only.
#[derive(Debug, Clone, PartialEq)]
pub struct Mix {
    /// Rows of each set per block.
    shares: Vec<u64>,
    seed: Seed,
}

impl Mix {
    /// A mix with these weights, rounded to thousandths of their sum.
    ///
    /// # Errors
    /// When a weight is not above 0, or is rounded to 0.
    pub fn new(weights: &[f64], seed: Seed) -> Result<Self, String> {
        if let Some(weight) = weights.iter().find(|w| !w.is_finite() || **w <= 0.0) {
            return Err(format!("the weight {weight} must be above 0"));
        }
        let sum: f64 = weights.iter().sum();
        let exact: Vec<f64> = weights.iter().map(|w| w / sum * BLOCK as f64).collect();
        let mut shares: Vec<u64> = exact.iter().map(|share| share.floor() as u64).collect();
        let mut by_remainder: Vec<usize> = (0..shares.len()).collect();
        by_remainder.sort_by(|&a, &b| exact[b].fract().total_cmp(&exact[a].fract()));
        let missing = BLOCK - shares.iter().sum::<u64>();
        for index in by_remainder.into_iter().take(missing as usize) {
            shares[index] += 1;
        }
        match shares.iter().position(|&share| share == 0) {
            None => Ok(Self { shares, seed }),
            Some(set) => Err(format!(
                "the weight {} is less than a thousandth of the sum, {sum}",
                weights[set]
            )),
        }
    }

    /// Fraction of the rows that come from a set.
    #[must_use]
    pub fn share(&self, set: usize) -> f64 {
        self.shares[set] as f64 / BLOCK as f64
    }

    /// The set at `index`, and the index within that set.
    #[must_use]
    pub fn place(&self, index: u64) -> (usize, u64) {
        if self.shares.len() == 1 {
            return (0, index);
        }
        let (block, offset) = (index / BLOCK, index % BLOCK);
        let mut offset = permuted(offset, BLOCK, self.seed.derive(block));
        for (set, &share) in self.shares.iter().enumerate() {
            if offset < share {
                return (set, block * share + offset);
            }
            offset -= share;
        }
        unreachable!("the shares of all sets add up to a block")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn sets_are_read_in_order_and_in_proportion_to_their_weights() {
        let mix = Mix::new(&[3.0, 1.0, 0.5], Seed(7)).expect("valid weights");
        let mut read = [0; 3].map(|_| BTreeSet::new());
        for index in 0..3 * BLOCK {
            let (set, place) = mix.place(index);
            assert!(read[set].insert(place), "{index}: {place} of {set} again");
        }
        let counts = read.each_ref().map(BTreeSet::len);
        assert_eq!(counts, [2001, 666, 333]);
        for places in &read {
            // No row is skipped.
            assert_eq!(places.last(), Some(&(places.len() as u64 - 1)));
        }
        let first: Vec<_> = (0..20).map(|index| mix.place(index).0).collect();
        assert!(first.contains(&0) && first.contains(&1), "{first:?}");
        assert!((mix.share(0) - 0.667).abs() < 1e-12);
    }

    #[test]
    fn a_single_set_is_read_in_order() {
        let mix = Mix::new(&[0.1], Seed(7)).expect("a valid weight");
        assert!((0..3000).all(|index| mix.place(index) == (0, index)));
    }

    #[test]
    fn invalid_weights_are_errors() {
        for (weights, expected) in [
            (&[1.0, 0.0][..], "the weight 0 must be above 0"),
            (&[1.0, -1.0], "must be above 0"),
            (&[f64::NAN], "must be above 0"),
            (&[1.0, 1e-4], "less than a thousandth"),
        ] {
            let error = Mix::new(weights, Seed(0)).expect_err(expected);
            assert!(error.contains(expected), "{error}");
        }
    }
}
