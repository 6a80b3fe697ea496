//! Numbers rounded to the words that are multiplied.

use rayon::prelude::*;

use super::super::vector::{Arithmetic, Kernel, LANES, ROUND, dispatch};
use super::transpose::{Square, transpose};
use super::{Factor, filled};

/// The upper half of `x`, rounded to the nearest even. NaN stays NaN.
#[inline(always)]
fn half(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x40;
    if x.is_nan() { quiet } else { rounded }
}

/// The first 32 numbers as 16 words, zeros where there are fewer.
#[inline(always)]
pub(super) fn pairs_of(numbers: &[f32]) -> [u32; LANES] {
    let (near, mut words) = (near::<{ 2 * LANES }>(numbers), [0; LANES]);
    for k in 0..LANES {
        words[k] = pair(near[2 * k], near[2 * k + 1]);
    }
    words
}

/// The first `N` numbers, zeros where there are fewer.
#[inline(always)]
pub(super) fn near<const N: usize>(numbers: &[f32]) -> [f32; N] {
    if let Some(numbers) = numbers.first_chunk() {
        return *numbers;
    }
    let mut near = [0.0; N];
    near[..numbers.len()].copy_from_slice(numbers);
    near
}

/// Two numbers as bf16 in one word, the first in the low half.
#[inline(always)]
pub(super) fn pair(first: f32, second: f32) -> u32 {
    half(first) | half(second) << 16
}

/// How the words of bf16 lie that are multiplied.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// One row after the other.
    Rows,
    /// 16 words of each of 16 rows one after the other, and so the next 16 words of the same rows: as tile
    /// registers take them.
    Tiles,
}

/// A left factor as bf16, `depth` words to a row, a multiple of 16, zeros behind them; as many rows of zeros
/// as make their number a multiple of `rows`, which is one of 16.
pub(super) fn halves(left: Factor<'_>, depth: usize, layout: Layout, rows: usize) -> Vec<u32> {
    let groups = left.rows.next_multiple_of(rows) / LANES;
    filled(groups, LANES * depth, 16 * 1024, |group, words| {
        let first = group * LANES;
        if first < left.rows {
            dispatch(Halve {
                left,
                first,
                depth,
                layout,
                words,
            });
        }
    })
}

/// 16 rows of a factor or fewer, from `first` on.
struct Halve<'a> {
    left: Factor<'a>,
    first: usize,
    depth: usize,
    layout: Layout,
    words: &'a mut [u32],
}

impl Kernel for Halve<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let count = LANES.min(self.left.rows - self.first);
        for tile in 0..self.depth / LANES {
            let words = if self.left.across {
                self.columns(tile, count)
            } else {
                self.rows(tile, count)
            };
            for (row, words) in words[..count].iter().enumerate() {
                let at = match self.layout {
                    Layout::Rows => row * self.depth + tile * LANES,
                    Layout::Tiles => (tile * LANES + row) * LANES,
                };
                self.words[at..at + LANES].copy_from_slice(words);
            }
        }
    }
}

impl Halve<'_> {
    #[inline(always)]
    fn rows(&self, tile: usize, count: usize) -> Square<u32> {
        let (numbers, width) = (self.left.numbers, self.left.columns);
        let mut words = [[0; LANES]; LANES];
        for (row, words) in words[..count].iter_mut().enumerate() {
            let x = &numbers[(self.first + row) * width..][..width];
            *words = pairs_of(x.get(tile * 2 * LANES..).unwrap_or_default());
        }
        words
    }

    /// Where the factor lies across.
    #[inline(always)]
    fn columns(&self, tile: usize, count: usize) -> Square<u32> {
        let (numbers, stride) = (self.left.numbers, self.left.rows);
        let mut across = [[0; LANES]; LANES];
        let lines = numbers.chunks(2 * stride).skip(tile * LANES);
        for (words, two) in across.iter_mut().zip(lines) {
            let (even, odd) = two.split_at(stride);
            let (even, odd) = (&even[self.first..], odd.get(self.first..));
            let odd = odd.filter(|odd| !odd.is_empty());
            if let (Some(even), Some(odd)) = (even.first_chunk(), odd.and_then(|o| o.first_chunk()))
            {
                *words = pairs(even, odd);
            } else {
                for lane in 0..count {
                    words[lane] = pair(even[lane], odd.map_or(0.0, |odd| odd[lane]));
                }
            }
        }
        transpose(&mut across);
        across
    }
}

