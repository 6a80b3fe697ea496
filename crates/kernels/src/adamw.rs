//! AdamW step of one variable (Loshchilov and Hutter 2019, algorithm 2), as in PyTorch.

use candle_core::{Result, Tensor, Var, bail};
use rayon::prelude::*;

use crate::autograd::storage::{accumulation_dtype, address, fusible, read_f32, update_in_place};
use crate::simd::{Arithmetic, Kernel, dispatch};

/// Values per task.
const CHUNK: usize = 16 * 1024;

/// AdamW state of one variable. Both tensors have its shape; for half precision they are `f32`.
#[derive(Clone, Debug)]
pub struct Moments {
    /// Running mean of the gradient, m.
    pub first: Tensor,
    /// Running mean of the squared gradient, v.
    pub second: Tensor,
}

impl Moments {
    /// Zeros: the state before the first step.
    ///
    /// # Errors
    /// If the device runs out of memory.
    pub fn zeros(var: &Var) -> Result<Self> {
        let zeros = || Tensor::zeros(var.shape(), accumulation_dtype(var.dtype()), var.device());
        Ok(Self {
            first: zeros()?,
            second: zeros()?,
        })
    }
}

/// Hyperparameters of one step, the same for all variables.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWStep {
    /// η, after any schedule.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// λ, decoupled: the variable shrinks by `learning_rate * weight_decay` of itself.
    pub weight_decay: f64,
    /// 1 - beta1^t, t counting steps from 1.
    pub bias1: f64,
    /// 1 - beta2^t.
    pub bias2: f64,
    /// Factor applied to the gradient first, for clipping.
    pub grad_scale: f64,
}

/// Updates `var` and `moments` by one AdamW step. On the CPU in `f32` they change in place, so tensors that share their
/// storage (a detached view of `var`, say) change too.
///
/// # Errors
/// If `grad` or a moment differs from `var` in shape, or a moment shares storage with `var` or `grad`. Nothing has
/// changed then.
pub fn adamw_step(var: &Var, grad: &Tensor, moments: &mut Moments, step: &AdamWStep) -> Result<()> {
    for tensor in [grad, &moments.first, &moments.second] {
        if tensor.dims() != var.dims() {
            let (tensor, var) = (tensor.dims(), var.dims());
            bail!("adamw: gradient or moment of shape {tensor:?} for a variable of shape {var:?}");
        }
    }
    let tensors = [var.as_tensor(), grad, &moments.first, &moments.second];
    if fusible(&tensors) && tensors[2..].iter().all(|t| t.is_contiguous()) && var.is_contiguous() {
        fused(var, grad, moments, step)
    } else {
        composed(var, grad, moments, step)
    }
}

fn fused(var: &Var, grad: &Tensor, moments: &Moments, step: &AdamWStep) -> Result<()> {
    let written = [var.as_tensor(), &moments.first, &moments.second].map(address);
    let distinct =
        |i: usize| !written[i + 1..].contains(&written[i]) && written[i] != address(grad);
    if !(0..written.len()).all(distinct) {
        bail!("adamw: variable, moments and gradient share storage: copy() the gradient or moment");
    }
    let grad = grad.detach().contiguous()?;
    let grad = read_f32(&grad)?;
    update_in_place(var, |parameter| {
        update_in_place(&moments.first, |first| {
            update_in_place(&moments.second, |second| {
                update(parameter, first, second, &grad, step);
                Ok(())
            })
        })
    })
}

/// [`adamw_step`] composed of candle's operations.
pub(crate) fn composed(
    var: &Var,
    grad: &Tensor,
    moments: &mut Moments,
    step: &AdamWStep,
) -> Result<()> {
    let dtype = accumulation_dtype(var.dtype());
    let grad = (grad.detach().to_dtype(dtype)? * step.grad_scale)?;
    let first = ((&moments.first * step.beta1)? + (&grad * (1.0 - step.beta1))?)?;
    let second = ((&moments.second * step.beta2)? + (grad.sqr()? * (1.0 - step.beta2))?)?;
    let shrunk = (var.as_detached_tensor().to_dtype(dtype)?
        * (1.0 - step.learning_rate * step.weight_decay))?;
    let root = ((second.sqrt()? / step.bias2.sqrt())? + step.epsilon)?;
    let moved = (shrunk - (first.div(&root)? * (step.learning_rate / step.bias1))?)?;
    var.set(&moved.to_dtype(var.dtype())?)?;
    *moments = Moments { first, second };
    Ok(())
}

fn update(
    parameter: &mut [f32],
    first: &mut [f32],
    second: &mut [f32],
    grad: &[f32],
    step: &AdamWStep,
) {
    parameter
        .par_chunks_mut(CHUNK)
        .zip(first.par_chunks_mut(CHUNK))
        .zip(second.par_chunks_mut(CHUNK).zip(grad.par_chunks(CHUNK)))
        .for_each(|((parameter, first), (second, grad))| {
            dispatch(AdamWUpdate {
                parameter,
                first,
                second,
                grad,
                step,
            });
        });
}

struct AdamWUpdate<'a> {
    parameter: &'a mut [f32],
    first: &'a mut [f32],
    second: &'a mut [f32],
    grad: &'a [f32],
    step: &'a AdamWStep,
}

