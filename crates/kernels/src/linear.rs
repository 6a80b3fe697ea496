//! Linear layer without bias, in `f32` or bf16.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor, bail};

use crate::autograd::gradients::accumulate;
use crate::autograd::storage::{argument, fusible, read_f32, result};
use crate::matmul::{MatrixRef, PackedMatrix, PackedRows, Precision, product};

/// `x · weightᵀ`: `x` is `[N, in]`, `weight` `[out, in]`, the result `[N, out]`.
///
/// Differentiable in both; the gradient of a weight that is not trained is not computed. With [`Precision::Bf16`] the
/// operands of the product and of both its gradients are rounded to bf16 and accumulated in `f32` (mixed precision,
/// Micikevicius et al. 2018); on other devices the product is candle's own.
///
/// # Errors
/// If the shapes do not match, or for [`Precision::Int8`].
pub fn linear(x: &Tensor, weight: &Tensor, precision: Precision) -> Result<Tensor> {
    let ((_, width), (out, expected)) = (x.dims2()?, weight.dims2()?);
    if width != expected {
        bail!("linear: rows of {width} for a weight [{out}, {expected}]");
    }
    if precision == Precision::Int8 {
        bail!("linear: int8 is inference-only, not for training: use f32 or bf16");
    }
    if !fusible(&[x, weight]) {
        return x.matmul(&weight.t()?);
    }
    x.contiguous()?
        .apply_op2(&weight.contiguous()?, LinearOp { precision })
}

/// [`linear()`] with a frozen weight `[out, in]` that is packed, in its precision. Differentiable in `x`, `f32` on the CPU.
///
/// # Errors
/// If the shapes do not match, `x` is of another dtype or on another device, or the weight is packed in int8.
pub fn packed_linear(x: &Tensor, weight: &PackedMatrix) -> Result<Tensor> {
    let ((_, width), [out, expected]) = (x.dims2()?, weight.weight_dims());
    if width != expected {
        bail!("packed_linear: rows of {width} for a weight [{out}, {expected}]");
    }
    if weight.precision() == Precision::Int8 {
        bail!("packed_linear: int8 is inference-only, not for training: use f32 or bf16");
    }
    if !fusible(&[x]) {
        let dtype = x.dtype();
        bail!("packed_linear: rows in {dtype:?}, expected f32 on the CPU");
    }
    let weight = weight.clone();
    x.contiguous()?.apply_op1(PackedLinearOp { weight })
}

struct PackedLinearOp {
    weight: PackedMatrix,
}

impl CustomOp1 for PackedLinearOp {
    fn name(&self) -> &'static str {
        "packed-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, _) = layout.shape().dims2()?;
        let out = self.weight.multiply(argument(x, layout)?);
        let [columns, _] = self.weight.weight_dims();
        Ok(result(out, &Shape::from((rows, columns))))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let (rows, columns) = gradient.dims2()?;
        let gradient = gradient.contiguous()?;
        let gradient = read_f32(&gradient)?;
        let gradient = MatrixRef::new(&gradient, rows, columns);
        let gradient = PackedRows::pack(gradient, self.weight.precision());
        accumulate(x, self.weight.transposed().product(&gradient))
    }
}

struct LinearOp {
    precision: Precision,
}

impl CustomOp2 for LinearOp {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let ((rows, width), (columns, _)) =
            (x_layout.shape().dims2()?, weight_layout.shape().dims2()?);
        let x = MatrixRef::new(argument(x, x_layout)?, rows, width);
        let weight = MatrixRef::new(argument(weight, weight_layout)?, columns, width);
        let out = product(x, weight.transpose(), self.precision);
        Ok(result(out, &Shape::from((rows, columns))))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let ((rows, width), (columns, _)) = (x.dims2()?, weight.dims2()?);
        let gradient = gradient.contiguous()?;
        let gradient = read_f32(&gradient)?;
        let gradient = MatrixRef::new(&gradient, rows, columns);
        let of_weight = read_f32(weight)?;
        let of_weight = MatrixRef::new(&of_weight, columns, width);
        let dx = product(gradient, of_weight, self.precision);
        let dweight = || {
            let x = read_f32(x)?;
            let x = MatrixRef::new(&x, rows, width);
            accumulate(weight, product(gradient.transpose(), x, self.precision))
        };
        let dweight = weight.track_op().then(dweight).transpose()?;
        Ok((accumulate(x, dx)?, dweight.flatten()))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;
    use crate::check::{
        assert_close, assert_differentiates, assert_same, bits, noise, value_and_gradients,
    };

