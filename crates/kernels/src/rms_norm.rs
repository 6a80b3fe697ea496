//! Root-mean-square normalisation (Zhang and Sennrich 2019, eq. 4).

use candle_core::{CpuStorage, CustomOp2, D, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use crate::autograd::gradients::{accumulate, sum_rows};
use crate::autograd::storage::{accumulation_dtype, argument, fusible, read_f32, result};
use crate::simd::{Arithmetic, Kernel, dispatch, dot};

/// Rows per task: fixed, so that the weight's gradient, summed task by task, does not depend on the number of threads.
const ROWS: usize = 32;

/// `x / sqrt(mean(x²) + eps) * weight` over the last dimension.
///
/// `x` is `[.., D]` and `weight` `[D]`; the result has the shape of `x`. Differentiable in both; the gradient of a
/// weight that is not trained is dropped.
///
/// # Errors
/// If `weight` is not `[D]`, or D is 0.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let width = x.dim(D::Minus1)?;
    if width == 0 || weight.dims() != [width] {
        bail!("rms_norm: weight {:?} for rows of {width}", weight.dims());
    }
    if !fusible(&[x, weight]) {
        return composed(x, weight, eps);
    }
    let op = RmsNormOp { eps: eps as f32 };
    x.contiguous()?.apply_op2(&weight.contiguous()?, op)
}

/// [`rms_norm`] on a slice of rows as long as `weight`.
pub fn rms_norm_rows(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    dispatch(RmsNormForward {
        x,
        weight,
        eps,
        out: &mut out,
    });
    out
}

/// [`rms_norm`] composed of candle's operations.
pub(crate) fn composed(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let dtype = x.dtype();
    let x = x.to_dtype(accumulation_dtype(dtype))?;
    let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
    let normed = x.broadcast_div(&(mean_square + eps)?.sqrt()?)?;
    normed.to_dtype(dtype)?.broadcast_mul(weight)
}

struct RmsNormOp {
    eps: f32,
}

impl CustomOp2 for RmsNormOp {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let x = argument(x, x_layout)?;
        let weight = argument(weight, weight_layout)?;
        Ok(result(forward(x, weight, self.eps), x_layout.shape()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let gradient = gradient.contiguous()?;
        let (dx, dweight) = backward(
            &read_f32(x)?,
            &read_f32(weight)?,
            self.eps,
            &read_f32(&gradient)?,
        );
        let dweight = weight.track_op().then(|| accumulate(weight, dweight));
        Ok((accumulate(x, dx)?, dweight.transpose()?.flatten()))
    }
}

/// The norm of rows as long as `weight`.
pub(crate) fn forward(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let chunk = ROWS * weight.len();
    let mut out = vec![0.0; x.len()];
    out.par_chunks_mut(chunk)
        .zip(x.par_chunks(chunk))
        .for_each(|(out, x)| {
            dispatch(RmsNormForward {
                x,
                weight,
                eps,
                out,
            });
        });
    out
}

/// The gradients of `x` and of `weight`.
pub(crate) fn backward(
    x: &[f32],
    weight: &[f32],
    eps: f32,
    gradient: &[f32],
) -> (Vec<f32>, Vec<f32>) {
    let chunk = ROWS * weight.len();
    let mut dx = vec![0.0; x.len()];
    let partial: Vec<Vec<f32>> = dx
        .par_chunks_mut(chunk)
        .zip(x.par_chunks(chunk).zip(gradient.par_chunks(chunk)))
        .map(|(dx, (x, gradient))| {
            dispatch(RmsNormBackward {
                x,
                weight,
                gradient,
                eps,
                dx,
            })
        })
        .collect();
    let partial = partial.iter().map(Vec::as_slice);
    (dx, sum_rows(partial, weight.len()))
}

/// 1 / sqrt(mean(x²) + eps) of one row.
#[inline(always)]
fn inverse_rms<A: Arithmetic>(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot::<A>(x, x) / x.len() as f32 + eps).sqrt()
}

