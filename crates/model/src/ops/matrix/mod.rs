//! Products of matrices: the right factor laid out in panels, the left in rows of the same kind of words.
//!
//! A panel is 16 columns of the result; it is a sequence of lines, and a line holds one word for each of the
//! 16 columns: an `f32`, two bf16 or four `i8` that follow one another in the inner dimension. A
//! [`PackedMatrix`] is laid out once for many products, as decoding makes them; [`product()`] lays both
//! factors out for one. Every element is summed in the order of the inner dimension, so it depends neither
//! on the other rows nor on the number of threads.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
mod panels;
mod rows;
mod tile;
mod transpose;

use std::mem::MaybeUninit;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use self::panels::{Columns, bytes, floats, pairs};
use self::rows::{Bytes, Layout, halves};
pub(super) use self::tile::Begin;
use self::tile::{Bf16, F32, Format, Int8, Left, Part, Target, Task};
use super::vector::{LANES, Line, dispatch};

/// How the factors of a product are kept. Sums are taken in `f32`, or exactly where bytes are multiplied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// As they are.
    #[default]
    F32,
    /// The upper half of an `f32`, rounded to the nearest even.
    Bf16,
    /// Bytes: a scale for every column of the right factor, and one for every row of the left.
    Int8,
}

impl From<settings::DtypeSetting> for Precision {
    fn from(setting: settings::DtypeSetting) -> Self {
        match setting {
            settings::DtypeSetting::F32 => Self::F32,
            settings::DtypeSetting::Bf16 => Self::Bf16,
        }
    }
}

impl From<settings::PrecisionSetting> for Precision {
    fn from(setting: settings::PrecisionSetting) -> Self {
        match setting {
            settings::PrecisionSetting::F32 => Self::F32,
            settings::PrecisionSetting::Bf16 => Self::Bf16,
            settings::PrecisionSetting::Int8 => Self::Int8,
        }
    }
}

/// A matrix as it lies in memory, row-major, or across: then its columns lie there as rows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Factor<'a> {
    pub numbers: &'a [f32],
    pub rows: usize,
    pub columns: usize,
    pub across: bool,
}

impl<'a> Factor<'a> {
    pub fn new(numbers: &'a [f32], rows: usize, columns: usize) -> Self {
        assert_eq!(numbers.len(), rows * columns);
        Self {
            numbers,
            rows,
            columns,
            across: false,
        }
    }

    /// Rows and columns exchanged; nothing is moved.
    pub fn transposed(self) -> Self {
        Self {
            numbers: self.numbers,
            rows: self.columns,
            columns: self.rows,
            across: !self.across,
        }
    }
}

/// `left · right`, `[left.rows, right.columns]` row-major, in f32 or bf16.
pub(super) fn product(left: Factor<'_>, right: Factor<'_>, precision: Precision) -> Vec<f32> {
    let packed = PackedMatrix::of(right, precision);
    packed.product(&PackedRows::of(left, precision))
}

/// A left factor, ready for products with packed matrices of the same precision.
pub(super) struct PackedRows<'a> {
    rows: usize,
    width: usize,
    words: Words<'a>,
}

enum Words<'a> {
    F32(Left<'a, f32>),
    /// As [`layout`] says.
    Bf16(Vec<u32>),
    Int8(Bytes),
}

impl<'a> PackedRows<'a> {
    pub fn of(left: Factor<'a>, precision: Precision) -> Self {
        let (numbers, depth) = (left.numbers, depth(left.columns, precision));
        let words = match precision {
            Precision::F32 if left.across => Words::F32(Left::Across {
                words: numbers,
                stride: left.rows,
            }),
            Precision::F32 => Words::F32(Left::Rows {
                words: numbers,
                stride: left.columns,
            }),
            Precision::Bf16 => Words::Bf16(halves(left, depth, layout(), BLOCK)),
            Precision::Int8 => {
                assert!(!left.across, "bytes are for writing");
                Words::Int8(Bytes::of(numbers, left.columns, depth))
            }
        };
        Self {
            rows: left.rows,
            width: left.columns,
            words,
        }
    }
}

