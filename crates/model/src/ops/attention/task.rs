//! Attention of one segment through one key head: what a single thread computes.

use std::ops::Range;

use super::super::product::{Left, Right, Sizes, add_product};
use super::super::vector::{Arithmetic, Kernel, LANES, dot, exp, flushed, fold, largest};
use super::block::{BLOCK, Block, Part};
use super::{Geometry, Segment};

/// One segment and one key head. Its rows are counted from the segment's first.
pub(super) struct Task<'a> {
    pub segment: &'a Segment,
    pub kv_head: usize,
    pub geometry: Geometry,
}

impl Task<'_> {
    /// Head width padded to whole vectors.
    fn padded(&self) -> usize {
        self.geometry.width.next_multiple_of(LANES)
    }

    /// Row length of transposed keys: the longest sequence, padded to whole vectors.
    fn length(&self) -> usize {
        let longest = self.segment.prefix.len() + self.segment.longest_branch();
        longest.next_multiple_of(LANES)
    }

    /// Room for the scores of any block.
    fn room(&self) -> Vec<f32> {
        let longest = self.segment.longest_branch().max(self.segment.prefix.len());
        vec![0.0; BLOCK.min(longest) * self.length()]
    }

    /// Room for a key head across: by width and by place in the sequence, `[width, length]`.
    fn across(&self) -> Vec<f32> {
        vec![0.0; self.geometry.width * self.length()]
    }

    /// The prefix and then the branches, none of them empty.
    fn parts(&self) -> impl Iterator<Item = Part> {
        let Segment { prefix, branches } = self.segment;
        let branches = branches.iter().map(|rows| (rows, prefix.len()));
        let part = |(rows, start): (&Range<usize>, usize)| Part {
            row: rows.start - prefix.start,
            start,
            end: start + rows.len(),
        };
        std::iter::once((prefix, 0))
            .chain(branches)
            .filter(|(rows, _)| !rows.is_empty())
            .map(part)
    }

    /// The blocks of a part, once for every query head of this key head.
    fn blocks(&self, part: Part) -> impl Iterator<Item = (usize, Block)> {
        let window = self.geometry.options.window;
        let of = move |member| part.blocks(window).map(move |block| (member, block));
        (0..self.geometry.group).flat_map(of)
    }

    /// Writes a part of the packed keys or values to its places in `across`. The places of the prefix
    /// stay for every branch; those of a branch are the next one's.
    fn transpose(&self, across: &mut [f32], source: &[f32], part: Part) {
        let length = self.length();
        for t in part.start..part.end {
            let head = self.key(source, part.row + (t - part.start));
            for (d, &x) in head.iter().enumerate() {
                across[d * length + t] = x;
            }
        }
    }

    /// Key head `kv_head` of packed keys or values, its rows padded: `[rows, padded]`.
    fn gathered(&self, source: &[f32]) -> Vec<f32> {
        let padded = self.padded();
        let mut out = vec![0.0; self.segment.rows().len() * padded];
        for (row, out) in out.chunks_exact_mut(padded).enumerate() {
            out[..self.geometry.width].copy_from_slice(self.key(source, row));
        }
        out
    }

    /// The numbers of a row's key or value in a packed `[N, KV, hd]`.
    fn key<'a>(&self, source: &'a [f32], row: usize) -> &'a [f32] {
        let Geometry {
            kv_heads, width, ..
        } = self.geometry;
        let row = self.segment.prefix.start + row;
        &source[(row * kv_heads + self.kv_head) * width..][..width]
    }

    /// Where the packed `[N, H]` has query `row` of head `member` of this group.
    fn query(&self, row: usize, member: usize) -> usize {
        let Geometry {
            kv_heads, group, ..
        } = self.geometry;
        ((self.segment.prefix.start + row) * kv_heads + self.kv_head) * group + member
    }

    /// That query's numbers in a packed `[N, H, hd]`.
    fn head<'a>(&self, source: &'a [f32], row: usize, member: usize) -> &'a [f32] {
        let width = self.geometry.width;
        &source[self.query(row, member) * width..][..width]
    }

    /// Head `member` of a block of queries times `factor`, its rows padded: `[queries, padded]`.
    fn block(&self, source: &[f32], block: &Block, member: usize, factor: f32) -> Vec<f32> {
        let padded = self.padded();
        let mut out = vec![0.0; block.queries.len() * padded];
        for (index, out) in out.chunks_exact_mut(padded).enumerate() {
            for (out, x) in out
                .iter_mut()
                .zip(self.head(source, block.row(index), member))
            {
                *out = x * factor;
            }
        }
        out
    }

    /// `out = left · rightᵀ` over the block's keys: `left` is `[queries, padded]`, `right` a
    /// key head across.
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
        for (span, row) in block.spans() {
            let left = Left::Rows {
                data: &weights[span.start..],
                stride: block.stride(),
            };
            let right = Right {
                data: &keys[row * padded..],
                stride: padded,
            };
            let sizes = Sizes {
                m: block.queries.len(),
                k: span.len(),
                n: padded,
            };
            add_product::<A>(&mut out, left, right, sizes);
        }
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
        for (span, row) in block.spans() {
            let left = Left::Columns {
                data: &weights[span.start..],
                stride: block.stride(),
            };
            let right = Right {
                data: queries,
                stride: padded,
            };
            let sizes = Sizes {
                m: span.len(),
                k: block.queries.len(),
                n: padded,
            };
            add_product::<A>(&mut out[row * padded..], left, right, sizes);
        }
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
            chunk[lane] = flushed(exp::<A>(chunk[lane] - shift));
            lanes[lane] += chunk[lane];
        }
    }
    for (lane, score) in lanes.iter_mut().zip(rest) {
        *score = flushed(exp::<A>(*score - shift));
        *lane += *score;
    }
    fold(lanes)
}

