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

impl Heads {
    /// Lines to a value.
    fn depth(&self) -> usize {
        self.width.div_ceil(LANES)
    }

    /// Lines to a block of places: of each key head, a line for each number of a key; then of each key head,
    /// place after place, a value, padded with zeros to whole lines.
    fn stride(&self) -> usize {
        self.keys * (self.width + LANES * self.depth())
    }

    fn keys_at(&self, block: usize, head: usize) -> Range<usize> {
        let start = block * self.stride() + head * self.width;
        start..start + self.width
    }

    fn value_at(&self, place: usize, head: usize) -> Range<usize> {
        let values = place / LANES * self.stride() + self.keys * self.width;
        let start = values + (head * LANES + place % LANES) * self.depth();
        start..start + self.depth()
    }
}

/// The keys and values of one sequence in one layer: blocks of 16 places, as many as it has needed so far.
#[derive(Default)]
pub(crate) struct KeyValues {
    lines: Vec<Line<f32>>,
}

impl KeyValues {
    /// Makes room for so many places. It grows by a quarter, so that little of it stays empty.
    fn reach(&mut self, heads: Heads, places: usize) {
        let wanted = places.div_ceil(LANES) * heads.stride();
        if let Some(more) = wanted.checked_sub(self.lines.len()) {
            if wanted > self.lines.capacity() {
                self.lines.reserve_exact(more.max(self.lines.len() / 4));
            }
            self.lines.resize(wanted, Line([0.0; LANES]));
        }
    }

    /// Writes a key and a value, `[keys, width]` each, to `place`.
    pub fn write(&mut self, heads: Heads, place: usize, key: &[f32], value: &[f32]) {
        self.reach(heads, place + 1);
        for head in 0..heads.keys {
            let key = &key[head * heads.width..][..heads.width];
            let lines = &mut self.lines[heads.keys_at(place / LANES, head)];
            for (line, &x) in lines.iter_mut().zip(key) {
                line.0[place % LANES] = x;
            }
            let value = &value[head * heads.width..][..heads.width];
            let lines = &mut self.lines[heads.value_at(place, head)];
            for (line, x) in lines.iter_mut().zip(value.chunks(LANES)) {
                line.0[..x.len()].copy_from_slice(x);
            }
        }
    }

    /// Takes the first `places` of another sequence over.
    pub fn begin_as(&mut self, other: &Self, heads: Heads, places: usize) {
        self.reach(heads, places);
        let lines = places.div_ceil(LANES) * heads.stride();
        self.lines[..lines].copy_from_slice(&other.lines[..lines]);
    }

    /// `softmax(scale · q kᵀ) v` of the query at `place`, `[queries, width]`, over the places up to its
    /// own: into `out`, of the same shape.
    pub fn attend(&self, heads: Heads, place: usize, query: &[f32], out: &mut [f32]) {
        dispatch(Attend {
            lines: &self.lines,
            heads,
            place,
            query,
            out,
        });
    }
}

struct Attend<'a> {
    lines: &'a [Line<f32>],
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
            let keys = Keys {
                lines: self.lines,
                heads: self.heads,
                head: head / group,
            };
            score::<A>(query, keys, blocks.clone(), &mut weights);
            let offset = blocks.start * LANES;
            let weights = &mut weights[seen.start - offset..seen.end - offset];
            let sum = soften::<A>(weights, options.scale);
            let out = &mut self.out[head * width..][..width];
            blend::<A>(weights, keys, seen.start, out);
            out.iter_mut().for_each(|x| *x /= sum);
        }
    }
}

/// Keys and values of one head.
#[derive(Clone, Copy)]
struct Keys<'a> {
    lines: &'a [Line<f32>],
    heads: Heads,
    head: usize,
}

impl<'a> Keys<'a> {
    #[inline(always)]
    fn block(self, block: usize) -> &'a [Line<f32>] {
        &self.lines[self.heads.keys_at(block, self.head)]
    }

    /// The values from `place` on, `count` of them, all in one block.
    #[inline(always)]
    fn values(self, place: usize, count: usize) -> &'a [Line<f32>] {
        let first = self.heads.value_at(place, self.head);
        &self.lines[first.start..][..count * first.len()]
    }
}

