//! Attention of one segment through one key head: what a single thread computes.

use std::ops::Range;

use super::super::product::{Left, Right, Sizes, add_product};
use super::super::vector::{Arithmetic, Kernel, LANES, dot, exp, fold, largest};
use super::Geometry;

/// Queries scored at a time.
const BLOCK: usize = 64;

/// One segment and one key head.
pub(super) struct Task {
    /// The segment's packed rows; not empty.
    pub rows: Range<usize>,
    pub kv_head: usize,
    pub geometry: Geometry,
}

/// Queries of one segment, by place in the segment, and the keys any of them sees.
struct Block {
    queries: Range<usize>,
    keys: Range<usize>,
    window: usize,
}

impl Block {
    /// Keys seen by query `index` of the block, counted from the block's first key.
    fn seen(&self, index: usize) -> Range<usize> {
        let end = self.queries.start + index + 1;
        end.saturating_sub(self.window).max(self.keys.start) - self.keys.start
            ..end - self.keys.start
    }

    /// Row length of the scores: the keys, padded to whole vectors.
    fn stride(&self) -> usize {
        self.keys.len().next_multiple_of(LANES)
    }

    /// How many scores there are, padding included.
    fn scores(&self) -> usize {
        self.queries.len() * self.stride()
    }
}

impl Task {
    /// Head width padded to whole vectors.
    fn padded(&self) -> usize {
        self.geometry.width.next_multiple_of(LANES)
    }

    /// Row length of a transposed head: the segment, padded to whole vectors.
    fn length(&self) -> usize {
        self.rows.len().next_multiple_of(LANES)
    }

    /// Room for the scores of any block.
    fn room(&self) -> Vec<f32> {
        vec![0.0; BLOCK.min(self.rows.len()) * self.length()]
    }

    fn blocks(&self) -> impl Iterator<Item = Block> {
        let length = self.rows.len();
        let window = self.geometry.options.window.unwrap_or(length);
        (0..length).step_by(BLOCK).map(move |start| {
            let end = (start + BLOCK).min(length);
            let first_key = (start + 1).saturating_sub(window) / LANES * LANES;
            Block {
                queries: start..end,
                keys: first_key..end,
                window,
            }
        })
    }

    /// Key head `kv_head` of packed keys or values, transposed: `[width, length]`.
    fn transposed(&self, source: &[f32]) -> Vec<f32> {
        let Geometry {
            kv_heads, width, ..
        } = self.geometry;
        let length = self.length();
        let mut out = vec![0.0; width * length];
        for (t, row) in self.rows.clone().enumerate() {
            let head = &source[(row * kv_heads + self.kv_head) * width..][..width];
            for (d, &x) in head.iter().enumerate() {
                out[d * length + t] = x;
            }
        }
        out
    }

    /// Key head `kv_head` of packed keys or values, its rows padded: `[rows, padded]`.
    fn gathered(&self, source: &[f32]) -> Vec<f32> {
        let Geometry {
            kv_heads, width, ..
        } = self.geometry;
        let padded = self.padded();
        let mut out = vec![0.0; self.rows.len() * padded];
        for (row, out) in self.rows.clone().zip(out.chunks_exact_mut(padded)) {
            let head = &source[(row * kv_heads + self.kv_head) * width..][..width];
            out[..width].copy_from_slice(head);
        }
        out
    }

    /// Where the packed `[N, H]` has query `t` of head `member` of this group.
    fn query(&self, t: usize, member: usize) -> usize {
        let Geometry {
            kv_heads, group, ..
        } = self.geometry;
        ((self.rows.start + t) * kv_heads + self.kv_head) * group + member
    }

