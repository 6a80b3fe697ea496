//! Rejection sampling: the likelihood of the preferred completion.
//!
//! RAFT (Dong et al. 2023, arXiv 2304.06767), the rejection sampling of Llama 2 (Touvron et al. 2023) and the baseline RJS
//! of APO (Cheng et al. 2023): of several completions of a prompt the best is trained on as an answer. With
//! `learner.pair_selection = "best-worst"` and hard labels that is the best of `actor.num_generations`.
//!
//! Over pairs of the reference's samples the minimum is the distribution of the preferred one,
//! `π(y) = 2·ref(y)·p(y ≻ ref)`. The reference enters by the samples alone: of the policy's own the minimum moves on to the
//! best answer.

use candle_core::{Result, Tensor};

use crate::objective::batch::check_rows;
use crate::objective::{Batch, Objective};

/// Rejection sampling as an objective.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RejectionSampling;

impl Objective for RejectionSampling {
    fn name(&self) -> &'static str {
        "rejection-sampling"
    }

    fn loss(&self, batch: &Batch<'_>) -> Result<Tensor> {
        let [first, second] = batch.logp_of_rows()?;
        batch.weighted_sum(&preferred_nll(&first, &second, batch.p)?)
    }
}

/// `−p·log π(y) − (1 − p)·log π(y')` per pair, `[B]`: the negative log-likelihood of the preferred completion, of a soft
/// label its expectation. All arguments are `[B]`.
///
/// # Errors
/// If the shapes disagree.
pub fn preferred_nll(first: &Tensor, second: &Tensor, p: &Tensor) -> Result<Tensor> {
    check_rows(first, p)?;
    check_rows(second, p)?;
    let p = p.detach();
    let if_first = (&p * first)?;
    let if_second = (p.affine(-1.0, 1.0)? * second)?;
    (if_first + if_second)?.neg()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objective::bandit::{ActionPair, close, loss_and_gradient};

    const THETA: [f64; 3] = [0.4, -0.3, 0.9];

    fn at(row: ActionPair) -> Result<(f64, Vec<f64>)> {
        loss_and_gradient(&RejectionSampling, &THETA, &[0.2, 0.5, 0.3], &[row], None)
    }

    /// `−Σ p log π` with its gradient `π − p` in the logits, by hand.
    #[test]
    fn it_is_the_cross_entropy_of_the_preferred_completion() -> Result<()> {
        let total: f64 = THETA.iter().map(|z| z.exp()).sum();
        let policy = THETA.map(|z| z.exp() / total);
        for (p, weight) in [(1.0, 1.0), (0.0, 0.5), (0.25, 2.0)] {
            let (loss, gradient) = at(ActionPair {
                first: 0,
                second: 2,
                p,
                weight,
            })?;
            let target = [p, 0.0, 1.0 - p];
            let expected = -p * policy[0].ln() - (1.0 - p) * policy[2].ln();
            close(&[loss], &[weight * expected], 1e-12);
            let expected: Vec<f64> = (0..3).map(|z| weight * (policy[z] - target[z])).collect();
            close(&gradient, &expected, 1e-12);
        }
        Ok(())
    }

    #[test]
    fn swapping_the_completions_and_the_label_changes_nothing() -> Result<()> {
        let row = |first, second, p| ActionPair {
            first,
            second,
            p,
            weight: 1.0,
        };
        let (loss, gradient) = at(row(0, 1, 0.8))?;
        let (loss_swapped, gradient_swapped) = at(row(1, 0, 0.2))?;
        close(&[loss], &[loss_swapped], 1e-12);
        close(&gradient, &gradient_swapped, 1e-12);
        Ok(())
    }
}
