//! Micro-kernel: the product of an output tile's rows with its panels, one block of accumulators in registers at a
//! time.

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::ColumnScales;
use crate::simd::{Arithmetic, CacheLine, Kernel, LANES, dispatch};

/// Panels per micro-kernel with 512-bit registers.
pub(super) const MAX_PANELS: usize = 3;

/// Output tiles begin at a multiple of this row: twice the rows of the micro-kernel.
pub(super) fn row_granularity<F: Format>() -> usize {
    struct MicroRows<F>(PhantomData<F>);
    impl<F: Format> Kernel for MicroRows<F> {
        type Output = usize;

        #[inline(always)]
        fn run<A: Arithmetic>(self) -> usize {
            const { micro_rows::<F, A>() }
        }
    }
    2 * dispatch(MicroRows::<F>(PhantomData))
}

const fn micro_rows<F: Format, A: Arithmetic>() -> usize {
    if F::SUBWORD {
        A::MICRO_ROWS_SUBWORD
    } else {
        A::MICRO_ROWS
    }
}

/// Word format of the packed operands, and its multiply-accumulate.
pub(super) trait Format: Sync {
    type Word: Copy + Default + Send + Sync;
    type Accumulator<A: Arithmetic>: Copy;

    /// Whether a word holds several values.
    const SUBWORD: bool = true;

    /// Maximum k-block: cache lines of a panel that stay in a core's own cache, with those of its neighbours and the
    /// tile's rows, while all rows are multiplied. Sums are stored and loaded again between two blocks.
    const K_BLOCK: usize;

    /// The accumulator's initial value, given the output so far.
    fn load<A: Arithmetic>(values: &[f32; LANES]) -> Self::Accumulator<A>;

    fn accumulate<A: Arithmetic>(
        x: Self::Word,
        line: &CacheLine<Self::Word>,
        sum: Self::Accumulator<A>,
    ) -> Self::Accumulator<A>;

    /// The output of `row` in the 16 columns of `panel`.
    fn store<A: Arithmetic>(
        &self,
        sum: Self::Accumulator<A>,
        row: usize,
        panel: usize,
    ) -> [f32; LANES];
}

pub(super) struct F32;

impl Format for F32 {
    type Word = f32;
    type Accumulator<A: Arithmetic> = A::Vector;

    const SUBWORD: bool = false;
    const K_BLOCK: usize = 640;

    #[inline(always)]
    fn load<A: Arithmetic>(values: &[f32; LANES]) -> A::Vector {
        A::load(values)
    }

    #[inline(always)]
    fn accumulate<A: Arithmetic>(x: f32, line: &CacheLine<f32>, sum: A::Vector) -> A::Vector {
        A::accumulate(x, A::load(&line.0), sum)
    }

    #[inline(always)]
    fn store<A: Arithmetic>(&self, sum: A::Vector, _: usize, _: usize) -> [f32; LANES] {
        let mut values = [0.0; LANES];
        A::store(sum, &mut values);
        values
    }
}

pub(super) struct Bf16;

impl Format for Bf16 {
    type Word = u32;
    type Accumulator<A: Arithmetic> = A::Vector;

    const K_BLOCK: usize = 400;

    #[inline(always)]
    fn load<A: Arithmetic>(values: &[f32; LANES]) -> A::Vector {
        A::load(values)
    }

    #[inline(always)]
    fn accumulate<A: Arithmetic>(x: u32, line: &CacheLine<u32>, sum: A::Vector) -> A::Vector {
        A::dot_bf16(x, line, sum)
    }

    #[inline(always)]
    fn store<A: Arithmetic>(&self, sum: A::Vector, row: usize, panel: usize) -> [f32; LANES] {
        F32.store::<A>(sum, row, panel)
    }
}

pub(super) struct Int8<'a> {
    /// Value of one quantisation step, per row.
    pub row_scales: &'a [f32],
    /// Per panel.
    pub columns: &'a [ColumnScales],
}

