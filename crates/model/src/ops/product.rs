//! Small matrix products inside one task, where a call to a threaded product would cost more than
//! it saves. Every element is summed in the order of the inner index, so it does not depend on its
//! place among the others.

use super::vector::{Arithmetic, LANES};

/// The left factor, `[m, k]`, both ways round.
#[derive(Clone, Copy)]
pub(super) enum Left<'a> {
    /// Row-major: `(i, k)` lies at `i * stride + k`.
    Rows { data: &'a [f32], stride: usize },
    /// Column-major, a transposed matrix: `(i, k)` lies at `k * stride + i`.
    Columns { data: &'a [f32], stride: usize },
}

/// The right factor, `[k, n]`, row-major.
#[derive(Clone, Copy)]
pub(super) struct Right<'a> {
    pub data: &'a [f32],
    pub stride: usize,
}

/// The sizes of a product. `n` is a multiple of [`LANES`].
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub m: usize,
    pub k: usize,
    pub n: usize,
}

/// `out += left · right`; `out` is `[m, n]`, row-major, its rows `n` long and without gaps.
#[inline(always)]
pub(super) fn add_product<A: Arithmetic>(
    out: &mut [f32],
    left: Left<'_>,
    right: Right<'_>,
    sizes: Sizes,
) {
    let first = if A::WIDE {
        blocks::<A, 8>(out, left, right, sizes, 0)
    } else {
        blocks::<A, 4>(out, left, right, sizes, 0)
    };
    blocks::<A, 1>(out, left, right, sizes, first);
}

/// All blocks of `M` rows from row `first` on; returns the row after the last.
#[inline(always)]
fn blocks<A: Arithmetic, const M: usize>(
    out: &mut [f32],
    left: Left<'_>,
    right: Right<'_>,
    sizes: Sizes,
    mut first: usize,
) -> usize {
    while first + M <= sizes.m {
        let out = &mut out[first * sizes.n..][..M * sizes.n];
        match left {
            Left::Rows { data, stride } => {
                let rows: [&[f32]; M] =
                    std::array::from_fn(|i| &data[(first + i) * stride..][..sizes.k]);
                let column = |k: usize| std::array::from_fn(|i| rows[i][k]);
                block::<A, M>(out, column, right, sizes);
            }
            Left::Columns { data, stride } => {
                let column = |k: usize| {
                    let rows = &data[k * stride + first..][..M];
                    std::array::from_fn(|i| rows[i])
                };
                block::<A, M>(out, column, right, sizes);
            }
        }
        first += M;
    }
    first
}

/// `M` rows of the product; `column(k)` is their part of column `k` of the left factor.
#[inline(always)]
fn block<A: Arithmetic, const M: usize>(
    out: &mut [f32],
    column: impl Fn(usize) -> [f32; M],
    right: Right<'_>,
    sizes: Sizes,
) {
    for j in (0..sizes.n).step_by(LANES) {
        // A loop, not a closure: that would not be compiled for the vectors of the function around it.
        let mut sums = [A::load(lanes(&out[j..])); M];
        for (i, sum) in sums.iter_mut().enumerate() {
            *sum = A::load(lanes(&out[i * sizes.n + j..]));
        }
        for k in 0..sizes.k {
            let row = A::load(lanes(&right.data[k * right.stride + j..]));
            for (sum, factor) in sums.iter_mut().zip(column(k)) {
                *sum = A::accumulate(factor, row, *sum);
            }
        }
        for (i, sum) in sums.into_iter().enumerate() {
            let row = out[i * sizes.n + j..].first_chunk_mut();
            A::store(sum, row.expect("n is a multiple of the lanes"));
        }
    }
}

/// The first vector of a row.
#[inline(always)]
fn lanes(row: &[f32]) -> &[f32; LANES] {
    row.first_chunk().expect("n is a multiple of the lanes")
}

#[cfg(test)]
mod tests {
    use super::super::vector::{Kernel, Separate, dispatch};
    use super::*;

    struct Multiply<'a> {
        out: &'a mut [f32],
        left: Left<'a>,
        right: Right<'a>,
        sizes: Sizes,
    }

    impl Kernel for Multiply<'_> {
        type Output = ();

        #[inline(always)]
        fn run<A: Arithmetic>(self) {
            add_product::<A>(self.out, self.left, self.right, self.sizes);
        }
    }

    #[test]
    fn adds_the_product_whichever_way_the_left_factor_lies() {
        let numbers: Vec<f32> = (0..2000).map(|i| ((i * 37) % 11) as f32 - 5.0).collect();
        for (m, k, n) in [(1, 1, 16), (4, 3, 32), (11, 5, 16), (19, 8, 48)] {
            let sizes = Sizes { m, k, n };
            let right = Right {
                data: &numbers[3..],
                stride: n + 2,
            };
            let rows = Left::Rows {
                data: &numbers,
                stride: k + 1,
            };
            let columns = Left::Columns {
                data: &numbers,
                stride: m + 1,
            };
            for (left, row_step, column_step) in [(rows, k + 1, 1), (columns, 1, m + 1)] {
                let mut out = vec![1.0; m * n];
                dispatch(Multiply {
                    out: &mut out,
                    left,
                    right,
                    sizes,
                });
                let mut separate = vec![1.0; m * n];
                let multiply = Multiply {
                    out: &mut separate,
                    left,
                    right,
                    sizes,
                };
                multiply.run::<Separate>();
                // Small integers: every order of summation is exact.
                for (at, &got) in out.iter().enumerate() {
                    let (i, j) = (at / n, at % n);
                    let expected: f32 = (0..k)
                        .map(|k| {
                            numbers[i * row_step + k * column_step] * numbers[3 + k * (n + 2) + j]
                        })
                        .sum();
                    assert_eq!(got, 1.0 + expected, "{m} {k} {n} at {i} {j}");
                }
                assert_eq!(out, separate);
            }
        }
    }
}
