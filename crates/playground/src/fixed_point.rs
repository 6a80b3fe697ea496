//! The fixed point of self-play on a matrix game, computed to machine precision.
//!
//! This is the KL-regularised Nash equilibrium of a finite preference game (Munos et al., "Nash Learning from Human
//! Feedback", 2312.00886; Calandriello et al., "Human Alignment of Large Language Models through Online Preference
//! Optimisation", 2403.08635): π ∝ ref · exp(p(y ≻ mixture)/τ) with mixture ∝ π^(1−m) · ref^m.

use crate::error::PlaygroundError;

/// Tolerance of the iteration, as an error of a probability. An error ε of the policy moves its best response by up
/// to ε · (1 + slope), which is the residual that is tested.
const TOLERANCE: f64 = 1e-12;
/// Maximum iterations per unit of (1 + slope of the map); convergence takes a few dozen.
const ITERATIONS_PER_SLOPE: f64 = 1000.0;
const SUM_TOLERANCE: f64 = 1e-6;

/// The policy π ∝ reference · exp(p(y ≻ mixture)/tau), mixture ∝ π^(1−m) · reference^m.
///
/// `matrix[i][j]` is the probability that arm i is preferred to arm j, so that `matrix[i][j] + matrix[j][i] = 1`.
/// `tau` > 0 is the KL temperature; `m` in \[0, 1\] the weight on the reference. With m = 0 this is the fixed point
/// of online IPO, with m > 0 that of IPO-MD. Computed by a damped extragradient iteration on log-probabilities, since
/// plain fixed-point iteration cycles when tau is small.
///
/// # Errors
/// If the arguments do not form such a game, or the iteration does not converge (extremely small tau).
pub fn fixed_point(
    matrix: &[Vec<f64>],
    reference: &[f64],
    tau: f64,
    m: f64,
) -> Result<Vec<f64>, PlaygroundError> {
    let game = PreferenceGame::new(matrix, reference, tau, m)?;
    // The map's derivative is A·Cov/tau with A antisymmetric and small, hence the bound and the step.
    let slope = game.largest_advantage() * (1.0 - m) / tau;
    let step = 0.5 / (1.0 + slope);
    let limit = (ITERATIONS_PER_SLOPE * (1.0 + slope)) as u64;

    let mut logits = game.log_reference.clone();
    let mut residual = f64::INFINITY;
    for _ in 0..limit {
        let response = game.response(&logits);
        residual = largest_difference(&softmax(&logits), &softmax(&response));
        if residual < TOLERANCE * (1.0 + slope) {
            return Ok(softmax(&logits));
        }
        let ahead = toward(&logits, &logits, &response, step);
        logits = toward(&logits, &ahead, &game.response(&ahead), step);
    }
    Err(PlaygroundError::NotConverged {
        iterations: limit,
        residual,
    })
}

/// The mixture ∝ policy^(1−m) · reference^m, m being the weight on the reference.
pub fn mixture(policy: &[f64], reference: &[f64], m: f64) -> Vec<f64> {
    let blend = |(p, r): (&f64, &f64)| (1.0 - m) * p.ln() + m * r.ln();
    softmax(&policy.iter().zip(reference).map(blend).collect::<Vec<_>>())
}

/// A validated preference game.
struct PreferenceGame<'a> {
    matrix: &'a [Vec<f64>],
    log_reference: Vec<f64>,
    tau: f64,
    m: f64,
}

impl<'a> PreferenceGame<'a> {
    fn new(
        matrix: &'a [Vec<f64>],
        reference: &[f64],
        tau: f64,
        m: f64,
    ) -> Result<Self, PlaygroundError> {
        let arms = reference.len();
        let square = arms > 0 && matrix.len() == arms && matrix.iter().all(|row| row.len() == arms);
        let checks = [
            (
                square,
                "needs one row and one column for each arm of the reference",
            ),
            (
                square && complementary(matrix),
                "needs p(i, j) in [0, 1] and p(i, j) + p(j, i) = 1",
            ),
            (
                positive_distribution(reference),
                "needs a reference of positive probabilities that sum to 1",
            ),
            (tau.is_finite() && tau > 0.0, "needs tau above 0"),
            (
                (0.0..=1.0).contains(&m),
                "needs a mixture weight m in [0, 1]",
            ),
        ];
        if let Some((_, reason)) = checks.iter().find(|(holds, _)| !holds) {
            return Err(PlaygroundError::Game {
                reason: (*reason).to_owned(),
            });
        }
        Ok(Self {
            matrix,
            log_reference: reference.iter().map(|p| p.ln()).collect(),
            tau,
            m,
        })
    }