    #[test]
    fn agrees_with_matmul_and_differentiates() {
        for (rows, width, out) in [(1, 1, 1), (37, 24, 19), (300, 200, 130)] {
            let inputs = [noise((rows, width), 1), noise((out, width), 2)];
            assert_same(
                &inputs,
                |t| linear(&t[0], &t[1], Precision::F32),
                |t| t[0].matmul(&t[1].t()?),
            );
        }
        assert_differentiates(&[noise((4, 7), 4), noise((5, 7), 3)], |t| {
            linear(&t[0], &t[1], Precision::F32)
        });
    }

    #[test]
    fn a_packed_weight_has_the_bits_of_the_tensor() {
        let (x, weight) = (noise((37, 24), 1), noise((19, 24), 2));
        let values: Vec<f32> = weight.flatten_all().unwrap().to_vec1().unwrap();
        for precision in [Precision::F32, Precision::Bf16] {
            let packed = PackedMatrix::stacked(&[&values], 24, precision);
            let x = std::slice::from_ref(&x);
            let found = value_and_gradients(x, |t| packed_linear(&t[0], &packed));
            let expected = value_and_gradients(x, |t| linear(&t[0], &weight, precision));
            assert_eq!(bits(&found.0), bits(&expected.0), "{precision:?}");
            assert_eq!(bits(&found.1[0]), bits(&expected.1[0]), "{precision:?}");
        }
        let packed = PackedMatrix::stacked(&[&values], 24, Precision::F32);
        let error = packed_linear(&noise((3, 23), 1), &packed).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("rows of 23 for a weight [19, 24]")
        );
        let half = x.to_dtype(candle_core::DType::BF16).unwrap();
        let error = packed_linear(&half, &packed).unwrap_err();
        assert!(error.to_string().contains("expected f32 on the CPU"));
    }

    #[test]
    fn bf16_rounds_the_operands_of_all_three_products() -> Result<()> {
        let inputs = [noise((70, 40), 1), noise((33, 40), 2)];
        let rounded = |x: &Tensor| {
            let half = x.to_dtype(candle_core::DType::BF16)?;
            half.to_dtype(candle_core::DType::F32)
        };
        let (value, gradients) =
            value_and_gradients(&inputs, |t| linear(&t[0], &t[1], Precision::Bf16));
        let (x, weight) = (rounded(&inputs[0])?, rounded(&inputs[1])?);
        assert_close(&value, &x.matmul(&weight.t()?)?, 1e-5);
        let exact = value_and_gradients(&inputs, |t| linear(&t[0], &t[1], Precision::F32));
        for (found, exact) in gradients.iter().zip(&exact.1) {
            assert_close(found, exact, 0.02);
        }
        Ok(())
    }

    #[test]
    fn an_untrained_weight_has_no_gradient() -> Result<()> {
        let (x, weight) = (Var::from_tensor(&noise((37, 24), 1))?, noise((19, 24), 2));
        let gradients = linear(&x, &weight, Precision::F32)?.sqr()?.backward()?;
        assert!(gradients.get(&x).is_some() && gradients.get(&weight).is_none());
        Ok(())
    }

    #[test]
    fn mismatched_shapes_and_int8_are_rejected() {
        let x = noise((4, 7), 4);
        let error = |weight: &Tensor, precision| {
            let error = linear(&x, weight, precision).unwrap_err();
            error.to_string()
        };
        let shapes = error(&noise((5, 6), 1), Precision::F32);
        assert!(shapes.contains("rows of 7 for a weight [5, 6]"), "{shapes}");
        let int8 = error(&noise((5, 7), 1), Precision::Int8);
        assert!(int8.contains("not for training"), "{int8}");
    }
}
