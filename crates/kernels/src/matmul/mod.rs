//! Matrix products (GEMM) with packed operands, in f32, bf16 and int8.
//!
//! The right operand is packed into panels of 16 columns: one [`CacheLine`] per step of the inner dimension holds
//! a 32-bit word for each of the 16 columns, that is one `f32`, two bf16 or four `i8` that are neighbours in the
//! inner dimension. The left operand is rows of the same kind of words. `docs/kernels.md` draws the layouts.
//!
//! A [`PackedMatrix`] is packed once for many products, as in decoding; [`product()`] packs both operands for one.
//!
//! Promises: every element is summed in the order of the inner dimension, so it depends neither on the other rows
//! nor on the number of threads.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
mod panels;
mod rows;
mod tile;
mod transpose;

use std::borrow::Cow;
use std::fmt;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use self::panels::{
    ColumnScales, PanelsRef, pack_bf16, pack_f32, pack_int8, transpose_bf16, transpose_f32,
};
pub(crate) use self::rows::bf16_bits;
use self::rows::{QuantisedRows, RowLayout, pack_bf16_rows};
pub(crate) use self::tile::Accumulate;
use self::tile::{Bf16, F32, Format, Int8, LeftOperand, Operands, OutputView, Tile, TileProduct};
use crate::simd::{CacheLine, LANES, dispatch};

/// Precision of a product's operands. Sums are taken in `f32`; in int8 they are exact integers, scaled afterwards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// No rounding.
    #[default]
    F32,
    /// bfloat16: the upper half of an `f32`, rounded to nearest even.
    Bf16,
    /// Symmetric int8 with one scale per column of the right operand and one per row of the left. Inference only.
    Int8,
}

/// View of a matrix: row-major, or the transpose of a row-major one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MatrixRef<'a> {
    pub values: &'a [f32],
    pub rows: usize,
    pub columns: usize,
    /// Whether `values` is column-major.
    pub transposed: bool,
}

impl<'a> MatrixRef<'a> {
    pub fn new(values: &'a [f32], rows: usize, columns: usize) -> Self {
        assert_eq!(values.len(), rows * columns);
        Self {
            values,
            rows,
            columns,
            transposed: false,
        }
    }

    /// The transposed view; moves no values.
    pub fn transpose(self) -> Self {
        Self {
            values: self.values,
            rows: self.columns,
            columns: self.rows,
            transposed: !self.transposed,
        }
    }
}

/// `left · right`, `[left.rows, right.columns]` row-major, in f32 or bf16.
pub(crate) fn product(left: MatrixRef<'_>, right: MatrixRef<'_>, precision: Precision) -> Vec<f32> {
    let packed = PackedMatrix::pack(right, precision);
    packed.product(&PackedRows::pack(left, precision))
}

/// Packed left operand, for products with packed matrices of the same precision.
pub(crate) struct PackedRows<'a> {
    rows: usize,
    /// The inner dimension.
    width: usize,
    words: RowWords<'a>,
}

enum RowWords<'a> {
    /// Not copied.
    F32(LeftOperand<'a, f32>),
    /// In the order of [`row_layout`].
    Bf16(Vec<u32>),
    Int8(QuantisedRows),
}

impl<'a> PackedRows<'a> {
    pub fn pack(left: MatrixRef<'a>, precision: Precision) -> Self {
        let (values, depth) = (left.values, depth(left.columns, precision));
        let words = match precision {
            Precision::F32 if left.transposed => RowWords::F32(LeftOperand::Transposed {
                words: values,
                stride: left.rows,
            }),
            Precision::F32 => RowWords::F32(LeftOperand::RowMajor {
                words: values,
                stride: left.columns,
            }),
            Precision::Bf16 => {
                RowWords::Bf16(pack_bf16_rows(left, depth, row_layout(), ROW_MULTIPLE))
            }
            Precision::Int8 => {
                assert!(!left.transposed, "int8 is inference-only");
                RowWords::Int8(QuantisedRows::quantise(values, left.columns, depth))
            }
        };
        Self {
            rows: left.rows,
            width: left.columns,
            words,
        }
    }
}

