//! Rotary position embedding (Su et al. 2021, eq. 34), in the half-split form of Hugging Face's Llama.

use candle_core::{CpuStorage, CustomOp3, D, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use crate::autograd::storage::{argument, fusible, result};
use crate::simd::{Arithmetic, Kernel, dispatch};

/// Tokens per task.
const TOKENS: usize = 16;

/// Rotates each head of each token by the token's angles:
/// `[x1 cos - x2 sin, x2 cos + x1 sin]`, x1 and x2 being the halves of a head.
///
/// `x` is `[N, H, hd]`, `cos` and `sin` are `[N, hd/2]`. Differentiable in `x` only.
///
/// # Errors
/// If there are no heads, `hd` is odd or 0, or `cos` or `sin` is not `[N, hd/2]`.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (tokens, heads, width) = x.dims3()?;
    let angles = [tokens, width / 2];
    if width == 0 || width % 2 == 1 || heads == 0 {
        bail!("rope: {heads} heads of width {width}: there must be a head, of positive even width");
    }
    if cos.dims() != angles || sin.dims() != angles {
        let (cos, sin) = (cos.dims(), sin.dims());
        bail!("rope: cos {cos:?} and sin {sin:?}, expected {angles:?}");
    }
    let (cos, sin) = (cos.detach(), sin.detach());
    if !fusible(&[x, &cos, &sin]) {
        return composed(x, &cos, &sin);
    }
    let op = RopeOp {
        direction: Direction::Forward,
    };
    x.contiguous()?
        .apply_op3(&cos.contiguous()?, &sin.contiguous()?, op)
}

/// [`rope`] of one token's heads, in place; `cos` and `sin` have `hd/2` values.
pub fn rotate(heads: &mut [f32], cos: &[f32], sin: &[f32]) {
    for head in heads.chunks_exact_mut(2 * cos.len()) {
        let (first, second) = head.split_at_mut(cos.len());
        for ((x1, x2), (cos, sin)) in first.iter_mut().zip(second).zip(cos.iter().zip(sin)) {
            (*x1, *x2) = (*x1 * cos - *x2 * sin, *x2 * cos + *x1 * sin);
        }
    }
}

/// [`rope`] composed of candle's operations.
pub(crate) fn composed(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let half = x.dim(D::Minus1)? / 2;
    let (x1, x2) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
    let cos = cos.to_dtype(x.dtype())?.unsqueeze(1)?;
    let sin = sin.to_dtype(x.dtype())?.unsqueeze(1)?;
    let first = (x1.broadcast_mul(&cos)? - x2.broadcast_mul(&sin)?)?;
    let second = (x2.broadcast_mul(&cos)? + x1.broadcast_mul(&sin)?)?;
    Tensor::cat(&[first, second], 2)
}

struct RopeOp {
    direction: Direction,
}

/// Direction of a rotation. The gradient of one is rotated in the other.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    Forward,
    Inverse,
}

impl CustomOp3 for RopeOp {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        cos: &CpuStorage,
        cos_layout: &Layout,
        sin: &CpuStorage,
        sin_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let x = argument(x, x_layout)?;
        let cos = argument(cos, cos_layout)?;
        let sin = argument(sin, sin_layout)?;
        let half = x_layout.dims()[2] / 2;
        let out = rotated(x, cos, sin, half, self.direction);
        Ok(result(out, x_layout.shape()))
    }

    fn bwd(
        &self,
        _: &Tensor,
        cos: &Tensor,
        sin: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let direction = match self.direction {
            Direction::Forward => Direction::Inverse,
            Direction::Inverse => Direction::Forward,
        };
        let inverse = RopeOp { direction };
        let dx = gradient
            .contiguous()?
            .apply_op3_no_bwd(cos, sin, &inverse)?;
        Ok((Some(dx), None, None))
    }
}