impl Kernel for AdamWUpdate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let step = self.step;
        let (beta1, beta2) = (step.beta1 as f32, step.beta2 as f32);
        let (fresh1, fresh2) = ((1.0 - step.beta1) as f32, (1.0 - step.beta2) as f32);
        let (scale, epsilon) = (step.grad_scale as f32, step.epsilon as f32);
        let shrink = (1.0 - step.learning_rate * step.weight_decay) as f32;
        let rate = (step.learning_rate / step.bias1) as f32;
        let root_bias = step.bias2.sqrt() as f32;
        let moments = self.first.iter_mut().zip(self.second);
        for ((parameter, (first, second)), &grad) in
            self.parameter.iter_mut().zip(moments).zip(self.grad)
        {
            let grad = grad * scale;
            *first = A::mul_add(*first, beta1, fresh1 * grad);
            *second = A::mul_add(*second, beta2, fresh2 * grad * grad);
            let root = second.sqrt() / root_bias + epsilon;
            *parameter = A::mul_add(*parameter, shrink, -rate * (*first / root));
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::check::{assert_close, bits, noise};

    fn at(t: i32) -> AdamWStep {
        AdamWStep {
            learning_rate: 0.1,
            beta1: 0.9,
            beta2: 0.99,
            epsilon: 1e-8,
            weight_decay: 0.5,
            bias1: 1.0 - 0.9f64.powi(t),
            bias2: 1.0 - 0.99f64.powi(t),
            grad_scale: 0.5,
        }
    }

    #[test]
    fn by_hand() -> Result<()> {
        let var = Var::new(&[2f32, 2., 2.], &Device::Cpu)?;
        let grad = Tensor::new(&[8f32, -0.02, 0.], &Device::Cpu)?;
        let mut moments = Moments::zeros(&var)?;
        adamw_step(&var, &grad, &mut moments, &at(1))?;
        // The decay subtracts 5 % of 2; a first step is the learning rate times the negative sign of the gradient.
        assert_close(
            var.as_tensor(),
            &Tensor::new(&[1.8f32, 2.0, 1.9], &Device::Cpu)?,
            1e-6,
        );
        assert_close(
            &moments.first,
            &Tensor::new(&[0.4f32, -0.001, 0.], &Device::Cpu)?,
            1e-6,
        );
        assert_close(
            &moments.second,
            &Tensor::new(&[0.16f32, 1e-6, 0.], &Device::Cpu)?,
            1e-6,
        );
        Ok(())
    }

    #[test]
    fn agrees_with_its_composed_version_over_steps() -> Result<()> {
        let start = noise((37, 1001), 1);
        let (a, b) = (Var::from_tensor(&start)?, Var::from_tensor(&start)?);
        let again = Var::from_tensor(&start)?;
        let mut of_a = Moments::zeros(&a)?;
        let (mut of_b, mut of_again) = (Moments::zeros(&b)?, Moments::zeros(&again)?);
        for t in 1..=4 {
            let grad = noise((37, 1001), 10 + t as u64);
            adamw_step(&a, &grad, &mut of_a, &at(t))?;
            adamw_step(&again, &grad, &mut of_again, &at(t))?;
            composed(&b, &grad, &mut of_b, &at(t))?;
        }
        assert_close(a.as_tensor(), b.as_tensor(), 1e-6);
        assert_close(&of_a.first, &of_b.first, 1e-6);
        assert_close(&of_a.second, &of_b.second, 1e-6);
        assert_eq!(bits(a.as_tensor()), bits(again.as_tensor()));
        Ok(())
    }

    #[test]
    fn strided_gradients_and_other_dtypes() -> Result<()> {
        let start = noise((5, 3), 1);
        let grad = noise((3, 5), 2);
        let single = Var::from_tensor(&start)?;
        let mut moments = Moments::zeros(&single)?;
        adamw_step(&single, &grad.t()?, &mut moments, &at(1))?;
        let double = Var::from_tensor(&start.to_dtype(DType::F64)?)?;
        let mut moments = Moments::zeros(&double)?;
        let grad = grad.t()?.to_dtype(DType::F64)?;
        adamw_step(&double, &grad, &mut moments, &at(1))?;
        assert_close(
            single.as_tensor(),
            &double.as_tensor().to_dtype(DType::F32)?,
            1e-6,
        );
        Ok(())
    }

    #[test]
    fn mismatched_shapes_and_shared_storage_are_rejected() -> Result<()> {
        let var = Var::from_tensor(&noise(4, 1))?;
        let before = bits(var.as_tensor());
        let mut moments = Moments::zeros(&var)?;
        assert!(adamw_step(&var, &noise(3, 2), &mut moments, &at(1)).is_err());
        moments.second = moments.first.clone();
        assert!(adamw_step(&var, &noise(4, 2), &mut moments, &at(1)).is_err());
        let mut moments = Moments::zeros(&var)?;
        assert!(adamw_step(&var, var.as_tensor(), &mut moments, &at(1)).is_err());
        assert_eq!(bits(var.as_tensor()), before);
        Ok(())
    }
}