/// A vector of `chunks` chunks of `chunk` values, filled on all threads if it has more than `serial_below` values.
/// `fill` is called with zeroed memory.
fn parallel_fill<T: Copy + Default + Send>(
    chunks: usize,
    chunk: usize,
    serial_below: usize,
    fill: impl Fn(usize, &mut [T]) + Sync,
) -> Vec<T> {
    let mut values = Vec::with_capacity(chunks * chunk);
    values.spare_capacity_mut()[..chunks * chunk]
        .par_chunks_mut(chunk.max(1))
        .enumerate()
        .with_min_len(1 + serial_below / chunk.max(1))
        .for_each(|(index, memory)| {
            memory.fill(MaybeUninit::new(T::default()));
            #[expect(
                unsafe_code,
                reason = "zeroing everything on one thread costs as much as the rest"
            )]
            // SAFETY: the memory is initialised by the line above.
            fill(index, unsafe { memory.assume_init_mut() });
        });
    #[expect(unsafe_code, reason = "as above")]
    // SAFETY: the capacity is at least this length, and every chunk is initialised.
    unsafe {
        values.set_len(chunks * chunk);
    }
    values
}

/// Words per packed row of `width` values, which are the cache lines per panel.
fn depth(width: usize, precision: Precision) -> usize {
    match precision {
        Precision::F32 => width,
        Precision::Bf16 => width.div_ceil(2).next_multiple_of(BF16_DEPTH_MULTIPLE),
        Precision::Int8 => width.div_ceil(4),
    }
}

/// Layout of packed bf16 rows on this machine.
fn row_layout() -> RowLayout {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if amx::Amx::detect().is_some() {
        return RowLayout::AmxTiles;
    }
    RowLayout::RowMajor
}

/// Whether products in this precision run on AMX tiles on this machine. A product of few rows with a large matrix then waits
/// for memory; without tiles, and from eight rows on, it waits for the multiplications.
#[must_use]
pub fn uses_tiles(precision: Precision) -> bool {
    precision == Precision::Bf16 && row_layout() == RowLayout::AmxTiles
}

/// Packed right operand `[in, out]`, for products with rows of `in` values. Clones share the panels.
#[derive(Clone)]
pub struct PackedMatrix {
    /// Columns of the result.
    out: usize,
    /// The inner dimension.
    width: usize,
    /// Cache lines per panel.
    depth: usize,
    panels: Panels,
    /// Index of the first column's panel.
    first_panel: usize,
}

/// Panel after panel, `depth` cache lines each.
#[derive(Clone)]
enum Panels {
    F32(Arc<Vec<CacheLine<f32>>>),
    Bf16(Arc<Vec<CacheLine<u32>>>),
    Int8(Arc<Vec<CacheLine<u32>>>, Arc<Vec<ColumnScales>>),
}

impl Panels {
    /// Whether both are the same memory.
    fn are_those_of(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::F32(a), Self::F32(b)) => Arc::ptr_eq(a, b),
            (Self::Bf16(a), Self::Bf16(b)) | (Self::Int8(a, _), Self::Int8(b, _)) => {
                Arc::ptr_eq(a, b)
            }
            _ => false,
        }
    }
}

impl fmt::Debug for PackedMatrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (weight, precision) = (self.weight_dims(), self.precision());
        write!(f, "PackedMatrix(weight {weight:?} in {precision:?})")
    }
}

/// Cache lines per bf16 panel are a multiple of this: one AMX tile.
const BF16_DEPTH_MULTIPLE: usize = 16;

/// Packed bf16 rows are a multiple of this: two AMX tiles. Output tiles begin at such a row.
const ROW_MULTIPLE: usize = 32;

/// Multiplications that are worth a task of their own.
const MULTIPLICATIONS_PER_TASK: usize = 512 * 1024;

/// Tasks per thread, for load balance.
const TASKS_PER_THREAD: usize = 4;

/// Maximum rows of an output tile: as many as stay in a core's own cache while panel after panel is multiplied.
const MAX_TILE_ROWS: usize = 256;

