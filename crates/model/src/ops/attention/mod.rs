//! Causal attention over packed sequences of different lengths, with grouped queries. Sequences may
//! share a prefix, which then lies in the batch once.
//!
//! The fused version never holds more scores than 64 queries by one sequence (the block scheme of
//! Dao et al. 2022): it keeps each query's log-sum-exp and recomputes its scores in the backward.
//! Its numbers for a token do not depend on whether the token's prefix is shared.

mod composed;
mod segments;
mod task;

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
        geometry,
        segments: segments.clone(),
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
    geometry: Geometry,
    segments: Arc<Segments>,
    /// Of each query, ln Σ exp(score): `[N, H]`, left by the forward for the backward.
    log_sums: OnceLock<Vec<f32>>,
}

impl CausalAttention {
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
        for (task, part) in self.tasks().iter().zip(parts) {
            for (row, part) in task.segment.rows().zip(part.chunks_exact(run)) {
                whole[(row * kv_heads + task.kv_head) * run..][..run].copy_from_slice(part);
            }
        }
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
        let parts: Vec<(Vec<f32>, Vec<f32>)> = self
            .tasks()
            .par_iter()
            .with_max_len(1)
            .map(|task| dispatch(Forward { task, q, k, v }))
            .collect();
        let Geometry { group, width, .. } = self.geometry;
        let log_sums = self.assemble(parts.iter().map(|part| &part.1), group);
        if self.log_sums.set(log_sums).is_err() {
            bail!("attention: one operation ran forward twice");
        }
        let out = self.assemble(parts.iter().map(|part| &part.0), group * width);
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
        let parts: Vec<[Vec<f32>; 3]> = self
            .tasks()
            .par_iter()
            .with_max_len(1)
            .map(|task| {
                dispatch(Backward {
                    task,
                    qkv: [q_, k_, v_],
                    out: out_,
                    log_sums,
                    gradient: &gradient,
                })
            })
            .collect();
        let Geometry { group, width, .. } = self.geometry;
        let gather = |index: usize, run: usize, like: &Tensor| {
            let numbers = self.assemble(parts.iter().map(|part| &part[index]), run);
            Tensor::from_vec(numbers, like.shape(), like.device()).map(Some)
        };
        Ok((
            gather(0, group * width, q)?,
            gather(1, width, k)?,
            gather(2, width, v)?,
        ))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::super::check::{assert_close, assert_differentiates, assert_same, bits, noise};
    use super::*;

    fn full(scale: f32) -> Attention {
        Attention {
            scale,
            window: None,
        }
    }

    fn inputs(tokens: usize, heads: usize, kv_heads: usize, width: usize) -> [Tensor; 3] {
        let q = (noise((tokens, heads, width), 1) * 3.0).unwrap();
        let kv = |seed| noise((tokens, kv_heads, width), seed);
        [q, kv(2), kv(3)]
    }

    fn branching(shapes: &[(usize, &[usize])]) -> Arc<Segments> {
        let shapes = shapes
            .iter()
            .map(|&(prefix, branches)| (prefix, branches.to_vec()));
        Arc::new(Segments::branching(shapes))
    }

    #[test]
    fn by_hand() -> Result<()> {
        let column = |x: &[f32]| Tensor::new(x, &Device::Cpu)?.reshape((4, 1, 1));
        let q = column(&[1., 1., 1., 1.])?;
        let k = column(&[0., 3f32.ln(), 0., 4f32.ln()])?;
        let v = column(&[4., 8., 16., 32.])?;
        let segments = Arc::new(Segments::new(&[3, 1]));
        // Weights of the first three: 1; 1/4, 3/4; 1/5, 3/5, 1/5. The fourth is by itself.
        let y = causal_attention(&q, &k, &v, &segments, full(1.0))?;
        let expected = Tensor::new(&[4f32, 7., 8.8, 32.], &Device::Cpu)?;
        assert_close(&y.flatten_all()?, &expected, 1e-6);
        // A window of two hides the first from the third: 3/4, 1/4.
        let window = Attention {
            scale: 1.0,
            window: Some(2),
        };
        let y = causal_attention(&q, &k, &v, &segments, window)?;
        let expected = Tensor::new(&[4f32, 7., 10., 32.], &Device::Cpu)?;
        assert_close(&y.flatten_all()?, &expected, 1e-6);
        // The last two as branches of the first two: the fourth has weights 1/8, 3/8, 4/8.
        let branches = branching(&[(2, &[1, 1])]);
        let y = causal_attention(&q, &k, &v, &branches, full(1.0))?;
        let expected = Tensor::new(&[4f32, 7., 8.8, 19.5], &Device::Cpu)?;
        assert_close(&y.flatten_all()?, &expected, 1e-6);
        let y = causal_attention(&q, &k, &v, &branches, window)?;
        let expected = Tensor::new(&[4f32, 7., 10., 152. / 7.], &Device::Cpu)?;
        assert_close(&y.flatten_all()?, &expected, 1e-6);
        Ok(())
    }

