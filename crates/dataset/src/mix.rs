//! Several sets read as one, each as often as its weight says.

use messages::Seed;

use crate::order::permuted;

/// Places of one round of a mix: every round has each set as often as every other round.
const ROUND: u64 = 1000;

/// An endless reading of several sets. Which set stands at a place, and which of its own places that is,
/// follows from the place alone: a cursor is all there is to resume.
#[derive(Debug, Clone, PartialEq)]
pub struct Mix {
    /// The places of a round that each set has.
    shares: Vec<u64>,
    seed: Seed,
}

impl Mix {
    /// Sets of these weights, to a thousandth of their sum.
    ///
    /// # Errors
    /// When a weight is not above 0, or less than half a thousandth of all.
    pub fn new(weights: &[f64], seed: Seed) -> Result<Self, String> {
        if let Some(weight) = weights.iter().find(|w| !w.is_finite() || **w <= 0.0) {
            return Err(format!("the weight {weight} must be above 0"));
        }
        let sum: f64 = weights.iter().sum();
        let exact: Vec<f64> = weights.iter().map(|w| w / sum * ROUND as f64).collect();
        let mut shares: Vec<u64> = exact.iter().map(|share| share.floor() as u64).collect();
        let mut by_rest: Vec<usize> = (0..shares.len()).collect();
        by_rest.sort_by(|&a, &b| exact[b].fract().total_cmp(&exact[a].fract()));
        let missing = ROUND - shares.iter().sum::<u64>();
        for index in by_rest.into_iter().take(missing as usize) {
            shares[index] += 1;
        }
        match shares.iter().position(|&share| share == 0) {
            None => Ok(Self { shares, seed }),
            Some(none) => Err(format!(
                "the weight {} is less than a thousandth of all, {sum}",
                weights[none]
            )),
        }
    }

    /// The share of all that a set has.
    #[must_use]
    pub fn share(&self, set: usize) -> f64 {
        self.shares[set] as f64 / ROUND as f64
    }

    /// The set that is read at place `index`, and at which place of its own.
    #[must_use]
    pub fn place(&self, index: u64) -> (usize, u64) {
        if self.shares.len() == 1 {
            return (0, index);
        }
        let (round, place) = (index / ROUND, index % ROUND);
        let mut place = permuted(place, ROUND, self.seed.derive(round));
        for (set, &share) in self.shares.iter().enumerate() {
            if place < share {
                return (set, round * share + place);
            }
            place -= share;
        }
        unreachable!("the shares of all sets are a round")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_place_of_every_set_is_read_once_and_as_often_as_it_weighs() {
        let mix = Mix::new(&[3.0, 1.0, 0.5], Seed(7)).expect("sound weights");
        let mut read = [0; 3].map(|_| BTreeSet::new());
        for index in 0..3 * ROUND {
            let (set, place) = mix.place(index);
            assert!(read[set].insert(place), "{index}: {place} of {set} again");
        }
        let counts = read.each_ref().map(BTreeSet::len);
        assert_eq!(counts, [2001, 666, 333]);
        for places in &read {
            // None is left out either: they are read from the first on.
            assert_eq!(places.last(), Some(&(places.len() as u64 - 1)));
        }
        let first: Vec<_> = (0..20).map(|index| mix.place(index).0).collect();
        assert!(first.contains(&0) && first.contains(&1), "{first:?}");
        assert!((mix.share(0) - 0.667).abs() < 1e-12);
    }

    #[test]
    fn one_set_is_read_in_its_own_order() {
        let mix = Mix::new(&[0.1], Seed(7)).expect("a sound weight");
        assert!((0..3000).all(|index| mix.place(index) == (0, index)));
    }

    #[test]
    fn weights_that_say_nothing_are_refused() {
        for (weights, says) in [
            (&[1.0, 0.0][..], "the weight 0 must be above 0"),
            (&[1.0, -1.0], "must be above 0"),
            (&[f64::NAN], "must be above 0"),
            (&[1.0, 1e-4], "less than a thousandth"),
        ] {
            let why = Mix::new(weights, Seed(0)).expect_err(says);
            assert!(why.contains(says), "{why}");
        }
    }
}
