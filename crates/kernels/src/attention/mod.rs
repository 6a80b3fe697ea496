//! Causal grouped-query attention over packed sequences of different lengths. Sequences may share a prefix, which is
//! in the batch once.
//!
//! The fused version holds the scores of at most 64 queries by one sequence at a time (the block scheme of Dao et al.
//! 2022): it saves each query's log-sum-exp and recomputes its scores in the backward.
//!
//! Promises: a token's result does not depend on whether its prefix is shared, to the last bit.

mod block;
mod composed;
mod segments;
mod task;
#[cfg(test)]
mod tests;

use std::sync::{Arc, OnceLock};

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use self::composed::composed;
pub use self::segments::{Segment, Segments};
use self::task::{AttentionBackward, AttentionForward, HeadTask};
use crate::autograd::storage::{argument, fusible, read_f32, result};
use crate::simd::dispatch;

/// Attention parameters: scale and window.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionParams {
    /// Multiplies q·k; usually 1/√hd.
    pub scale: f32,
    /// Sliding window: the token at position t attends to keys j ≤ t with t - j < window; to all if `None`. Positions
    /// count from the start of the token's own sequence, including a shared prefix.
    pub window: Option<usize>,
}

/// Attention heads of a layer, and their parameters.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// Query heads.
    pub queries: usize,
    /// Key heads, each of which serves `queries / keys` query heads.
    pub keys: usize,
    /// Values per head.
    pub width: usize,
    /// Scale and window.
    pub attention: AttentionParams,
}

/// Causal attention, `softmax(scale · q kᵀ) v`: each token attends to itself and to the tokens before it in its own
/// sequence, that is in its prefix or branch, and for a branch in the prefix of its segment.
///
/// `q` is `[N, H, hd]`, `k` and `v` are `[N, KV, hd]`, N being `segments.total()`; the result is
/// `[N, H, hd]`. Query head h reads key head h / (H / KV). Differentiable in `q`, `k` and `v`.
///
/// # Errors
/// If the shapes do not match, H is not a multiple of KV, or the window is 0.
pub fn causal_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    segments: &Arc<Segments>,
    params: AttentionParams,
) -> Result<Tensor> {
    let geometry = Geometry::of(q, k, params)?;
    if k.dims() != v.dims() || segments.total() != q.dim(0)? {
        let (k, v, total) = (k.dims(), v.dims(), segments.total());
        bail!("attention: keys {k:?}, values {v:?} and segments of {total} tokens do not fit");
    }
    if !fusible(&[q, k, v]) {
        return composed(q, k, v, segments, params);
    }
    let op = CausalAttentionOp {
        layer: AttentionLayer {
            geometry,
            segments: segments.clone(),
        },
        log_sums: OnceLock::new(),
    };
    q.contiguous()?
        .apply_op3(&k.contiguous()?, &v.contiguous()?, op)
}

/// Shape and parameters of an attention layer.
#[derive(Clone, Copy)]
struct Geometry {
    /// Key and value heads.
    kv_heads: usize,
    /// Query heads per key head.
    group: usize,
    /// Values per head.
    width: usize,
    params: AttentionParams,
}

impl Geometry {
    fn of(q: &Tensor, k: &Tensor, params: AttentionParams) -> Result<Self> {
        let (tokens, heads, width) = q.dims3()?;
        let (k_tokens, kv_heads, k_width) = k.dims3()?;
        let fits = tokens == k_tokens && width == k_width && width > 0;
        if !fits || heads == 0 || kv_heads == 0 || heads % kv_heads != 0 {
            let (q, k) = (q.dims(), k.dims());
            bail!("attention: queries {q:?} do not fit keys {k:?}");
        }
        if params.window == Some(0) {
            bail!("attention: the window is 0 tokens, it must be at least 1");
        }
        Ok(Self {
            kv_heads,
            group: heads / kv_heads,
            width,
            params,
        })
    }
}

struct CausalAttentionOp {
    layer: AttentionLayer,
    /// Saved by the forward for the backward.
    log_sums: OnceLock<Vec<f32>>,
}

/// Attention of packed sequences, on slices.
pub(crate) struct AttentionLayer {
    geometry: Geometry,
    segments: Arc<Segments>,
}

