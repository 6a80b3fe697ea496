//! Differentiable CPU kernels of a transformer, one operation per file.
//!
//! Each operation is a function on tensors. On the CPU in `f32` it is one fused kernel with its own backward; on other
//! devices and dtypes it is composed of candle's operations, so the same model code runs everywhere. The tests compare
//! the fused version with the composed one. `docs/kernels.md` explains the parts and the packed layouts.
//!
//! Promises of every fused operation:
//! - bit-stable: the same inputs give the same bits on the same machine, at any number of threads. One task computes an
//!   output element, in a fixed order, and sums over rows are taken over chunks of a fixed size, added in order;
//! - batch-independent: a row (a segment, for attention) does not depend on the rest of the batch;
//! - NaN in, NaN out: NaN never becomes a plausible value.
//!
//! Does not know models, weight files or optimiser schedules. Second derivatives are not supported.

mod adamw;
mod attention;
mod autograd;
mod block;
mod cached_attention;
mod embedding;
mod kv_cache;
mod linear;
mod logprobs;
mod moving_average;
mod rms_norm;
mod rope;
mod softmax;
mod squared_norm;
mod swiglu;
mod weight;

mod matmul;
mod simd;
mod small_gemm;

#[cfg(test)]
mod check;

pub use adamw::{AdamWStep, Moments, adamw_step};
pub use attention::{AttentionParams, Heads, Segment, Segments, causal_attention};
pub use autograd::gradients::{Gradients, backward};
pub use autograd::storage::{CpuTensor, F32Guard, accumulation_dtype};
pub use block::{BlockOptions, BlockWeights, LinearParams, LowRankParams, Rotation, block};
pub use cached_attention::{CacheRows, cached_attention};
pub use embedding::embedding;
pub use kv_cache::KvCache;
pub use linear::{linear, packed_linear};
pub use logprobs::{LogprobsOutput, token_logprobs};
pub use matmul::{PackedMatrix, Precision, uses_tiles};
pub use moving_average::moving_average_step;
pub use rms_norm::rms_norm;
pub use rms_norm::rms_norm_rows;
pub use rope::rope;
pub use rope::rotate;
pub use simd::vectors;
pub use softmax::{SUM_CHUNK, exponentials, log_sum_exp, max_value};
pub use squared_norm::squared_norm;
pub use swiglu::swiglu;
pub use swiglu::swiglu_rows;
pub use weight::WeightMatrix;

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use candle_core::{Result, Tensor};

    use super::check::{bits, noise, value_and_gradients};
    use super::*;

    type Operation = Box<dyn Fn(&[Tensor]) -> Result<Tensor> + Send + Sync>;

    fn operations() -> Vec<(&'static str, Vec<Tensor>, Operation)> {
        let lengths = [(100, vec![]), (20, vec![17, 0, 30]), (133, vec![])];
        let (angles, segments) = (noise((300, 8), 5), Arc::new(Segments::branching(lengths)));
        let heads = |heads: usize, seed| noise((300, heads, 16), seed);
        let params = AttentionParams {
            scale: 0.25,
            window: None,
        };
        let targets: Vec<u32> = (0..700).collect();
        vec![
            (
                "rms_norm",
                vec![noise((300, 40), 1), noise(40, 2)],
                Box::new(|t| rms_norm(&t[0], &t[1], 1e-5)),
            ),
            (
                "rope",
                vec![heads(4, 1)],
                Box::new(move |t| rope(&t[0], &angles.cos()?, &angles.sin()?)),
            ),
            (
                "swiglu",
                vec![noise((300, 200), 1), noise((300, 200), 2)],
                Box::new(|t| swiglu(&t[0], &t[1])),
            ),
            (
                "causal_attention",
                vec![heads(4, 1), heads(2, 2), heads(2, 3)],
                Box::new(move |t| causal_attention(&t[0], &t[1], &t[2], &segments, params)),
            ),
            (
                "token_logprobs",
                vec![noise((700, 24), 1), noise((1500, 24), 2)],
                Box::new(move |t| Ok(token_logprobs(&t[0], &t[1], &targets, Precision::F32)?.logp)),
            ),
        ]
    }

    #[test]
    fn the_number_of_threads_changes_no_bit() {
        let on = |threads: usize, inputs: &[Tensor], operation: &Operation| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            let pool = pool.build().unwrap();
            let (value, gradients) = pool.install(|| value_and_gradients(inputs, operation));
            let gradients: Vec<_> = gradients.iter().map(bits).collect();
            (bits(&value), gradients)
        };
        for (name, inputs, operation) in operations() {
            let one = on(1, &inputs, &operation);
            let three = on(3, &inputs, &operation);
            assert!(one == three, "{name} depends on the number of threads");
        }
    }
}
