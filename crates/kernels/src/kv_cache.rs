//! KV cache of one sequence in one layer, for the CPU decoder's single queries. The positions of keys are the lanes of
//! a vector, so that scores need no horizontal sums.

use std::ops::Range;
use std::slice::ChunksExact;

use crate::attention::Heads;
use crate::simd::{Arithmetic, CacheLine, Kernel, LANES, dispatch, exp, maximum, sum_lanes};

/// Blocks of positions that are scored at a time.
const SCORED_BLOCKS: usize = 4;

/// Vectors of a value that are accumulated at a time.
const VALUE_VECTORS: usize = 4;

impl Heads {
    /// Cache lines per value.
    fn depth(&self) -> usize {
        self.width.div_ceil(LANES)
    }

    /// Cache lines per block of 16 positions. First the keys: per head, one line for each dimension, its lanes the
    /// positions. Then the values: per head and position, a row padded with zeros to whole lines.
    fn block_stride(&self) -> usize {
        self.keys * (self.width + LANES * self.depth())
    }

    /// Lines of a block's keys.
    fn key_lines(&self, block: usize, head: usize) -> Range<usize> {
        let start = block * self.block_stride() + head * self.width;
        start..start + self.width
    }

    /// Lines of a position's value.
    fn value_lines(&self, position: usize, head: usize) -> Range<usize> {
        let values = position / LANES * self.block_stride() + self.keys * self.width;
        let start = values + (head * LANES + position % LANES) * self.depth();
        start..start + self.depth()
    }
}

/// KV cache of one sequence in one layer: blocks of 16 positions, allocated as they are written.
#[derive(Default)]
pub struct KvCache {
    lines: Vec<CacheLine<f32>>,
}

impl KvCache {
    /// Grows to `positions`, by at least a quarter of its size.
    fn grow(&mut self, heads: Heads, positions: usize) {
        let len = positions.div_ceil(LANES) * heads.block_stride();
        if let Some(more) = len.checked_sub(self.lines.len()) {
            if len > self.lines.capacity() {
                self.lines.reserve_exact(more.max(self.lines.len() / 4));
            }
            self.lines.resize(len, CacheLine([0.0; LANES]));
        }
    }

    /// Writes the key and the value of `position`, `[keys, width]` each.
    pub fn write(&mut self, heads: Heads, position: usize, key: &[f32], value: &[f32]) {
        self.grow(heads, position + 1);
        for head in 0..heads.keys {
            let key = &key[head * heads.width..][..heads.width];
            let lines = &mut self.lines[heads.key_lines(position / LANES, head)];
            for (line, &x) in lines.iter_mut().zip(key) {
                line.0[position % LANES] = x;
            }
            let value = &value[head * heads.width..][..heads.width];
            let lines = &mut self.lines[heads.value_lines(position, head)];
            for (line, x) in lines.iter_mut().zip(value.chunks(LANES)) {
                line.0[..x.len()].copy_from_slice(x);
            }
        }
    }

    /// Copies the first `positions` of another sequence, such as a shared prompt.
    pub fn copy_prefix(&mut self, other: &Self, heads: Heads, positions: usize) {
        self.grow(heads, positions);
        let lines = positions.div_ceil(LANES) * heads.block_stride();
        self.lines[..lines].copy_from_slice(&other.lines[..lines]);
    }

    /// Causal attention, `softmax(scale · q kᵀ) v`, of the query at `position`, `[queries, width]`, written to `out`, of
    /// the same shape.
    pub fn attend(&self, heads: Heads, position: usize, query: &[f32], out: &mut [f32]) {
        dispatch(AttendQuery {
            lines: &self.lines,
            heads,
            position,
            query,
            out,
        });
    }
}

struct AttendQuery<'a> {
    lines: &'a [CacheLine<f32>],
    heads: Heads,
    position: usize,
    query: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for AttendQuery<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let Heads {
            width, attention, ..
        } = self.heads;
        let window = attention.window.unwrap_or(usize::MAX);
        let visible = (self.position + 1).saturating_sub(window)..self.position + 1;
        let blocks = visible.start / LANES..visible.end.div_ceil(LANES);
        let mut weights = vec![0f32; blocks.len() * LANES];
        let group = self.heads.queries / self.heads.keys;
        for head in 0..self.heads.queries {
            let query = &self.query[head * width..][..width];
            let out = &mut self.out[head * width..][..width];
            let head = CachedHead {
                lines: self.lines,
                heads: self.heads,
                head: head / group,
            };
            score::<A>(query, head, blocks.clone(), &mut weights);
            let offset = blocks.start * LANES;
            let weights = &mut weights[visible.start - offset..visible.end - offset];
            let sum = exponentiate::<A>(weights, attention.scale);
            weighted_sum::<A>(weights, head, visible.start, out);
            out.iter_mut().for_each(|x| *x /= sum);
        }
    }
}