impl Format for Int8<'_> {
    type Word = u32;
    type Accumulator<A: Arithmetic> = A::IntVector;

    /// Not blocked: integer sums cannot be resumed from scaled output.
    const K_BLOCK: usize = usize::MAX;

    #[inline(always)]
    fn load<A: Arithmetic>(_: &[f32; LANES]) -> A::IntVector {
        A::int_zeros()
    }

    #[inline(always)]
    fn accumulate<A: Arithmetic>(x: u32, line: &CacheLine<u32>, sum: A::IntVector) -> A::IntVector {
        A::dot_int8(x, line, sum)
    }

    #[inline(always)]
    fn store<A: Arithmetic>(&self, sum: A::IntVector, row: usize, panel: usize) -> [f32; LANES] {
        let sums = A::to_ints(sum);
        let ColumnScales {
            scales,
            corrections,
        } = &self.columns[panel];
        let scale = self.row_scales[row];
        let mut values = [0.0; LANES];
        for lane in 0..LANES {
            let correction = if A::SIGNED { 0 } else { corrections[lane] };
            values[lane] = (sums[lane] - correction) as f32 * (scale * scales[lane]);
        }
        values
    }
}

/// Output of a product: a row-major matrix, which may be uninitialised if it is overwritten.
pub(super) struct OutputView<'a> {
    first: *mut f32,
    len: usize,
    pub accumulate: Accumulate,
    values: PhantomData<&'a mut [f32]>,
}

impl<'a> OutputView<'a> {
    /// Initialised output.
    pub fn new(values: &'a mut [f32], accumulate: Accumulate) -> Self {
        Self {
            first: values.as_mut_ptr(),
            len: values.len(),
            accumulate,
            values: PhantomData,
        }
    }

    /// Uninitialised output, which is overwritten.
    pub fn uninit(memory: &'a mut [MaybeUninit<f32>]) -> Self {
        Self {
            first: memory.as_mut_ptr().cast(),
            len: memory.len(),
            accumulate: Accumulate::Overwrite,
            values: PhantomData,
        }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// Cuts the matrix into tiles of `rows` by `columns`, smaller at the edges; `stride` is the length of a row.
    pub fn split(self, stride: usize, rows: usize, columns: usize) -> Vec<Tile<'a>> {
        let height = self.len.checked_div(stride).unwrap_or(0);
        assert_eq!(self.len, height * stride, "whole rows");
        let tile = |row: usize, column: usize| Tile {
            first: self.first,
            stride,
            rows: row..(row + rows).min(height),
            columns: column..(column + columns).min(stride),
            matrix: PhantomData,
        };
        // Row-major order: a thread that takes neighbouring tiles reuses their rows; the panels are read in every tile.
        let row_of_tiles = |row| {
            (0..stride)
                .step_by(columns)
                .map(move |column| tile(row, column))
        };
        (0..height).step_by(rows).flat_map(row_of_tiles).collect()
    }
}

/// Copies values, without a call if they fill a vector.
///
/// # Safety
/// As [`std::ptr::copy_nonoverlapping`].
#[expect(unsafe_code, reason = "columns of a matrix are not slices of it")]
#[inline(always)]
unsafe fn copy(from: *const f32, to: *mut f32, count: usize) {
    // SAFETY: the caller's obligation.
    unsafe {
        if count == LANES {
            std::ptr::copy_nonoverlapping(from, to, LANES);
        } else {
            std::ptr::copy_nonoverlapping(from, to, count);
        }
    }
}

/// A range of rows and columns of a row-major output. Tiles are disjoint, so different threads write them at once.
pub(super) struct Tile<'a> {
    first: *mut f32,
    stride: usize,
    pub rows: Range<usize>,
    pub columns: Range<usize>,
    matrix: PhantomData<&'a mut [f32]>,
}

#[expect(unsafe_code, reason = "columns of a matrix are not slices of it")]
// SAFETY: `split` makes disjoint tiles, so a tile alone accesses its values, and f32 is Send.
unsafe impl Send for Tile<'_> {}

