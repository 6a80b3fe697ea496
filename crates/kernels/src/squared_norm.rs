//! The squared Euclidean norm of a tensor, for clipping gradients by their global norm.

use candle_core::{DType, Result, Tensor};
use rayon::prelude::*;

use crate::autograd::storage::{fusible, read_f32};

/// Values per partial sum.
const CHUNK: usize = 16 * 1024;
/// Partial sums within a chunk.
const LANES: usize = 8;

/// Σ x² over all elements, accumulated in `f64`: it cannot overflow, and a NaN or infinite element makes it NaN or
/// infinite. The same tensor always gives the same bits.
///
/// # Errors
/// When an operation of candle fails, on other devices.
pub fn squared_norm(tensor: &Tensor) -> Result<f64> {
    let tensor = tensor.detach();
    if !fusible(&[&tensor]) {
        return tensor
            .to_dtype(DType::F64)?
            .sqr()?
            .sum_all()?
            .to_scalar::<f64>();
    }
    let tensor = tensor.contiguous()?;
    let values = read_f32(&tensor)?;
    let partial: Vec<f64> = values.par_chunks(CHUNK).map(sum_of_squares).collect();
    Ok(partial.iter().sum())
}

fn sum_of_squares(values: &[f32]) -> f64 {
    let mut lanes = [0f64; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(x) * f64::from(x);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane += f64::from(x) * f64::from(x);
    }
    lanes.iter().sum()
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::check::noise;

    #[test]
    fn by_hand_and_beyond_the_range_of_f32() -> Result<()> {
        let norm = |values: &[f32]| squared_norm(&Tensor::new(values, &Device::Cpu)?);
        assert_eq!(norm(&[3., -4., 12.])?, 169.0);
        let huge = norm(&[1e30, 1e30])?;
        assert!((huge / 2e60 - 1.0).abs() < 1e-6);
        assert!(norm(&[1., f32::NAN])?.is_nan());
        assert_eq!(norm(&[1., f32::NEG_INFINITY])?, f64::INFINITY);
        Ok(())
    }

    #[test]
    fn agrees_with_candle_in_double_precision() -> Result<()> {
        for shape in [(1, 1), (3, 5), (41, 1000)] {
            let tensor = noise(shape, 1);
            let fused = squared_norm(&tensor)?;
            let double = squared_norm(&tensor.to_dtype(DType::F64)?)?;
            assert!((fused / double - 1.0).abs() < 1e-12);
            assert_eq!(fused.to_bits(), squared_norm(&tensor)?.to_bits());
        }
        Ok(())
    }
}
