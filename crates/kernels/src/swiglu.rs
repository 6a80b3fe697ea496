//! SwiGLU, the gate of a gated feed-forward layer (Shazeer 2020, eq. 6, β = 1).

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use crate::autograd::storage::{argument, fusible, read_f32, result};
use crate::simd::{Arithmetic, Kernel, dispatch, sigmoid};

/// Values per task.
const CHUNK: usize = 16 * 1024;

/// `silu(gate) * up`, element by element, silu(x) being x / (1 + e^-x).
///
/// Both have the same shape, which is the result's. Differentiable in both.
///
/// # Errors
/// If the shapes differ.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if gate.dims() != up.dims() {
        let (gate, up) = (gate.dims(), up.dims());
        bail!("swiglu: gate {gate:?} and up {up:?} differ in shape");
    }
    if !fusible(&[gate, up]) {
        return composed(gate, up);
    }
    gate.contiguous()?.apply_op2(&up.contiguous()?, SwiGluOp)
}

/// [`swiglu`] on slices: each row is `width` values of the gate, then `width` of `up`.
pub fn swiglu_rows(rows: &[f32], width: usize) -> Vec<f32> {
    let mut out = vec![0.0; rows.len() / 2];
    out.par_chunks_mut(width)
        .zip(rows.par_chunks(2 * width))
        .with_min_len(1 + CHUNK / width)
        .for_each(|(out, row)| {
            let (gate, up) = row.split_at(width);
            dispatch(SwiGluForward { gate, up, out });
        });
    out
}

/// [`swiglu`] composed of candle's operations.
pub(crate) fn composed(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    gate.silu()? * up
}

struct SwiGluOp;

impl CustomOp2 for SwiGluOp {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let gate = argument(gate, gate_layout)?;
        let up = argument(up, up_layout)?;
        Ok(result(forward(gate, up), gate_layout.shape()))
    }

    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let gradient = gradient.contiguous()?;
        let (dgate, dup) = backward(&read_f32(gate)?, &read_f32(up)?, &read_f32(&gradient)?);
        let dgate = Tensor::from_vec(dgate, gate.shape(), gate.device())?;
        let dup = Tensor::from_vec(dup, up.shape(), up.device())?;
        Ok((Some(dgate), Some(dup)))
    }
}

pub(crate) fn forward(gate: &[f32], up: &[f32]) -> Vec<f32> {
    let mut out = vec![0.0; gate.len()];
    out.par_chunks_mut(CHUNK)
        .zip(gate.par_chunks(CHUNK).zip(up.par_chunks(CHUNK)))
        .for_each(|(out, (gate, up))| dispatch(SwiGluForward { gate, up, out }));
    out
}

/// The gradients of `gate` and of `up`.
pub(crate) fn backward(gate: &[f32], up: &[f32], gradient: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let mut dgate = vec![0.0; gate.len()];
    let mut dup = vec![0.0; gate.len()];
    let inputs = gate
        .par_chunks(CHUNK)
        .zip(up.par_chunks(CHUNK))
        .zip(gradient.par_chunks(CHUNK));
    dgate
        .par_chunks_mut(CHUNK)
        .zip(dup.par_chunks_mut(CHUNK))
        .zip(inputs)
        .for_each(|((dgate, dup), ((gate, up), gradient))| {
            dispatch(SwiGluBackward {
                gate,
                up,
                gradient,
                dgate,
                dup,
            });
        });
    (dgate, dup)
}

struct SwiGluForward<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for SwiGluForward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        for ((out, &gate), &up) in self.out.iter_mut().zip(self.gate).zip(self.up) {
            *out = gate * sigmoid::<A>(gate) * up;
        }
    }
}

struct SwiGluBackward<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    gradient: &'a [f32],
    dgate: &'a mut [f32],
    dup: &'a mut [f32],
}

impl Kernel for SwiGluBackward<'_> {
    type Output = ();

    /// With s = sigmoid(gate): silu' = s (1 + gate (1 - s)).
    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let inputs = self.gate.iter().zip(self.up).zip(self.gradient);
        let outputs = self.dgate.iter_mut().zip(self.dup);
        for ((dgate, dup), ((&gate, &up), &gradient)) in outputs.zip(inputs) {
            let s = sigmoid::<A>(gate);
            *dup = gradient * gate * s;
            *dgate = gradient * up * s * A::mul_add(gate, 1.0 - s, 1.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::check::{assert_differentiates, assert_same, bits, noise};

    #[test]
    fn by_hand() -> Result<()> {
        // sigmoid(ln 3) = 3/4; silu tends to the identity at +∞ and to 0 at -∞.
        let ln_3 = 3f32.ln();
        let gate = Tensor::new(&[0f32, ln_3, 100., -100.], &Device::Cpu)?;
        let up = Tensor::new(&[5f32, 4., 2., 2.], &Device::Cpu)?;
        let y = swiglu(&gate, &up)?.to_vec1::<f32>()?;
        assert_eq!(y[0], 0.0);
        assert!((y[1] - 3.0 * ln_3).abs() < 1e-6);
        assert_eq!(y[2], 200.0);
        assert!(y[3].abs() < 1e-30);
        Ok(())
    }

    #[test]
    fn agrees_with_its_composed_version() {
        for (rows, width) in [(1, 1), (3, 7), (129, 300)] {
            let gate = (noise((rows, width), 1) * 8.0).unwrap();
            let inputs = [gate, noise((rows, width), 2)];
            assert_same(
                &inputs,
                |t| swiglu(&t[0], &t[1]),
                |t| composed(&t[0], &t[1]),
            );
        }
        let inputs = [(noise((2, 5), 1) * 3.0).unwrap(), noise((2, 5), 2)];
        assert_differentiates(&inputs, |t| swiglu(&t[0], &t[1]));
    }

    #[test]
    fn a_row_does_not_depend_on_the_others() -> Result<()> {
        let (gate, up) = (noise((101, 333), 1), noise((101, 333), 2));
        let all = swiglu(&gate, &up)?;
        for row in [0, 49, 100] {
            let one = |t: &Tensor| t.narrow(0, row, 1);
            assert_eq!(bits(&swiglu(&one(&gate)?, &one(&up)?)?), bits(&one(&all)?));
        }
        Ok(())
    }

    #[test]
    fn nan_propagates_and_mismatched_shapes_are_rejected() -> Result<()> {
        let gate = Tensor::new(&[f32::NAN, 1.], &Device::Cpu)?;
        let up = Tensor::new(&[1f32, f32::NAN], &Device::Cpu)?;
        let y = swiglu(&gate, &up)?.to_vec1::<f32>()?;
        assert!(y[0].is_nan() && y[1].is_nan());
        assert!(swiglu(&gate, &noise(3, 1)).is_err());
        Ok(())
    }
}