impl Tile<'_> {
    /// Address of `row` at `column`, and the number of values the tile has there, at most `count`.
    #[inline(always)]
    fn span(&self, row: usize, column: usize, count: usize) -> (*mut f32, usize) {
        assert!(self.rows.contains(&row) && self.columns.start <= column);
        assert!(column <= self.columns.end);
        let count = count.min(self.columns.end - column);
        // The pointer is not dereferenced here, and it stays inside the matrix.
        let at = self.first.wrapping_add(row * self.stride + column);
        (at, count)
    }

    /// Writes values to a row from `column` on; those beyond the tile's edge are dropped.
    #[inline(always)]
    pub fn write(&mut self, row: usize, column: usize, values: &[f32]) {
        let (at, count) = self.span(row, column, values.len());
        #[expect(unsafe_code, reason = "columns of a matrix are not slices of it")]
        // SAFETY: the addresses are in a row and in columns of this tile, which no other tile accesses.
        unsafe {
            copy(values.as_ptr(), at, count);
        }
    }

    /// Reads a row from `column` on, up to the tile's edge. The output must be initialised there: by the caller of the
    /// product, or by an earlier `write`.
    #[inline(always)]
    pub fn read(&self, row: usize, column: usize, values: &mut [f32]) {
        let (at, count) = self.span(row, column, values.len());
        #[expect(unsafe_code, reason = "columns of a matrix are not slices of it")]
        // SAFETY: as in `write`; and the values are initialised: they are read only to add to an output, which
        // `OutputView::new` has, or after an earlier k-block wrote them.
        unsafe {
            copy(at, values.as_mut_ptr(), count);
        }
    }

    /// Address of a block's first value and the stride of its rows, if the whole block is in this tile. Only the
    /// tile's owner accesses it.
    #[inline(always)]
    pub fn block(
        &mut self,
        rows: Range<usize>,
        columns: Range<usize>,
    ) -> Option<(*mut f32, usize)> {
        let inside = self.rows.start <= rows.start && rows.end <= self.rows.end;
        if !inside || columns.start < self.columns.start || columns.end > self.columns.end {
            return None;
        }
        // The pointer is not dereferenced here, and it stays inside the matrix.
        Some((
            self.first
                .wrapping_add(rows.start * self.stride + columns.start),
            self.stride,
        ))
    }
}

/// Left operand as words: `(row, k)` is at `row * stride + k`, or transposed at `k * stride + row`.
#[derive(Clone, Copy)]
pub(super) enum LeftOperand<'a, W> {
    RowMajor { words: &'a [W], stride: usize },
    Transposed { words: &'a [W], stride: usize },
}

/// Operation of a product on its output's values.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Accumulate {
    /// Replaces them.
    Overwrite,
    /// Adds to them.
    Add,
}

/// Packed operands of a product.
pub(super) struct Operands<'a, F: Format> {
    pub format: &'a F,
    pub left: LeftOperand<'a, F::Word>,
    /// Of the whole matrix: panel after panel, `depth` cache lines each.
    pub panels: &'a [CacheLine<F::Word>],
    pub depth: usize,
}

/// The product of the tile's rows with its panels.
pub(super) struct TileProduct<'a, F: Format> {
    pub operands: &'a Operands<'a, F>,
    pub accumulate: Accumulate,
    pub tile: Tile<'a>,
}

impl<F: Format> Kernel for TileProduct<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        match const { micro_rows::<F, A>() } {
            8 => self.k_blocks::<A, 8>(),
            6 => self.k_blocks::<A, 6>(),
            _ => self.k_blocks::<A, 4>(),
        }
    }
}

