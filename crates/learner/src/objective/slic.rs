//! Sequence likelihood calibration: a hinge loss on the log-ratio margin.
//!
//! Zhao et al. 2023 (arXiv 2305.10425), the rank calibration loss, in the log-ratio form with a temperature of
//! Calandriello et al. 2024 (arXiv 2403.08635); the label may be soft.

use candle_core::{Result, Tensor};

use crate::objective::batch::check_rows;
use crate::objective::{Batch, Objective};

/// SLiC as an objective.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Slic {
    /// Inverse of the margin, β > 0.
    pub beta: f64,
}

impl Objective for Slic {
    fn name(&self) -> &'static str {
        "slic"
    }

    fn loss(&self, batch: &Batch<'_>) -> Result<Tensor> {
        batch.sum_of(|h, p| slic(h, p, self.beta))
    }
}

/// `p·max(0, 1 − βh) + (1−p)·max(0, 1 + βh)` per pair, `[B]`; `h` and `p` are `[B]`. At a kink the gradient is that of
/// the sloping side.
///
/// # Errors
/// If the shapes disagree.
pub fn slic(h: &Tensor, p: &Tensor, beta: f64) -> Result<Tensor> {
    check_rows(h, p)?;
    let if_first = (p * h.affine(-beta, 1.0)?.relu()?)?;
    let if_second = (p.affine(-1.0, 1.0)? * h.affine(beta, 1.0)?.relu()?)?;
    if_first + if_second
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objective::bandit::close;
    use crate::objective::finite_difference::{agrees, gradient, value};

    #[test]
    fn hand_worked_values_and_slopes() -> Result<()> {
        for (h, p, beta, loss, slope) in [
            (0.0, 1.0, 2.0, 1.0, -2.0),
            (0.0, 0.5, 2.0, 1.0, 0.0),
            (3.0, 1.0, 0.5, 0.0, 0.0),
            (3.0, 0.0, 0.5, 2.5, 0.5),
            (-4.0, 0.75, 0.5, 2.25, -0.375),
            (100.0, 0.0, 1.0, 101.0, 1.0),
            // At the kink of the first term: the sloping side.
            (2.0, 1.0, 0.5, 0.0, -0.5),
        ] {
            close(&[value(&|h, p| slic(h, p, beta), h, p)?], &[loss], 1e-12);
            close(
                &[gradient(&|h, p| slic(h, p, beta), h, p)?],
                &[slope],
                1e-12,
            );
        }
        Ok(())
    }

    #[test]
    fn gradients_agree_with_finite_differences_off_the_kinks() -> Result<()> {
        for (h, p, beta) in [
            (0.3, 1.0, 1.0),
            (1.5, 0.2, 1.0),
            (-0.7, 0.9, 10.0),
            (100.0, 0.4, 1.0),
            (-9.0, 0.4, 0.1),
        ] {
            agrees(&|h, p| slic(h, p, beta), h, p)?;
        }
        Ok(())
    }
}
