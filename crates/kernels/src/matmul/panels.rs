//! Packing of the right operand into panels of 16 columns, and their transposition.

use rayon::prelude::*;

use super::transpose::{Square, transpose};
use super::{MatrixRef, parallel_fill, rows};
use crate::simd::{Arithmetic, CacheLine, Kernel, LANES, dispatch};

/// Dequantisation of an int8 panel's columns.
#[derive(Clone, Copy)]
pub(super) struct ColumnScales {
    /// Value of one quantisation step.
    pub scales: [f32; LANES],
    /// Contribution of the left rows' zero point to each sum: 128 times the sum of the column's bytes.
    pub corrections: [i32; LANES],
}

/// A panel to be packed: at most 16 columns of the operand, from `first` on.
struct Panel<'a, W> {
    right: MatrixRef<'a>,
    first: usize,
    lines: &'a mut [CacheLine<W>],
}

impl<W> Panel<'_, W> {
    fn count(&self) -> usize {
        LANES.min(self.right.columns - self.first)
    }

    /// Packs the columns of a transposed operand, 16 words of each at a time, through a 16 × 16 transpose. `words`
    /// gives the next 16 words of a column from its remaining values; a word holds `per_word` values.
    #[inline(always)]
    fn pack_transposed(self, per_word: usize, words: impl Fn(usize, &[f32]) -> [W; LANES])
    where
        W: Copy + Default,
    {
        let count = self.count();
        let columns = self.right.values.chunks(self.right.rows);
        let columns = columns.skip(self.first).take(count);
        for (step, lines) in (0..).zip(self.lines.chunks_mut(LANES)) {
            let mut square = [[W::default(); LANES]; LANES];
            for (lane, column) in columns.clone().enumerate() {
                let values = column.get(step * per_word * LANES..);
                square[lane] = words(lane, values.unwrap_or_default());
            }
            transpose(&mut square);
            for (line, row) in lines.iter_mut().zip(square) {
                line.0 = row;
            }
        }
    }
}

/// Packs an operand into panels of `depth` cache lines.
fn pack<W: Copy + Default + Send>(
    right: MatrixRef<'_>,
    depth: usize,
    fill: impl Fn(Panel<'_, W>) + Sync,
) -> Vec<CacheLine<W>> {
    let panels = right.columns.div_ceil(LANES);
    parallel_fill(panels, depth, 1024, |panel, lines| {
        fill(Panel {
            right,
            first: panel * LANES,
            lines,
        });
    })
}

pub(super) fn pack_f32(right: MatrixRef<'_>) -> Vec<CacheLine<f32>> {
    pack(right, right.rows, |panel| dispatch(PackF32(panel)))
}

pub(super) fn pack_bf16(right: MatrixRef<'_>, depth: usize) -> Vec<CacheLine<u32>> {
    pack(right, depth, |panel| dispatch(PackBf16(panel)))
}

/// Quantises a transposed operand: weights.
pub(super) fn pack_int8(
    right: MatrixRef<'_>,
    depth: usize,
) -> (Vec<CacheLine<u32>>, Vec<ColumnScales>) {
    assert!(right.transposed, "int8 is for weights");
    let of_panel = |columns: &[f32]| {
        let (mut scales, mut corrections) = ([0.0; LANES], [0; LANES]);
        for (lane, column) in columns.chunks(right.rows).enumerate() {
            (scales[lane], corrections[lane]) = dispatch(ColumnScale(column));
        }
        ColumnScales {
            scales,
            corrections,
        }
    };
    let panels = right.values.par_chunks(LANES * right.rows);
    let columns: Vec<ColumnScales> = panels.map(of_panel).collect();
    let lines = pack(right, depth, |panel| {
        let scales = &columns[panel.first / LANES].scales;
        dispatch(PackInt8 { panel, scales });
    });
    (lines, columns)
}

struct PackF32<'a>(Panel<'a, f32>);

impl Kernel for PackF32<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let (panel, count) = (&self.0, self.0.count());
        let (right, first) = (panel.right, panel.first);
        if right.transposed {
            self.0
                .pack_transposed(1, |_, values| rows::zero_padded(values));
            return;
        }
        let rows = right.values.chunks(right.columns);
        for (line, row) in self.0.lines.iter_mut().zip(rows) {
            line.0[..count].copy_from_slice(&row[first..first + count]);
        }
    }
}

struct PackBf16<'a>(Panel<'a, u32>);

impl Kernel for PackBf16<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let (panel, count) = (&self.0, self.0.count());
        let (right, first) = (panel.right, panel.first);
        if right.transposed {
            self.0
                .pack_transposed(2, |_, values| rows::bf16_words(values));
            return;
        }
        let zeros = [0.0; LANES];
        let row_pairs = right.values.chunks(2 * right.columns);
        for (line, row_pair) in self.0.lines.iter_mut().zip(row_pairs) {
            let even = &row_pair[first..first + count];
            // The last row of an odd number of rows is paired with zeros.
            let odd = match row_pair.split_at_checked(right.columns) {
                Some((_, odd)) if !odd.is_empty() => &odd[first..],
                _ => &zeros[..],
            };
            for ((word, &even), &odd) in line.0.iter_mut().zip(even).zip(odd) {
                *word = rows::bf16_pair(even, odd);
            }
        }
    }
}

