//! Step of an exponential moving average of one variable (Polyak and Juditsky 1992, with exponential weights).

use candle_core::{Result, Tensor, Var, bail};
use rayon::prelude::*;

use crate::autograd::storage::{address, fusible, read_f32, update_in_place};
use crate::simd::{Arithmetic, Kernel, dispatch};

/// Values per task.
const CHUNK: usize = 16 * 1024;

/// Moves `average` towards `value`: `a ← a + (1 − decay)·(v − a)`, which is `decay·a + (1 − decay)·v`, and leaves `a`
/// unchanged to the bit where `v = a`. On the CPU in `f32` it changes in place, so tensors that share its storage change
/// too.
///
/// # Errors
/// If `value` differs from `average` in shape or dtype, or shares its storage. Nothing has changed then.
pub fn moving_average_step(average: &Var, value: &Tensor, decay: f64) -> Result<()> {
    if value.dims() != average.dims() || value.dtype() != average.dtype() {
        let (value, average) = (
            (value.dims(), value.dtype()),
            (average.dims(), average.dtype()),
        );
        bail!(
            "moving average: {value:?} are the shape and dtype of a value, {average:?} those of its average"
        );
    }
    if fusible(&[average.as_tensor(), value]) && average.is_contiguous() {
        return fused(average, value, decay);
    }
    let average_now = average.as_detached_tensor();
    let step = ((value.detach() - &average_now)? * (1.0 - decay))?;
    average.set(&(average_now + step)?)
}

fn fused(average: &Var, value: &Tensor, decay: f64) -> Result<()> {
    if address(average.as_tensor()) == address(value) {
        bail!("moving average: a value shares the storage of its average: copy() it");
    }
    let value = value.detach().contiguous()?;
    let value = read_f32(&value)?;
    let rate = (1.0 - decay) as f32;
    update_in_place(average, |average| {
        let chunks = average.par_chunks_mut(CHUNK).zip(value.par_chunks(CHUNK));
        chunks.for_each(|(average, value)| {
            dispatch(MovingAverageUpdate {
                average,
                value,
                rate,
            });
        });
        Ok(())
    })
}

struct MovingAverageUpdate<'a> {
    average: &'a mut [f32],
    value: &'a [f32],
    /// 1 − decay.
    rate: f32,
}

impl Kernel for MovingAverageUpdate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        for (average, &value) in self.average.iter_mut().zip(self.value) {
            *average = A::mul_add(value - *average, self.rate, *average);
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;
    use crate::check::{assert_close, bits, noise};

    #[test]
    fn by_hand_and_at_its_fixed_point() -> Result<()> {
        let average = Var::new(&[2f32, -4., 0.1], &Device::Cpu)?;
        let value = Tensor::new(&[4f32, 4., 0.1], &Device::Cpu)?;
        moving_average_step(&average, &value, 0.75)?;
        assert_eq!(average.to_vec1::<f32>()?, [2.5, -2.0, 0.1]);
        // 0: the value itself.
        moving_average_step(&average, &value, 0.0)?;
        assert_close(average.as_tensor(), &value, 1e-7);
        Ok(())
    }

    /// After t steps towards v_1 … v_t the average is `d^t·a + Σ (1 − d)·d^(t−i)·v_i`.
    #[test]
    fn many_steps_have_the_closed_form() -> Result<()> {
        let decay = 0.9;
        let start = noise((7, 5003), 1);
        let (average, again) = (Var::from_tensor(&start)?, Var::from_tensor(&start)?);
        let double = Var::from_tensor(&start.to_dtype(DType::F64)?)?;
        let mut expected = (start.to_dtype(DType::F64)? * 0.9f64.powi(6))?;
        for t in 1..=6 {
            let value = noise((7, 5003), 10 + t as u64);
            moving_average_step(&average, &value, decay)?;
            moving_average_step(&again, &value, decay)?;
            let value = value.to_dtype(DType::F64)?;
            moving_average_step(&double, &value, decay)?;
            expected = (expected + (value * (0.1 * 0.9f64.powi(6 - t)))?)?;
        }
        assert_eq!(bits(average.as_tensor()), bits(again.as_tensor()));
        let expected = expected.to_dtype(DType::F32)?;
        assert_close(average.as_tensor(), &expected, 1e-6);
        assert_close(&double.to_dtype(DType::F32)?, &expected, 1e-6);
        Ok(())
    }

    #[test]
    fn other_shapes_dtypes_and_shared_storage_are_rejected() -> Result<()> {
        let average = Var::from_tensor(&noise(4, 1))?;
        let before = bits(average.as_tensor());
        let shared = average.as_detached_tensor();
        for value in [noise(3, 2), noise(4, 2).to_dtype(DType::F64)?, shared] {
            assert!(moving_average_step(&average, &value, 0.5).is_err());
        }
        assert_eq!(bits(average.as_tensor()), before);
        Ok(())
    }
}