impl<F: Format> TileProduct<'_, F> {
    /// One k-block after the other, `M` rows to the micro-kernel. A transposed left operand is packed into strips of
    /// `M` rows first.
    #[inline(always)]
    fn k_blocks<A: Arithmetic, const M: usize>(mut self) {
        let mut strips = Vec::new();
        let depth = self.operands.depth;
        let blocks = depth.div_ceil(F::K_BLOCK).max(1);
        let k_block = depth.div_ceil(blocks);
        let mut first = 0;
        while first < depth {
            let k_range = first..(first + k_block).min(depth);
            if let LeftOperand::Transposed { words, stride } = self.operands.left {
                let words = &words[k_range.start * stride..k_range.end * stride];
                pack_strips(words, stride, &self.tile.rows, &mut strips);
            }
            self.panels::<A, M>(&k_range, &strips);
            first = k_range.end;
        }
    }
}

/// Packs rows of a transposed left operand into strips of `STRIP` rows, one strip after the other: a strip holds for
/// each k one word of each of its rows.
fn pack_strips<W: Copy + Default, const STRIP: usize>(
    words: &[W],
    stride: usize,
    rows: &Range<usize>,
    strips: &mut Vec<[W; STRIP]>,
) {
    let strip_stride = strip_stride(words.len() / stride);
    strips.clear();
    strips.resize(
        rows.len().div_ceil(STRIP) * strip_stride,
        [W::default(); STRIP],
    );
    for (k, column) in words.chunks_exact(stride).enumerate() {
        let (whole, rest) = column[rows.clone()].as_chunks::<STRIP>();
        for (strip, words) in whole.iter().enumerate() {
            strips[strip * strip_stride + k] = *words;
        }
        if !rest.is_empty() {
            strips[whole.len() * strip_stride + k][..rest.len()].copy_from_slice(rest);
        }
    }
}

/// Distance of strips of `depth` words a row. They are written side by side: at a power of two they would share a few
/// sets of the first cache.
const fn strip_stride(depth: usize) -> usize {
    depth.next_multiple_of(4) + 2
}

