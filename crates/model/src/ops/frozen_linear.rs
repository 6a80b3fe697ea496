//! The product with a weight that is not trained.

use candle_core::{
    CpuStorage, CudaStorage, CustomOp2, Layout, MetalStorage, Result, Shape, Tensor,
    backend::BackendStorage,
};

/// `x · weightᵀ`: `x` is `[N, in]`, `weight` `[out, in]`, the result `[N, out]`. Differentiable in `x`
/// alone: candle's own product computes the gradient of both sides and keeps it, whoever wants it. The
/// numbers are those of candle's product, to the last bit.
///
/// # Errors
/// If the shapes do not fit.
pub fn frozen_linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    if !x.track_op() {
        return x.matmul(&weight.t()?);
    }
    x.apply_op2(&weight.detach(), FrozenLinear)
}

struct FrozenLinear;

impl FrozenLinear {
    fn product<S: BackendStorage>(
        (x, of_x): (&S, &Layout),
        (weight, of_weight): (&S, &Layout),
    ) -> Result<(S, Shape)> {
        let (rows, width) = of_x.shape().dims2()?;
        let (out, expected) = of_weight.shape().dims2()?;
        if width != expected {
            candle_core::bail!("frozen_linear: rows of {width} for a weight [{out}, {expected}]");
        }
        let product = x.matmul(
            weight,
            (1, rows, out, width),
            of_x,
            &of_weight.transpose(0, 1)?,
        )?;
        Ok((product, Shape::from((rows, out))))
    }
}

impl CustomOp2 for FrozenLinear {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        of_x: &Layout,
        weight: &CpuStorage,
        of_weight: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Self::product((x, of_x), (weight, of_weight))
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        of_x: &Layout,
        weight: &CudaStorage,
        of_weight: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        Self::product((x, of_x), (weight, of_weight))
    }

    fn metal_fwd(
        &self,
        x: &MetalStorage,
        of_x: &Layout,
        weight: &MetalStorage,
        of_weight: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        Self::product((x, of_x), (weight, of_weight))
    }

    fn bwd(
        &self,
        _: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(gradient.matmul(weight)?), None))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::super::check::{assert_differentiates, bits, noise};
    use super::*;

    #[test]
    fn it_is_the_product_to_the_last_bit_and_the_weight_gets_no_gradient() -> Result<()> {
        let (x, weight) = (Var::from_tensor(&noise((37, 24), 1))?, noise((19, 24), 2));
        let frozen = frozen_linear(&x, &weight)?;
        let plain = x.matmul(&weight.t()?)?;
        assert_eq!(bits(&frozen), bits(&plain));
        assert_eq!(bits(&frozen_linear(&x.detach(), &weight)?), bits(&plain));
        let (of_frozen, of_plain) = (frozen.sqr()?.backward()?, plain.sqr()?.backward()?);
        let gradient = |store: &candle_core::backprop::GradStore| store.get(&x).map(bits);
        assert_eq!(gradient(&of_frozen), gradient(&of_plain));
        assert!(gradient(&of_frozen).is_some());
        assert!(of_frozen.get(&weight).is_none());
        Ok(())
    }

    #[test]
    fn it_differentiates_in_its_rows() {
        let weight = noise((5, 7), 3);
        assert_differentiates(&[noise((4, 7), 4)], |inputs| {
            frozen_linear(&inputs[0], &weight)
        });
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() -> Result<()> {
        let x = Var::from_tensor(&noise((4, 7), 4))?;
        let refused = frozen_linear(&x, &noise((5, 6), 1))
            .unwrap_err()
            .to_string();
        assert!(
            refused.contains("rows of 7 for a weight [5, 6]"),
            "{refused}"
        );
        Ok(())
    }
}
