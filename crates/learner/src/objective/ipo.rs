//! Identity preference optimisation: regression of the log-ratio margin onto the preference.
//!
//! Azar et al. 2023 (arXiv 2310.12036), equation 17; on samples of the policy or of the mixture it is online IPO or
//! IPO-MD (Calandriello et al. 2024, arXiv 2403.08635), whose gradient contains that of the KL penalty exactly: no
//! separate penalty is added.

use candle_core::{Result, Tensor};
use settings::IpoScale;

use crate::objective::batch::check_rows;
use crate::objective::{Batch, Objective};

/// IPO as an objective.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ipo {
    /// KL temperature τ > 0.
    pub tau: f64,
    /// Scale of the loss: the paper's [`square`], or [`scaled`]. Learning rates do not transfer between the two.
    pub scale: IpoScale,
}

impl Objective for Ipo {
    fn name(&self) -> &'static str {
        "ipo"
    }

    fn loss(&self, batch: &Batch<'_>) -> Result<Tensor> {
        batch.sum_of(|h, p| match self.scale {
            IpoScale::Square => square(h, p, self.tau),
            IpoScale::Scaled => scaled(h, p, self.tau),
        })
    }
}

/// `(h − (p − ½)/τ)²` per pair, `[B]`; `h` and `p` are `[B]`.
///
/// For a soft label it equals `p(h − 1/2τ)² + (1−p)(h + 1/2τ)²`, equation 17 averaged over the label, minus the
/// constant `p(1−p)/τ²`.
///
/// # Errors
/// If the shapes disagree.
pub fn square(h: &Tensor, p: &Tensor, tau: f64) -> Result<Tensor> {
    check_rows(h, p)?;
    let target = ((p - 0.5)? / tau)?;
    (h - target)?.sqr()
}

/// `τh² − (2p − 1)h` per pair, `[B]`: `τ` times [`square`], minus the constant `(p − ½)²/τ`.
///
/// # Errors
/// If the shapes disagree.
pub fn scaled(h: &Tensor, p: &Tensor, tau: f64) -> Result<Tensor> {
    check_rows(h, p)?;
    let pull = (p.affine(2.0, -1.0)? * h)?;
    (h.sqr()? * tau)? - pull
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objective::bandit::close;
    use crate::objective::finite_difference::{agrees, gradient, value};

    /// (h, p, τ)
    const TABLE: [(f64, f64, f64); 6] = [
        (0.0, 1.0, 0.5),
        (0.0, 0.5, 0.1),
        (1.3, 0.2, 1.0),
        (-0.7, 0.9, 0.05),
        (40.0, 0.0, 0.3),
        (-12.0, 0.35, 2.0),
    ];

    #[test]
    fn hand_worked_values() -> Result<()> {
        for (h, p, tau, square_is, scaled_is) in [
            (0.0, 1.0, 0.5, 1.0, 0.0),
            (0.0, 1.0, 0.1, 25.0, 0.0),
            (0.0, 0.5, 0.1, 0.0, 0.0),
            (2.0, 0.75, 0.5, 2.25, 1.0),
            (-1.0, 1.0, 0.25, 9.0, 1.25),
        ] {
            close(
                &[value(&|h, p| square(h, p, tau), h, p)?],
                &[square_is],
                1e-12,
            );
            close(
                &[value(&|h, p| scaled(h, p, tau), h, p)?],
                &[scaled_is],
                1e-12,
            );
        }
        Ok(())
    }

    #[test]
    fn at_the_reference_a_certain_preference_costs_one_over_four_tau_squared() -> Result<()> {
        for tau in [0.05, 0.5, 3.0] {
            let loss = value(&|h, p| square(h, p, tau), 0.0, 1.0)?;
            close(&[loss * 4.0 * tau * tau], &[1.0], 1e-12);
        }
        Ok(())
    }

    #[test]
    fn gradients_agree_with_finite_differences() -> Result<()> {
        for (h, p, tau) in TABLE {
            agrees(&|h, p| square(h, p, tau), h, p)?;
            agrees(&|h, p| scaled(h, p, tau), h, p)?;
        }
        Ok(())
    }

    #[test]
    fn a_soft_label_is_the_mean_over_hard_ones_up_to_a_constant() -> Result<()> {
        for (h, p, tau) in TABLE {
            let loss = |h: &Tensor, p: &Tensor| square(h, p, tau);
            let mean = p * value(&loss, h, 1.0)? + (1.0 - p) * value(&loss, h, 0.0)?;
            let constant = p * (1.0 - p) / (tau * tau);
            close(&[value(&loss, h, p)?], &[mean - constant], 1e-9);
            let slopes = p * gradient(&loss, h, 1.0)? + (1.0 - p) * gradient(&loss, h, 0.0)?;
            close(&[gradient(&loss, h, p)?], &[slopes], 1e-9);
        }
        Ok(())
    }

    #[test]
    fn scaled_is_tau_times_square_up_to_a_constant() -> Result<()> {
        for (h, p, tau) in TABLE {
            let constant = (p - 0.5) * (p - 0.5) / tau;
            let square_loss = value(&|h, p| square(h, p, tau), h, p)?;
            let scaled_loss = value(&|h, p| scaled(h, p, tau), h, p)?;
            close(&[scaled_loss], &[tau * square_loss - constant], 1e-9);
            let square_slope = gradient(&|h, p| square(h, p, tau), h, p)?;
            let scaled_slope = gradient(&|h, p| scaled(h, p, tau), h, p)?;
            close(&[scaled_slope], &[tau * square_slope], 1e-9);
        }
        Ok(())
    }
}