    /// The best response log ref + (p(· ≻ mixture) − ½)/tau to the policy of these logits. The constant ½ cancels in
    /// the softmax and keeps the logits small.
    fn response(&self, logits: &[f64]) -> Vec<f64> {
        let blend =
            |(policy, reference): (&f64, &f64)| (1.0 - self.m) * policy + self.m * reference;
        let opponent = softmax(
            &logits
                .iter()
                .zip(&self.log_reference)
                .map(blend)
                .collect::<Vec<_>>(),
        );
        let win_rate =
            |row: &Vec<f64>| -> f64 { row.iter().zip(&opponent).map(|(p, q)| (p - 0.5) * q).sum() };
        let rows = self.matrix.iter().zip(&self.log_reference);
        rows.map(|(row, log_reference)| log_reference + win_rate(row) / self.tau)
            .collect()
    }

    /// max |p(i, j) − ½|.
    fn largest_advantage(&self) -> f64 {
        self.matrix
            .iter()
            .flatten()
            .map(|p| (p - 0.5).abs())
            .fold(0.0, f64::max)
    }
}

fn complementary(matrix: &[Vec<f64>]) -> bool {
    let cells = (0..matrix.len()).flat_map(|i| (0..=i).map(move |j| (i, j)));
    cells.into_iter().all(|(i, j)| {
        let (p, q) = (matrix[i][j], matrix[j][i]);
        (0.0..=1.0).contains(&p) && (0.0..=1.0).contains(&q) && (p + q - 1.0).abs() < SUM_TOLERANCE
    })
}

fn positive_distribution(probabilities: &[f64]) -> bool {
    let sum: f64 = probabilities.iter().sum();
    probabilities.iter().all(|p| *p > 0.0) && (sum - 1.0).abs() < SUM_TOLERANCE
}

/// from + step · (target − at).
fn toward(from: &[f64], at: &[f64], target: &[f64], step: f64) -> Vec<f64> {
    from.iter()
        .zip(at)
        .zip(target)
        .map(|((from, at), target)| from + step * (target - at))
        .collect()
}

fn softmax(logits: &[f64]) -> Vec<f64> {
    let maximum = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = logits.iter().map(|logit| (logit - maximum).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / sum).collect()
}