struct RmsNormForward<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Kernel for RmsNormForward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let width = self.weight.len();
        for (out, x) in self
            .out
            .chunks_exact_mut(width)
            .zip(self.x.chunks_exact(width))
        {
            let inverse = inverse_rms::<A>(x, self.eps);
            for ((out, x), weight) in out.iter_mut().zip(x).zip(self.weight) {
                *out = x * inverse * weight;
            }
        }
    }
}

struct RmsNormBackward<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    gradient: &'a [f32],
    eps: f32,
    dx: &'a mut [f32],
}

impl Kernel for RmsNormBackward<'_> {
    type Output = Vec<f32>;

    /// With n = x · r and r the inverse root: dx = r (w g - n mean(w g n)), dw = Σ g n.
    #[inline(always)]
    fn run<A: Arithmetic>(self) -> Vec<f32> {
        let width = self.weight.len();
        let mut dweight = vec![0.0; width];
        let rows = self
            .x
            .chunks_exact(width)
            .zip(self.gradient.chunks_exact(width));
        for (dx, (x, gradient)) in self.dx.chunks_exact_mut(width).zip(rows) {
            let inverse = inverse_rms::<A>(x, self.eps);
            for ((dx, gradient), weight) in dx.iter_mut().zip(gradient).zip(self.weight) {
                *dx = gradient * weight;
            }
            let projection = dot::<A>(dx, x) * inverse * inverse / width as f32;
            for ((dx, x), (dweight, gradient)) in
                dx.iter_mut().zip(x).zip(dweight.iter_mut().zip(gradient))
            {
                *dx = inverse * A::mul_add(-projection, *x, *dx);
                *dweight = A::mul_add(gradient * inverse, *x, *dweight);
            }
        }
        dweight
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::check::{assert_close, assert_differentiates, assert_same, bits, noise};

    #[test]
    fn by_hand() -> Result<()> {
        let x = Tensor::new(&[[3f32, 4.], [0., 0.]], &Device::Cpu)?;
        let weight = Tensor::new(&[1f32, 2.], &Device::Cpu)?;
        // The mean square of (3, 4) is 12.5; with 3.5 added its root is 4.
        let y = rms_norm(&x, &weight, 3.5)?;
        assert_eq!(y.to_vec2::<f32>()?, [[0.75, 2.], [0., 0.]]);
        Ok(())
    }

    #[test]
    fn agrees_with_its_composed_version() {
        for (rows, width) in [(1, 1), (3, 7), (70, 48), (129, 288)] {
            let inputs = [noise((rows, width), 1), noise(width, 2)];
            assert_same(
                &inputs,
                |t| rms_norm(&t[0], &t[1], 1e-5),
                |t| composed(&t[0], &t[1], 1e-5),
            );
        }
        let inputs = [noise((2, 3, 5), 1), noise(5, 2)];
        assert_differentiates(&inputs, |t| rms_norm(&t[0], &t[1], 1e-2));
    }

    #[test]
    fn a_row_does_not_depend_on_the_others() -> Result<()> {
        let (x, weight) = (noise((67, 20), 1), noise(20, 2));
        let all = rms_norm(&x, &weight, 1e-6)?;
        for row in [0, 31, 32, 66] {
            let alone = rms_norm(&x.narrow(0, row, 1)?, &weight, 1e-6)?;
            assert_eq!(bits(&alone), bits(&all.narrow(0, row, 1)?));
        }
        Ok(())
    }

    #[test]
    fn strided_rows_other_dtypes_and_mismatched_widths() -> Result<()> {
        let (x, weight) = (noise((6, 4), 1), noise(6, 2));
        let expected = composed(&x.t()?, &weight, 1e-6)?;
        assert_close(&rms_norm(&x.t()?, &weight, 1e-6)?, &expected, 1e-6);
        let double = rms_norm(
            &x.t()?.to_dtype(DType::F64)?,
            &weight.to_dtype(DType::F64)?,
            1e-6,
        )?;
        assert_close(&double.to_dtype(DType::F32)?, &expected, 1e-6);
        assert!(rms_norm(&x, &weight, 1e-6).is_err());
        Ok(())
    }
}