    #[test]
    fn agrees_with_its_composed_version() {
        type Case<'a> = (&'a [usize], usize, usize, usize, Option<usize>);
        // Lengths, query heads, key heads, head width, window.
        let cases: [Case<'_>; 7] = [
            (&[1], 1, 1, 8, None),
            (&[5, 0, 2], 2, 1, 8, None),
            (&[17, 64, 65, 3], 6, 6, 48, None),
            (&[130, 1, 40], 4, 2, 20, None),
            (&[130, 33], 4, 2, 20, Some(1)),
            (&[150, 9], 2, 2, 16, Some(37)),
            (&[70], 3, 1, 128, Some(200)),
        ];
        for (lengths, heads, kv_heads, width, window) in cases {
            let segments = Arc::new(Segments::new(lengths));
            let options = Attention {
                scale: 1.0 / (width as f32).sqrt(),
                window,
            };
            assert_same(
                &inputs(segments.total(), heads, kv_heads, width),
                |t| causal_attention(&t[0], &t[1], &t[2], &segments, options),
                |t| composed(&t[0], &t[1], &t[2], &segments, options),
            );
        }
    }

    #[test]
    fn branches_agree_with_the_composed_version() {
        type Case<'a> = (
            &'a [(usize, &'a [usize])],
            usize,
            usize,
            usize,
            Option<usize>,
        );
        // Prefixes with their branches, query heads, key heads, head width, window.
        let cases: [Case<'_>; 6] = [
            (&[(1, &[1])], 1, 1, 8, None),
            (&[(37, &[15, 0, 3, 15])], 4, 2, 24, None),
            (
                &[(70, &[66, 130, 1]), (5, &[]), (0, &[3, 2])],
                4,
                2,
                20,
                None,
            ),
            (&[(130, &[0, 70])], 2, 1, 16, Some(1)),
            (&[(150, &[90, 5]), (20, &[40])], 2, 2, 16, Some(37)),
            (&[(66, &[80, 9])], 3, 1, 128, Some(200)),
        ];
        for (shapes, heads, kv_heads, width, window) in cases {
            let segments = branching(shapes);
            let options = Attention {
                scale: 1.0 / (width as f32).sqrt(),
                window,
            };
            assert_same(
                &inputs(segments.total(), heads, kv_heads, width),
                |t| causal_attention(&t[0], &t[1], &t[2], &segments, options),
                |t| composed(&t[0], &t[1], &t[2], &segments, options),
            );
        }
    }

    /// Sharing a prefix is repeating it, to the last bit.
    #[test]
    fn a_shared_prefix_is_a_repeated_prefix() -> Result<()> {
        let segments = branching(&[(70, &[66, 0, 15]), (9, &[4]), (21, &[])]);
        let apart = Arc::new(Segments::new(&[136, 70, 85, 13, 21]));
        let rows: Vec<u32> = segments
            .iter()
            .flat_map(|segment| segment.paths().flatten())
            .map(|row| row as u32)
            .collect();
        let rows = Tensor::new(rows, &Device::Cpu)?;
        let shared = inputs(segments.total(), 4, 2, 24);
        let repeated = shared.each_ref().map(|x| x.index_select(&rows, 0).unwrap());
        for window in [None, Some(30)] {
            let options = Attention { scale: 0.3, window };
            let attend =
                |[q, k, v]: &[Tensor; 3], segments| causal_attention(q, k, v, segments, options);
            let once = attend(&shared, &segments)?.index_select(&rows, 0)?;
            assert_eq!(bits(&once), bits(&attend(&repeated, &apart)?));
        }
        Ok(())
    }

    #[test]
    fn differentiates() {
        let plain = Arc::new(Segments::new(&[3, 2]));
        let branched = branching(&[(2, &[2, 0, 1])]);
        for (segments, window) in [
            (&plain, None),
            (&plain, Some(2)),
            (&branched, None),
            (&branched, Some(2)),
        ] {
            let options = Attention { scale: 0.7, window };
            assert_differentiates(&inputs(5, 2, 1, 3), |t| {
                causal_attention(&t[0], &t[1], &t[2], segments, options)
            });
        }
    }

    #[test]
    fn a_segment_is_alone_and_blind_to_what_follows() -> Result<()> {
        let [q, k, v] = inputs(170, 4, 2, 24);
        let attend = |range: std::ops::Range<usize>, lengths: &[usize]| {
            let part = |x: &Tensor| x.narrow(0, range.start, range.len());
            let segments = Arc::new(Segments::new(lengths));
            causal_attention(&part(&q)?, &part(&k)?, &part(&v)?, &segments, full(0.2))
        };
        let all = attend(0..170, &[30, 100, 40])?;
        let alone = attend(30..130, &[100])?;
        assert_eq!(bits(&alone), bits(&all.narrow(0, 30, 100)?));
        for shorter in [1, 63, 64, 65, 90] {
            let prefix = attend(30..30 + shorter, &[shorter])?;
            assert_eq!(bits(&prefix), bits(&all.narrow(0, 30, shorter)?));
        }
        Ok(())
    }

    #[test]
    fn other_types_are_composed() -> Result<()> {
        let [q, k, v] = inputs(9, 4, 2, 8);
        let segments = Arc::new(Segments::new(&[4, 5]));
        let double = |x: &Tensor| x.to_dtype(DType::F64);
        let y = causal_attention(&q, &k, &v, &segments, full(0.3))?;
        let (q, k, v) = (double(&q)?, double(&k)?, double(&v)?);
        let expected = causal_attention(&q, &k, &v, &segments, full(0.3))?;
        assert_close(&y, &expected.to_dtype(DType::F32)?, 1e-6);
        Ok(())
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let [q, k, v] = inputs(6, 4, 2, 8);
        let of = |lengths: &[usize]| Arc::new(Segments::new(lengths));
        assert!(causal_attention(&q, &k, &v, &of(&[6]), full(1.0)).is_ok());
        assert!(causal_attention(&q, &k, &v, &of(&[5]), full(1.0)).is_err());
        let three = noise((6, 3, 8), 1);
        assert!(causal_attention(&q, &three, &three, &of(&[6]), full(1.0)).is_err());
        assert!(causal_attention(&q, &k, &three, &of(&[6]), full(1.0)).is_err());
        let nothing = Attention {
            scale: 1.0,
            window: Some(0),
        };
        assert!(causal_attention(&q, &k, &v, &of(&[6]), nothing).is_err());
    }
}
