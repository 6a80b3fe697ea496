//! KV cache of one sequence in one layer, for the CPU decoder's single queries. The positions of keys are the lanes of
//! a vector, so that scores need no horizontal sums.

use std::ops::Range;
use std::slice::ChunksExact;

use crate::attention::Heads;
use crate::matmul::{Precision, bf16_bits};
use crate::simd::{Arithmetic, CacheLine, Kernel, LANES, dispatch, exp, maximum, sum_lanes};

/// Blocks of positions that are scored at a time.
const SCORED_BLOCKS: usize = 4;

/// Vectors of a value that are accumulated at a time.
const VALUE_VECTORS: usize = 4;

impl Heads {
    /// Lines per value.
    fn depth(&self) -> usize {
        self.width.div_ceil(LANES)
    }

    /// Lines of 16 values per block of 16 positions. First the keys: per head, one line for each dimension, its lanes the
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
pub struct KvCache(CachedValues);

enum CachedValues {
    F32(Lines<CacheLine<f32>>),
    Bf16(Lines<HalfLine>),
}

/// 16 bf16 values, half a cache line.
#[derive(Clone, Copy, Default)]
#[repr(C, align(32))]
struct HalfLine([u16; LANES]);

/// 16 values as a cache stores them.
trait StoredLine: Copy + Default {
    fn load<A: Arithmetic>(&self) -> A::Vector;

    /// Replaces one value.
    fn set(&mut self, lane: usize, value: f32);

    /// Replaces the first values.
    fn write(&mut self, values: &[f32]);
}

impl StoredLine for CacheLine<f32> {
    #[inline(always)]
    fn load<A: Arithmetic>(&self) -> A::Vector {
        A::load(&self.0)
    }

    fn set(&mut self, lane: usize, value: f32) {
        self.0[lane] = value;
    }

    fn write(&mut self, values: &[f32]) {
        self.0[..values.len()].copy_from_slice(values);
    }
}

impl StoredLine for HalfLine {
    #[inline(always)]
    fn load<A: Arithmetic>(&self) -> A::Vector {
        let mut values = [0.0; LANES];
        for (value, &half) in values.iter_mut().zip(&self.0) {
            *value = f32::from_bits(u32::from(half) << 16);
        }
        A::load(&values)
    }

    fn set(&mut self, lane: usize, value: f32) {
        self.0[lane] = bf16_bits(value);
    }

    fn write(&mut self, values: &[f32]) {
        for (half, &value) in self.0.iter_mut().zip(values) {
            *half = bf16_bits(value);
        }
    }
}

impl KvCache {
    /// An empty cache: of `f32` values for weights in f32, of bf16 values for coarser ones.
    #[must_use]
    pub fn new(precision: Precision) -> Self {
        Self(match precision {
            Precision::F32 => CachedValues::F32(Lines::default()),
            Precision::Bf16 | Precision::Int8 => CachedValues::Bf16(Lines::default()),
        })
    }

    /// Writes the key and the value of `position`, `[keys, width]` each.
    pub fn write(&mut self, heads: Heads, position: usize, key: &[f32], value: &[f32]) {
        match &mut self.0 {
            CachedValues::F32(lines) => lines.write(heads, position, key, value),
            CachedValues::Bf16(lines) => lines.write(heads, position, key, value),
        }
    }

    /// Copies the first `positions` of another sequence, such as a shared prompt.
    ///
    /// # Panics
    /// If the caches store their values in different formats.
    pub fn copy_prefix(&mut self, other: &Self, heads: Heads, positions: usize) {
        match (&mut self.0, &other.0) {
            (CachedValues::F32(lines), CachedValues::F32(other)) => {
                lines.copy_prefix(other, heads, positions);
            }
            (CachedValues::Bf16(lines), CachedValues::Bf16(other)) => {
                lines.copy_prefix(other, heads, positions);
            }
            _ => unreachable!("the caches of a decoder have one format"),
        }
    }

