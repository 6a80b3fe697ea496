//! Keys and values of one sequence in one layer, laid out for a query that comes alone: the places of the
//! sequence are the lanes of a vector, so that scores need no sums across one.

use std::ops::Range;

use super::attention::Attention;
use super::vector::{Arithmetic, Kernel, LANES, Line, dispatch, exp, fold, largest};

/// Blocks of places that are scored together.
const BLOCKS: usize = 4;

/// Vectors of a value that are summed together.
const VECTORS: usize = 4;

/// How a layer's queries meet its keys.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Heads {
    /// Query heads.
    pub queries: usize,
    /// Key heads, of which each serves `queries / keys` query heads.
    pub keys: usize,
    /// Numbers to a head.
    pub width: usize,
    pub options: Attention,
}

/// The keys and values of one sequence in one layer.
#[derive(Clone)]
pub(crate) struct KeyValues {
    /// Of each key head, block after block of 16 places: a line for each number of a key.
    keys: Vec<Line<f32>>,
    /// Of each key head, place after place: a value, padded with zeros to whole lines.
    values: Vec<Line<f32>>,
    /// Room, in blocks.
    blocks: usize,
}

impl KeyValues {
    /// Room for `capacity` places.
    pub fn new(heads: Heads, capacity: usize) -> Self {
        let blocks = capacity.div_ceil(LANES);
        let empty = |lines: usize| vec![Line([0.0; LANES]); lines];
        Self {
            keys: empty(heads.keys * blocks * heads.width),
            values: empty(heads.keys * blocks * LANES * heads.width.div_ceil(LANES)),
            blocks,
        }
    }

    /// Writes a key and a value, `[keys, width]` each, to `place`.
    pub fn write(&mut self, heads: Heads, place: usize, key: &[f32], value: &[f32]) {
        let (block, lane) = (place / LANES, place % LANES);
        let depth = heads.width.div_ceil(LANES);
        for head in 0..heads.keys {
            let key = &key[head * heads.width..][..heads.width];
            let lines = &mut self.keys[(head * self.blocks + block) * heads.width..];
            for (line, &x) in lines.iter_mut().zip(key) {
                line.0[lane] = x;
            }
            let value = &value[head * heads.width..][..heads.width];
            let lines = &mut self.values[(head * self.blocks * LANES + place) * depth..];
            for (line, x) in lines.iter_mut().zip(value.chunks(LANES)) {
                line.0[..x.len()].copy_from_slice(x);
            }
        }
    }

    /// `softmax(scale · q kᵀ) v` of the query at `place`, `[queries, width]`, over the places up to its
    /// own: into `out`, of the same shape.
    pub fn attend(&self, heads: Heads, place: usize, query: &[f32], out: &mut [f32]) {
        dispatch(Attend {
            cache: self,
            heads,
            place,
            query,
            out,
        });
    }
}

struct Attend<'a> {
    cache: &'a KeyValues,
    heads: Heads,
    place: usize,
    query: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let Heads { width, options, .. } = self.heads;
        let window = options.window.unwrap_or(usize::MAX);
        let seen = (self.place + 1).saturating_sub(window)..self.place + 1;
        let blocks = seen.start / LANES..seen.end.div_ceil(LANES);
        let mut weights = vec![0f32; blocks.len() * LANES];
        let group = self.heads.queries / self.heads.keys;
        for head in 0..self.heads.queries {
            let query = &self.query[head * width..][..width];
            let keys = &self.cache.keys[head / group * self.cache.blocks * width..];
            score::<A>(query, keys, blocks.clone(), &mut weights);
            let offset = blocks.start * LANES;
            let seen = seen.start - offset..seen.end - offset;
            let sum = soften::<A>(&mut weights[seen.clone()], options.scale);
            let depth = width.div_ceil(LANES);
            let values = (head / group * self.cache.blocks * LANES + offset + seen.start) * depth;
            let values = &self.cache.values[values..][..seen.len() * depth];
            let out = &mut self.out[head * width..][..width];
            blend::<A>(&weights[seen], values, depth, out);
            out.iter_mut().for_each(|x| *x /= sum);
        }
    }
}

/// q·k of every place of these blocks.
#[inline(always)]
fn score<A: Arithmetic>(
    query: &[f32],
    keys: &[Line<f32>],
    blocks: Range<usize>,
    scores: &mut [f32],
) {
    let width = query.len();
    let (scores, _) = scores.as_chunks_mut::<LANES>();
    let mut done = 0;
    while done + BLOCKS <= blocks.len() {
        let keys = &keys[(blocks.start + done) * width..][..BLOCKS * width];
        let scores = &mut scores[done..][..BLOCKS];
        let mut sums = [A::load(&[0.0; LANES]); BLOCKS];
        for (d, &x) in query.iter().enumerate() {
            for (block, sum) in sums.iter_mut().enumerate() {
                *sum = A::accumulate(x, A::load(&keys[block * width + d].0), *sum);
            }
        }
        for (scores, sum) in scores.iter_mut().zip(sums) {
            A::store(sum, scores);
        }
        done += BLOCKS;
    }
    for (block, scores) in blocks.skip(done).zip(&mut scores[done..]) {
        let mut sum = A::load(&[0.0; LANES]);
        for (&x, key) in query.iter().zip(&keys[block * width..][..width]) {
            sum = A::accumulate(x, A::load(&key.0), sum);
        }
        A::store(sum, scores);
    }
}