/// A vector of so many chunks, filled by all threads when there are more than `few` numbers. `fill` finds zeros.
fn filled<T: Copy + Default + Send>(
    chunks: usize,
    chunk: usize,
    few: usize,
    fill: impl Fn(usize, &mut [T]) + Sync,
) -> Vec<T> {
    let mut numbers = Vec::with_capacity(chunks * chunk);
    numbers.spare_capacity_mut()[..chunks * chunk]
        .par_chunks_mut(chunk.max(1))
        .enumerate()
        .with_min_len(1 + few / chunk.max(1))
        .for_each(|(index, memory)| {
            memory.fill(MaybeUninit::new(T::default()));
            #[expect(
                unsafe_code,
                reason = "one thread that writes all zeros costs as much as the rest"
            )]
            // SAFETY: it was filled just now.
            fill(index, unsafe { memory.assume_init_mut() });
        });
    #[expect(unsafe_code, reason = "as above")]
    // SAFETY: so much was asked for, and every chunk was filled.
    unsafe {
        numbers.set_len(chunks * chunk);
    }
    numbers
}

/// Words to a row, which are the lines to a panel, of so many numbers.
fn depth(width: usize, precision: Precision) -> usize {
    match precision {
        Precision::F32 => width,
        Precision::Bf16 => width.div_ceil(2).next_multiple_of(DEEP),
        Precision::Int8 => width.div_ceil(4),
    }
}

/// How rows of bf16 lie on this machine.
fn layout() -> Layout {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if amx::Tiles::here().is_some() {
        return Layout::Tiles;
    }
    Layout::Rows
}

/// A right factor `[in, out]`, ready for products with rows of `in` numbers.
pub struct PackedMatrix {
    /// Columns of the result.
    out: usize,
    /// The inner dimension.
    width: usize,
    /// Lines to a panel.
    depth: usize,
    lines: Lines,
}

enum Lines {
    F32(Vec<Line<f32>>),
    Bf16(Vec<Line<u32>>),
    Int8(Vec<Line<u32>>, Vec<Columns>),
}

/// Lines of bf16 to a panel come in multiples of this: a whole tile of AMX.
const DEEP: usize = 16;

/// Rows of bf16 come in multiples of this: two tiles. Parts of a product begin at such a row.
const BLOCK: usize = 32;

/// Multiplications that are worth a task of their own.
const TASK: usize = 512 * 1024;

/// Tasks for every thread, so that one that is late does not hold up the others.
const SHARE: usize = 4;

/// Rows of the result to a task, at most: as many as stay near while panel after panel meets them.
const HEIGHT: usize = 256;

/// On which threads a product is computed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Threads {
    /// This one alone: for tasks that share their work out otherwise.
    This,
    /// All there are, if it is worth it.
    All,
}

impl PackedMatrix {
    /// Lays out weights `[out, in]` row-major, one below the other: their rows are the columns of the
    /// result.
    pub fn stacked(weights: &[&[f32]], width: usize, precision: Precision) -> Self {
        let rows = weights.concat();
        let weight = Factor::new(&rows, rows.len() / width, width);
        Self::of(weight.transposed(), precision)
    }

    /// Lays out a factor `[in, out]`.
    pub(super) fn of(right: Factor<'_>, precision: Precision) -> Self {
        let width = right.rows;
        let depth = depth(width, precision);
        let lines = match precision {
            Precision::F32 => Lines::F32(floats(right)),
            Precision::Bf16 => Lines::Bf16(pairs(right, depth)),
            Precision::Int8 => {
                let (lines, columns) = bytes(right, depth);
                Lines::Int8(lines, columns)
            }
        };
        Self {
            out: right.columns,
            width,
            depth,
            lines,
        }
    }

    fn precision(&self) -> Precision {
        match self.lines {
            Lines::F32(_) => Precision::F32,
            Lines::Bf16(_) => Precision::Bf16,
            Lines::Int8(..) => Precision::Int8,
        }
    }

    /// `x · weightᵀ`: `x` is `[n, in]`, the result `[n, out]`. NaN in a row gives NaN in its result.
    pub fn multiply(&self, x: &[f32]) -> Vec<f32> {
        let x = Factor::new(x, x.len() / self.width, self.width);
        self.product(&PackedRows::of(x, self.precision()))
    }