fn largest_difference(a: &[f64], b: &[f64]) -> f64 {
    a.iter()
        .zip(b)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use rand::Rng;

    use super::*;
    use crate::seed::{RngStream, generator};

    const REFERENCE: [f64; 3] = [0.5, 0.3, 0.2];

    fn cycle() -> Vec<Vec<f64>> {
        vec![
            vec![0.5, 0.8, 0.3],
            vec![0.2, 0.5, 0.9],
            vec![0.7, 0.1, 0.5],
        ]
    }

    #[test]
    fn fixed_points_match_the_published_three_arm_table() {
        for (tau, m, policy, mixed) in [
            (
                1.0,
                0.0,
                [0.523000, 0.278052, 0.198948],
                [0.523000, 0.278052, 0.198948],
            ),
            (
                0.5,
                0.0,
                [0.540314, 0.256488, 0.203198],
                [0.540314, 0.256488, 0.203198],
            ),
            (
                0.1,
                0.0,
                [0.530186, 0.192368, 0.277445],
                [0.530186, 0.192368, 0.277445],
            ),
            (
                0.5,
                0.5,
                [0.545601, 0.257024, 0.197375],
                [0.523000, 0.278052, 0.198948],
            ),
            (0.5, 1.0, [0.549535, 0.259368, 0.191097], REFERENCE),
        ] {
            let actual = fixed_point(&cycle(), &REFERENCE, tau, m).unwrap();
            assert!(
                largest_difference(&actual, &policy) < 1e-6,
                "tau {tau} m {m}: {actual:?}"
            );
            let actual = mixture(&actual, &REFERENCE, m);
            assert!(
                largest_difference(&actual, &mixed) < 1e-6,
                "tau {tau} m {m}: mixture {actual:?}"
            );
        }
    }

    #[test]
    fn a_tiny_temperature_reaches_the_unregularised_equilibrium() {
        // Of the cycle with advantages (.3, −.2, .4): (.4, .2, .3) normalised, whatever the reference.
        let actual = fixed_point(&cycle(), &REFERENCE, 1e-4, 0.0).unwrap();
        let nash = [4.0 / 9.0, 2.0 / 9.0, 3.0 / 9.0];
        assert!(largest_difference(&actual, &nash) < 1e-3, "{actual:?}");
    }

    #[test]
    fn the_solution_satisfies_the_fixed_point_equation() {
        let mut rng = generator(2, RngStream::Bandit);
        for (arms, tau, m) in [
            (2, 0.5, 0.0),
            (5, 0.05, 0.25),
            (64, 0.01, 0.0),
            (20, 0.001, 0.125),
            (7, 2.0, 1.0),
        ] {
            let mut matrix = vec![vec![0.5; arms]; arms];
            for (i, j) in (0..arms).flat_map(|i| (0..i).map(move |j| (i, j))) {
                matrix[i][j] = rng.random::<f64>();
                matrix[j][i] = 1.0 - matrix[i][j];
            }
            let draws: Vec<f64> = (0..arms).map(|_| rng.random::<f64>() * 3.0).collect();
            let reference = softmax(&draws);
            let policy = fixed_point(&matrix, &reference, tau, m).unwrap();
            let opponent = mixture(&policy, &reference, m);
            let expected: Vec<f64> = (0..arms)
                .map(|i| {
                    let win_rate: f64 = matrix[i].iter().zip(&opponent).map(|(p, q)| p * q).sum();
                    reference[i].ln() + win_rate / tau
                })
                .collect();
            let difference = largest_difference(&policy, &softmax(&expected));
            assert!(
                difference < 1e-8,
                "{arms} arms, tau {tau}, m {m}: off by {difference:e}"
            );
        }
    }

    #[test]
    fn indifferent_preferences_yield_the_reference() {
        let actual = fixed_point(&vec![vec![0.5; 3]; 3], &REFERENCE, 0.01, 0.3).unwrap();
        assert!(
            largest_difference(&actual, &REFERENCE) < 1e-12,
            "{actual:?}"
        );
    }

    #[test]
    fn the_mixture_is_geometric() {
        assert!(largest_difference(&mixture(&[0.8, 0.2], &[0.2, 0.8], 0.5), &[0.5, 0.5]) < 1e-15);
        assert!(largest_difference(&mixture(&[0.8, 0.2], &[0.3, 0.7], 0.0), &[0.8, 0.2]) < 1e-15);
    }

    #[test]
    fn invalid_games_are_rejected() {
        let half = || vec![vec![0.5; 3]; 3];
        let biased = vec![vec![0.5, 0.6], vec![0.6, 0.5]];
        for (matrix, reference, tau, m, message) in [
            (
                vec![vec![0.5; 3]; 2],
                REFERENCE.to_vec(),
                1.0,
                0.0,
                "one row",
            ),
            (vec![], vec![], 1.0, 0.0, "one row"),
            (biased, vec![0.5, 0.5], 1.0, 0.0, "= 1"),
            (half(), vec![0.5, 0.5, 0.0], 1.0, 0.0, "positive"),
            (half(), vec![0.5, 0.5, 0.5], 1.0, 0.0, "sum to 1"),
            (half(), REFERENCE.to_vec(), 0.0, 0.0, "tau"),
            (half(), REFERENCE.to_vec(), 1.0, 1.5, "mixture"),
        ] {
            let error = fixed_point(&matrix, &reference, tau, m)
                .unwrap_err()
                .to_string();
            assert!(error.contains(message), "{error}");
        }
    }
}
