//! Noisy preference labels: Bernoulli draws from the gold preference, flipped at a fixed rate.

use rand::Rng;

use crate::seed::{RngStream, generator};

/// Default label noise: probability that a label is flipped.
pub const FLIP: f64 = 0.10;

/// Draws a label, true when the first summary is preferred: Bernoulli(`p_star`), then flipped with probability `flip`
/// (usually [`FLIP`]). The result is true with probability p* + flip − 2·p*·flip.
pub fn noisy_label(p_star: f64, seed: u64, flip: f64) -> bool {
    let mut rng = generator(seed, RngStream::Label);
    let preferred = rng.random::<f64>() < p_star;
    let flipped = rng.random::<f64>() < flip;
    preferred != flipped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn label_rates_match_the_probability_and_the_noise() {
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
            let observed = chosen as f64 / 20_000.0;
            assert!(
                (observed - expected).abs() < 0.011,
                "{p_star} {flip}: {observed}"
            );
        }
    }

    #[test]
    fn a_label_is_a_function_of_its_seed() {
        for seed in 0..50 {
            assert_eq!(noisy_label(0.5, seed, FLIP), noisy_label(0.5, seed, FLIP));
        }
    }
}
