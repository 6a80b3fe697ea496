//! Packing of the left operand: rounding to bf16, quantisation to int8.

use rayon::prelude::*;

use super::transpose::{Square, transpose};
use super::{MatrixRef, parallel_fill};
use crate::simd::{Arithmetic, Kernel, LANES, ROUND, dispatch};

/// Bits of `x` in bf16, rounded to nearest even. NaN stays NaN.
#[inline(always)]
pub(crate) fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x40;
    if x.is_nan() {
        quiet as u16
    } else {
        rounded as u16
    }
}

/// The first 32 values as 16 words of two bf16, zero-padded.
#[inline(always)]
pub(super) fn bf16_words(values: &[f32]) -> [u32; LANES] {
    let (padded, mut words) = (zero_padded::<{ 2 * LANES }>(values), [0; LANES]);
    for k in 0..LANES {
        words[k] = bf16_pair(padded[2 * k], padded[2 * k + 1]);
    }
    words
}

/// The first `N` values, zero-padded.
#[inline(always)]
pub(super) fn zero_padded<const N: usize>(values: &[f32]) -> [f32; N] {
    if let Some(values) = values.first_chunk() {
        return *values;
    }
    let mut padded = [0.0; N];
    padded[..values.len()].copy_from_slice(values);
    padded
}

/// Two values as bf16 in one word, the first in the low half.
#[inline(always)]
pub(super) fn bf16_pair(first: f32, second: f32) -> u32 {
    u32::from(bf16_bits(first)) | u32::from(bf16_bits(second)) << 16
}

/// Memory order of packed bf16 rows.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum RowLayout {
    /// Row after row.
    RowMajor,
    /// Tiles of 16 rows by 16 words, row-major inside; the tiles of the same 16 rows follow one another. This is the
    /// order in which AMX loads tile registers.
    AmxTiles,
}

/// A left operand as bf16: `depth` words per row, a multiple of 16, zero-padded, and zero rows up to a multiple of
/// `row_multiple`, itself a multiple of 16.
pub(super) fn pack_bf16_rows(
    left: MatrixRef<'_>,
    depth: usize,
    layout: RowLayout,
    row_multiple: usize,
) -> Vec<u32> {
    let groups = left.rows.next_multiple_of(row_multiple) / LANES;
    parallel_fill(groups, LANES * depth, 16 * 1024, |group, words| {
        let first = group * LANES;
        if first < left.rows {
            dispatch(PackBf16Rows {
                left,
                first,
                depth,
                layout,
                words,
            });
        }
    })
}

/// At most 16 rows of an operand, from `first` on.
struct PackBf16Rows<'a> {
    left: MatrixRef<'a>,
    first: usize,
    depth: usize,
    layout: RowLayout,
    words: &'a mut [u32],
}

impl Kernel for PackBf16Rows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let count = LANES.min(self.left.rows - self.first);
        for tile in 0..self.depth / LANES {
            let words = if self.left.transposed {
                self.transposed_tile(tile, count)
            } else {
                self.row_major_tile(tile, count)
            };
            for (row, words) in words[..count].iter().enumerate() {
                let at = match self.layout {
                    RowLayout::RowMajor => row * self.depth + tile * LANES,
                    RowLayout::AmxTiles => (tile * LANES + row) * LANES,
                };
                self.words[at..at + LANES].copy_from_slice(words);
            }
        }
    }
}

impl PackBf16Rows<'_> {
    /// Words `16 · tile ..` of the rows of a row-major operand.
    #[inline(always)]
    fn row_major_tile(&self, tile: usize, count: usize) -> Square<u32> {
        let (values, width) = (self.left.values, self.left.columns);
        let mut words = [[0; LANES]; LANES];
        for (row, words) in words[..count].iter_mut().enumerate() {
            let x = &values[(self.first + row) * width..][..width];
            *words = bf16_words(x.get(tile * 2 * LANES..).unwrap_or_default());
        }
        words
    }

    /// Words `16 · tile ..` of the rows of a transposed operand.
    #[inline(always)]
    fn transposed_tile(&self, tile: usize, count: usize) -> Square<u32> {
        let (values, stride) = (self.left.values, self.left.rows);
        let mut columns = [[0; LANES]; LANES];
        let column_pairs = values.chunks(2 * stride).skip(tile * LANES);
        for (words, column_pair) in columns.iter_mut().zip(column_pairs) {
            let (even, odd) = column_pair.split_at(stride);
            let (even, odd) = (&even[self.first..], odd.get(self.first..));
            let odd = odd.filter(|odd| !odd.is_empty());
            if let (Some(even), Some(odd)) = (even.first_chunk(), odd.and_then(|o| o.first_chunk()))
            {
                *words = bf16_pairs(even, odd);
            } else {
                for lane in 0..count {
                    words[lane] = bf16_pair(even[lane], odd.map_or(0.0, |odd| odd[lane]));
                }
            }
        }
        transpose(&mut columns);
        columns
    }
}

