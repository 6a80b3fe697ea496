//! Numbers rounded to the words that are multiplied.

use rayon::prelude::*;

use super::super::vector::{Arithmetic, Kernel, LANES, dispatch};

/// The upper half of `x`, rounded to the nearest even. NaN stays NaN.
#[inline(always)]
fn half(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x40;
    if x.is_nan() { quiet } else { rounded }
}

/// Two numbers as bf16 in one word, the first in the low half.
#[inline(always)]
pub(super) fn pair(first: f32, second: f32) -> u32 {
    half(first) | half(second) << 16
}

/// Rows `[n, width]` as bf16, `depth` words to a row, zeros behind them; as many rows of zeros as make n a
/// multiple of `rows`.
pub(super) fn halves(x: &[f32], width: usize, depth: usize, rows: usize) -> Vec<u32> {
    let count = (x.len() / width).next_multiple_of(rows);
    let mut words = vec![0; count * depth];
    let tasks = words.par_chunks_mut(depth).zip(x.par_chunks(width));
    tasks
        .with_min_len(1 + 16 * 1024 / width)
        .for_each(|(words, x)| dispatch(Halve { x, words }));
    words
}

struct Halve<'a> {
    x: &'a [f32],
    words: &'a mut [u32],
}

impl Kernel for Halve<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let (pairs, rest) = self.x.as_chunks::<2>();
        for (word, &[first, second]) in self.words.iter_mut().zip(pairs) {
            *word = pair(first, second);
        }
        if let [last] = rest {
            self.words[pairs.len()] = pair(*last, 0.0);
        }
    }
}

/// The same of columns: `x` is `[width, n]`, and its columns become the rows.
pub(super) fn halves_across(x: &[f32], width: usize, depth: usize, rows: usize) -> Vec<u32> {
    let columns = x.len() / width;
    let mut words = vec![0; columns.next_multiple_of(rows) * depth];
    words
        .par_chunks_mut(LANES * depth)
        .zip((0..columns).into_par_iter().step_by(LANES))
        .for_each(|(words, first)| {
            dispatch(HalveAcross {
                x,
                columns,
                first,
                depth,
                words,
            });
        });
    words
}

/// 16 columns or fewer, from `first` on.
struct HalveAcross<'a> {
    x: &'a [f32],
    columns: usize,
    first: usize,
    depth: usize,
    words: &'a mut [u32],
}

impl Kernel for HalveAcross<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let count = LANES.min(self.columns - self.first);
        for (k, rows) in self.x.chunks(2 * self.columns).enumerate() {
            let (even, odd) = rows.split_at(self.columns);
            for lane in 0..count {
                let odd = odd.get(self.first + lane).copied().unwrap_or(0.0);
                self.words[lane * self.depth + k] = pair(even[self.first + lane], odd);
            }
        }
    }
}

/// What one of a byte stands for, so that the largest of `x` is 127. NaN where `x` holds what is not finite.
pub(super) fn scale(x: &[f32]) -> f32 {
    let most = x.iter().fold(0f32, |most, x| most.max(x.abs()));
    // The sum of what is not finite is not finite.
    let finite = x.iter().map(|x| x * 0.0).sum::<f32>();
    most / 127.0 + finite
}

/// `x` in steps of `scale`, to the nearest.
#[inline(always)]
pub(super) fn byte(x: f32, scale: f32) -> i8 {
    let steps = if scale > 0.0 { x / scale } else { 0.0 };
    steps.round_ties_even() as i8
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
        for (word, x) in self.words.iter_mut().zip(self.x.chunks(4)) {
            let mut bytes = [0; 4];
            for (to, &x) in bytes.iter_mut().zip(x) {
                *to = byte(x, *self.scale).cast_unsigned() ^ 0x80;
            }
            *word = u32::from_le_bytes(bytes);
        }
    }
}
