//! Unbounded streams of posts: a training split and a held-out split of one seed.
//!
//! Training posts use the even offsets from the seed's base and held-out posts the odd ones, each mapped by a bijection
//! on `u64`. No post seed occurs twice below index 2⁶³ of either split.

use crate::post::Post;
use crate::seed::split_mix;

/// Training post `index` of a seed.
pub fn train_post(seed: u64, index: u64) -> Post {
    Post::generate(train_seed(seed, index))
}

/// Held-out post `index` of a seed.
pub fn held_out_post(seed: u64, index: u64) -> Post {
    Post::generate(held_out_seed(seed, index))
}

/// Seed of a training post, of its target and of its labels.
pub fn train_seed(seed: u64, index: u64) -> u64 {
    post_seed(seed, index.wrapping_mul(2))
}

/// Seed of a held-out post, of its target and of its labels.
pub fn held_out_seed(seed: u64, index: u64) -> u64 {
    post_seed(seed, index.wrapping_mul(2).wrapping_add(1))
}

fn post_seed(seed: u64, offset: u64) -> u64 {
    split_mix(split_mix(seed).wrapping_add(offset))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn no_post_seed_occurs_twice() {
        let train = (0..5000).map(|index| train_seed(3, index));
        let held_out = (0..5000).map(|index| held_out_seed(3, index));
        let seeds: HashSet<u64> = train.chain(held_out).collect();
        assert_eq!(seeds.len(), 10_000);
    }

    #[test]
    fn training_and_held_out_posts_are_disjoint() {
        let train: HashSet<String> = (0..2000).map(|index| train_post(0, index).text()).collect();
        let shared = (0..2000)
            .filter(|index| train.contains(&held_out_post(0, *index).text()))
            .count();
        assert_eq!((train.len(), shared), (2000, 0));
    }

    #[test]
    fn streams_are_deterministic_and_differ_by_seed() {
        assert_eq!(train_post(1, 5), train_post(1, 5));
        assert_ne!(train_post(1, 5), train_post(2, 5));
    }
}
