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
        rows::<A, 8>(out, left, right, sizes, 0)
    } else {
        rows::<A, 4>(out, left, right, sizes, 0)
    };
    rows::<A, 1>(out, left, right, sizes, first);
}

/// All blocks of `M` rows from row `first` on; returns the row after the last.
#[inline(always)]
fn rows<A: Arithmetic, const M: usize>(
    out: &mut [f32],
    left: Left<'_>,
    right: Right<'_>,
    sizes: Sizes,
    mut first: usize,
) -> usize {
    while first + M <= sizes.m {
        let out = &mut out[first * sizes.n..][..M * sizes.n];
        // Where the block's part of the left factor begins, and its steps from row to row and from k to k.
        let (data, down, across) = match left {
            Left::Rows { data, stride } => (&data[first * stride..], stride, 1),
            Left::Columns { data, stride } => (&data[first..], 1, stride),
        };
        let of_row = |i: usize| &data[i * down..];
        let left: [&[f32]; M] = std::array::from_fn(of_row);
        let mut j = 0;
        while A::WIDE && j + 3 * LANES <= sizes.n {
            block::<A, M, 3>(out, (left, across), right, sizes, j);
            j += 3 * LANES;
        }
        while j < sizes.n {
            block::<A, M, 1>(out, (left, across), right, sizes, j);
            j += LANES;
        }
        first += M;
    }
    first
}

/// `M` rows of the product in `N` vectors of columns from `j` on; `left` are their rows of the left factor,
/// whose numbers are so far apart.
///
/// Loops, not closures: a closure would not be compiled for the vectors of the function around it.
#[inline(always)]
fn block<A: Arithmetic, const M: usize, const N: usize>(
    out: &mut [f32],
    (left, across): ([&[f32]; M], usize),
    right: Right<'_>,
    sizes: Sizes,
    j: usize,
) {
    let mut sums = [[A::load(lanes(&out[j..])); N]; M];
    for i in 0..M {
        for n in 0..N {
            sums[i][n] = A::load(lanes(&out[i * sizes.n + j + n * LANES..]));
        }
    }
    for k in 0..sizes.k {
        let line = &right.data[k * right.stride + j..][..N * LANES];
        for i in 0..M {
            let factor = left[i][k * across];
            for n in 0..N {
                let row = A::load(lanes(&line[n * LANES..]));
                sums[i][n] = A::accumulate(factor, row, sums[i][n]);
            }
        }
    }
    for i in 0..M {
        for n in 0..N {
            let row = out[i * sizes.n + j + n * LANES..].first_chunk_mut();
            A::store(sums[i][n], row.expect("n is a multiple of the lanes"));
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