impl AttentionLayer {
    /// `heads.queries` must be a multiple of `heads.keys`.
    pub fn new(heads: Heads, segments: &Arc<Segments>) -> Self {
        Self {
            geometry: Geometry {
                kv_heads: heads.keys,
                group: heads.queries / heads.keys,
                width: heads.width,
                params: heads.attention,
            },
            segments: segments.clone(),
        }
    }

    /// The result, `[N, H, hd]`, and the log-sum-exp of each query's scores, `[N, H]`.
    pub fn forward(&self, q: &[f32], k: &[f32], v: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let parts: Vec<(Vec<f32>, Vec<f32>)> = self
            .tasks()
            .par_iter()
            .with_max_len(1)
            .map(|task| dispatch(AttentionForward { task, q, k, v }))
            .collect();
        let Geometry { group, width, .. } = self.geometry;
        let log_sums = self.assemble(parts.iter().map(|part| &part.1), group);
        let out = self.assemble(parts.iter().map(|part| &part.0), group * width);
        (out, log_sums)
    }

    /// The gradients of queries, keys and values, given the results of the forward.
    pub fn backward(
        &self,
        qkv: [&[f32]; 3],
        out: &[f32],
        log_sums: &[f32],
        gradient: &[f32],
    ) -> [Vec<f32>; 3] {
        let parts: Vec<[Vec<f32>; 3]> = self
            .tasks()
            .par_iter()
            .with_max_len(1)
            .map(|task| {
                dispatch(AttentionBackward {
                    task,
                    qkv,
                    out,
                    log_sums,
                    gradient,
                })
            })
            .collect();
        let Geometry { group, width, .. } = self.geometry;
        let assemble =
            |index: usize, run: usize| self.assemble(parts.iter().map(|part| &part[index]), run);
        [
            assemble(0, group * width),
            assemble(1, width),
            assemble(2, width),
        ]
    }

    /// One task per segment and key head, so that each key's gradient is written by one task.
    fn tasks(&self) -> Vec<HeadTask<'_>> {
        let heads = 0..self.geometry.kv_heads;
        self.segments
            .iter()
            .flat_map(|segment| heads.clone().map(move |kv_head| (segment, kv_head)))
            .map(|(segment, kv_head)| HeadTask {
                segment,
                kv_head,
                geometry: self.geometry,
            })
            .collect()
    }

    /// Assembles the tasks' results, each `[rows, run]`, into `[N, KV, run]`.
    fn assemble<'a>(&self, parts: impl Iterator<Item = &'a Vec<f32>>, run: usize) -> Vec<f32> {
        let kv_heads = self.geometry.kv_heads;
        let mut whole = vec![0.0; self.segments.total() * kv_heads * run];
        let (mut rest, mut segments) = (whole.as_mut_slice(), Vec::new());
        for segment in self.segments.iter() {
            let of_segment = rest.split_off_mut(..segment.rows().len() * kv_heads * run);
            segments.extend(of_segment);
        }
        let parts: Vec<&Vec<f32>> = parts.collect();
        let segments = segments.into_par_iter().zip(parts.par_chunks(kv_heads));
        segments.for_each(|(whole, parts)| {
            for (row, whole) in whole.chunks_exact_mut(kv_heads * run).enumerate() {
                for (part, whole) in parts.iter().zip(whole.chunks_exact_mut(run)) {
                    whole.copy_from_slice(&part[row * run..][..run]);
                }
            }
        });
        whole
    }
}

impl CustomOp3 for CausalAttentionOp {
    fn name(&self) -> &'static str {
        "causal-attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let q = argument(q, q_layout)?;
        let k = argument(k, k_layout)?;
        let v = argument(v, v_layout)?;
        let (out, log_sums) = self.layer.forward(q, k, v);
        if self.log_sums.set(log_sums).is_err() {
            bail!("attention: one operation ran forward twice");
        }
        Ok(result(out, q_layout.shape()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let Some(log_sums) = self.log_sums.get() else {
            bail!("attention: backward before forward");
        };
        let gradient = gradient.contiguous()?;
        let locked = [read_f32(q)?, read_f32(k)?, read_f32(v)?, read_f32(out)?];
        let [q_, k_, v_, out_] = &locked;
        let gradient = read_f32(&gradient)?;
        let [dq, dk, dv] = self.layer.backward([q_, k_, v_], out_, log_sums, &gradient);
        let tensor =
            |values, like: &Tensor| Tensor::from_vec(values, like.shape(), like.device()).map(Some);
        Ok((tensor(dq, q)?, tensor(dk, k)?, tensor(dv, v)?))
    }
}
