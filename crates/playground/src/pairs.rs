//! Labels as people give them: drawn from the gold preference, and now and then mistaken.

use rand::Rng;

use crate::seed::{Purpose, generator};

/// How often a label is given the wrong way round.
pub const FLIP: f64 = 0.10;

/// Draws whether the first summary is called the better one: true with probability `p_star`, then turned round with
/// probability `flip` (usually [`FLIP`]). In all, true with probability p* + flip − 2·p*·flip.
pub fn noisy_label(p_star: f64, seed: u64, flip: f64) -> bool {
    let mut rng = generator(seed, Purpose::Label);
    let preferred = rng.random::<f64>() < p_star;
    let mistaken = rng.random::<f64>() < flip;
    preferred != mistaken
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_come_at_their_rate() {
        for (p_star, flip, expected) in [
            (1.0, 0.0, 1.0),
            (0.0, 0.0, 0.0),
            (1.0, FLIP, 0.9),
            (0.0, FLIP, 0.1),
            (0.8, FLIP, 0.74),
        ] {
            let chosen = (0..20_000)
                .filter(|seed| noisy_label(p_star, *seed, flip))
                .count();
            // Three standard errors of a half over 20,000 draws are .011.
            let seen = chosen as f64 / 20_000.0;
            assert!((seen - expected).abs() < 0.011, "{p_star} {flip}: {seen}");
        }
    }

    #[test]
    fn a_seed_repeats_its_label() {
        for seed in 0..50 {
            assert_eq!(noisy_label(0.5, seed, FLIP), noisy_label(0.5, seed, FLIP));
        }
    }
}