/// Threads that compute a product.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Threads {
    /// The calling thread only: for tasks that are parallel at a higher level.
    Current,
    /// The whole pool, if the product is large enough.
    All,
}

/// Units in which an output is cut into tiles.
#[derive(Clone, Copy)]
struct Granularity {
    rows: usize,
    panels: usize,
}

impl PackedMatrix {
    /// Packs weights `[out, in]`, row-major, stacked along `out`: their rows are the columns of the result.
    pub fn stacked(weights: &[&[f32]], width: usize, precision: Precision) -> Self {
        let rows = match weights {
            [one] => Cow::Borrowed(*one),
            _ => Cow::Owned(weights.concat()),
        };
        let weight = MatrixRef::new(&rows, rows.len() / width, width);
        Self::pack(weight.transpose(), precision)
    }

    /// Packs a right operand `[in, out]`.
    pub(crate) fn pack(right: MatrixRef<'_>, precision: Precision) -> Self {
        let width = right.rows;
        let depth = depth(width, precision);
        let panels = match precision {
            Precision::F32 => Panels::F32(Arc::new(pack_f32(right))),
            Precision::Bf16 => Panels::Bf16(Arc::new(pack_bf16(right, depth))),
            Precision::Int8 => {
                let (lines, scales) = pack_int8(right, depth);
                Panels::Int8(Arc::new(lines), Arc::new(scales))
            }
        };
        Self {
            out: right.columns,
            width,
            depth,
            panels,
            first_panel: 0,
        }
    }

    /// Each of several weights `[out, in]`, row-major, that read the same rows of `width` values. They share panels, but for a
    /// weight whose columns begin within a panel.
    #[must_use]
    pub fn neighbours(weights: &[&[f32]], width: usize, precision: Precision) -> Vec<Self> {
        let all = Self::stacked(weights, width, precision);
        let mut end = 0;
        let parts = weights.iter().map(|weight| {
            let start = end;
            end += weight.len() / width;
            let alone = || Self::stacked(&[weight], width, precision);
            all.columns(start..end).unwrap_or_else(alone)
        });
        parts.collect()
    }

    /// Matrices side by side, without a copy; `None` unless they are neighbours in the same panels.
    #[must_use]
    pub fn joined(parts: &[Self]) -> Option<Self> {
        let (first, rest) = parts.split_first()?;
        rest.iter().try_fold(first.clone(), |mut all, next| {
            let end = all.first_panel * LANES + all.out;
            let is_next = next.first_panel * LANES == end && next.panels.are_those_of(&all.panels);
            all.out += next.out;
            is_next.then_some(all)
        })
    }