/// The outputs `[rows, group, hd]` and log-sum-exps `[rows, group]` of one task.
pub(super) struct Forward<'a> {
    pub task: &'a Task<'a>,
    pub q: &'a [f32],
    pub k: &'a [f32],
    pub v: &'a [f32],
}

impl Kernel for Forward<'_> {
    type Output = (Vec<f32>, Vec<f32>);

    #[inline(always)]
    fn run<A: Arithmetic>(self) -> Self::Output {
        let task = self.task;
        let Geometry { group, width, .. } = task.geometry;
        let rows = task.segment.rows().len();
        let values = task.gathered(self.v);
        let (mut keys, mut room) = (task.across(), task.room());
        let mut out = vec![0.0; rows * group * width];
        let mut log_sums = vec![0.0; rows * group];
        for part in task.parts() {
            task.transpose(&mut keys, self.k, part);
            for (member, block) in task.blocks(part) {
                let queries = task.block(self.q, &block, member, task.geometry.options.scale);
                let scores = &mut room[..block.scores()];
                task.score::<A>(scores, &queries, &keys, &block);
                let mut sums = [0.0; BLOCK];
                let score_rows = scores.chunks_exact_mut(block.stride());
                for (index, (scores, sum)) in score_rows.zip(&mut sums).enumerate() {
                    let seen = block.seen(index);
                    let most = largest(&scores[seen.clone()]);
                    *sum = exponentiate::<A>(scores, seen, most);
                    log_sums[block.row(index) * group + member] = most + sum.ln();
                }
                let mixed = task.mix::<A>(scores, &values, &block);
                let mixed = mixed.chunks_exact(task.padded());
                for (index, (mixed, sum)) in mixed.zip(sums).enumerate() {
                    let inverse = 1.0 / sum;
                    let out = &mut out[(block.row(index) * group + member) * width..][..width];
                    for (out, mixed) in out.iter_mut().zip(mixed) {
                        *out = mixed * inverse;
                    }
                }
            }
        }
        (out, log_sums)
    }
}

/// The gradients of one task: dq `[rows, group, hd]`, dk and dv `[rows, hd]`.
pub(super) struct Backward<'a> {
    pub task: &'a Task<'a>,
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
        let Geometry { group, width, .. } = task.geometry;
        let scale = task.geometry.options.scale;
        let [q, k, v] = self.qkv;
        let keys = task.gathered(k);
        let (mut keys_across, mut values_across) = (task.across(), task.across());
        let (mut room, mut slope_room) = (task.room(), task.room());
        let mut dq = vec![0.0; task.segment.rows().len() * group * width];
        let (mut dk, mut dv) = (vec![0.0; keys.len()], vec![0.0; keys.len()]);
        for part in task.parts() {
            task.transpose(&mut keys_across, k, part);
            task.transpose(&mut values_across, v, part);
            for (member, block) in task.blocks(part) {
                let queries = task.block(q, &block, member, scale);
                let gradients = task.block(self.gradient, &block, member, 1.0);
                let weights = &mut room[..block.scores()];
                task.score::<A>(weights, &queries, &keys_across, &block);
                let slopes = &mut slope_room[..block.scores()];
                task.score::<A>(slopes, &gradients, &values_across, &block);
                self.weigh::<A>(weights, slopes, &block, member);
                task.spread::<A>(&mut dv, weights, &gradients, &block);
                task.spread::<A>(&mut dk, slopes, &queries, &block);
                let mixed = task.mix::<A>(slopes, &keys, &block);
                for (index, mixed) in mixed.chunks_exact(task.padded()).enumerate() {
                    let dq = &mut dq[(block.row(index) * group + member) * width..][..width];
                    for (dq, mixed) in dq.iter_mut().zip(mixed) {
                        *dq = scale * mixed;
                    }
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
            let row = block.row(index);
            let log_sum = self.log_sums[self.task.query(row, member)];
            exponentiate::<A>(scores, block.seen(index), log_sum);
            let gradient = self.task.head(self.gradient, row, member);
            let pull = dot::<A>(gradient, self.task.head(self.out, row, member));
            for (slope, weight) in slopes.iter_mut().zip(scores) {
                *slope = flushed(*weight * (*slope - pull));
            }
        }
    }
}
