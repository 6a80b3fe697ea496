//! The product of some rows with some panels of a packed matrix, one block of sums in registers at a time.

use std::marker::PhantomData;
use std::ops::Range;

use super::super::vector::{Arithmetic, Kernel, LANES, Line};
use super::Columns;

/// Panels that are multiplied together where registers are wide.
pub(super) const GROUP: usize = 3;

/// A kind of word, and how it is multiplied.
pub(super) trait Format: Sync {
    type Word: Copy + Send + Sync;
    type Sum<A: Arithmetic>: Copy;

    /// Lines of a panel that are taken together, so that they stay near while all rows meet them.
    const LINES: usize;

    /// The sums to begin with, given what is already there.
    fn begin<A: Arithmetic>(numbers: &[f32; LANES]) -> Self::Sum<A>;

    fn accumulate<A: Arithmetic>(
        x: Self::Word,
        line: &Line<Self::Word>,
        sum: Self::Sum<A>,
    ) -> Self::Sum<A>;

    /// The sums of `row` in the 16 columns of `panel`, as numbers.
    fn finish<A: Arithmetic>(&self, sum: Self::Sum<A>, row: usize, panel: usize) -> [f32; LANES];
}

pub(super) struct F32;

impl Format for F32 {
    type Word = f32;
    type Sum<A: Arithmetic> = A::Vector;

    const LINES: usize = 192;

    #[inline(always)]
    fn begin<A: Arithmetic>(numbers: &[f32; LANES]) -> A::Vector {
        A::load(numbers)
    }

    #[inline(always)]
    fn accumulate<A: Arithmetic>(x: f32, line: &Line<f32>, sum: A::Vector) -> A::Vector {
        A::accumulate(x, A::load(&line.0), sum)
    }

    #[inline(always)]
    fn finish<A: Arithmetic>(&self, sum: A::Vector, _: usize, _: usize) -> [f32; LANES] {
        let mut numbers = [0.0; LANES];
        A::store(sum, &mut numbers);
        numbers
    }
}

pub(super) struct Bf16;

impl Format for Bf16 {
    type Word = u32;
    type Sum<A: Arithmetic> = A::Vector;

    const LINES: usize = F32::LINES;

    #[inline(always)]
    fn begin<A: Arithmetic>(numbers: &[f32; LANES]) -> A::Vector {
        A::load(numbers)
    }

    #[inline(always)]
    fn accumulate<A: Arithmetic>(x: u32, line: &Line<u32>, sum: A::Vector) -> A::Vector {
        A::dot_pairs(x, line, sum)
    }

    #[inline(always)]
    fn finish<A: Arithmetic>(&self, sum: A::Vector, row: usize, panel: usize) -> [f32; LANES] {
        F32.finish::<A>(sum, row, panel)
    }
}

pub(super) struct Int8<'a> {
    /// What a step of each row stands for.
    pub rows: &'a [f32],
    pub columns: &'a [Columns],
}

impl Format for Int8<'_> {
    type Word = u32;
    type Sum<A: Arithmetic> = A::Counts;

    /// Sums of bytes begin at nothing: all lines at once.
    const LINES: usize = usize::MAX;

    #[inline(always)]
    fn begin<A: Arithmetic>(_: &[f32; LANES]) -> A::Counts {
        A::zero_counts()
    }

    #[inline(always)]
    fn accumulate<A: Arithmetic>(x: u32, line: &Line<u32>, sum: A::Counts) -> A::Counts {
        A::dot_quads(x, line, sum)
    }

    #[inline(always)]
    fn finish<A: Arithmetic>(&self, sum: A::Counts, row: usize, panel: usize) -> [f32; LANES] {
        let counts = A::counts(sum);
        let Columns { scales, excess } = &self.columns[panel];
        let scale = self.rows[row];
        let mut numbers = [0.0; LANES];
        for lane in 0..LANES {
            numbers[lane] = (counts[lane] - excess[lane]) as f32 * (scale * scales[lane]);
        }
        numbers
    }
}