    /// Whether both are the same columns of the same panels, not equal ones.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        self.panels.are_those_of(&other.panels)
            && (self.first_panel, self.out) == (other.first_panel, other.out)
    }

    /// The transpose, packed: weights `[in, out]`. It has the bits of the transposed weights packed, but costs no rounding.
    ///
    /// # Panics
    /// In int8, whose scales are those of the columns.
    pub(crate) fn transposed(&self) -> Self {
        let depth = depth(self.out, self.precision());
        let first_line = self.first_panel * self.depth;
        let panels = match &self.panels {
            Panels::F32(lines) => Panels::F32(Arc::new(transpose_f32(
                self.panels_ref(&lines[first_line..]),
            ))),
            Panels::Bf16(lines) => {
                let source = self.panels_ref(&lines[first_line..]);
                Panels::Bf16(Arc::new(transpose_bf16(source, depth)))
            }
            Panels::Int8(..) => panic!("int8 is inference-only"),
        };
        Self {
            out: self.width,
            width: self.out,
            depth,
            panels,
            first_panel: 0,
        }
    }

    fn panels_ref<'a, W>(&self, lines: &'a [CacheLine<W>]) -> PanelsRef<'a, W> {
        PanelsRef {
            lines,
            depth: self.depth,
            width: self.width,
            out: self.out,
        }
    }

    /// The weights `[out, in]`, row-major, as they were rounded.
    ///
    /// # Panics
    /// In int8, which nothing holds weights in.
    #[must_use]
    pub fn unpacked(&self) -> Vec<f32> {
        let mut rows = vec![0.0; self.out * self.width];
        let rows_of_panel = rows.par_chunks_mut((LANES * self.width).max(1));
        rows_of_panel.enumerate().for_each(|(panel, rows)| {
            let line = |index: usize| (self.first_panel + panel) * self.depth + index;
            for (lane, row) in rows.chunks_exact_mut(self.width).enumerate() {
                for (index, value) in row.iter_mut().enumerate() {
                    *value = match &self.panels {
                        Panels::F32(lines) => lines[line(index)].0[lane],
                        Panels::Bf16(lines) => {
                            let word = lines[line(index / 2)].0[lane];
                            f32::from_bits((word >> (16 * (index % 2))) << 16)
                        }
                        Panels::Int8(..) => panic!("int8 is inference-only"),
                    };
                }
            }
        });
        rows
    }

    /// Size of these columns in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let lines = self.out.div_ceil(LANES) * self.depth;
        (lines * size_of::<CacheLine<u32>>()) as u64
    }

    /// These columns, in the same panels; `None` if they do not begin with a panel.
    #[must_use]
    pub fn columns(&self, columns: Range<usize>) -> Option<Self> {
        assert!(columns.end <= self.out);
        columns.start.is_multiple_of(LANES).then(|| Self {
            out: columns.len(),
            first_panel: self.first_panel + columns.start / LANES,
            ..self.clone()
        })
    }

    /// Dimensions `[out, in]` of the packed weight.
    #[must_use]
    pub fn weight_dims(&self) -> [usize; 2] {
        [self.out, self.width]
    }

    /// Whether a weight of these dimensions, `[out, in]`, is packed in this precision.
    pub(crate) fn fits(&self, weight_dims: [usize; 2], precision: Precision) -> bool {
        self.weight_dims() == weight_dims && self.precision() == precision
    }

    /// Precision of its products.
    #[must_use]
    pub fn precision(&self) -> Precision {
        match self.panels {
            Panels::F32(_) => Precision::F32,
            Panels::Bf16(_) => Precision::Bf16,
            Panels::Int8(..) => Precision::Int8,
        }
    }

    /// `x · weightᵀ`: `x` is `[n, in]`, the result `[n, out]`. NaN in a row gives NaN in its result.
    pub fn multiply(&self, x: &[f32]) -> Vec<f32> {
        let x = MatrixRef::new(x, x.len() / self.width, self.width);
        self.product(&PackedRows::pack(x, self.precision()))
    }

    /// Adds `x · weightᵀ` to `out`: `x` is `[n, in]`, `out` `[n, out]`.
    ///
    /// # Panics
    /// In int8, whose products cannot be added.
    pub fn multiply_add(&self, x: &[f32], out: &mut [f32]) {
        let x = MatrixRef::new(x, x.len() / self.width, self.width);
        let left = PackedRows::pack(x, self.precision());
        self.product_into(Threads::All, &left, Accumulate::Add, out);
    }

    /// `left · self`.
    pub(crate) fn product(&self, left: &PackedRows<'_>) -> Vec<f32> {
        let count = left.rows * self.out;
        if self.width == 0 {
            return vec![0.0; count];
        }
        let mut out = Vec::with_capacity(count);
        let memory = &mut out.spare_capacity_mut()[..count];
        self.run(Threads::All, left, OutputView::uninit(memory));
        #[expect(
            unsafe_code,
            reason = "zeroing the output first costs a tenth of a product"
        )]
        // SAFETY: the capacity is at least `count`, and a product writes every value of its output.
        unsafe {
            out.set_len(count);
        }
        out
    }

    /// `left · self` written to `out` or added to it. Int8 products cannot be added.
    pub(crate) fn product_into(
        &self,
        threads: Threads,
        left: &PackedRows<'_>,
        accumulate: Accumulate,
        out: &mut [f32],
    ) {
        if self.width == 0 && accumulate == Accumulate::Overwrite {
            out.fill(0.0);
        }
        self.run(threads, left, OutputView::new(out, accumulate));
    }

    fn run(&self, threads: Threads, left: &PackedRows<'_>, output: OutputView<'_>) {
        assert_eq!(left.width, self.width);
        assert_eq!(output.len(), left.rows * self.out);
        let accumulate = output.accumulate;
        let depth = self.depth;
        let first_line = self.first_panel * depth;
        match (&self.panels, &left.words) {
            (Panels::F32(panels), RowWords::F32(left)) => {
                let operands = Operands {
                    format: &F32,
                    left: *left,
                    panels: &panels[first_line..],
                    depth,
                };
                self.run_simd(threads, &operands, output);
            }
            (Panels::Bf16(panels), RowWords::Bf16(words)) => {
                let panels = &panels[first_line..];
                #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
                if let Some(amx) = amx::Amx::detect() {
                    let operands = amx::AmxOperands {
                        left: words,
                        panels,
                        depth,
                    };
                    self.for_each_tile(threads, amx::GRANULARITY, output, |tile| {
                        amx.multiply(operands, accumulate, tile);
                    });
                    return;
                }
                let operands = Operands {
                    format: &Bf16,
                    left: LeftOperand::RowMajor {
                        words,
                        stride: depth,
                    },
                    panels,
                    depth,
                };
                self.run_simd(threads, &operands, output);
            }
            (Panels::Int8(panels, columns), RowWords::Int8(QuantisedRows { words, scales })) => {
                assert!(
                    accumulate == Accumulate::Overwrite,
                    "int8 is inference-only"
                );
                let operands = Operands {
                    format: &Int8 {
                        row_scales: scales,
                        columns: &columns[self.first_panel..],
                    },
                    left: LeftOperand::RowMajor {
                        words,
                        stride: depth,
                    },
                    panels: &panels[first_line..],
                    depth,
                };
                self.run_simd(threads, &operands, output);
            }
            _ => unreachable!("both operands of a product have the same precision"),
        }
    }

    fn run_simd<F: Format>(
        &self,
        threads: Threads,
        operands: &Operands<'_, F>,
        output: OutputView<'_>,
    ) {
        let accumulate = output.accumulate;
        let granularity = Granularity {
            rows: tile::row_granularity::<F>(),
            panels: tile::MAX_PANELS,
        };
        self.for_each_tile(threads, granularity, output, |tile| {
            dispatch(TileProduct {
                operands,
                accumulate,
                tile,
            });
        });
    }

    /// Cuts the output into as many tiles as are worth a task, in whole units of `granularity`, and runs `work` on
    /// each.
    fn for_each_tile(
        &self,
        threads: Threads,
        granularity: Granularity,
        output: OutputView<'_>,
        work: impl Fn(Tile<'_>) + Sync,
    ) {
        let rows = output.len() / self.out.max(1);
        let threads = match threads {
            Threads::Current => 1,
            Threads::All => rayon::current_num_threads(),
        };
        let unit = granularity.rows;
        let tasks = rows * self.out * self.width / MULTIPLICATIONS_PER_TASK;
        let max_tasks = if threads == 1 {
            1
        } else {
            TASKS_PER_THREAD * threads
        };
        let tasks = tasks.clamp(1, max_tasks);
        let height = (rows / tasks + unit / 2) / unit * unit;
        let height = height.clamp(unit, MAX_TILE_ROWS / unit * unit);
        // Every tile of a transposed left operand packs its own rows, so columns are split only if there are too few
        // rows.
        let tiles_down = rows.div_ceil(height).max(1);
        let tiles_across = if tiles_down < 2 * threads {
            tasks.div_ceil(tiles_down)
        } else {
            1
        };
        let panels = self.out.div_ceil(LANES).max(1);
        let tile_panels = panels
            .div_ceil(tiles_across)
            .next_multiple_of(granularity.panels);
        let tiles = output.split(self.out.max(1), height, tile_panels * LANES);
        if tasks == 1 {
            tiles.into_iter().for_each(&work);
        } else {
            tiles.into_par_iter().for_each(&work);
        }
    }
}

#[cfg(test)]
mod tests;
