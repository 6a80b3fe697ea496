//! Attention of one segment and one key head: the work of one thread.

use std::ops::Range;

use super::block::{QUERY_BLOCK, QueryBlock, SegmentPart};
use super::{Geometry, Segment};
use crate::simd::{Arithmetic, Kernel, LANES, dot, exp, flush_to_zero, maximum, sum_lanes};
use crate::small_gemm::{GemmSize, LeftMatrix, RightMatrix, add_product};

/// One segment and one key head. Rows count from the segment's first.
pub(super) struct HeadTask<'a> {
    pub segment: &'a Segment,
    pub kv_head: usize,
    pub geometry: Geometry,
}

impl HeadTask<'_> {
    /// Head width padded to whole vectors.
    fn padded(&self) -> usize {
        self.geometry.width.next_multiple_of(LANES)
    }

    /// Row length of transposed keys: the longest sequence, padded to whole vectors.
    fn length(&self) -> usize {
        let longest = self.segment.prefix.len() + self.segment.longest_branch();
        longest.next_multiple_of(LANES)
    }

    /// Buffer for the scores of any block.
    fn score_buffer(&self) -> Vec<f32> {
        let longest = self.segment.longest_branch().max(self.segment.prefix.len());
        vec![0.0; QUERY_BLOCK.min(longest) * self.length()]
    }

    /// Buffer for a transposed key head, `[width, length]`.
    fn transposed_buffer(&self) -> Vec<f32> {
        vec![0.0; self.geometry.width * self.length()]
    }

    /// The prefix and then the branches, without empty ones.
    fn parts(&self) -> impl Iterator<Item = SegmentPart> {
        let Segment { prefix, branches } = self.segment;
        let branches = branches.iter().map(|rows| (rows, prefix.len()));
        let part = |(rows, start): (&Range<usize>, usize)| SegmentPart {
            row: rows.start - prefix.start,
            start,
            end: start + rows.len(),
        };
        std::iter::once((prefix, 0))
            .chain(branches)
            .filter(|(rows, _)| !rows.is_empty())
            .map(part)
    }

    /// The query blocks of a part, for each query head of this key head.
    fn blocks(&self, part: SegmentPart) -> impl Iterator<Item = (usize, QueryBlock)> {
        let window = self.geometry.params.window;
        let of = move |member| part.blocks(window).map(move |block| (member, block));
        (0..self.geometry.group).flat_map(of)
    }

    /// Transposes a part of the packed keys or values into `transposed`, by position. The prefix stays for every
    /// branch; a branch is overwritten by the next.
    fn transpose(&self, transposed: &mut [f32], source: &[f32], part: SegmentPart) {
        let length = self.length();
        for t in part.start..part.end {
            let head = self.key(source, part.row + (t - part.start));
            for (d, &x) in head.iter().enumerate() {
                transposed[d * length + t] = x;
            }
        }
    }

    /// Key head `kv_head` of packed keys or values, its rows padded: `[rows, padded]`.
    fn gather(&self, source: &[f32]) -> Vec<f32> {
        let padded = self.padded();
        let mut out = vec![0.0; self.segment.rows().len() * padded];
        for (row, out) in out.chunks_exact_mut(padded).enumerate() {
            out[..self.geometry.width].copy_from_slice(self.key(source, row));
        }
        out
    }

    /// Key or value of a row in a packed `[N, KV, hd]`.
    fn key<'a>(&self, source: &'a [f32], row: usize) -> &'a [f32] {
        let Geometry {
            kv_heads, width, ..
        } = self.geometry;
        let row = self.segment.prefix.start + row;
        &source[(row * kv_heads + self.kv_head) * width..][..width]
    }

    /// Index in a packed `[N, H]` of query `row` of head `member` of this group.
    fn query(&self, row: usize, member: usize) -> usize {
        let Geometry {
            kv_heads, group, ..
        } = self.geometry;
        ((self.segment.prefix.start + row) * kv_heads + self.kv_head) * group + member
    }

    /// The query at that index of a packed `[N, H, hd]`.
    fn head<'a>(&self, source: &'a [f32], row: usize, member: usize) -> &'a [f32] {
        let width = self.geometry.width;
        &source[self.query(row, member) * width..][..width]
    }

    /// Head `member` of a block of queries times `factor`, its rows padded: `[queries, padded]`.
    fn block(&self, source: &[f32], block: &QueryBlock, member: usize, factor: f32) -> Vec<f32> {
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

    /// `out = left · rightᵀ` over the block's keys: `left` is `[queries, padded]`, `right` a transposed key head.
    #[inline(always)]
    fn score<A: Arithmetic>(
        &self,
        out: &mut [f32],
        left: &[f32],
        right: &[f32],
        block: &QueryBlock,
    ) {
        out.fill(0.0);
        let left = LeftMatrix::RowMajor {
            data: left,
            stride: self.padded(),
        };
        let right = RightMatrix {
            data: &right[block.keys.start..],
            stride: self.length(),
        };
        let size = GemmSize {
            m: block.queries.len(),
            k: self.geometry.width,
            n: block.stride(),
        };
        add_product::<A>(out, left, right, size);
    }

    /// `weights · keys` for a block: `[queries, padded]`. `weights` is `[queries, stride]`, `keys`
    /// a gathered head.
    #[inline(always)]
    fn weighted_sum<A: Arithmetic>(
        &self,
        weights: &[f32],
        keys: &[f32],
        block: &QueryBlock,
    ) -> Vec<f32> {
        let padded = self.padded();
        let mut out = vec![0.0; block.queries.len() * padded];
        for (span, row) in block.spans() {
            let left = LeftMatrix::RowMajor {
                data: &weights[span.start..],
                stride: block.stride(),
            };
            let right = RightMatrix {
                data: &keys[row * padded..],
                stride: padded,
            };
            let size = GemmSize {
                m: block.queries.len(),
                k: span.len(),
                n: padded,
            };
            add_product::<A>(&mut out, left, right, size);
        }
        out
    }

    /// `out += weightsᵀ · queries` over the block's keys, `out` being a gathered head.
    #[inline(always)]
    fn add_transposed_product<A: Arithmetic>(
        &self,
        out: &mut [f32],
        weights: &[f32],
        queries: &[f32],
        block: &QueryBlock,
    ) {
        let padded = self.padded();
        for (span, row) in block.spans() {
            let left = LeftMatrix::ColumnMajor {
                data: &weights[span.start..],
                stride: block.stride(),
            };
            let right = RightMatrix {
                data: queries,
                stride: padded,
            };
            let size = GemmSize {
                m: span.len(),
                k: block.queries.len(),
                n: padded,
            };
            add_product::<A>(&mut out[row * padded..], left, right, size);
        }
    }

    /// A gathered head without its padding: `[rows, width]`.
    fn unpad(&self, gathered: &[f32]) -> Vec<f32> {
        gathered
            .chunks_exact(self.padded())
            .flat_map(|row| &row[..self.geometry.width])
            .copied()
            .collect()
    }
}