/// Some neighbouring rows of some neighbouring columns of a row-major matrix. Its parts are written by
/// different threads at once, no number by two of them.
pub(super) struct Part<'a> {
    first: *mut f32,
    stride: usize,
    pub rows: Range<usize>,
    pub columns: Range<usize>,
    matrix: PhantomData<&'a mut [f32]>,
}

#[expect(unsafe_code, reason = "columns of a matrix are not slices of it")]
// SAFETY: a part is the only one that reaches its numbers, as `split` makes them, and f32 may be sent.
unsafe impl Send for Part<'_> {}

/// The matrix in parts of so many neighbouring rows and columns, the last maybe fewer.
pub(super) fn split(
    matrix: &mut [f32],
    stride: usize,
    (rows, columns): (usize, usize),
) -> Vec<Part<'_>> {
    let height = matrix.len().checked_div(stride).unwrap_or(0);
    assert_eq!(matrix.len(), height * stride, "whole rows");
    let first = matrix.as_mut_ptr();
    let across = move |start: usize| (start..(start + columns).min(stride), start);
    (0..stride)
        .step_by(columns)
        .map(across)
        .flat_map(|(columns, _)| {
            (0..height).step_by(rows).map(move |start| Part {
                first,
                stride,
                rows: start..(start + rows).min(height),
                columns: columns.clone(),
                matrix: PhantomData,
            })
        })
        .collect()
}

impl Part<'_> {
    /// Of a row of the matrix the columns of the part from `column` on, at most `count` of them.
    #[inline(always)]
    pub fn of_row(&mut self, row: usize, column: usize, count: usize) -> &mut [f32] {
        assert!(self.rows.contains(&row) && self.columns.start <= column);
        assert!(column <= self.columns.end);
        let count = count.min(self.columns.end - column);
        #[expect(unsafe_code, reason = "columns of a matrix are not slices of it")]
        // SAFETY: the numbers lie in a row and in columns of this part, which no other part reaches; the
        // borrow of the part keeps them from being lent twice.
        unsafe {
            let at = self.first.add(row * self.stride + column);
            std::slice::from_raw_parts_mut(at, count)
        }
    }
}

/// The left factor, as words: `(row, k)` lies at `row * stride + k`, or across at `k * stride + row`.
#[derive(Clone, Copy)]
pub(super) enum Left<'a, W> {
    Rows { words: &'a [W], stride: usize },
    Across { words: &'a [W], stride: usize },
}

/// What sums begin with.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Begin {
    /// Nothing, whatever is there.
    Anew,
    /// What is there: the product is added to it.
    There,
}

/// The product of the part's rows with its panels.
pub(super) struct Task<'a, F: Format> {
    pub format: &'a F,
    pub begin: Begin,
    pub left: Left<'a, F::Word>,
    /// Of the whole matrix: panel after panel, `depth` lines each.
    pub lines: &'a [Line<F::Word>],
    pub depth: usize,
    pub part: Part<'a>,
}

impl<F: Format> Kernel for Task<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(mut self) {
        let Range { start, end } = self.part.columns;
        let (mut panel, panels) = (start / LANES, end.div_ceil(LANES));
        while A::WIDE && panel + GROUP <= panels {
            self.panels::<A, 8, GROUP>(panel);
            panel += GROUP;
        }
        while panel < panels {
            if A::WIDE {
                self.panels::<A, 8, 1>(panel);
            } else {
                self.panels::<A, 4, 1>(panel);
            }
            panel += 1;
        }
    }
}

