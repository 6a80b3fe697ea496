//! The product of some rows with some panels of a packed matrix, one block of sums in registers at a time.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::super::vector::{Arithmetic, Kernel, LANES, Line, dispatch};
use super::Columns;

/// Panels that are multiplied together where registers are wide.
pub(super) const GROUP: usize = 3;

/// Rows that are multiplied at a time, twice: parts of a product begin at such a row.
pub(super) fn block<F: Format>() -> usize {
    struct Rows<F>(PhantomData<F>);
    impl<F: Format> Kernel for Rows<F> {
        type Output = usize;

        #[inline(always)]
        fn run<A: Arithmetic>(self) -> usize {
            const { rows_at_a_time::<F, A>() }
        }
    }
    2 * dispatch(Rows::<F>(PhantomData))
}

const fn rows_at_a_time<F: Format, A: Arithmetic>() -> usize {
    if F::PARTS { A::ROWS_OF_PARTS } else { A::ROWS }
}

/// A kind of word, and how it is multiplied.
pub(super) trait Format: Sync {
    type Word: Copy + Default + Send + Sync;
    type Sum<A: Arithmetic>: Copy;

    /// Whether a word holds several numbers.
    const PARTS: bool = true;

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

    const PARTS: bool = false;
    const LINES: usize = 320;

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
            let excess = if A::SIGNED { 0 } else { excess[lane] };
            numbers[lane] = (counts[lane] - excess) as f32 * (scale * scales[lane]);
        }
        numbers
    }
}

/// Where the result of a product goes: row-major numbers, which need not be numbers yet when sums begin anew.
pub(super) struct Target<'a> {
    first: *mut f32,
    len: usize,
    /// What sums begin with.
    pub begin: Begin,
    numbers: PhantomData<&'a mut [f32]>,
}

impl<'a> Target<'a> {
    /// Numbers that are there.
    pub fn over(numbers: &'a mut [f32], begin: Begin) -> Self {
        Self {
            first: numbers.as_mut_ptr(),
            len: numbers.len(),
            begin,
            numbers: PhantomData,
        }
    }

    /// Memory that holds nothing yet: sums begin anew.
    pub fn into(memory: &'a mut [MaybeUninit<f32>]) -> Self {
        Self {
            first: memory.as_mut_ptr().cast(),
            len: memory.len(),
            begin: Begin::Anew,
            numbers: PhantomData,
        }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// The matrix in parts of so many neighbouring rows and columns, the last maybe fewer; `stride` is the length
    /// of a row.
    pub fn split(self, stride: usize, (rows, columns): (usize, usize)) -> Vec<Part<'a>> {
        let height = self.len.checked_div(stride).unwrap_or(0);
        assert_eq!(self.len, height * stride, "whole rows");
        let part = |row: usize, column: usize| Part {
            first: self.first,
            stride,
            rows: row..(row + rows).min(height),
            columns: column..(column + columns).min(stride),
            matrix: PhantomData,
        };
        // A thread that takes neighbours keeps their rows near: the panels are met again in every part.
        let across = |row| {
            (0..stride)
                .step_by(columns)
                .map(move |column| part(row, column))
        };
        (0..height).step_by(rows).flat_map(across).collect()
    }
}