impl<F: Format> TileProduct<'_, F> {
    /// All panels of the tile, as many at a time as there are registers for their accumulators.
    #[inline(always)]
    fn panels<A: Arithmetic, const M: usize>(
        &mut self,
        k_range: &Range<usize>,
        strips: &[[F::Word; M]],
    ) {
        let Range { start, end } = self.tile.columns;
        let (mut panel, panels) = (start / LANES, end.div_ceil(LANES));
        while panel < panels {
            // Four are two and two rather than three and one.
            let count = match panels - panel {
                _ if !A::WIDE => 1,
                4 => 2,
                left => left.min(MAX_PANELS),
            };
            match count {
                MAX_PANELS => self.rows::<A, M, MAX_PANELS>(panel, k_range, strips),
                2 => self.rows::<A, M, 2>(panel, k_range, strips),
                _ => self.rows::<A, M, 1>(panel, k_range, strips),
            }
            panel += count;
        }
    }

    /// All rows of the tile with `N` panels, `M` rows at a time as long as there are as many.
    #[inline(always)]
    fn rows<A: Arithmetic, const M: usize, const N: usize>(
        &mut self,
        panel: usize,
        k_range: &Range<usize>,
        strips: &[[F::Word; M]],
    ) {
        let Range { start, end } = self.tile.rows;
        let mut row = start;
        while row + M <= end {
            self.block::<A, M, M, N>(row, panel, k_range, strips);
            row += M;
        }
        while row + 2 <= end {
            self.block::<A, M, 2, N>(row, panel, k_range, strips);
            row += 2;
        }
        if row < end {
            self.block::<A, M, 1, N>(row, panel, k_range, strips);
        }
    }

    /// `M` rows by `N` panels; rows of a transposed operand are read from strips of `STRIP` rows.
    #[inline(always)]
    fn block<A: Arithmetic, const STRIP: usize, const M: usize, const N: usize>(
        &mut self,
        row: usize,
        panel: usize,
        k_range: &Range<usize>,
        strips: &[[F::Word; STRIP]],
    ) {
        match self.operands.left {
            LeftOperand::RowMajor { words, stride } => {
                let row_of =
                    |m: usize| &words[(row + m) * stride + k_range.start..][..k_range.len()];
                let rows = RowMajorRows(std::array::from_fn(row_of));
                self.micro_kernel::<A, M, N>(row, panel, k_range, rows);
            }
            LeftOperand::Transposed { .. } => {
                let offset = row - self.tile.rows.start;
                let strip = offset / STRIP * strip_stride(k_range.len());
                let strip = &strips[strip..][..k_range.len()];
                let first = offset % STRIP;
                self.micro_kernel::<A, M, N>(row, panel, k_range, StripRows { strip, first });
            }
        }
    }

    /// `M × N` accumulators in registers over one k-block; `x` are the rows of the left operand from the first k of
    /// `k_range` on.
    ///
    /// Loops, not closures: a closure would not be compiled with the target features of the function around it.
    #[expect(
        clippy::needless_range_loop,
        reason = "accumulators are read and written by index"
    )]
    #[inline(always)]
    fn micro_kernel<A: Arithmetic, const M: usize, const N: usize>(
        &mut self,
        row: usize,
        panel: usize,
        k_range: &Range<usize>,
        x: impl LeftRows<F::Word, M>,
    ) {
        let Operands {
            format,
            panels: lines,
            depth,
            ..
        } = *self.operands;
        let count = k_range.len();
        let panel_at = |panel: usize| &lines[panel * depth + k_range.start..][..count];
        let panels: [&[CacheLine<F::Word>]; N] = std::array::from_fn(|n| panel_at(panel + n));
        let ahead = self.prefetched::<M, N>(row);
        let panels_left = lines.len() / depth - panel;
        let next: [&[CacheLine<F::Word>]; N] = std::array::from_fn(|n| {
            if ahead.contains(&n) && N + n < panels_left {
                panel_at(panel + N + n)
            } else {
                &[]
            }
        });
        let mut sums = [[F::load::<A>(&[0.0; LANES]); N]; M];
        if self.accumulate == Accumulate::Add || k_range.start > 0 {
            for (m, sums) in sums.iter_mut().enumerate() {
                for (n, sum) in sums.iter_mut().enumerate() {
                    let mut values = [0.0; LANES];
                    self.tile.read(row + m, (panel + n) * LANES, &mut values);
                    *sum = F::load::<A>(&values);
                }
            }
        }
        for k in 0..count {
            for next in next {
                if let Some(line) = next.get(k) {
                    A::prefetch(line);
                }
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
                let values = format.store::<A>(sum, row + m, panel + n);
                self.tile.write(row + m, (panel + n) * LANES, &values);
            }
        }
    }
}

impl<F: Format> TileProduct<'_, F> {
    /// Which of the next `N` panels are prefetched while the `M` rows from `row` on are multiplied: a share of them in
    /// each of the first blocks of rows, so that memory is read all the time. The next panels may be those of another
    /// tile, which this thread probably takes next.
    #[inline(always)]
    fn prefetched<const M: usize, const N: usize>(&self, row: usize) -> Range<usize> {
        let rows = &self.tile.rows;
        let blocks = (rows.len() / M).clamp(1, N);
        let block = (row - rows.start) / M;
        block * N / blocks..(block + 1) * N / blocks
    }
}

/// `M` rows of the left operand.
trait LeftRows<W, const M: usize>: Copy {
    fn word(self, row: usize, k: usize) -> W;
}

#[derive(Clone, Copy)]
struct RowMajorRows<'a, W, const M: usize>([&'a [W]; M]);

impl<W: Copy, const M: usize> LeftRows<W, M> for RowMajorRows<'_, W, M> {
    #[inline(always)]
    fn word(self, row: usize, k: usize) -> W {
        self.0[row][k]
    }
}

/// Neighbouring rows of a strip, from `first` on.
#[derive(Clone, Copy)]
struct StripRows<'a, W, const STRIP: usize> {
    strip: &'a [[W; STRIP]],
    first: usize,
}

impl<W: Copy, const STRIP: usize, const M: usize> LeftRows<W, M> for StripRows<'_, W, STRIP> {
    #[inline(always)]
    fn word(self, row: usize, k: usize) -> W {
        self.strip[k][self.first + row]
    }
}