/// exp(score - `shift`) for the `visible` keys, 0 for the others; returns the sum.
#[inline(always)]
fn exponentiate<A: Arithmetic>(scores: &mut [f32], visible: Range<usize>, shift: f32) -> f32 {
    scores[..visible.start].fill(0.0);
    scores[visible.end..].fill(0.0);
    let mut lanes = [0.0; LANES];
    let (chunks, rest) = scores[visible].as_chunks_mut::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            chunk[lane] = flush_to_zero(exp::<A>(chunk[lane] - shift));
            lanes[lane] += chunk[lane];
        }
    }
    for (lane, score) in lanes.iter_mut().zip(rest) {
        *score = flush_to_zero(exp::<A>(*score - shift));
        *lane += *score;
    }
    sum_lanes(lanes)
}

/// The outputs `[rows, group, hd]` and log-sum-exps `[rows, group]` of one task.
pub(super) struct AttentionForward<'a> {
    pub task: &'a HeadTask<'a>,
    pub q: &'a [f32],
    pub k: &'a [f32],
    pub v: &'a [f32],
}

impl Kernel for AttentionForward<'_> {
    type Output = (Vec<f32>, Vec<f32>);

    #[inline(always)]
    fn run<A: Arithmetic>(self) -> Self::Output {
        let task = self.task;
        let Geometry { group, width, .. } = task.geometry;
        let rows = task.segment.rows().len();
        let values = task.gather(self.v);
        let (mut keys, mut score_buffer) = (task.transposed_buffer(), task.score_buffer());
        let mut out = vec![0.0; rows * group * width];
        let mut log_sums = vec![0.0; rows * group];
        for part in task.parts() {
            task.transpose(&mut keys, self.k, part);
            for (member, block) in task.blocks(part) {
                let queries = task.block(self.q, &block, member, task.geometry.params.scale);
                let scores = &mut score_buffer[..block.score_count()];
                task.score::<A>(scores, &queries, &keys, &block);
                let mut sums = [0.0; QUERY_BLOCK];
                let score_rows = scores.chunks_exact_mut(block.stride());
                for (index, (scores, sum)) in score_rows.zip(&mut sums).enumerate() {
                    let visible = block.visible(index);
                    let max = maximum(&scores[visible.clone()]);
                    *sum = exponentiate::<A>(scores, visible, max);
                    log_sums[block.row(index) * group + member] = max + sum.ln();
                }
                let weighted = task.weighted_sum::<A>(scores, &values, &block);
                let weighted = weighted.chunks_exact(task.padded());
                for (index, (weighted, sum)) in weighted.zip(sums).enumerate() {
                    let inverse = 1.0 / sum;
                    let out = &mut out[(block.row(index) * group + member) * width..][..width];
                    for (out, weighted) in out.iter_mut().zip(weighted) {
                        *out = weighted * inverse;
                    }
                }
            }
        }
        (out, log_sums)
    }
}

