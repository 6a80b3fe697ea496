//! Direct preference optimisation: logistic regression of the preference on the log-ratio margin.
//!
//! Rafailov et al. 2023 (arXiv 2305.18290), equation 7, with a soft label: the cross-entropy between
//! `p` and `σ(βh)`. Online it does not converge to the regularised Nash equilibrium; IPO does.

use candle_core::{Result, Tensor};

use crate::objective::batch::check_rows;
use crate::objective::{Batch, Objective};

/// DPO as an objective.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dpo {
    /// KL temperature β > 0.
    pub beta: f64,
}

impl Objective for Dpo {
    fn name(&self) -> &'static str {
        "dpo"
    }

    fn loss(&self, batch: &Batch<'_>) -> Result<Tensor> {
        batch.sum_of(|h, p| dpo(h, p, self.beta))
    }
}

/// `−p·log σ(βh) − (1−p)·log σ(−βh)` per pair, `[B]`; `h` and `p` are `[B]`. Its derivative in `h` is
/// `β(σ(βh) − p)`.
///
/// # Errors
/// If the shapes disagree.
pub fn dpo(h: &Tensor, p: &Tensor, beta: f64) -> Result<Tensor> {
    check_rows(h, p)?;
    let x = (h * beta)?;
    let if_first = (p * softplus(&x.neg()?)?)?;
    let if_second = (p.affine(-1.0, 1.0)? * softplus(&x)?)?;
    if_first + if_second
}

/// `log(1 + eˣ) = −log σ(−x)`, written `(|x| + x)/2 + log(1 + e^−|x|)`.
///
/// Does not overflow. The terms in `|x|` are even and smooth together, so the slope at zero is ½ whichever subgradient
/// the tensor library uses for `|x|`.
pub(crate) fn softplus(x: &Tensor) -> Result<Tensor> {
    let size = x.abs()?;
    let positive_part = ((&size + x)? * 0.5)?;
    positive_part + (size.neg()?.exp()? + 1.0)?.log()?
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Var};

    use super::*;
    use crate::objective::bandit::close;
    use crate::objective::finite_difference::{agrees, gradient, value};

    fn sigmoid(x: f64) -> f64 {
        1.0 / (1.0 + (-x).exp())
    }

    #[test]
    fn hand_worked_values() -> Result<()> {
        let ln2 = std::f64::consts::LN_2;
        for (h, p, beta, loss) in [
            (0.0, 1.0, 0.1, ln2),
            (0.0, 0.3, 5.0, ln2),
            (3.0_f64.ln(), 1.0, 1.0, (4.0_f64 / 3.0).ln()),
            (3.0_f64.ln(), 0.0, 1.0, 4.0_f64.ln()),
            (2.0 * 3.0_f64.ln(), 0.5, 0.5, 0.5 * (16.0_f64 / 3.0).ln()),
        ] {
            close(&[value(&|h, p| dpo(h, p, beta), h, p)?], &[loss], 1e-12);
        }
        Ok(())
    }

    #[test]
    fn the_gradient_is_beta_times_sigmoid_minus_p_for_extreme_h() -> Result<()> {
        for beta in [0.1, 1.0, 5.0] {
            for x in [-1000.0, -100.0, -20.0, -1.0, 0.0, 0.3, 7.0, 100.0, 1000.0] {
                for p in [0.0, 0.25, 0.5, 1.0] {
                    let h = x / beta;
                    let slope = gradient(&|h, p| dpo(h, p, beta), h, p)?;
                    close(&[slope], &[beta * (sigmoid(beta * h) - p)], 1e-12);
                    let loss = value(&|h, p| dpo(h, p, beta), h, p)?;
                    assert!(loss.is_finite() && loss >= 0.0, "x={x} p={p}: {loss}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn gradients_agree_with_finite_differences() -> Result<()> {
        for (h, p, beta) in [
            (0.0, 1.0, 0.1),
            (0.0, 0.4, 5.0),
            (1.3, 0.2, 1.0),
            (-0.7, 0.9, 2.0),
            (100.0, 0.0, 1.0),
            (-100.0, 0.3, 1.0),
        ] {
            agrees(&|h, p| dpo(h, p, beta), h, p)?;
        }
        Ok(())
    }

    #[test]
    fn single_precision_agrees_with_double() -> Result<()> {
        let points = [-100.0, -30.0, -2.0, 0.0, 0.5, 15.0, 100.0];
        let mut found = Vec::new();
        for dtype in [DType::F32, DType::F64] {
            let h = Var::from_tensor(&Tensor::new(&points, &Device::Cpu)?.to_dtype(dtype)?)?;
            let p = (h.ones_like()? * 0.8)?;
            let loss = dpo(&h, &p, 1.0)?;
            let gradients = loss.sum_all()?.backward()?;
            let slope = gradients.get(&h).expect("h is a variable of the loss");
            for tensor in [&loss, slope] {
                found.push(tensor.to_dtype(DType::F64)?.to_vec1::<f64>()?);
            }
        }
        close(&found[0], &found[2], 1e-5);
        close(&found[1], &found[3], 1e-6);
        Ok(())
    }
}