    /// That query's numbers in a packed `[N, H, hd]`.
    fn head<'a>(&self, source: &'a [f32], t: usize, member: usize) -> &'a [f32] {
        let width = self.geometry.width;
        &source[self.query(t, member) * width..][..width]
    }

    /// Head `member` of a block of queries times `factor`, its rows padded: `[queries, padded]`.
    fn block(&self, source: &[f32], block: &Block, member: usize, factor: f32) -> Vec<f32> {
        let padded = self.padded();
        let mut out = vec![0.0; block.queries.len() * padded];
        for (t, out) in block.queries.clone().zip(out.chunks_exact_mut(padded)) {
            for (out, x) in out.iter_mut().zip(self.head(source, t, member)) {
                *out = x * factor;
            }
        }
        out
    }

    /// `out = left · rightᵀ` over the block's keys: `left` is `[queries, padded]`, `right` a
    /// transposed head.
    #[inline(always)]
    fn score<A: Arithmetic>(&self, out: &mut [f32], left: &[f32], right: &[f32], block: &Block) {
        out.fill(0.0);
        let left = Left::Rows {
            data: left,
            stride: self.padded(),
        };
        let right = Right {
            data: &right[block.keys.start..],
            stride: self.length(),
        };
        let sizes = Sizes {
            m: block.queries.len(),
            k: self.geometry.width,
            n: block.stride(),
        };
        add_product::<A>(out, left, right, sizes);
    }

    /// `weights · keys` for a block: `[queries, padded]`. `weights` is `[queries, stride]`, `keys`
    /// a gathered head.
    #[inline(always)]
    fn mix<A: Arithmetic>(&self, weights: &[f32], keys: &[f32], block: &Block) -> Vec<f32> {
        let padded = self.padded();
        let mut out = vec![0.0; block.queries.len() * padded];
        let left = Left::Rows {
            data: weights,
            stride: block.stride(),
        };
        let right = Right {
            data: &keys[block.keys.start * padded..],
            stride: padded,
        };
        let sizes = Sizes {
            m: block.queries.len(),
            k: block.keys.len(),
            n: padded,
        };
        add_product::<A>(&mut out, left, right, sizes);
        out
    }

    /// `out += weightsᵀ · queries` over the block's keys, `out` being a gathered head.
    #[inline(always)]
    fn spread<A: Arithmetic>(
        &self,
        out: &mut [f32],
        weights: &[f32],
        queries: &[f32],
        block: &Block,
    ) {
        let padded = self.padded();
        let left = Left::Columns {
            data: weights,
            stride: block.stride(),
        };
        let right = Right {
            data: queries,
            stride: padded,
        };
        let sizes = Sizes {
            m: block.keys.len(),
            k: block.queries.len(),
            n: padded,
        };
        add_product::<A>(&mut out[block.keys.start * padded..], left, right, sizes);
    }

    /// A gathered head without its padding: `[rows, width]`.
    fn trimmed(&self, gathered: &[f32]) -> Vec<f32> {
        gathered
            .chunks_exact(self.padded())
            .flat_map(|row| &row[..self.geometry.width])
            .copied()
            .collect()
    }
}

/// exp(score - `shift`) for the keys `seen`, 0 for the others; returns the sum.
#[inline(always)]
fn exponentiate<A: Arithmetic>(scores: &mut [f32], seen: Range<usize>, shift: f32) -> f32 {
    scores[..seen.start].fill(0.0);
    scores[seen.end..].fill(0.0);
    let mut lanes = [0.0; LANES];
    let (chunks, rest) = scores[seen].as_chunks_mut::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            chunk[lane] = exp::<A>(chunk[lane] - shift);
            lanes[lane] += chunk[lane];
        }
    }
    for (lane, score) in lanes.iter_mut().zip(rest) {
        *score = exp::<A>(*score - shift);
        *lane += *score;
    }
    fold(lanes)
}

/// The outputs `[rows, group, hd]` and log-sum-exps `[rows, group]` of one task.
pub(super) struct Forward<'a> {
    pub task: &'a Task,
    pub q: &'a [f32],
    pub k: &'a [f32],
    pub v: &'a [f32],
}