#[inline(always)]
fn pairs(even: &[f32; LANES], odd: &[f32; LANES]) -> [u32; LANES] {
    let mut words = [0; LANES];
    for lane in 0..LANES {
        words[lane] = pair(even[lane], odd[lane]);
    }
    words
}

/// What one of a byte stands for, so that the largest of `x` is 127. NaN where `x` holds what is not finite.
#[inline(always)]
pub(super) fn scale(x: &[f32]) -> f32 {
    // The sum of what is not finite, times zero, is not finite.
    let (mut most, mut finite) = ([0f32; LANES], [0f32; LANES]);
    for x in x.chunks(LANES) {
        for (lane, x) in x.iter().enumerate() {
            most[lane] = if x.abs() > most[lane] {
                x.abs()
            } else {
                most[lane]
            };
            finite[lane] += x * 0.0;
        }
    }
    most.into_iter().fold(0f32, f32::max) / 127.0 + finite.iter().sum::<f32>()
}

/// What numbers are multiplied by to be steps of `scale`; nothing, where there is none.
#[inline(always)]
pub(super) fn inverse(scale: f32) -> f32 {
    if scale > 0.0 { 1.0 / scale } else { 0.0 }
}

/// `x` in steps, of which one has this `inverse`, to the nearest.
#[inline(always)]
pub(super) fn byte(x: f32, inverse: f32) -> i8 {
    ((x * inverse + ROUND).to_bits() as u8).cast_signed()
}

/// The first 64 numbers as words of four bytes, zeros where there are fewer.
#[inline(always)]
pub(super) fn quads(numbers: &[f32], inverse: f32) -> [u32; LANES] {
    let (near, mut bytes) = (near::<{ 4 * LANES }>(numbers), [0; 4 * LANES]);
    for (to, &x) in bytes.iter_mut().zip(&near) {
        *to = byte(x, inverse).cast_unsigned();
    }
    let (quads, _) = bytes.as_chunks::<4>();
    let mut words = [0; LANES];
    for (word, &quad) in words.iter_mut().zip(quads) {
        *word = u32::from_le_bytes(quad);
    }
    words
}

/// Rows as bytes from 128 on, four to a word.
pub(super) struct Bytes {
    /// `depth` words to a row.
    pub words: Vec<u32>,
    /// What a step of each row stands for.
    pub scales: Vec<f32>,
}

impl Bytes {
    /// Of rows `[n, width]`; what is behind them counts nothing, since the matrix has zeros there.
    pub fn of(x: &[f32], width: usize, depth: usize) -> Self {
        let count = x.len() / width;
        let (mut words, mut scales) = (vec![0; count * depth], vec![0.0; count]);
        words
            .par_chunks_mut(depth)
            .zip(scales.par_iter_mut())
            .zip(x.par_chunks(width))
            .with_min_len(1 + 16 * 1024 / width)
            .for_each(|((words, scale), x)| dispatch(Quantise { x, words, scale }));
        Self { words, scales }
    }
}

struct Quantise<'a> {
    x: &'a [f32],
    words: &'a mut [u32],
    scale: &'a mut f32,
}

impl Kernel for Quantise<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        *self.scale = scale(self.x);
        let inverse = inverse(*self.scale);
        for (words, x) in self.words.chunks_mut(LANES).zip(self.x.chunks(4 * LANES)) {
            for (word, quad) in words.iter_mut().zip(quads(x, inverse)) {
                *word = quad ^ 0x8080_8080;
            }
        }
    }
}
