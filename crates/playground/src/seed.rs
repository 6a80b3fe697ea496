//! Randomness from seeds alone.
//!
//! Every use of a seed has its own [`Purpose`], so that a post and its summary may share one seed without sharing
//! one stream of random numbers.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// What a stream of random numbers is for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Purpose {
    Post = 1,
    Golden = 2,
    Target = 3,
    Label = 4,
    Bandit = 5,
    Grammar = 6,
}

/// One output of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) at this state. A bijection of the 64-bit numbers:
/// distinct inputs give distinct outputs.
pub(crate) fn split_mix(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The generator of a seed for one purpose. The same on every platform.
pub(crate) fn generator(seed: u64, purpose: Purpose) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(split_mix(seed ^ split_mix(purpose as u64)))
}

#[cfg(test)]
mod tests {
    use rand::RngCore;

    use super::*;

    #[test]
    fn split_mix_gives_the_published_first_output_of_seed_zero() {
        assert_eq!(split_mix(0), 0xE220_A839_7B1D_CDAF);
    }

    #[test]
    fn a_seed_repeats_and_purposes_differ() {
        let first = |purpose| generator(7, purpose).next_u64();
        assert_eq!(first(Purpose::Post), first(Purpose::Post));
        assert_ne!(first(Purpose::Post), first(Purpose::Golden));
        assert_ne!(first(Purpose::Target), first(Purpose::Golden));
    }
}