struct PackInt8<'a> {
    panel: Panel<'a, u32>,
    scales: &'a [f32; LANES],
}

impl Kernel for PackInt8<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        self.panel.pack_transposed(4, |lane, values| {
            rows::int8_words(values, rows::reciprocal(self.scales[lane]))
        });
    }
}

/// A column's scale, and 128 times the sum of its bytes.
struct ColumnScale<'a>(&'a [f32]);

impl Kernel for ColumnScale<'_> {
    type Output = (f32, i32);

    #[inline(always)]
    fn run<A: Arithmetic>(self) -> (f32, i32) {
        let scale = rows::int8_scale(self.0);
        let reciprocal = rows::reciprocal(scale);
        let mut sum = 0;
        for &x in self.0 {
            sum += i32::from(rows::quantise(x, reciprocal));
        }
        (scale, 128 * sum)
    }
}

/// Panels of a packed operand `[width, out]`.
#[derive(Clone, Copy)]
pub(super) struct PanelsRef<'a, W> {
    /// From the first column's panel on.
    pub lines: &'a [CacheLine<W>],
    /// Cache lines per panel.
    pub depth: usize,
    pub width: usize,
    pub out: usize,
}

impl<W: Copy + Default + Send + Sync> PanelsRef<'_, W> {
    /// Panels of `depth` cache lines of the transpose, filled by `fill`.
    fn transposed(
        self,
        depth: usize,
        fill: impl Fn(TransposedPanel<'_, W>) + Sync,
    ) -> Vec<CacheLine<W>> {
        let panels = self.width.div_ceil(LANES);
        parallel_fill(panels, depth, 1024, |panel, lines| {
            fill(TransposedPanel {
                source: self,
                first: panel * LANES,
                lines,
            });
        })
    }

    /// The transpose of 16 cache lines, zeros where one is beyond the operand; `place` gives the panel and the line of each.
    #[inline(always)]
    fn transposed_lines(&self, place: impl Fn(usize) -> (usize, usize)) -> Square<W> {
        let mut square = [[W::default(); LANES]; LANES];
        for (row, square) in square.iter_mut().enumerate() {
            let (panel, line) = place(row);
            if panel * LANES < self.out && line < self.depth {
                *square = self.lines[panel * self.depth + line].0;
            }
        }
        transpose(&mut square);
        square
    }
}

pub(super) fn transpose_f32(source: PanelsRef<'_, f32>) -> Vec<CacheLine<f32>> {
    source.transposed(source.out, |panel| dispatch(TransposeF32(panel)))
}

pub(super) fn transpose_bf16(source: PanelsRef<'_, u32>, depth: usize) -> Vec<CacheLine<u32>> {
    source.transposed(depth, |panel| dispatch(TransposeBf16(panel)))
}

/// A panel of a transpose, to be filled: the lines of the source from `first` on, as columns.
struct TransposedPanel<'a, W> {
    source: PanelsRef<'a, W>,
    first: usize,
    lines: &'a mut [CacheLine<W>],
}

struct TransposeF32<'a>(TransposedPanel<'a, f32>);

impl Kernel for TransposeF32<'_> {
    type Output = ();

    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        let TransposedPanel {
            source,
            first,
            lines,
        } = self.0;
        for (panel, lines) in lines.chunks_mut(LANES).enumerate() {
            let square = source.transposed_lines(|row| (panel, first + row));
            for (line, row) in lines.iter_mut().zip(square) {
                line.0 = row;
            }
        }
    }
}

struct TransposeBf16<'a>(TransposedPanel<'a, u32>);

impl Kernel for TransposeBf16<'_> {
    type Output = ();

    /// Two panels of the source are 32 rows of the transpose, 16 lines of pairs: eight lines of each panel hold 16 columns.
    #[inline(always)]
    fn run<A: Arithmetic>(self) {
        const PAIRS: usize = LANES / 2;
        let TransposedPanel {
            source,
            first,
            lines,
        } = self.0;
        for (two, lines) in lines.chunks_mut(LANES).enumerate() {
            let place = |row| (2 * two + row / PAIRS, first / 2 + row % PAIRS);
            let mut square = source.transposed_lines(place);
            // A row of the square now holds one column of each panel, in pairs of lines.
            for (lane, row) in square.iter_mut().enumerate() {
                for (panel, half) in row.chunks_mut(PAIRS).enumerate() {
                    if (2 * two + panel) * LANES + lane >= source.out {
                        half.fill(0);
                    }
                }
            }
            for (index, line) in lines.iter_mut().enumerate() {
                let (half, pair) = (index / PAIRS * PAIRS, index % PAIRS);
                let (upper, lower) = (&square[2 * pair], &square[2 * pair + 1]);
                for k in 0..PAIRS {
                    let (even, odd) = (upper[half + k], lower[half + k]);
                    line.0[2 * k] = (even & 0xffff) | (odd << 16);
                    line.0[2 * k + 1] = (even >> 16) | (odd & 0xffff_0000);
                }
            }
        }
    }
}
