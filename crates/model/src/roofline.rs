//! What this machine can do at most: products of matrices a second, and bytes read a second.

use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use crate::{ModelError, ops::linear, sampling::Precision};

/// How long each is measured.
const MEASURED: Duration = Duration::from_millis(500);

/// The side of the matrices.
const SIDE: usize = 1024;

/// Numbers that are read: more than any cache holds but the last.
const NUMBERS: usize = 64 << 20;

/// What bounds everything that is computed here.
#[derive(Debug, Clone, Copy)]
pub struct Roofline {
    /// Operations a second in f32 products, two to a multiplication.
    pub products: f64,
    /// Bytes read from memory a second, by all threads.
    pub bandwidth: f64,
}

impl Roofline {
    /// Measures both, for half a second each.
    ///
    /// # Errors
    /// When a product of matrices fails.
    pub fn measure() -> Result<Self, ModelError> {
        Ok(Self {
            products: products()?,
            bandwidth: bandwidth()?,
        })
    }

    /// The least seconds for so many operations and bytes, the larger of the two.
    #[must_use]
    pub fn least(self, operations: f64, bytes: f64) -> f64 {
        (operations / self.products).max(bytes / self.bandwidth)
    }
}

/// Operations a second in f32 products, two to a multiplication, by whichever of the two ways at hand is faster.
///
/// # Errors
/// When a product of matrices fails.
pub fn products() -> Result<f64, ModelError> {
    let matrix = Tensor::rand(-1f32, 1f32, (SIDE, SIDE), &Device::Cpu)?;
    let of_candle = best(|| Ok(matrix.matmul(&matrix)?))?;
    let of_ours = best(|| Ok(linear(&matrix, &matrix, Precision::F32)?))?;
    Ok(2.0 * (SIDE as f64).powi(3) / of_candle.min(of_ours))
}

fn bandwidth() -> Result<f64, ModelError> {
    let numbers = vec![1f32; NUMBERS];
    let read = || {
        let sum: f32 = numbers
            .par_chunks(1 << 20)
            .map(|part| part.iter().step_by(16).sum::<f32>())
            .sum();
        std::hint::black_box(sum);
        Ok(())
    };
    Ok(4.0 * NUMBERS as f64 / best(read)?)
}

/// The seconds of the fastest of several runs: all that disturbs makes it slower.
fn best<T>(mut work: impl FnMut() -> Result<T, ModelError>) -> Result<f64, ModelError> {
    let (clock, mut least) = (Instant::now(), f64::INFINITY);
    while clock.elapsed() < MEASURED {
        let started = Instant::now();
        drop(work()?);
        least = least.min(started.elapsed().as_secs_f64());
    }
    Ok(least)
}