    /// `left · self`.
    pub(super) fn product(&self, left: &PackedRows<'_>) -> Vec<f32> {
        let count = left.rows * self.out;
        if self.width == 0 {
            return vec![0.0; count];
        }
        let mut out = Vec::with_capacity(count);
        let memory = &mut out.spare_capacity_mut()[..count];
        self.write(Threads::All, left, Target::into(memory));
        #[expect(
            unsafe_code,
            reason = "zeros written before the numbers cost a tenth of a product"
        )]
        // SAFETY: so much was asked for, and a product writes every number of its target.
        unsafe {
            out.set_len(count);
        }
        out
    }

    /// `left · self` into `out`, or, unless bytes are multiplied, added to it.
    pub(super) fn put(
        &self,
        threads: Threads,
        left: &PackedRows<'_>,
        (begin, out): (Begin, &mut [f32]),
    ) {
        if self.width == 0 && begin == Begin::Anew {
            out.fill(0.0);
        }
        self.write(threads, left, Target::over(out, begin));
    }

    fn write(&self, threads: Threads, left: &PackedRows<'_>, target: Target<'_>) {
        assert_eq!(left.width, self.width);
        assert_eq!(target.len(), left.rows * self.out);
        let begin = target.begin;
        let depth = self.depth;
        match (&self.lines, &left.words) {
            (Lines::F32(lines), Words::F32(left)) => {
                self.run((&F32, threads), *left, lines, target);
            }
            (Lines::Bf16(lines), Words::Bf16(words)) => {
                #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
                if let Some(tiles) = amx::Tiles::here() {
                    let panels = amx::Panels { lines, depth };
                    self.spread((threads, (BLOCK, amx::GROUP)), target, |part| {
                        tiles.multiply(words, panels, begin, part);
                    });
                    return;
                }
                let left = Left::Rows {
                    words,
                    stride: depth,
                };
                self.run((&Bf16, threads), left, lines, target);
            }
            (Lines::Int8(lines, columns), Words::Int8(Bytes { words, scales })) => {
                assert!(begin == Begin::Anew, "bytes are for writing");
                let format = Int8 {
                    rows: scales,
                    columns,
                };
                let left = Left::Rows {
                    words,
                    stride: depth,
                };
                self.run((&format, threads), left, lines, target);
            }
            _ => unreachable!("factors of one product have one precision"),
        }
    }

    fn run<F: Format>(
        &self,
        (format, threads): (&F, Threads),
        left: Left<'_, F::Word>,
        lines: &[Line<F::Word>],
        target: Target<'_>,
    ) {
        let (depth, begin) = (self.depth, target.begin);
        self.spread(
            (threads, (tile::block::<F>(), tile::GROUP)),
            target,
            |part| {
                dispatch(Task {
                    format,
                    begin,
                    left,
                    lines,
                    depth,
                    part,
                });
            },
        );
    }

    /// Cuts the target into as many parts as are worth a task, of whole blocks of rows and groups of panels.
    fn spread(
        &self,
        (threads, (block, group)): (Threads, (usize, usize)),
        target: Target<'_>,
        work: impl Fn(Part<'_>) + Sync,
    ) {
        let rows = target.len() / self.out.max(1);
        let threads = match threads {
            Threads::This => 1,
            Threads::All => rayon::current_num_threads(),
        };
        let tasks = rows * self.out * self.width / TASK;
        let tasks = tasks.clamp(1, if threads == 1 { 1 } else { SHARE * threads });
        let height = (rows / tasks + block / 2) / block * block;
        let height = height.clamp(block, HEIGHT / block * block);
        // Every part lays out its rows, where they lie across: panels are shared out when rows are too few.
        let below = rows.div_ceil(height).max(1);
        let beside = if below < 2 * threads {
            tasks.div_ceil(below)
        } else {
            1
        };
        let panels = self.out.div_ceil(LANES).max(1);
        let wide = panels.div_ceil(beside).next_multiple_of(group);
        let parts = target.split(self.out.max(1), (height, wide * LANES));
        if tasks == 1 {
            parts.into_iter().for_each(&work);
        } else {
            parts.into_par_iter().for_each(&work);
        }
    }
}

#[cfg(test)]
mod tests;
