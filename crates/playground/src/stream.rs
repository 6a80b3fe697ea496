//! Endless posts: one world for training, one held out, from the same seed.
//!
//! Training posts take the even numbers after the world's base and held-out posts the odd ones, each sent through a
//! bijection of the 64-bit numbers. Below index 2⁶³ no seed is therefore ever used twice within a world.

use crate::post::Post;
use crate::seed::split_mix;

/// The training post at an index.
pub fn train_post(world_seed: u64, index: u64) -> Post {
    Post::generate(train_seed(world_seed, index))
}

/// The held-out post at an index.
pub fn held_out_post(world_seed: u64, index: u64) -> Post {
    Post::generate(held_out_seed(world_seed, index))
}

/// The seed of a training post, fit also for its target and its labels.
pub fn train_seed(world_seed: u64, index: u64) -> u64 {
    numbered(world_seed, index.wrapping_mul(2))
}

/// The seed of a held-out post, fit also for its target and its labels.
pub fn held_out_seed(world_seed: u64, index: u64) -> u64 {
    numbered(world_seed, index.wrapping_mul(2).wrapping_add(1))
}

fn numbered(world_seed: u64, number: u64) -> u64 {
    split_mix(split_mix(world_seed).wrapping_add(number))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn no_seed_is_used_twice() {
        let train = (0..5000).map(|index| train_seed(3, index));
        let held_out = (0..5000).map(|index| held_out_seed(3, index));
        let seeds: HashSet<u64> = train.chain(held_out).collect();
        assert_eq!(seeds.len(), 10_000);
    }

    #[test]
    fn no_held_out_post_is_trained_on() {
        let train: HashSet<String> = (0..2000).map(|index| train_post(0, index).text()).collect();
        let shared = (0..2000)
            .filter(|index| train.contains(&held_out_post(0, *index).text()))
            .count();
        assert_eq!((train.len(), shared), (2000, 0));
    }

    #[test]
    fn worlds_repeat_and_differ() {
        assert_eq!(train_post(1, 5), train_post(1, 5));
        assert_ne!(train_post(1, 5), train_post(2, 5));
    }
}
