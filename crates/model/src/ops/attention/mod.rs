//! Causal attention over packed sequences of different lengths, with grouped queries. Sequences may
//! share a prefix, which then lies in the batch once.
//!
//! The fused version never holds more scores than 64 queries by one sequence (the block scheme of
//! Dao et al. 2022): it keeps each query's log-sum-exp and recomputes its scores in the backward.
//! Its numbers for a token do not depend on whether the token's prefix is shared.

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
use self::task::{Backward, Forward, Task};
use super::storage::{argument, floats, fusible, result};
use super::vector::dispatch;

/// How queries look at keys.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// Multiplies q·k; usually 1/√hd.
    pub scale: f32,
    /// The token at t sees keys j ≤ t with t - j < window; all of them if `None`. Both are places in
    /// the token's own sequence, of which a shared prefix is the beginning.
    pub window: Option<usize>,
}

/// `softmax(scale · q kᵀ) v`, each token seeing itself and what came before it in its own sequence: in
/// its prefix or branch, and for a branch in the prefix of its segment.
///
/// `q` is `[N, H, hd]`, `k` and `v` are `[N, KV, hd]`, N being `segments.total()`; the result is
/// `[N, H, hd]`. Query head h reads key head h / (H / KV). Differentiable in `q`, `k` and `v`.
///
/// # Errors
/// If the shapes do not fit together, H is no multiple of KV, or the window is 0.
pub fn causal_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    segments: &Arc<Segments>,
    options: Attention,
) -> Result<Tensor> {
    let geometry = Geometry::of(q, k, options)?;
    if k.dims() != v.dims() || segments.total() != q.dim(0)? {
        let (k, v, total) = (k.dims(), v.dims(), segments.total());
        bail!("attention: keys {k:?}, values {v:?} and segments of {total} tokens do not fit");
    }
    if !fusible(&[q, k, v]) {
        return composed(q, k, v, segments, options);
    }
    let op = CausalAttention {
        layer: Layer {
            geometry,
            segments: segments.clone(),
        },
        log_sums: OnceLock::new(),
    };
    q.contiguous()?
        .apply_op3(&k.contiguous()?, &v.contiguous()?, op)
}

/// The shape of one attention layer, and how it looks.
#[derive(Clone, Copy)]
struct Geometry {
    /// Key and value heads.
    kv_heads: usize,
    /// Query heads to a key head.
    group: usize,
    /// Numbers to a head.
    width: usize,
    options: Attention,
}

impl Geometry {
    fn of(q: &Tensor, k: &Tensor, options: Attention) -> Result<Self> {
        let (tokens, heads, width) = q.dims3()?;
        let (k_tokens, kv_heads, k_width) = k.dims3()?;
        let fits = tokens == k_tokens && width == k_width && width > 0;
        if !fits || heads == 0 || kv_heads == 0 || heads % kv_heads != 0 {
            let (q, k) = (q.dims(), k.dims());
            bail!("attention: queries {q:?} do not fit keys {k:?}");
        }
        if options.window == Some(0) {
            bail!("attention: a window of 0 tokens sees nothing: give at least 1");
        }
        Ok(Self {
            kv_heads,
            group: heads / kv_heads,
            width,
            options,
        })
    }
}

struct CausalAttention {
    layer: Layer,
    /// Left by the forward for the backward.
    log_sums: OnceLock<Vec<f32>>,
}

/// Attention of packed sequences, on slices.
pub(super) struct Layer {
    geometry: Geometry,
    segments: Arc<Segments>,
}

impl Layer {
    /// Of `heads` query heads and `kv_heads` key heads, each so wide; they fit one another.
    pub fn new(
        (heads, kv_heads, width): (usize, usize, usize),
        segments: &Arc<Segments>,
        options: Attention,
    ) -> Self {
        Self {
            geometry: Geometry {
                kv_heads,
                group: heads / kv_heads,
                width,
                options,
            },
            segments: segments.clone(),
        }
    }

    /// The result, `[N, H, hd]`, and of each query ln Σ exp(score), `[N, H]`.
    pub fn forward(&self, q: &[f32], k: &[f32], v: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let parts: Vec<(Vec<f32>, Vec<f32>)> = self
            .tasks()
            .par_iter()
            .with_max_len(1)
            .map(|task| dispatch(Forward { task, q, k, v }))
            .collect();
        let Geometry { group, width, .. } = self.geometry;
        let log_sums = self.assemble(parts.iter().map(|part| &part.1), group);
        let out = self.assemble(parts.iter().map(|part| &part.0), group * width);
        (out, log_sums)
    }

    /// The gradients of queries, keys and values, from what the forward gave.
    pub fn backward(
        &self,
        qkv: [&[f32]; 3],
        (out, log_sums): (&[f32], &[f32]),
        gradient: &[f32],
    ) -> [Vec<f32>; 3] {
        let parts: Vec<[Vec<f32>; 3]> = self
            .tasks()
            .par_iter()
            .with_max_len(1)
            .map(|task| {
                dispatch(Backward {
                    task,
                    qkv,
                    out,
                    log_sums,
                    gradient,
                })
            })
            .collect();
        let Geometry { group, width, .. } = self.geometry;
        let gather =
            |index: usize, run: usize| self.assemble(parts.iter().map(|part| &part[index]), run);
        [gather(0, group * width), gather(1, width), gather(2, width)]
    }

    /// One task a segment and key head, so that each gradient of a key has one owner.
    fn tasks(&self) -> Vec<Task<'_>> {
        let heads = 0..self.geometry.kv_heads;
        self.segments
            .iter()
            .flat_map(|segment| heads.clone().map(move |kv_head| (segment, kv_head)))
            .map(|(segment, kv_head)| Task {
                segment,
                kv_head,
                geometry: self.geometry,
            })
            .collect()
    }

    /// Puts the tasks' parts, each `[rows, run]`, together as `[N, KV, run]`.
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

impl CustomOp3 for CausalAttention {
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
        let locked = [floats(q)?, floats(k)?, floats(v)?, floats(out)?];
        let [q_, k_, v_, out_] = &locked;
        let gradient = floats(&gradient)?;
        let [dq, dk, dv] = self
            .layer
            .backward([q_, k_, v_], (out_, log_sums), &gradient);
        let tensor = |numbers, like: &Tensor| {
            Tensor::from_vec(numbers, like.shape(), like.device()).map(Some)
        };
        Ok((tensor(dq, q)?, tensor(dk, k)?, tensor(dv, v)?))
    }
}