/// The gradients of one task: dq `[rows, group, hd]`, dk and dv `[rows, hd]`.
pub(super) struct AttentionBackward<'a> {
    pub task: &'a HeadTask<'a>,
    pub qkv: [&'a [f32]; 3],
    pub out: &'a [f32],
    pub log_sums: &'a [f32],
    pub gradient: &'a [f32],
}

impl Kernel for AttentionBackward<'_> {
    type Output = [Vec<f32>; 3];

    /// Dao et al. 2022, algorithm 4. With P the weights and dO the gradient: dV = Pᵀ dO,
    /// dS = P (dO Vᵀ - rowsum(dO O)), dQ = scale dS K, dK = scale dSᵀ Q.
    #[inline(always)]
    fn run<A: Arithmetic>(self) -> Self::Output {
        let task = self.task;
        let Geometry { group, width, .. } = task.geometry;
        let scale = task.geometry.params.scale;
        let [q, k, v] = self.qkv;
        let keys = task.gather(k);
        let mut keys_transposed = task.transposed_buffer();
        let mut values_transposed = task.transposed_buffer();
        let (mut score_buffer, mut d_scores_buffer) = (task.score_buffer(), task.score_buffer());
        let mut dq = vec![0.0; task.segment.rows().len() * group * width];
        let (mut dk, mut dv) = (vec![0.0; keys.len()], vec![0.0; keys.len()]);
        for part in task.parts() {
            task.transpose(&mut keys_transposed, k, part);
            task.transpose(&mut values_transposed, v, part);
            for (member, block) in task.blocks(part) {
                let queries = task.block(q, &block, member, scale);
                let gradients = task.block(self.gradient, &block, member, 1.0);
                let weights = &mut score_buffer[..block.score_count()];
                task.score::<A>(weights, &queries, &keys_transposed, &block);
                let d_scores = &mut d_scores_buffer[..block.score_count()];
                task.score::<A>(d_scores, &gradients, &values_transposed, &block);
                self.softmax_backward::<A>(weights, d_scores, &block, member);
                task.add_transposed_product::<A>(&mut dv, weights, &gradients, &block);
                task.add_transposed_product::<A>(&mut dk, d_scores, &queries, &block);
                let weighted = task.weighted_sum::<A>(d_scores, &keys, &block);
                for (index, weighted) in weighted.chunks_exact(task.padded()).enumerate() {
                    let dq = &mut dq[(block.row(index) * group + member) * width..][..width];
                    for (dq, weighted) in dq.iter_mut().zip(weighted) {
                        *dq = scale * weighted;
                    }
                }
            }
        }
        [dq, task.unpad(&dk), task.unpad(&dv)]
    }
}

impl AttentionBackward<'_> {
    /// Replaces scores by weights P, and dO Vᵀ in `d_scores` by dS.
    #[inline(always)]
    fn softmax_backward<A: Arithmetic>(
        &self,
        scores: &mut [f32],
        d_scores: &mut [f32],
        block: &QueryBlock,
        member: usize,
    ) {
        let rows = scores
            .chunks_exact_mut(block.stride())
            .zip(d_scores.chunks_exact_mut(block.stride()));
        for (index, (scores, d_scores)) in rows.enumerate() {
            let row = block.row(index);
            let log_sum = self.log_sums[self.task.query(row, member)];
            exponentiate::<A>(scores, block.visible(index), log_sum);
            let gradient = self.task.head(self.gradient, row, member);
            let delta = dot::<A>(gradient, self.task.head(self.out, row, member));
            for (d_score, weight) in d_scores.iter_mut().zip(scores) {
                *d_score = flush_to_zero(*weight * (*d_score - delta));
            }
        }
    }
}