/// Copies numbers, a whole vector of them without a call.
///
/// # Safety
/// As [`std::ptr::copy_nonoverlapping`].
#[expect(unsafe_code, reason = "columns of a matrix are not slices of it")]
#[inline(always)]
unsafe fn copy(from: *const f32, to: *mut f32, count: usize) {
    // SAFETY: as the caller says.
    unsafe {
        if count == LANES {
            std::ptr::copy_nonoverlapping(from, to, LANES);
        } else {
            std::ptr::copy_nonoverlapping(from, to, count);
        }
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

impl Part<'_> {
    /// Where the part's numbers of a row from `column` on lie, and how many there are, at most `count`.
    #[inline(always)]
    fn place(&self, row: usize, column: usize, count: usize) -> (*mut f32, usize) {
        assert!(self.rows.contains(&row) && self.columns.start <= column);
        assert!(column <= self.columns.end);
        let count = count.min(self.columns.end - column);
        // No pointer is followed here, and this one stays inside the matrix.
        let at = self.first.wrapping_add(row * self.stride + column);
        (at, count)
    }

    /// Writes numbers into a row from `column` on, as many as the part has there.
    #[inline(always)]
    pub fn put(&mut self, row: usize, column: usize, numbers: &[f32]) {
        let (at, count) = self.place(row, column, numbers.len());
        #[expect(unsafe_code, reason = "columns of a matrix are not slices of it")]
        // SAFETY: the places lie in a row and in columns of this part, which no other part reaches.
        unsafe {
            copy(numbers.as_ptr(), at, count);
        }
    }

    /// Reads them back, or what was there before, if anything was.
    #[inline(always)]
    pub fn get(&self, row: usize, column: usize, numbers: &mut [f32]) {
        let (at, count) = self.place(row, column, numbers.len());
        #[expect(unsafe_code, reason = "columns of a matrix are not slices of it")]
        // SAFETY: as in `put`; and there are numbers, for sums either begin with what is there, which a
        // `Target::over` has, or they were put before.
        unsafe {
            copy(at, numbers.as_mut_ptr(), count);
        }
    }

    /// Where a block of so many rows and columns begins, and the numbers from row to row, if all of it is in
    /// this part: only the part's owner reaches it.
    #[inline(always)]
    pub fn block(
        &mut self,
        (row, rows): (usize, usize),
        (column, columns): (usize, usize),
    ) -> Option<(*mut f32, usize)> {
        let inside = self.rows.start <= row && row + rows <= self.rows.end;
        if !inside || column < self.columns.start || column + columns > self.columns.end {
            return None;
        }
        // No pointer is followed here, and this one stays inside the matrix.
        Some((
            self.first.wrapping_add(row * self.stride + column),
            self.stride,
        ))
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
    fn run<A: Arithmetic>(self) {
        match const { rows_at_a_time::<F, A>() } {
            8 => self.pieces::<A, 8>(),
            6 => self.pieces::<A, 6>(),
            _ => self.pieces::<A, 4>(),
        }
    }
}

impl<F: Format> Task<'_, F> {
    /// `M` rows at a time, those of a left factor that lies across laid side by side.
    #[inline(always)]
    fn pieces<A: Arithmetic, const M: usize>(mut self) {
        let mut strips = Vec::new();
        let pieces = self.depth.div_ceil(F::LINES).max(1);
        let piece = self.depth.div_ceil(pieces);
        let mut first = 0;
        while first < self.depth {
            let lines = first..(first + piece).min(self.depth);
            if let Left::Across { words, stride } = self.left {
                let words = &words[lines.start * stride..lines.end * stride];
                lay(words, stride, &self.part.rows, &mut strips);
            }
            self.columns::<A, M>(&lines, &strips);
            first = lines.end;
        }
    }
}

/// Lays some columns of a left factor that lies across into strips, one strip after the other.
fn lay<W: Copy + Default, const STRIP: usize>(
    words: &[W],
    stride: usize,
    columns: &Range<usize>,
    strips: &mut Vec<[W; STRIP]>,
) {
    let lines = words.len() / stride;
    strips.clear();
    strips.resize(columns.len().div_ceil(STRIP) * lines, [W::default(); STRIP]);
    for (k, line) in words.chunks_exact(stride).enumerate() {
        let (whole, rest) = line[columns.clone()].as_chunks::<STRIP>();
        for (strip, words) in whole.iter().enumerate() {
            strips[strip * lines + k] = *words;
        }
        if !rest.is_empty() {
            strips[whole.len() * lines + k][..rest.len()].copy_from_slice(rest);
        }
    }
}

impl<F: Format> Task<'_, F> {
    /// The part's panels, as many at a time as registers hold the sums of.
    #[inline(always)]
    fn columns<A: Arithmetic, const M: usize>(
        &mut self,
        lines: &Range<usize>,
        strips: &[[F::Word; M]],
    ) {
        let Range { start, end } = self.part.columns;
        let (mut panel, panels) = (start / LANES, end.div_ceil(LANES));
        while panel < panels {
            // Two and two rather than three and one.
            let group = match panels - panel {
                _ if !A::WIDE => 1,
                4 => 2,
                left => left.min(GROUP),
            };
            match group {
                GROUP => self.rows::<A, M, GROUP>(panel, lines, strips),
                2 => self.rows::<A, M, 2>(panel, lines, strips),
                _ => self.rows::<A, M, 1>(panel, lines, strips),
            }
            panel += group;
        }
    }

    /// All rows with some lines of `N` panels, `M` rows at a time as long as there are as many.
    #[inline(always)]
    fn rows<A: Arithmetic, const M: usize, const N: usize>(
        &mut self,
        panel: usize,
        lines: &Range<usize>,
        strips: &[[F::Word; M]],
    ) {
        let Range { start, end } = self.part.rows;
        let mut row = start;
        while row + M <= end {
            self.block::<A, M, M, N>(row, panel, lines, strips);
            row += M;
        }
        while row + 2 <= end {
            self.block::<A, M, 2, N>(row, panel, lines, strips);
            row += 2;
        }
        if row < end {
            self.block::<A, M, 1, N>(row, panel, lines, strips);
        }
    }

    /// `M` rows, those of a factor that lies across found in strips of `STRIP`.
    #[inline(always)]
    fn block<A: Arithmetic, const STRIP: usize, const M: usize, const N: usize>(
        &mut self,
        row: usize,
        panel: usize,
        lines: &Range<usize>,
        strips: &[[F::Word; STRIP]],
    ) {
        match self.left {
            Left::Rows { words, stride } => {
                let row_of = |m: usize| &words[(row + m) * stride + lines.start..][..lines.len()];
                let rows = RowsOf(std::array::from_fn(row_of));
                self.sums::<A, M, N>((row, panel), lines, rows);
            }
            Left::Across { .. } => {
                let place = row - self.part.rows.start;
                let strip = &strips[place / STRIP * lines.len()..][..lines.len()];
                let first = place % STRIP;
                self.sums::<A, M, N>((row, panel), lines, StripOf { strip, first });
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
        let panel_at = |panel: usize| &self.lines[panel * self.depth + lines.start..][..count];
        let panels: [&[Line<F::Word>]; N] = std::array::from_fn(|n| panel_at(panel + n));
        // While the first rows are multiplied, a panel each of the next group is on its way.
        let ahead = (row - self.part.rows.start) / M;
        let next = if ahead < N && (panel + N + ahead) * LANES < self.part.columns.end {
            panel_at(panel + N + ahead)
        } else {
            &[]
        };
        let mut sums = [[F::begin::<A>(&[0.0; LANES]); N]; M];
        if self.begin == Begin::There || lines.start > 0 {
            for (m, sums) in sums.iter_mut().enumerate() {
                for (n, sum) in sums.iter_mut().enumerate() {
                    let mut there = [0.0; LANES];
                    self.part.get(row + m, (panel + n) * LANES, &mut there);
                    *sum = F::begin::<A>(&there);
                }
            }
        }
        for k in 0..count {
            if let Some(line) = next.get(k) {
                A::prefetch(line);
            }
            for m in 0..M {
                let x = x.word(m, k);
                for n in 0..N {
                    sums[m][n] = F::accumulate::<A>(x, &panels[n][k], sums[m][n]);
                }
            }
        }
        for (m, sums) in sums.into_iter().enumerate() {
            for (n, sum) in sums.into_iter().enumerate() {
                let numbers = self.format.finish::<A>(sum, row + m, panel + n);
                self.part.put(row + m, (panel + n) * LANES, &numbers);
            }
        }
    }
}

/// `M` rows of the left factor.
trait Block<W, const M: usize>: Copy {
    fn word(self, row: usize, k: usize) -> W;
}

#[derive(Clone, Copy)]
struct RowsOf<'a, W, const M: usize>([&'a [W]; M]);

impl<W: Copy, const M: usize> Block<W, M> for RowsOf<'_, W, M> {
    #[inline(always)]
    fn word(self, row: usize, k: usize) -> W {
        self.0[row][k]
    }
}

/// Neighbours of a strip, from `first` on.
#[derive(Clone, Copy)]
struct StripOf<'a, W, const STRIP: usize> {
    strip: &'a [[W; STRIP]],
    first: usize,
}

impl<W: Copy, const STRIP: usize, const M: usize> Block<W, M> for StripOf<'_, W, STRIP> {
    #[inline(always)]
    fn word(self, row: usize, k: usize) -> W {
        self.strip[k][self.first + row]
    }
}