/// Cached keys and values of one head.
#[derive(Clone, Copy)]
struct CachedHead<'a> {
    lines: &'a [CacheLine<f32>],
    heads: Heads,
    head: usize,
}

impl<'a> CachedHead<'a> {
    #[inline(always)]
    fn keys(self, block: usize) -> &'a [CacheLine<f32>] {
        &self.lines[self.heads.key_lines(block, self.head)]
    }

    /// `count` values from `position` on, all in one block.
    #[inline(always)]
    fn values(self, position: usize, count: usize) -> &'a [CacheLine<f32>] {
        let first = self.heads.value_lines(position, self.head);
        &self.lines[first.start..][..count * first.len()]
    }
}

/// q·k for every position of these blocks.
#[inline(always)]
fn score<A: Arithmetic>(
    query: &[f32],
    head: CachedHead<'_>,
    blocks: Range<usize>,
    scores: &mut [f32],
) {
    let (scores, _) = scores.as_chunks_mut::<LANES>();
    let mut done = 0;
    while done + SCORED_BLOCKS <= blocks.len() {
        let first = blocks.start + done;
        let [a, b, c, d]: [_; SCORED_BLOCKS] =
            std::array::from_fn(|block| head.keys(first + block));
        let mut sums = [A::load(&[0.0; LANES]); SCORED_BLOCKS];
        for ((((&x, a), b), c), d) in query.iter().zip(a).zip(b).zip(c).zip(d) {
            sums[0] = A::accumulate(x, A::load(&a.0), sums[0]);
            sums[1] = A::accumulate(x, A::load(&b.0), sums[1]);
            sums[2] = A::accumulate(x, A::load(&c.0), sums[2]);
            sums[3] = A::accumulate(x, A::load(&d.0), sums[3]);
        }
        for (scores, sum) in scores[done..].iter_mut().zip(sums) {
            A::store(sum, scores);
        }
        done += SCORED_BLOCKS;
    }
    for (block, scores) in blocks.skip(done).zip(&mut scores[done..]) {
        let mut sum = A::load(&[0.0; LANES]);
        for (&x, key) in query.iter().zip(head.keys(block)) {
            sum = A::accumulate(x, A::load(&key.0), sum);
        }
        A::store(sum, scores);
    }
}

/// Replaces every score s by e^(scale (s - max)); returns their sum.
#[inline(always)]
fn exponentiate<A: Arithmetic>(scores: &mut [f32], scale: f32) -> f32 {
    let max = maximum(scores);
    let mut sums = [0.0; LANES];
    for scores in scores.chunks_mut(LANES) {
        for (score, sum) in scores.iter_mut().zip(&mut sums) {
            *score = exp::<A>(scale * (*score - max));
            *sum += *score;
        }
    }
    sum_lanes(sums)
}

/// Σ w v over the values from `position` on.
#[inline(always)]
fn weighted_sum<A: Arithmetic>(
    weights: &[f32],
    head: CachedHead<'_>,
    position: usize,
    out: &mut [f32],
) {
    let depth = head.heads.depth();
    for (index, out) in out.chunks_mut(VALUE_VECTORS * LANES).enumerate() {
        let first = index * VALUE_VECTORS;
        let mut sums = [A::load(&[0.0; LANES]); VALUE_VECTORS];
        let (mut position, mut rest) = (position, weights);
        while !rest.is_empty() {
            let (weights, later) = rest.split_at(rest.len().min(LANES - position % LANES));
            let values = head.values(position, weights.len());
            match (depth - first).min(VALUE_VECTORS) {
                1 => add_lines::<A, 1>(weights, values.chunks_exact(depth), first, &mut sums),
                2 => add_lines::<A, 2>(weights, values.chunks_exact(depth), first, &mut sums),
                3 => add_lines::<A, 3>(weights, values.chunks_exact(depth), first, &mut sums),
                _ => add_lines::<A, VALUE_VECTORS>(
                    weights,
                    values.chunks_exact(depth),
                    first,
                    &mut sums,
                ),
            }
            (position, rest) = (position + weights.len(), later);
        }
        for (out, sum) in out.chunks_mut(LANES).zip(sums) {
            let mut values = [0.0; LANES];
            A::store(sum, &mut values);
            out.copy_from_slice(&values[..out.len()]);
        }
    }
}