impl<F: Format> Task<'_, F> {
    /// All rows with the `N` panels from `panel` on.
    #[inline(always)]
    fn panels<A: Arithmetic, const M: usize, const N: usize>(&mut self, panel: usize) {
        let mut first = 0;
        while first < self.depth {
            let lines = first..first + F::LINES.min(self.depth - first);
            self.rows::<A, M, N>(panel, &lines);
            first = lines.end;
        }
    }

    /// All rows with some lines, `M` rows at a time as long as there are as many.
    #[inline(always)]
    fn rows<A: Arithmetic, const M: usize, const N: usize>(
        &mut self,
        panel: usize,
        lines: &Range<usize>,
    ) {
        let Range { start, end } = self.part.rows;
        let mut row = start;
        while row + M <= end {
            self.block::<A, M, N>(row, panel, lines);
            row += M;
        }
        while row + 2 <= end {
            self.block::<A, 2, N>(row, panel, lines);
            row += 2;
        }
        if row < end {
            self.block::<A, 1, N>(row, panel, lines);
        }
    }

    #[inline(always)]
    fn block<A: Arithmetic, const M: usize, const N: usize>(
        &mut self,
        row: usize,
        panel: usize,
        lines: &Range<usize>,
    ) {
        match self.left {
            Left::Rows { words, stride } => {
                let row_of = |m: usize| &words[(row + m) * stride + lines.start..][..lines.len()];
                let rows = RowsOf(std::array::from_fn(row_of));
                self.sums::<A, M, N>((row, panel), lines, rows);
            }
            Left::Across { words, stride } => {
                let words = &words[lines.start * stride + row..];
                self.sums::<A, M, N>((row, panel), lines, AcrossOf { words, stride });
            }
        }
    }

    /// The sums of the block, `x` being its part of the left factor from the first of `lines` on.
    ///
    /// Loops, not closures: a closure would not be compiled for the vectors of the function around it.
    #[expect(
        clippy::needless_range_loop,
        reason = "blocks of sums are read and written by place"
    )]
    #[inline(always)]
    fn sums<A: Arithmetic, const M: usize, const N: usize>(
        &mut self,
        (row, panel): (usize, usize),
        lines: &Range<usize>,
        x: impl Block<F::Word, M>,
    ) {
        let count = lines.len();
        let panels: [&[Line<F::Word>]; N] =
            std::array::from_fn(|n| &self.lines[(panel + n) * self.depth + lines.start..][..count]);
        let mut sums = [[F::begin::<A>(&[0.0; LANES]); N]; M];
        if self.begin == Begin::There || lines.start > 0 {
            for (m, sums) in sums.iter_mut().enumerate() {
                for (n, sum) in sums.iter_mut().enumerate() {
                    let there = self.there(row + m, panel + n);
                    *sum = F::begin::<A>(&there);
                }
            }
        }
        for k in 0..count {
            let x = x.column(k);
            for m in 0..M {
                for n in 0..N {
                    sums[m][n] = F::accumulate::<A>(x[m], &panels[n][k], sums[m][n]);
                }
            }
        }
        for (m, sums) in sums.into_iter().enumerate() {
            for (n, sum) in sums.into_iter().enumerate() {
                let numbers = self.format.finish::<A>(sum, row + m, panel + n);
                let out = self.part.of_row(row + m, (panel + n) * LANES, LANES);
                match out.first_chunk_mut() {
                    Some(out) => *out = numbers,
                    None => out.copy_from_slice(&numbers[..out.len()]),
                }
            }
        }
    }

    /// What is already there of `row` in the 16 columns of `panel`.
    #[inline(always)]
    fn there(&mut self, row: usize, panel: usize) -> [f32; LANES] {
        let out = self.part.of_row(row, panel * LANES, LANES);
        match out.first_chunk() {
            Some(out) => *out,
            None => {
                let mut numbers = [0.0; LANES];
                numbers[..out.len()].copy_from_slice(out);
                numbers
            }
        }
    }
}

/// `M` rows of the left factor, column by column.
trait Block<W, const M: usize>: Copy {
    fn column(self, k: usize) -> [W; M];
}

#[derive(Clone, Copy)]
struct RowsOf<'a, W, const M: usize>([&'a [W]; M]);

impl<W: Copy, const M: usize> Block<W, M> for RowsOf<'_, W, M> {
    #[inline(always)]
    fn column(self, k: usize) -> [W; M] {
        let mut column = [self.0[0][k]; M];
        for (word, row) in column.iter_mut().zip(self.0) {
            *word = row[k];
        }
        column
    }
}

#[derive(Clone, Copy)]
struct AcrossOf<'a, W> {
    words: &'a [W],
    stride: usize,
}

impl<W: Copy, const M: usize> Block<W, M> for AcrossOf<'_, W> {
    #[inline(always)]
    fn column(self, k: usize) -> [W; M] {
        let words = self.words[k * self.stride..].first_chunk();
        *words.expect("a column has all rows of the block")
    }
}
