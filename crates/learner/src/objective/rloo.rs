//! RLOO: policy gradient with a leave-one-out baseline and a KL penalty within the reward.
//!
//! Ahmadian et al. 2024 (arXiv 2402.14740), equation 10, with the reward `R(y) = r(y) − β·log π(y)/ref(y)`. Ascends
//! `E[r(y)] − β·KL(π‖ref)` over y ~ π.
//!
//! The reward enters through the label: of a Bradley–Terry model `log(p/(1 − p)) = r(y) − r(y')`, and the leave-one-out
//! advantage of a completion among k is the mean of such differences, so that the estimate over k completions is the
//! mean over their pairs. Of a preference without a scalar reward the log-odds take the difference's place.

use candle_core::{Result, Tensor};

use crate::objective::batch::check_rows;
use crate::objective::{Batch, Objective};

/// Lower bound of p and 1 − p in the log-odds, which are then within ±13.8.
const MIN_P: f64 = 1e-6;

/// RLOO as an objective. All completions must be from the policy itself.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rloo {
    /// KL strength β ≥ 0, in units of the reward.
    pub beta: f64,
}

impl Objective for Rloo {
    fn name(&self) -> &'static str {
        "rloo"
    }

    fn loss(&self, batch: &Batch<'_>) -> Result<Tensor> {
        batch.sum_of(|h, p| surrogate(h, p, self.beta))
    }
}

/// `−½·SG[log(p/(1 − p)) − βh]·h` per pair, `[B]`, with SG the stop-gradient; `h` and `p` are `[B]`.
///
/// Only its gradient has a meaning: its mean over the pairs of k completions is the leave-one-out estimate
/// `−(1/k)·Σᵢ Aᵢ·∇log π(yᵢ)` with `Aᵢ = R(yᵢ) − mean of the other R(yⱼ)`.
///
/// # Errors
/// If the shapes disagree.
pub fn surrogate(h: &Tensor, p: &Tensor, beta: f64) -> Result<Tensor> {
    check_rows(h, p)?;
    let p = p.detach();
    // Bounded on both sides alike, so that swapping the completions changes nothing.
    let log = |p: &Tensor| p.maximum(MIN_P)?.log();
    let log_odds = (log(&p)? - log(&p.affine(-1.0, 1.0)?)?)?;
    let advantage = (log_odds - (h.detach() * beta)?)?;
    (advantage * h)? * -0.5
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objective::bandit::{ActionPair, close, loss_and_gradient};
    use crate::objective::finite_difference::{gradient, value};

    #[test]
    fn hand_worked_values() -> Result<()> {
        let ln3 = 3.0_f64.ln();
        for (h, p, beta, slope) in [
            (0.0, 0.75, 0.05, -0.5 * ln3),
            (0.0, 0.5, 1.0, 0.0),
            (2.0, 0.5, 0.25, 0.25),
            (ln3, 0.75, 1.0, 0.0),
            (-4.0, 0.25, 0.5, -0.5 * (2.0 - ln3)),
        ] {
            let found = gradient(&|h, p| surrogate(h, p, beta), h, p)?;
            close(&[found], &[slope], 1e-12);
            close(
                &[value(&|h, p| surrogate(h, p, beta), h, p)?],
                &[slope * h],
                1e-12,
            );
        }
        Ok(())
    }

    #[test]
    fn certain_labels_have_bounded_log_odds() -> Result<()> {
        let bound = -MIN_P.ln();
        for (p, log_odds) in [(1.0, bound), (0.0, -bound)] {
            let slope = gradient(&|h, p| surrogate(h, p, 0.1), 0.0, p)?;
            close(&[slope], &[-0.5 * log_odds], 1e-9);
        }
        Ok(())
    }

    /// Three completions of one prompt with rewards r: the mean over their pairs against the estimator as printed.
    #[test]
    fn the_pairs_of_a_prompt_give_the_leave_one_out_estimate() -> Result<()> {
        let (beta, rewards) = (0.3, [0.7, -1.1, 2.0]);
        let (theta, reference) = ([0.4, -0.3, 0.9], [0.2, 0.5, 0.3]);
        let mut rows = Vec::new();
        for (first, second) in [(0, 1), (0, 2), (1, 2)] {
            let difference: f64 = rewards[first] - rewards[second];
            rows.push(ActionPair {
                first: first as u32,
                second: second as u32,
                p: 1.0 / (1.0 + (-difference).exp()),
                weight: 1.0 / 3.0,
            });
        }
        let (_, found) = loss_and_gradient(&Rloo { beta }, &theta, &reference, &rows, None)?;

        let total: f64 = theta.iter().map(|z: &f64| z.exp()).sum();
        let policy = theta.map(|z| z.exp() / total);
        let penalized: Vec<f64> = (0..3)
            .map(|i| rewards[i] - beta * (policy[i] / reference[i]).ln())
            .collect();
        let sum: f64 = penalized.iter().sum();
        let mut expected = [0.0; 3];
        for (i, own) in penalized.iter().enumerate() {
            let advantage = own - (sum - own) / 2.0;
            for (z, slope) in expected.iter_mut().enumerate() {
                let score = f64::from(u8::from(z == i)) - policy[z];
                *slope -= advantage * score / 3.0;
            }
        }
        close(&found, &expected, 1e-12);
        Ok(())
    }
}