    /// Causal attention, `softmax(scale · q kᵀ) v`, of the query at `position`, `[queries, width]`, written to `out`, of
    /// the same shape.
    pub fn attend(&self, heads: Heads, position: usize, query: &[f32], out: &mut [f32]) {
        match &self.0 {
            CachedValues::F32(Lines(lines)) => dispatch(AttendQuery {
                lines,
                heads,
                position,
                query,
                out,
            }),
            CachedValues::Bf16(Lines(lines)) => dispatch(AttendQuery {
                lines,
                heads,
                position,
                query,
                out,
            }),
        }
    }
}

/// The lines of a cache, block after block.
#[derive(Default)]
struct Lines<L>(Vec<L>);

impl<L: StoredLine> Lines<L> {
    /// Grows to `positions`, by at least a quarter of its size.
    fn grow(&mut self, heads: Heads, positions: usize) {
        let lines = &mut self.0;
        let len = positions.div_ceil(LANES) * heads.block_stride();
        if let Some(more) = len.checked_sub(lines.len()) {
            if len > lines.capacity() {
                lines.reserve_exact(more.max(lines.len() / 4));
            }
            lines.resize(len, L::default());
        }
    }

    fn write(&mut self, heads: Heads, position: usize, key: &[f32], value: &[f32]) {
        self.grow(heads, position + 1);
        for head in 0..heads.keys {
            let key = &key[head * heads.width..][..heads.width];
            let lines = &mut self.0[heads.key_lines(position / LANES, head)];
            for (line, &x) in lines.iter_mut().zip(key) {
                line.set(position % LANES, x);
            }
            let value = &value[head * heads.width..][..heads.width];
            let lines = &mut self.0[heads.value_lines(position, head)];
            for (line, x) in lines.iter_mut().zip(value.chunks(LANES)) {
                line.write(x);
            }
        }
    }

    fn copy_prefix(&mut self, other: &Self, heads: Heads, positions: usize) {
        self.grow(heads, positions);
        let lines = positions.div_ceil(LANES) * heads.block_stride();
        self.0[..lines].copy_from_slice(&other.0[..lines]);
    }
}

struct AttendQuery<'a, L> {
    lines: &'a [L],
    heads: Heads,
    position: usize,
    query: &'a [f32],
    out: &'a mut [f32],
}

impl<L: StoredLine> Kernel for AttendQuery<'_, L> {
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
            score::<A, L>(query, head, blocks.clone(), &mut weights);
            let offset = blocks.start * LANES;
            let weights = &mut weights[visible.start - offset..visible.end - offset];
            let sum = exponentiate::<A>(weights, attention.scale);
            weighted_sum::<A, L>(weights, head, visible.start, out);
            out.iter_mut().for_each(|x| *x /= sum);
        }
    }
}

/// Cached keys and values of one head.
#[derive(Clone, Copy)]
struct CachedHead<'a, L> {
    lines: &'a [L],
    heads: Heads,
    head: usize,
}

impl<'a, L: Copy> CachedHead<'a, L> {
    #[inline(always)]
    fn keys(self, block: usize) -> &'a [L] {
        &self.lines[self.heads.key_lines(block, self.head)]
    }

    /// `count` values from `position` on, all in one block.
    #[inline(always)]
    fn values(self, position: usize, count: usize) -> &'a [L] {
        let first = self.heads.value_lines(position, self.head);
        &self.lines[first.start..][..count * first.len()]
    }
}

