//! Small matrix products without packing, for use inside one task.
//!
//! Promises: every element is summed in the order of the inner dimension, so it does not depend on its position in the
//! output.

use crate::simd::{Arithmetic, LANES};

/// Left operand, `[m, k]`.
#[derive(Clone, Copy)]
pub(crate) enum LeftMatrix<'a> {
    /// `(i, k)` is at `i * stride + k`.
    RowMajor { data: &'a [f32], stride: usize },
    /// `(i, k)` is at `k * stride + i`.
    ColumnMajor { data: &'a [f32], stride: usize },
}

/// Right operand, `[k, n]`, row-major.
#[derive(Clone, Copy)]
pub(crate) struct RightMatrix<'a> {
    pub data: &'a [f32],
    pub stride: usize,
}

/// Dimensions of a product. `n` is a multiple of [`LANES`].
#[derive(Clone, Copy)]
pub(crate) struct GemmSize {
    pub m: usize,
    pub k: usize,
    pub n: usize,
}

/// `out += left · right`; `out` is `[m, n]`, row-major and contiguous.
#[inline(always)]
pub(crate) fn add_product<A: Arithmetic>(
    out: &mut [f32],
    left: LeftMatrix<'_>,
    right: RightMatrix<'_>,
    size: GemmSize,
) {
    let first = if A::WIDE {
        rows::<A, 8>(out, left, right, size, 0)
    } else {
        rows::<A, 4>(out, left, right, size, 0)
    };
    rows::<A, 1>(out, left, right, size, first);
}

/// All blocks of `M` rows from row `first` on; returns the row after the last.
#[inline(always)]
fn rows<A: Arithmetic, const M: usize>(
    out: &mut [f32],
    left: LeftMatrix<'_>,
    right: RightMatrix<'_>,
    size: GemmSize,
    mut first: usize,
) -> usize {
    while first + M <= size.m {
        let out = &mut out[first * size.n..][..M * size.n];
        // The block's part of the left operand, and its strides.
        let (data, row_stride, k_stride) = match left {
            LeftMatrix::RowMajor { data, stride } => (&data[first * stride..], stride, 1),
            LeftMatrix::ColumnMajor { data, stride } => (&data[first..], 1, stride),
        };
        let of_row = |i: usize| &data[i * row_stride..];
        let left = BlockRows {
            rows: std::array::from_fn::<_, M, _>(of_row),
            stride: k_stride,
        };
        let mut j = 0;
        while A::WIDE && j + 3 * LANES <= size.n {
            block::<A, M, 3>(out, left, right, size, j);
            j += 3 * LANES;
        }
        while j < size.n {
            block::<A, M, 1>(out, left, right, size, j);
            j += LANES;
        }
        first += M;
    }
    first
}

/// `M` rows of the left operand, whose values are `stride` apart.
#[derive(Clone, Copy)]
struct BlockRows<'a, const M: usize> {
    rows: [&'a [f32]; M],
    stride: usize,
}

/// `M` rows of the product in `N` vectors of columns from `j` on.
///
/// Loops, not closures: a closure would not be compiled with the target features of the function around it.
#[inline(always)]
fn block<A: Arithmetic, const M: usize, const N: usize>(
    out: &mut [f32],
    left: BlockRows<'_, M>,
    right: RightMatrix<'_>,
    size: GemmSize,
    j: usize,
) {
    let BlockRows { rows, stride } = left;
    let mut sums = [[A::load(lanes(&out[j..])); N]; M];
    for i in 0..M {
        for n in 0..N {
            sums[i][n] = A::load(lanes(&out[i * size.n + j + n * LANES..]));
        }
    }
    for k in 0..size.k {
        let line = &right.data[k * right.stride + j..][..N * LANES];
        for i in 0..M {
            let factor = rows[i][k * stride];
            for n in 0..N {
                let row = A::load(lanes(&line[n * LANES..]));
                sums[i][n] = A::accumulate(factor, row, sums[i][n]);
            }
        }
    }
    for i in 0..M {
        for n in 0..N {
            let row = out[i * size.n + j + n * LANES..].first_chunk_mut();
            A::store(sums[i][n], row.expect("n is a multiple of the lanes"));
        }
    }
}

/// The first [`LANES`] values of a row.
#[inline(always)]
fn lanes(row: &[f32]) -> &[f32; LANES] {
    row.first_chunk().expect("n is a multiple of the lanes")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Kernel, Portable, dispatch};

    struct Multiply<'a> {
        out: &'a mut [f32],
        left: LeftMatrix<'a>,
        right: RightMatrix<'a>,
        size: GemmSize,
    }

    impl Kernel for Multiply<'_> {
        type Output = ();

        #[inline(always)]
        fn run<A: Arithmetic>(self) {
            add_product::<A>(self.out, self.left, self.right, self.size);
        }
    }

    #[test]
    fn adds_the_product_of_row_major_and_column_major_operands() {
        let values: Vec<f32> = (0..2000).map(|i| ((i * 37) % 11) as f32 - 5.0).collect();
        for (m, k, n) in [(1, 1, 16), (4, 3, 32), (11, 5, 16), (19, 8, 48)] {
            let size = GemmSize { m, k, n };
            let right = RightMatrix {
                data: &values[3..],
                stride: n + 2,
            };
            let rows = LeftMatrix::RowMajor {
                data: &values,
                stride: k + 1,
            };
            let columns = LeftMatrix::ColumnMajor {
                data: &values,
                stride: m + 1,
            };
            for (left, row_step, column_step) in [(rows, k + 1, 1), (columns, 1, m + 1)] {
                let mut out = vec![1.0; m * n];
                dispatch(Multiply {
                    out: &mut out,
                    left,
                    right,
                    size,
                });
                let mut separate = vec![1.0; m * n];
                let multiply = Multiply {
                    out: &mut separate,
                    left,
                    right,
                    size,
                };
                multiply.run::<Portable>();
                // Small integers: every order of summation is exact.
                for (at, &got) in out.iter().enumerate() {
                    let (i, j) = (at / n, at % n);
                    let expected: f32 = (0..k)
                        .map(|k| {
                            values[i * row_step + k * column_step] * values[3 + k * (n + 2) + j]
                        })
                        .sum();
                    assert_eq!(got, 1.0 + expected, "{m} {k} {n} at {i} {j}");
                }
                assert_eq!(out, separate);
            }
        }
    }
}