#[inline(always)]
fn bf16_pairs(even: &[f32; LANES], odd: &[f32; LANES]) -> [u32; LANES] {
    let mut words = [0; LANES];
    for lane in 0..LANES {
        words[lane] = bf16_pair(even[lane], odd[lane]);
    }
    words
}

/// Quantisation step of `x`, such that its largest magnitude is 127. NaN if `x` has a value that is not finite.
#[inline(always)]
pub(super) fn int8_scale(x: &[f32]) -> f32 {
    // Zero times a value that is not finite is NaN.
    let (mut max, mut nan) = ([0f32; LANES], [0f32; LANES]);
    for x in x.chunks(LANES) {
        for (lane, x) in x.iter().enumerate() {
            max[lane] = if x.abs() > max[lane] {
                x.abs()
            } else {
                max[lane]
            };
            nan[lane] += x * 0.0;
        }
    }
    max.into_iter().fold(0f32, f32::max) / 127.0 + nan.iter().sum::<f32>()
}

/// `1 / scale`, or 0 if the scale is 0 or NaN.
#[inline(always)]
pub(super) fn reciprocal(scale: f32) -> f32 {
    if scale > 0.0 { 1.0 / scale } else { 0.0 }
}

/// `x` in quantisation steps, rounded to nearest even, given the reciprocal of the scale.
#[inline(always)]
pub(super) fn quantise(x: f32, reciprocal: f32) -> i8 {
    ((x * reciprocal + ROUND).to_bits() as u8).cast_signed()
}

/// The first 64 values as 16 words of four bytes, the first in the lowest byte, zero-padded.
#[inline(always)]
pub(super) fn int8_words(values: &[f32], reciprocal: f32) -> [u32; LANES] {
    let (padded, mut bytes) = (zero_padded::<{ 4 * LANES }>(values), [0; 4 * LANES]);
    for (to, &x) in bytes.iter_mut().zip(&padded) {
        *to = quantise(x, reciprocal).cast_unsigned();
    }
    let (quads, _) = bytes.as_chunks::<4>();
    let mut words = [0; LANES];
    for (word, &quad) in words.iter_mut().zip(quads) {
        *word = u32::from_le_bytes(quad);
    }
    words
}

/// Left operand as unsigned bytes with zero point 128, four to a word.
pub(super) struct QuantisedRows {
    /// `depth` words per row.
    pub words: Vec<u32>,
    /// Value of one quantisation step, per row.
    pub scales: Vec<f32>,
}

impl QuantisedRows {
    /// Quantises rows `[n, width]`. Padding bytes add nothing, since the panels have zeros there.
    pub fn quantise(x: &[f32], width: usize, depth: usize) -> Self {
        let count = x.len() / width;
        let (mut words, mut scales) = (vec![0; count * depth], vec![0.0; count]);
        words
            .par_chunks_mut(depth)
            .zip(scales.par_iter_mut())
            .zip(x.par_chunks(width))
            .with_min_len(1 + 16 * 1024 / width)
            .for_each(|((words, scale), x)| dispatch(QuantiseRow { x, words, scale }));
        Self { words, scales }
    }
}

struct QuantiseRow<'a> {
    x: &'a [f32],
    words: &'a mut [u32],
    scale: &'a mut f32,
}

impl Kernel for QuantiseRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        *self.scale = int8_scale(self.x);
        let reciprocal = reciprocal(*self.scale);
        for (words, x) in self.words.chunks_mut(LANES).zip(self.x.chunks(4 * LANES)) {
            for (word, quad) in words.iter_mut().zip(int8_words(x, reciprocal)) {
                *word = quad ^ 0x8080_8080;
            }
        }
    }
}
