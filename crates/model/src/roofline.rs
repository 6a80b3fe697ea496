//! Measured peak throughput of a device: matmul FLOP/s in a dtype and memory bandwidth (the roofline model).

use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use crate::{error::ModelError, sampling::Precision};
use kernels::linear;

/// Duration of each measurement.
const DURATION: Duration = Duration::from_millis(500);

/// Side of the square matrices on the CPU.
const SIDE: usize = 1024;

/// Side of the square matrices on an accelerator, which smaller ones do not fill.
const ACCELERATOR_SIDE: usize = 8192;

/// Operations on an accelerator between two waits for it: a wait takes longer than starting an operation.
const QUEUED: usize = 8;

/// Elements (f32) of the buffer read on the CPU: 256 MiB, more than a last-level cache usually holds.
const ELEMENTS: usize = 64 << 20;

/// Bytes of the buffer copied on an accelerator: more than its cache holds.
const COPIED_BYTES: usize = 512 << 20;

/// Peak compute and memory throughput of a device.
#[derive(Debug, Clone, Copy)]
pub struct Roofline {
    /// Floating-point operations per second of a matmul, counting a multiply-add as two.
    pub flops: f64,
    /// Bytes per second read from memory by all threads of the CPU, or read and written by copies on an accelerator.
    pub bandwidth: f64,
}

impl Roofline {
    /// Measures both on this device, for half a second each, with matmuls in `dtype`.
    ///
    /// # Errors
    /// When the device cannot compute the matmul or cannot hold the operands.
    pub fn measure(device: &Device, dtype: DType) -> Result<Self, ModelError> {
        let bandwidth = match device.is_cpu() {
            true => cpu_bandwidth()?,
            false => copy_bandwidth(device, dtype)?,
        };
        Ok(Self {
            flops: matmul_flops(device, dtype)?,
            bandwidth,
        })
    }

    /// Lower bound in seconds for a number of operations and bytes: the larger of compute and memory time.
    #[must_use]
    pub fn min_seconds(self, operations: f64, bytes: f64) -> f64 {
        (operations / self.flops).max(bytes / self.bandwidth)
    }
}

/// Floating-point operations per second of a matmul of matrices in `dtype` on this device. On the CPU it is the faster of
/// candle's and this workspace's implementation; the latter rounds its operands to bf16 for any dtype but f32.
///
/// # Errors
/// When the device cannot compute it or cannot hold the operands.
pub fn matmul_flops(device: &Device, dtype: DType) -> Result<f64, ModelError> {
    let side = match device.is_cpu() {
        true => SIDE,
        false => ACCELERATOR_SIDE,
    };
    let full = Tensor::rand(-1f32, 1f32, (side, side), device)?;
    let matrix = full.to_dtype(dtype)?;
    let mut seconds = fastest(device, || Ok(matrix.matmul(&matrix)?))?;
    if device.is_cpu() {
        let precision = match dtype {
            DType::F32 => Precision::F32,
            _ => Precision::Bf16,
        };
        let kernels_seconds = fastest(device, || Ok(linear(&full, &full, precision)?))?;
        seconds = seconds.min(kernels_seconds);
    }
    Ok(2.0 * (side as f64).powi(3) / seconds)
}

fn cpu_bandwidth() -> Result<f64, ModelError> {
    let buffer = vec![1f32; ELEMENTS];
    let read = || {
        let sum: f32 = buffer
            .par_chunks(1 << 20)
            .map(|chunk| chunk.iter().step_by(16).sum::<f32>())
            .sum();
        std::hint::black_box(sum);
        Ok(())
    };
    Ok(4.0 * ELEMENTS as f64 / fastest(&Device::Cpu, read)?)
}

/// Bandwidth of copies within the memory of an accelerator, which read and write every byte.
fn copy_bandwidth(device: &Device, dtype: DType) -> Result<f64, ModelError> {
    let buffer = Tensor::zeros(COPIED_BYTES / dtype.size_in_bytes(), dtype, device)?;
    Ok(2.0 * COPIED_BYTES as f64 / fastest(device, || Ok(buffer.copy()?))?)
}

/// Seconds of the fastest of several runs, which interference affects least. A run waits for the device; on an accelerator
/// it is the mean of several that are queued.
fn fastest<T>(
    device: &Device,
    mut work: impl FnMut() -> Result<T, ModelError>,
) -> Result<f64, ModelError> {
    let queued = match device.is_cpu() {
        true => 1,
        false => QUEUED,
    };
    let (clock, mut fastest) = (Instant::now(), f64::INFINITY);
    while clock.elapsed() < DURATION {
        let started = Instant::now();
        for _ in 0..queued {
            drop(work()?);
        }
        device.synchronize()?;
        fastest = fastest.min(started.elapsed().as_secs_f64() / queued as f64);
    }
    Ok(fastest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_measured_in_the_dtype_of_the_model() {
        for dtype in [DType::F32, DType::BF16] {
            let measured = Roofline::measure(&Device::Cpu, dtype).unwrap();
            assert!(measured.flops > 1e6, "{dtype:?}: {measured:?}");
            assert!(measured.bandwidth > 1e6, "{dtype:?}: {measured:?}");
        }
        // Accelerators are measured by copies.
        assert!(copy_bandwidth(&Device::Cpu, DType::BF16).unwrap() > 1e6);
    }

    #[test]
    fn the_slower_of_compute_and_memory_bounds_the_time() {
        let roofline = Roofline {
            flops: 100.0,
            bandwidth: 10.0,
        };
        assert!((roofline.min_seconds(50.0, 1.0) - 0.5).abs() < 1e-12);
        assert!((roofline.min_seconds(50.0, 20.0) - 2.0).abs() < 1e-12);
    }
}