/// e^(scale (s - max)) in place of every score s; returns their sum.
#[inline(always)]
fn soften<A: Arithmetic>(scores: &mut [f32], scale: f32) -> f32 {
    let most = largest(scores);
    let mut sums = [0.0; LANES];
    for scores in scores.chunks_mut(LANES) {
        for (score, sum) in scores.iter_mut().zip(&mut sums) {
            *score = exp::<A>(scale * (*score - most));
            *sum += *score;
        }
    }
    fold(sums)
}

/// Σ w v, `depth` lines to a value.
#[inline(always)]
fn blend<A: Arithmetic>(weights: &[f32], values: &[Line<f32>], depth: usize, out: &mut [f32]) {
    for (part, out) in out.chunks_mut(VECTORS * LANES).enumerate() {
        let first = part * VECTORS;
        let mut sums = [A::load(&[0.0; LANES]); VECTORS];
        match (depth - first).min(VECTORS) {
            1 => add::<A, 1>(weights, values, (first, depth), &mut sums),
            2 => add::<A, 2>(weights, values, (first, depth), &mut sums),
            3 => add::<A, 3>(weights, values, (first, depth), &mut sums),
            _ => add::<A, VECTORS>(weights, values, (first, depth), &mut sums),
        }
        for (out, sum) in out.chunks_mut(LANES).zip(sums) {
            let mut numbers = [0.0; LANES];
            A::store(sum, &mut numbers);
            out.copy_from_slice(&numbers[..out.len()]);
        }
    }
}

/// Adds `N` lines of every value, from its line `first` on.
#[inline(always)]
fn add<A: Arithmetic, const N: usize>(
    weights: &[f32],
    values: &[Line<f32>],
    (first, depth): (usize, usize),
    sums: &mut [A::Vector; VECTORS],
) {
    let mut own = [A::load(&[0.0; LANES]); N];
    own.copy_from_slice(&sums[..N]);
    for (&weight, value) in weights.iter().zip(values.chunks_exact(depth)) {
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
    use crate::ops::check::{assert_close, noise};

    /// By candle's operations: one query at the end of a sequence, grouped heads.
    fn expected(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, first: usize) -> Result<Tensor> {
        let (keys, queries) = (k.dim(1)?, q.dim(0)?);
        let seen = k.dim(0)? - first;
        let across = |x: &Tensor| x.narrow(0, first, seen)?.transpose(0, 1)?.contiguous();
        let q = q.reshape((keys, queries / keys, ()))?;
        let scores = (q.matmul(&across(k)?.t()?)? * scale)?;
        let mixed = candle_nn::ops::softmax_last_dim(&scores)?.matmul(&across(v)?)?;
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
                        options: Attention { scale, window },
                    };
                    let mut cache = KeyValues::new(heads, 130);
                    let numbers = |x: &Tensor| x.flatten_all()?.to_vec1::<f32>();
                    let rows = numbers(&k)?;
                    let values = numbers(&v)?;
                    let row = keys * width;
                    for (place, (k, v)) in rows.chunks(row).zip(values.chunks(row)).enumerate() {
                        cache.write(heads, place, k, v);
                    }
                    let mut out = vec![0.0; queries * width];
                    cache.attend(heads, length - 1, &numbers(&q)?, &mut out);
                    let out = Tensor::from_vec(out, (queries, width), &Device::Cpu)?;
                    let first = window.map_or(0, |window| length.saturating_sub(window));
                    assert_close(&out, &expected(&q, &k, &v, f64::from(scale), first)?, 1e-5);
                }
            }
        }
        Ok(())
    }

    #[test]
    fn what_a_slot_held_before_is_not_seen() {
        let heads = Heads {
            queries: 1,
            keys: 1,
            width: 2,
            options: Attention {
                scale: 1.0,
                window: None,
            },
        };
        let mut cache = KeyValues::new(heads, 20);
        for place in 0..20 {
            cache.write(heads, place, &[f32::NAN; 2], &[f32::NAN; 2]);
        }
        cache.write(heads, 0, &[1.0, 2.0], &[3.0, 4.0]);
        let mut out = [0.0; 2];
        cache.attend(heads, 0, &[0.5, 0.5], &mut out);
        assert_eq!(out, [3.0, 4.0]);
    }
}