impl Kernel for Forward<'_> {
    type Output = (Vec<f32>, Vec<f32>);

    #[inline(always)]
    fn run<A: Arithmetic>(self) -> Self::Output {
        let Geometry {
            group,
            width,
            options,
            ..
        } = self.task.geometry;
        let keys = self.task.transposed(self.k);
        let values = self.task.gathered(self.v);
        let padded = self.task.padded();
        let mut room = self.task.room();
        let mut out = vec![0.0; self.task.rows.len() * group * width];
        let mut log_sums = vec![0.0; self.task.rows.len() * group];
        for (member, block) in (0..group).flat_map(|m| self.task.blocks().map(move |b| (m, b))) {
            let queries = self.task.block(self.q, &block, member, options.scale);
            let scores = &mut room[..block.scores()];
            self.task.score::<A>(scores, &queries, &keys, &block);
            let mut sums = [0.0; BLOCK];
            let rows = scores.chunks_exact_mut(block.stride());
            for (index, (scores, sum)) in rows.zip(&mut sums).enumerate() {
                let seen = block.seen(index);
                let most = largest(&scores[seen.clone()]);
                *sum = exponentiate::<A>(scores, seen, most);
                let query = (block.queries.start + index) * group + member;
                log_sums[query] = most + sum.ln();
            }
            let mixed = self.task.mix::<A>(scores, &values, &block);
            for (t, (mixed, sum)) in block
                .queries
                .clone()
                .zip(mixed.chunks_exact(padded).zip(sums))
            {
                let inverse = 1.0 / sum;
                let out = &mut out[(t * group + member) * width..][..width];
                for (out, mixed) in out.iter_mut().zip(mixed) {
                    *out = mixed * inverse;
                }
            }
        }
        (out, log_sums)
    }
}

/// The gradients of one task: dq `[rows, group, hd]`, dk and dv `[rows, hd]`.
pub(super) struct Backward<'a> {
    pub task: &'a Task,
    pub qkv: [&'a [f32]; 3],
    pub out: &'a [f32],
    pub log_sums: &'a [f32],
    pub gradient: &'a [f32],
}

impl Kernel for Backward<'_> {
    type Output = [Vec<f32>; 3];

    /// Dao et al. 2022, algorithm 4. With P the weights and dO the gradient: dV = Pᵀ dO,
    /// dS = P (dO Vᵀ - rowsum(dO O)), dQ = scale dS K, dK = scale dSᵀ Q.
    #[inline(always)]
    fn run<A: Arithmetic>(self) -> Self::Output {
        let task = self.task;
        let Geometry {
            group,
            width,
            options,
            ..
        } = task.geometry;
        let [q, k, v] = self.qkv;
        let keys = task.gathered(k);
        let (keys_across, values_across) = (task.transposed(k), task.transposed(v));
        let (mut room, mut slope_room) = (task.room(), task.room());
        let mut dq = vec![0.0; task.rows.len() * group * width];
        let (mut dk, mut dv) = (vec![0.0; keys.len()], vec![0.0; keys.len()]);
        for (member, block) in (0..group).flat_map(|m| task.blocks().map(move |b| (m, b))) {
            let queries = task.block(q, &block, member, options.scale);
            let gradients = task.block(self.gradient, &block, member, 1.0);
            let weights = &mut room[..block.scores()];
            task.score::<A>(weights, &queries, &keys_across, &block);
            let slopes = &mut slope_room[..block.scores()];
            task.score::<A>(slopes, &gradients, &values_across, &block);
            self.weigh::<A>(weights, slopes, &block, member);
            task.spread::<A>(&mut dv, weights, &gradients, &block);
            task.spread::<A>(&mut dk, slopes, &queries, &block);
            let mixed = task.mix::<A>(slopes, &keys, &block);
            for (t, mixed) in block.queries.zip(mixed.chunks_exact(task.padded())) {
                let dq = &mut dq[(t * group + member) * width..][..width];
                for (dq, mixed) in dq.iter_mut().zip(mixed) {
                    *dq = options.scale * mixed;
                }
            }
        }
        [dq, task.trimmed(&dk), task.trimmed(&dv)]
    }
}

impl Backward<'_> {
    /// Turns scores into weights P, and dO Vᵀ in `slopes` into dS.
    #[inline(always)]
    fn weigh<A: Arithmetic>(
        &self,
        scores: &mut [f32],
        slopes: &mut [f32],
        block: &Block,
        member: usize,
    ) {
        let rows = scores
            .chunks_exact_mut(block.stride())
            .zip(slopes.chunks_exact_mut(block.stride()));
        for (index, (scores, slopes)) in rows.enumerate() {
            let t = block.queries.start + index;
            let log_sum = self.log_sums[self.task.query(t, member)];
            exponentiate::<A>(scores, block.seen(index), log_sum);
            let gradient = self.task.head(self.gradient, t, member);
            let pull = dot::<A>(gradient, self.task.head(self.out, t, member));
            for (slope, weight) in slopes.iter_mut().zip(scores) {
                *slope = *weight * (*slope - pull);
            }
        }
    }
}
