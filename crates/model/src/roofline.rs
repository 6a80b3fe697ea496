//! Measured peak throughput of this machine: f32 matmul FLOP/s and memory bandwidth (the roofline model).

use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use crate::{error::ModelError, sampling::Precision};
use kernels::linear;

/// Duration of each measurement.
const DURATION: Duration = Duration::from_millis(500);

/// Side of the square matrices.
const SIDE: usize = 1024;

/// Elements (f32) of the buffer read: 256 MiB, more than a last-level cache usually holds.
const ELEMENTS: usize = 64 << 20;

/// Peak compute and memory throughput.
#[derive(Debug, Clone, Copy)]
pub struct Roofline {
    /// Floating-point operations per second of an f32 matmul, counting a multiply-add as two.
    pub flops: f64,
    /// Bytes per second read from memory by all threads.
    pub bandwidth: f64,
}

impl Roofline {
    /// Measures both, for half a second each.
    ///
    /// # Errors
    /// When a matmul fails.
    pub fn measure() -> Result<Self, ModelError> {
        Ok(Self {
            flops: matmul_flops()?,
            bandwidth: bandwidth()?,
        })
    }

    /// Lower bound in seconds for a number of operations and bytes: the larger of compute and memory time.
    #[must_use]
    pub fn min_seconds(self, operations: f64, bytes: f64) -> f64 {
        (operations / self.flops).max(bytes / self.bandwidth)
    }
}

/// Floating-point operations per second of an f32 matmul, by the faster of candle's and this workspace's
/// implementation.
///
/// # Errors
/// When a matmul fails.
pub fn matmul_flops() -> Result<f64, ModelError> {
    let matrix = Tensor::rand(-1f32, 1f32, (SIDE, SIDE), &Device::Cpu)?;
    let candle_seconds = fastest(|| Ok(matrix.matmul(&matrix)?))?;
    let kernels_seconds = fastest(|| Ok(linear(&matrix, &matrix, Precision::F32)?))?;
    Ok(2.0 * (SIDE as f64).powi(3) / candle_seconds.min(kernels_seconds))
}

fn bandwidth() -> Result<f64, ModelError> {
    let buffer = vec![1f32; ELEMENTS];
    let read = || {
        let sum: f32 = buffer
            .par_chunks(1 << 20)
            .map(|chunk| chunk.iter().step_by(16).sum::<f32>())
            .sum();
        std::hint::black_box(sum);
        Ok(())
    };
    Ok(4.0 * ELEMENTS as f64 / fastest(read)?)
}

/// Seconds of the fastest of several runs, which interference affects least.
fn fastest<T>(mut work: impl FnMut() -> Result<T, ModelError>) -> Result<f64, ModelError> {
    let (clock, mut fastest) = (Instant::now(), f64::INFINITY);
    while clock.elapsed() < DURATION {
        let started = Instant::now();
        drop(work()?);
        fastest = fastest.min(started.elapsed().as_secs_f64());
    }
    Ok(fastest)
}