/// Adds `N` cache lines of every weighted value, from its line `first` on.
#[inline(always)]
fn add_lines<A: Arithmetic, const N: usize>(
    weights: &[f32],
    values: ChunksExact<'_, CacheLine<f32>>,
    first: usize,
    sums: &mut [A::Vector; VALUE_VECTORS],
) {
    let mut own = [A::load(&[0.0; LANES]); N];
    own.copy_from_slice(&sums[..N]);
    for (&weight, value) in weights.iter().zip(values) {
        for (sum, line) in own.iter_mut().zip(&value[first..first + N]) {
            *sum = A::accumulate(weight, A::load(&line.0), *sum);
        }
    }
    sums[..N].copy_from_slice(&own);
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Result, Tensor};

    use super::*;
    use crate::attention::AttentionParams;
    use crate::check::{assert_close, noise};

    /// By candle's operations: one query at the end of a sequence, grouped heads.
    fn expected(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, first: usize) -> Result<Tensor> {
        let (keys, queries) = (k.dim(1)?, q.dim(0)?);
        let count = k.dim(0)? - first;
        let head_major = |x: &Tensor| x.narrow(0, first, count)?.transpose(0, 1)?.contiguous();
        let q = q.reshape((keys, queries / keys, ()))?;
        let scores = (q.matmul(&head_major(k)?.t()?)? * scale)?;
        let mixed = candle_nn::ops::softmax_last_dim(&scores)?.matmul(&head_major(v)?)?;
        mixed.reshape((queries, ()))
    }

    #[test]
    fn agrees_with_candles_operations() -> Result<()> {
        let shapes = [(1, 1, 4), (4, 2, 6), (3, 3, 48), (4, 1, 16), (2, 1, 80)];
        for (queries, keys, width) in shapes {
            for length in [1, 2, 15, 16, 17, 80, 130] {
                let (q, k, v) = (
                    noise((queries, width), 1),
                    noise((length, keys, width), 2),
                    noise((length, keys, width), 3),
                );
                for window in [None, Some(5), Some(40)] {
                    let scale = 0.7;
                    let heads = Heads {
                        queries,
                        keys,
                        width,
                        attention: AttentionParams { scale, window },
                    };
                    let mut cache = KvCache::default();
                    let flat = |x: &Tensor| x.flatten_all()?.to_vec1::<f32>();
                    let (key_rows, value_rows) = (flat(&k)?, flat(&v)?);
                    let row = keys * width;
                    let rows = key_rows.chunks(row).zip(value_rows.chunks(row));
                    for (position, (k, v)) in rows.enumerate() {
                        cache.write(heads, position, k, v);
                    }
                    let mut out = vec![0.0; queries * width];
                    cache.attend(heads, length - 1, &flat(&q)?, &mut out);
                    let out = Tensor::from_vec(out, (queries, width), &Device::Cpu)?;
                    let first = window.map_or(0, |window| length.saturating_sub(window));
                    assert_close(&out, &expected(&q, &k, &v, f64::from(scale), first)?, 1e-5);
                }
            }
        }
        Ok(())
    }

    #[test]
    fn earlier_contents_beyond_the_position_are_ignored() {
        let heads = Heads {
            queries: 1,
            keys: 1,
            width: 2,
            attention: AttentionParams {
                scale: 1.0,
                window: None,
            },
        };
        let mut cache = KvCache::default();
        for position in 0..20 {
            cache.write(heads, position, &[f32::NAN; 2], &[f32::NAN; 2]);
        }
        cache.write(heads, 0, &[1.0, 2.0], &[3.0, 4.0]);
        let mut out = [0.0; 2];
        cache.attend(heads, 0, &[0.5, 0.5], &mut out);
        assert_eq!(out, [3.0, 4.0]);
    }

    #[test]
    fn copying_a_prefix_overwrites_earlier_contents() {
        let heads = Heads {
            queries: 2,
            keys: 1,
            width: 3,
            attention: AttentionParams {
                scale: 0.5,
                window: None,
            },
        };
        let row = |position: usize| [position as f32, 1.0, -0.5 * position as f32];
        let (mut source, mut used) = (KvCache::default(), KvCache::default());
        for position in 0..40 {
            source.write(heads, position, &row(position), &row(position + 1));
            used.write(heads, position, &[f32::NAN; 3], &[f32::NAN; 3]);
        }
        let query = [0.1, 0.2, 0.3, -0.1, 0.0, 0.2];
        let attended = |cache: &KvCache| {
            let mut out = [0.0; 6];
            cache.attend(heads, 18, &query, &mut out);
            out
        };
        let expected = attended(&source);
        let mut empty = KvCache::default();
        for copy in [&mut used, &mut empty] {
            copy.copy_prefix(&source, heads, 18);
            copy.write(heads, 18, &row(18), &row(19));
            assert_eq!(attended(copy), expected);
        }
        assert!(
            empty.lines.len() < source.lines.len(),
            "copies the prefix only"
        );
    }
}
