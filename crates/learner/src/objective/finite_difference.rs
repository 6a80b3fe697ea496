//! Test fixture: a pair loss at one point, its gradient by autograd and by finite differences.

use candle_core::{Device, Result, Tensor, Var};

use crate::objective::bandit::close;

/// A pair loss with a fixed temperature.
pub type PairLoss<'a> = &'a dyn Fn(&Tensor, &Tensor) -> Result<Tensor>;

/// Loss of one pair.
pub fn value(loss: PairLoss<'_>, h: f64, p: f64) -> Result<f64> {
    let [h, p] = [h, p].map(|x| Tensor::new(&[x], &Device::Cpu));
    loss(&h?, &p?)?.get(0)?.to_scalar()
}

/// Derivative of the loss in `h`, by autograd.
pub fn gradient(loss: PairLoss<'_>, h: f64, p: f64) -> Result<f64> {
    let h = Var::new(&[h], &Device::Cpu)?;
    let gradients = loss(&h, &Tensor::new(&[p], &Device::Cpu)?)?.backward()?;
    gradients
        .get(&h)
        .expect("h is a variable of the loss")
        .get(0)?
        .to_scalar()
}

/// Asserts that autograd and central differences agree to 10⁻⁶.
pub fn agrees(loss: PairLoss<'_>, h: f64, p: f64) -> Result<()> {
    let step = 1e-5;
    let numeric = (value(loss, h + step, p)? - value(loss, h - step, p)?) / (2.0 * step);
    let exact = gradient(loss, h, p)?;
    close(&[exact], &[numeric], 1e-6 * exact.abs().max(1.0));
    Ok(())
}