/// [`rope`] on slices, in either direction: `x` is `[N, H, 2 half]`, `cos` and `sin` are `[N, half]`.
pub(crate) fn rotated(
    x: &[f32],
    cos: &[f32],
    sin: &[f32],
    half: usize,
    direction: Direction,
) -> Vec<f32> {
    let heads = x.len() / (2 * cos.len()).max(1);
    let chunk = (TOKENS * heads * half * 2).max(1);
    let mut out = vec![0.0; x.len()];
    let angles = cos
        .par_chunks(TOKENS * half)
        .zip(sin.par_chunks(TOKENS * half));
    out.par_chunks_mut(chunk)
        .zip(x.par_chunks(chunk))
        .zip(angles)
        .for_each(|((out, x), (cos, sin))| {
            dispatch(Rotate {
                x,
                cos,
                sin,
                heads,
                half,
                sign: if direction == Direction::Forward {
                    1.0
                } else {
                    -1.0
                },
                out,
            });
        });
    out
}

struct Rotate<'a> {
    x: &'a [f32],
    cos: &'a [f32],
    sin: &'a [f32],
    heads: usize,
    half: usize,
    sign: f32,
    out: &'a mut [f32],
}

impl Kernel for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let (half, sign) = (self.half, self.sign);
        let heads = self.x.chunks_exact(2 * half);
        for (head, (out, x)) in self.out.chunks_exact_mut(2 * half).zip(heads).enumerate() {
            let token = head / self.heads;
            let cos = &self.cos[token * half..][..half];
            let sin = &self.sin[token * half..][..half];
            let (x1, x2) = x.split_at(half);
            let (out1, out2) = out.split_at_mut(half);
            for i in 0..half {
                let sin = sign * sin[i];
                out1[i] = x1[i] * cos[i] - x2[i] * sin;
                out2[i] = x2[i] * cos[i] + x1[i] * sin;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::check::{assert_differentiates, assert_same, bits, noise};

    fn angles(tokens: usize, half: usize) -> (Tensor, Tensor) {
        let angles = (noise((tokens, half), 7) * 3.0).unwrap();
        (angles.cos().unwrap(), angles.sin().unwrap())
    }

    #[test]
    fn by_hand() -> Result<()> {
        let x = Tensor::new(&[[[1f32, 2., 3., 4.]]], &Device::Cpu)?;
        // A quarter turn of the first pair (1, 3), none of the second (2, 4).
        let cos = Tensor::new(&[[0f32, 1.]], &Device::Cpu)?;
        let sin = Tensor::new(&[[1f32, 0.]], &Device::Cpu)?;
        let y = rope(&x, &cos, &sin)?;
        assert_eq!(y.to_vec3::<f32>()?, [[[-3., 2., 1., 4.]]]);
        Ok(())
    }

    #[test]
    fn agrees_with_its_composed_version() {
        for (tokens, heads, width) in [(1, 1, 2), (5, 3, 6), (37, 6, 48), (16, 2, 128)] {
            let (cos, sin) = angles(tokens, width / 2);
            assert_same(
                &[noise((tokens, heads, width), 1)],
                |t| rope(&t[0], &cos, &sin),
                |t| composed(&t[0], &cos, &sin),
            );
        }
        let (cos, sin) = angles(3, 2);
        assert_differentiates(&[noise((3, 2, 4), 1)], |t| rope(&t[0], &cos, &sin));
    }

    #[test]
    fn a_token_does_not_depend_on_the_others() -> Result<()> {
        let (x, (cos, sin)) = (noise((40, 3, 10), 1), angles(40, 5));
        let all = rope(&x, &cos, &sin)?;
        for token in [0, 15, 16, 39] {
            let one = |t: &Tensor| t.narrow(0, token, 1);
            let alone = rope(&one(&x)?, &one(&cos)?, &one(&sin)?)?;
            assert_eq!(bits(&alone), bits(&one(&all)?));
        }
        Ok(())
    }

    #[test]
    fn mismatched_shapes_are_rejected() {
        let (cos, sin) = angles(2, 2);
        for shape in [(2, 1, 5), (2, 1, 6), (3, 1, 4), (2, 1, 0)] {
            assert!(rope(&noise(shape, 1), &cos, &sin).is_err(), "{shape:?}");
        }
    }
}