/// q·k of every place of these blocks.
#[inline(always)]
fn score<A: Arithmetic>(query: &[f32], keys: Keys<'_>, blocks: Range<usize>, scores: &mut [f32]) {
    let (scores, _) = scores.as_chunks_mut::<LANES>();
    let mut done = 0;
    while done + BLOCKS <= blocks.len() {
        let first = blocks.start + done;
        let [a, b, c, d]: [_; BLOCKS] = std::array::from_fn(|block| keys.block(first + block));
        let mut sums = [A::load(&[0.0; LANES]); BLOCKS];
        for ((((&x, a), b), c), d) in query.iter().zip(a).zip(b).zip(c).zip(d) {
            sums[0] = A::accumulate(x, A::load(&a.0), sums[0]);
            sums[1] = A::accumulate(x, A::load(&b.0), sums[1]);
            sums[2] = A::accumulate(x, A::load(&c.0), sums[2]);
            sums[3] = A::accumulate(x, A::load(&d.0), sums[3]);
        }
        for (scores, sum) in scores[done..].iter_mut().zip(sums) {
            A::store(sum, scores);
        }
        done += BLOCKS;
    }
    for (block, scores) in blocks.skip(done).zip(&mut scores[done..]) {
        let mut sum = A::load(&[0.0; LANES]);
        for (&x, key) in query.iter().zip(keys.block(block)) {
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

/// Σ w v over the values from `place` on.
#[inline(always)]
fn blend<A: Arithmetic>(weights: &[f32], keys: Keys<'_>, place: usize, out: &mut [f32]) {
    let depth = keys.heads.depth();
    for (part, out) in out.chunks_mut(VECTORS * LANES).enumerate() {
        let first = part * VECTORS;
        let mut sums = [A::load(&[0.0; LANES]); VECTORS];
        let (mut place, mut rest) = (place, weights);
        while !rest.is_empty() {
            let (weights, later) = rest.split_at(rest.len().min(LANES - place % LANES));
            let values = keys.values(place, weights.len());
            match (depth - first).min(VECTORS) {
                1 => add::<A, 1>(weights, values, (first, depth), &mut sums),
                2 => add::<A, 2>(weights, values, (first, depth), &mut sums),
                3 => add::<A, 3>(weights, values, (first, depth), &mut sums),
                _ => add::<A, VECTORS>(weights, values, (first, depth), &mut sums),
            }
            (place, rest) = (place + weights.len(), later);
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
                    let mut cache = KeyValues::default();
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
        let mut cache = KeyValues::default();
        for place in 0..20 {
            cache.write(heads, place, &[f32::NAN; 2], &[f32::NAN; 2]);
        }
        cache.write(heads, 0, &[1.0, 2.0], &[3.0, 4.0]);
        let mut out = [0.0; 2];
        cache.attend(heads, 0, &[0.5, 0.5], &mut out);
        assert_eq!(out, [3.0, 4.0]);
    }

    #[test]
    fn a_beginning_is_taken_over_whatever_was_there() {
        let heads = Heads {
            queries: 2,
            keys: 1,
            width: 3,
            options: Attention {
                scale: 0.5,
                window: None,
            },
        };
        let row = |place: usize| [place as f32, 1.0, -0.5 * place as f32];
        let (mut one, mut other) = (KeyValues::default(), KeyValues::default());
        for place in 0..40 {
            one.write(heads, place, &row(place), &row(place + 1));
            other.write(heads, place, &[f32::NAN; 3], &[f32::NAN; 3]);
        }
        let query = [0.1, 0.2, 0.3, -0.1, 0.0, 0.2];
        let attended = |cache: &KeyValues| {
            let mut out = [0.0; 6];
            cache.attend(heads, 18, &query, &mut out);
            out
        };
        let expected = attended(&one);
        let mut empty = KeyValues::default();
        for begun in [&mut other, &mut empty] {
            begun.begin_as(&one, heads, 18);
            begun.write(heads, 18, &row(18), &row(19));
            assert_eq!(attended(begun), expected);
        }
        assert!(empty.lines.len() < one.lines.len(), "only what is needed");
    }
}
