//! The order in which rows are read.

use messages::Seed;

/// Which of `count` rows stands at place `index` of an endless reading that takes every row once an
/// epoch, in a new order every epoch.
#[must_use]
pub fn shuffled(index: u64, count: u64, seed: Seed) -> u64 {
    permuted(index % count, count, seed.derive(index / count))
}

/// Place `place` of a permutation of `0..count`, computed without the others: a Feistel network over
/// the next power of four, walked until it is inside.
pub(crate) fn permuted(place: u64, count: u64, seed: Seed) -> u64 {
    let half = (64 - count.saturating_sub(1).leading_zeros())
        .div_ceil(2)
        .max(1);
    let mask = (1u64 << half) - 1;
    let mut place = place;
    loop {
        let (mut left, mut right) = (place >> half, place & mask);
        for round in 0..4u64 {
            let mixed = seed.derive(round << 32 | right).0 & mask;
            (left, right) = (right, left ^ mixed);
        }
        place = left << half | right;
        if place < count {
            return place;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_is_a_permutation_and_another_one() {
        for count in [1u64, 2, 7, 64, 100] {
            let of = |epoch| {
                let seed = Seed(5).derive(epoch);
                (0..count)
                    .map(|place| permuted(place, count, seed))
                    .collect::<Vec<_>>()
            };
            let mut sorted = of(0);
            sorted.sort_unstable();
            assert_eq!(sorted, (0..count).collect::<Vec<_>>(), "{count}");
            assert!(count < 7 || of(0) != of(1), "{count}");
        }
    }
}
