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

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use self::panels::{Columns, bytes, floats, pairs};
use self::rows::{Bytes, halves, halves_across};
pub(super) use self::tile::Begin;
use self::tile::{Bf16, F32, Format, Int8, Left, Part, Task};
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

/// `left · right`, `[left.rows, right.columns]` row-major, in f32 or bf16: into `out`, or added to it.
pub(super) fn product(
    left: Factor<'_>,
    right: Factor<'_>,
    precision: Precision,
    (begin, out): (Begin, &mut [f32]),
) {
    assert_eq!(left.columns, right.rows);
    assert_eq!(out.len(), left.rows * right.columns);
    let packed = PackedMatrix::of(right, precision);
    packed.put(left, begin, out);
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

/// Multiplications that are worth a task of their own.
const TASK: usize = 512 * 1024;

/// Rows of the result to a task at most.
const ROWS: usize = 256;

impl PackedMatrix {
    /// Lays out weights `[out, in]` row-major, one below the other: their rows are the columns of the
    /// result.
    pub fn stacked(weights: &[&[f32]], width: usize, precision: Precision) -> Self {
        let rows = weights.concat();
        let weight = Factor::new(&rows, rows.len() / width, width);
        Self::of(weight.transposed(), precision)
    }

    fn of(right: Factor<'_>, precision: Precision) -> Self {
        let width = right.rows;
        let (depth, lines) = match precision {
            Precision::F32 => (width, Lines::F32(floats(right))),
            Precision::Bf16 => {
                let depth = width.div_ceil(2).next_multiple_of(DEEP);
                (depth, Lines::Bf16(pairs(right, depth)))
            }
            Precision::Int8 => {
                let depth = width.div_ceil(4);
                let (lines, columns) = bytes(right, depth);
                (depth, Lines::Int8(lines, columns))
            }
        };
        Self {
            out: right.columns,
            width,
            depth,
            lines,
        }
    }

    /// `x · weightᵀ`: `x` is `[n, in]`, the result `[n, out]`. NaN in a row gives NaN in its result.
    pub fn multiply(&self, x: &[f32]) -> Vec<f32> {
        let rows = x.len() / self.width;
        let mut out = vec![0.0; rows * self.out];
        self.put(Factor::new(x, rows, self.width), Begin::Anew, &mut out);
        out
    }

    /// `left · self` into `out`, or, unless bytes are multiplied, added to it.
    fn put(&self, left: Factor<'_>, begin: Begin, out: &mut [f32]) {
        match &self.lines {
            Lines::F32(lines) => {
                let words = left.numbers;
                let left = if left.across {
                    let stride = left.rows;
                    Left::Across { words, stride }
                } else {
                    let stride = left.columns;
                    Left::Rows { words, stride }
                };
                self.run((&F32, begin), left, lines, out);
            }
            Lines::Bf16(lines) => self.put_halves(left, lines, begin, out),
            Lines::Int8(lines, columns) => {
                assert!(
                    !left.across && begin == Begin::Anew,
                    "bytes are for writing"
                );
                let x = Bytes::of(left.numbers, self.width, self.depth);
                let rows = &x.scales;
                let format = Int8 { rows, columns };
                self.run((&format, begin), self.rows(&x.words), lines, out);
            }
        }
    }

    fn put_halves(&self, left: Factor<'_>, lines: &[Line<u32>], begin: Begin, out: &mut [f32]) {
        let round = if left.across { halves_across } else { halves };
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if let Some(tiles) = amx::Tiles::here() {
            let x = round(left.numbers, self.width, self.depth, amx::ROWS);
            let panels = amx::Panels {
                lines,
                depth: self.depth,
            };
            self.spread(out, |part| tiles.multiply(&x, panels, begin, part));
            return;
        }
        let x = round(left.numbers, self.width, self.depth, 1);
        self.run((&Bf16, begin), self.rows(&x), lines, out);
    }

    fn rows<'a>(&self, words: &'a [u32]) -> Left<'a, u32> {
        let stride = self.depth;
        Left::Rows { words, stride }
    }

    fn run<F: Format>(
        &self,
        (format, begin): (&F, Begin),
        left: Left<'_, F::Word>,
        lines: &[Line<F::Word>],
        out: &mut [f32],
    ) {
        let depth = self.depth;
        self.spread(out, |part| {
            dispatch(Task {
                format,
                begin,
                left,
                lines,
                depth,
                part,
            });
        });
    }

    /// Cuts `out` into as many parts as are worth a task.
    fn spread(&self, out: &mut [f32], work: impl Fn(Part<'_>) + Sync) {
        let rows = out.len() / self.out.max(1);
        let tasks = (rows.min(ROWS) * self.out * self.width).div_ceil(TASK);
        let panels = self.out.div_ceil(LANES).max(1);
        // Whole groups of panels, as the kernels take them.
        let each = panels.div_ceil(tasks.max(1)).next_multiple_of(tile::GROUP);
        let parts = tile::split(out, self.out.max(1), (ROWS, each * LANES));
        if parts.len() == 1 {
            parts.into_iter().for_each(&work);
        } else {
            parts.into_par_iter().for_each(&work);
        }
    }
}

#[cfg(test)]
mod tests;