/// q·k for every position of these blocks.
#[inline(always)]
fn score<A: Arithmetic, L: StoredLine>(
    query: &[f32],
    head: CachedHead<'_, L>,
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
            sums[0] = A::accumulate(x, a.load::<A>(), sums[0]);
            sums[1] = A::accumulate(x, b.load::<A>(), sums[1]);
            sums[2] = A::accumulate(x, c.load::<A>(), sums[2]);
            sums[3] = A::accumulate(x, d.load::<A>(), sums[3]);
        }
        for (scores, sum) in scores[done..].iter_mut().zip(sums) {
            A::store(sum, scores);
        }
        done += SCORED_BLOCKS;
    }
    for (block, scores) in blocks.skip(done).zip(&mut scores[done..]) {
        let mut sum = A::load(&[0.0; LANES]);
        for (&x, key) in query.iter().zip(head.keys(block)) {
            sum = A::accumulate(x, key.load::<A>(), sum);
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
fn weighted_sum<A: Arithmetic, L: StoredLine>(
    weights: &[f32],
    head: CachedHead<'_, L>,
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
                1 => add_lines::<A, L, 1>(weights, values.chunks_exact(depth), first, &mut sums),
                2 => add_lines::<A, L, 2>(weights, values.chunks_exact(depth), first, &mut sums),
                3 => add_lines::<A, L, 3>(weights, values.chunks_exact(depth), first, &mut sums),
                _ => add_lines::<A, L, VALUE_VECTORS>(
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

/// Adds `N` lines of every weighted value, from its line `first` on.
#[inline(always)]
fn add_lines<A: Arithmetic, L: StoredLine, const N: usize>(
    weights: &[f32],
    values: ChunksExact<'_, L>,
    first: usize,
    sums: &mut [A::Vector; VALUE_VECTORS],
) {
    let mut own = [A::load(&[0.0; LANES]); N];
    own.copy_from_slice(&sums[..N]);
    for (&weight, value) in weights.iter().zip(values) {
        for (sum, line) in own.iter_mut().zip(&value[first..first + N]) {
            *sum = A::accumulate(weight, line.load::<A>(), *sum);
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
                    let mut cache = KvCache::new(Precision::F32);
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

    /// A cache in bf16 is one in f32 of rounded keys and values, to the last bit.
    #[test]
    fn bf16_rounds_keys_and_values_alone() {
        let heads = Heads {
            queries: 4,
            keys: 2,
            width: 24,
            attention: AttentionParams {
                scale: 0.3,
                window: None,
            },
        };
        let row = heads.keys * heads.width;
        let values = |seed| noise((70, row), seed).flatten_all().unwrap();
        let [keys, values, query] = [1, 2, 3].map(|seed| values(seed).to_vec1::<f32>().unwrap());
        let rounded = |x: &[f32]| -> Vec<f32> {
            let round = |&x: &f32| f32::from_bits(u32::from(bf16_bits(x)) << 16);
            x.iter().map(round).collect()
        };
        let attended = |precision, keys: &[f32], values: &[f32]| {
            let mut cache = KvCache::new(precision);
            let rows = keys.chunks(row).zip(values.chunks(row));
            for (position, (key, value)) in rows.enumerate() {
                cache.write(heads, position, key, value);
            }
            let mut copy = KvCache::new(precision);
            copy.copy_prefix(&cache, heads, 70);
            let mut out = vec![0.0; heads.queries * heads.width];
            copy.attend(heads, 69, &query[..out.len()], &mut out);
            out
        };
        let in_bf16 = attended(Precision::Bf16, &keys, &values);
        let exact = attended(Precision::F32, &rounded(&keys), &rounded(&values));
        assert_eq!(in_bf16, exact);
        assert_eq!(in_bf16, attended(Precision::Int8, &keys, &values));
        assert_ne!(in_bf16, attended(Precision::F32, &keys, &values));
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
        let mut cache = KvCache::new(Precision::F32);
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
        let (mut source, mut used) = (KvCache::new(Precision::F32), KvCache::new(Precision::F32));
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
        let mut empty = KvCache::new(Precision::F32);
        for copy in [&mut used, &mut empty] {
            copy.copy_prefix(&source, heads, 18);
            copy.write(heads, 18, &row(18), &row(19));
            assert_eq!(attended(copy), expected);
        }
        let lines = |cache: &KvCache| match &cache.0 {
            CachedValues::F32(Lines(lines)) => lines.len(),
            CachedValues::Bf16(Lines(lines)) => lines.len(),
        };
        assert!(lines(&empty) < lines(&source), "copies the prefix only");
    }
}
