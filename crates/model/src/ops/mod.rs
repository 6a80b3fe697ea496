//! The differentiable operations a transformer spends its time in, one a file.
//!
//! Each is a plain function on tensors. On the CPU in `f32` it runs as one fused pass with its own
//! backward; on any other device or type it is composed of candle's operations, so the same model
//! code runs everywhere. The composed version is also what the tests hold the fused one to.
//!
//! Promised by every fused operation:
//! - the same inputs give the same bits on the same machine, whatever the number of threads: every
//!   output row is computed by one task in a fixed order, and sums over rows are taken over chunks
//!   of a fixed size, added in order;
//! - one row (one segment, for attention) does not depend on what else is in the batch;
//! - NaN in gives NaN out, never a plausible number.
//!
//! They know nothing of models, weights or optimiser schedules. Second derivatives are not offered.

mod adamw;
mod attention;
mod block;
mod cache;
mod cached_attention;
mod embedding;
mod gradients;
mod linear;
mod rms_norm;
mod rope;
mod softmax;
mod squared_norm;
mod swiglu;
mod token_logprobs;

mod matrix;
mod product;
mod storage;
mod vector;

#[cfg(test)]
mod check;

pub use adamw::{AdamWStep, Moments, adamw_step};
pub use attention::{Attention, Segment, Segments, causal_attention};
pub use block::{Affine, BlockOptions, BlockWeights, block};
pub(crate) use cache::{Heads, KeyValues};
pub use cached_attention::{CacheRows, cached_attention};
pub use embedding::embedding;
pub use gradients::{Gradients, backward};
pub use linear::linear;
pub use matrix::{PackedMatrix, Precision};
pub use rms_norm::rms_norm;
pub(crate) use rms_norm::rms_norm_rows;
pub use rope::rope;
pub(crate) use rope::rotate;
pub(crate) use softmax::{PART, exponentials, largest_of, log_sum_exp};
pub use squared_norm::squared_norm;
pub(crate) use storage::{Fixed, wide};
pub use swiglu::swiglu;
pub(crate) use swiglu::swiglu_rows;
pub use token_logprobs::{TokenLogprobs, token_logprobs};
pub use vector::vectors;

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
        let options = Attention {
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
                Box::new(move |t| causal_attention(&t[0], &t[1], &t[2], &segments, options)),
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
