//! Shuffled order of rows.

use messages::Seed;

/// Row at position `index` of an endless sequence over `count` rows that has every row once per epoch, in a new order
/// every epoch.
#[must_use]
pub fn shuffled(index: u64, count: u64, seed: Seed) -> u64 {
    permuted(index % count, count, seed.derive(index / count))
}

/// Element `index` of a pseudorandom permutation of `0..count`, computed without the others: a Feistel network over the
/// next power of four, iterated until the result is in range (cycle walking).
pub(crate) fn permuted(index: u64, count: u64, seed: Seed) -> u64 {
    let half = (64 - count.saturating_sub(1).leading_zeros())
        .div_ceil(2)
        .max(1);
    let mask = (1u64 << half) - 1;
    let mut value = index;
    loop {
        let (mut left, mut right) = (value >> half, value & mask);
        for round in 0..4u64 {
            let mixed = seed.derive(round << 32 | right).0 & mask;
            (left, right) = (right, left ^ mixed);
        }
        value = left << half | right;
        if value < count {
            return value;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_is_a_different_permutation() {
        for count in [1u64, 2, 7, 64, 100] {
            let of = |epoch| {
                let seed = Seed(5).derive(epoch);
                (0..count)
                    .map(|index| permuted(index, count, seed))
                    .collect::<Vec<_>>()
            };
            let mut sorted = of(0);
            sorted.sort_unstable();
            assert_eq!(sorted, (0..count).collect::<Vec<_>>(), "{count}");
            assert!(count < 7 || of(0) != of(1), "{count}");
        }
    }
}
