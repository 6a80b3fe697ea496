use super::*;
use crate::simd::Level;

fn values(count: usize, seed: f32) -> Vec<f32> {
    (0..count)
        .map(|i| ((i as f32 * 0.731 + seed) * 12.9898).sin() * 2.0)
        .collect()
}

/// The product in f64 of operands rounded by `round`.
fn expected(x: &[f32], weight: &[f32], width: usize, round: impl Fn(f32) -> f32) -> Vec<f64> {
    let rows = x.chunks_exact(width);
    rows.flat_map(|x| {
        weight.chunks_exact(width).map(|w| {
            let products = x.iter().zip(w);
            products
                .map(|(&x, &w)| f64::from(round(x)) * f64::from(round(w)))
                .sum()
        })
    })
    .collect::<Vec<f64>>()
}

fn bf16(x: f32) -> f32 {
    f32::from_bits(rows::bf16_pair(x, 0.0) << 16)
}

fn worst(found: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let gaps = found.iter().zip(expected);
    gaps.map(|(&f, e)| (f64::from(f) - e).abs())
        .fold(0.0, f64::max)
}

/// Rows, columns and inner dimensions at and around the sizes of blocks.
const SHAPES: [(usize, usize, usize); 7] = [
    (1, 1, 1),
    (3, 17, 5),
    (8, 48, 32),
    (11, 100, 33),
    (32, 96, 64),
    (33, 130, 70),
    (70, 700, 129),
];

#[test]
fn products_in_every_precision() {
    for (rows, out, width) in SHAPES {
        let (x, weight) = (values(rows * width, 0.3), values(out * width, 1.7));
        let product = |precision| PackedMatrix::stacked(&[&weight], width, precision).multiply(&x);
        let exact = expected(&x, &weight, width, |x| x);
        let size = width as f64;
        let gap = worst(&product(Precision::F32), &exact);
        assert!(gap < 4e-6 * size, "f32 {rows} {out} {width}: {gap}");
        let rounded = expected(&x, &weight, width, bf16);
        let gap = worst(&product(Precision::Bf16), &rounded);
        assert!(gap < 4e-6 * size, "bf16 {rows} {out} {width}: {gap}");
        // Half a quantisation step of each operand; steps are at most 2 / 127.
        let gap = worst(&product(Precision::Int8), &exact);
        assert!(gap < 0.033 * size, "int8 {rows} {out} {width}: {gap}");
        assert!(gap > 0.0 || width == 1, "int8 rounds");
    }
}

#[test]
fn a_row_depends_neither_on_the_others_nor_on_threads() {
    let (out, width) = (3000, 70);
    let (x, weight) = (values(70 * width, 0.3), values(out * width, 1.7));
    for precision in [Precision::F32, Precision::Bf16, Precision::Int8] {
        let matrix = PackedMatrix::stacked(&[&weight], width, precision);
        let all = matrix.multiply(&x);
        for row in [0, 33, 69] {
            let alone = matrix.multiply(&x[row * width..][..width]);
            assert_eq!(alone, all[row * out..][..out], "{precision:?} {row}");
        }
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3);
        let many = pool.build().unwrap().install(|| matrix.multiply(&x));
        assert_eq!(many, all, "{precision:?}");
    }
}

#[test]
fn levels_agree_within_rounding_and_int8_exactly() {
    let (rows, out, width) = (13, 100, 66);
    let (x, weight) = (values(rows * width, 0.3), values(out * width, 1.7));
    let of = |format: &dyn Fn(Level) -> Vec<f32>, tolerance: f32| {
        let plain = format(Level::Plain);
        for level in Level::available() {
            let found = format(level);
            let gaps = found.iter().zip(&plain).map(|(a, b)| (a - b).abs());
            let gap = gaps.fold(0.0, f32::max);
            assert!(gap <= tolerance, "{level:?}: {gap}");
        }
        plain
    };
    let f32_weight = PackedMatrix::stacked(&[&weight], width, Precision::F32);
    let bf16_weight = PackedMatrix::stacked(&[&weight], width, Precision::Bf16);
    let int8_weight = PackedMatrix::stacked(&[&weight], width, Precision::Int8);
    let Panels::F32(panels) = &f32_weight.panels else {
        unreachable!()
    };
    let operands = Operands {
        format: &F32,
        left: LeftOperand::RowMajor {
            words: &x[..],
            stride: width,
        },
        panels,
        depth: f32_weight.depth,
    };
    of(&|level| product_at(level, &operands, out), 1e-4);
    let Panels::Bf16(panels) = &bf16_weight.panels else {
        unreachable!()
    };
    let left = MatrixRef::new(&x, x.len() / width, width);
    let words = rows::pack_bf16_rows(left, bf16_weight.depth, RowLayout::RowMajor, LANES);
    let operands = Operands {
        format: &Bf16,
        left: LeftOperand::RowMajor {
            words: &words[..],
            stride: bf16_weight.depth,
        },
        panels,
        depth: bf16_weight.depth,
    };
    of(&|level| product_at(level, &operands, out), 1e-4);
    of(&|level| int8_product_at(level, &int8_weight, &x), 0.0);
}

#[test]
fn extreme_int8_values_do_not_overflow() {
    let (rows, out, width) = (13, 100, 66);
    let x: Vec<f32> = (0..rows * width).map(|i| [1.0, -1.0][i % 2]).collect();
    for flip in [1.0, -1.0] {
        let weight: Vec<f32> = (0..out * width)
            .map(|i| flip * [1.0, -1.0][i % 2])
            .collect();
        let matrix = PackedMatrix::stacked(&[&weight], width, Precision::Int8);
        for level in Level::available() {
            for sum in int8_product_at(level, &matrix, &x) {
                assert!((sum - flip * width as f32).abs() < 1e-4, "{level:?}: {sum}");
            }
        }
    }
}

fn int8_product_at(level: Level, matrix: &PackedMatrix, x: &[f32]) -> Vec<f32> {
    let rows = QuantisedRows::quantise(x, matrix.width, matrix.depth);
    let Panels::Int8(panels, columns) = &matrix.panels else {
        unreachable!()
    };
    let operands = Operands {
        format: &Int8 {
            row_scales: &rows.scales,
            columns,
        },
        left: LeftOperand::RowMajor {
            words: &rows.words[..],
            stride: matrix.depth,
        },
        panels,
        depth: matrix.depth,
    };
    product_at(level, &operands, matrix.out)
}

/// A product of 13 rows and `columns` columns, in tiles of 5 by 48.
fn product_at<F: Format>(level: Level, operands: &Operands<'_, F>, columns: usize) -> Vec<f32> {
    let mut out = vec![0.0; 13 * columns];
    for tile in OutputView::new(&mut out, Accumulate::Overwrite).split(columns, 5, 48) {
        level.run(TileProduct {
            operands,
            accumulate: Accumulate::Overwrite,
            tile,
        });
    }
    out
}

#[test]
fn transposed_operands_and_accumulation() {
    for (m, n, k) in [(1, 1, 1), (9, 50, 31), (300, 33, 450)] {
        let (a, b) = (values(m * k, 0.3), values(k * n, 1.7));
        let transpose = |x: &[f32], rows: usize, columns: usize| -> Vec<f32> {
            let at = |i: usize| x[i % rows * columns + i / rows];
            (0..x.len()).map(at).collect()
        };
        let (a_, b_) = (transpose(&a, m, k), transpose(&b, k, n));
        for precision in [Precision::F32, Precision::Bf16] {
            let round = |x: f32| {
                if precision == Precision::F32 {
                    x
                } else {
                    bf16(x)
                }
            };
            let expected = expected(&a, &b_, k, round);
            let expected: Vec<f64> = expected.iter().map(|x| x + 1.0).collect();
            let lefts = [
                MatrixRef::new(&a, m, k),
                MatrixRef::new(&a_, k, m).transpose(),
            ];
            let rights = [
                MatrixRef::new(&b, k, n),
                MatrixRef::new(&b_, n, k).transpose(),
            ];
            let mut first: Option<Vec<f32>> = None;
            for (left, right) in lefts.into_iter().flat_map(|l| rights.map(|r| (l, r))) {
                let mut out = vec![1.0; m * n];
                let (rows, packed) = (
                    PackedRows::pack(left, precision),
                    PackedMatrix::pack(right, precision),
                );
                packed.product_into(Threads::All, &rows, Accumulate::Add, &mut out);
                let gap = worst(&out, &expected);
                assert!(gap < 4e-6 * k as f64, "{precision:?} {m} {n} {k}: {gap}");
                assert_eq!(first.get_or_insert(out.clone()), &out, "the same bits");
                packed.product_into(Threads::Current, &rows, Accumulate::Overwrite, &mut out);
                assert_eq!(
                    product(left, right, precision),
                    out,
                    "on all threads or on one"
                );
                let gap = worst(&out, &expected.iter().map(|x| x - 1.0).collect::<Vec<_>>());
                assert!(
                    gap < 4e-6 * k as f64,
                    "overwrite {precision:?} {m} {n} {k}: {gap}"
                );
            }
        }
    }
}

#[test]
fn nan_stays_in_its_row() {
    let (out, width) = (20, 40);
    let weight = values(out * width, 1.0);
    for bad in [f32::NAN, f32::INFINITY] {
        let mut x = values(3 * width, 0.0);
        x[width + 7] = bad;
        for precision in [Precision::F32, Precision::Bf16, Precision::Int8] {
            let found = PackedMatrix::stacked(&[&weight], width, precision).multiply(&x);
            assert!(
                found[out..2 * out].iter().all(|x| !x.is_finite()),
                "{precision:?}"
            );
            assert!(
                found[..out]
                    .iter()
                    .chain(&found[2 * out..])
                    .all(|x| x.is_finite())
            );
        }
    }
}

/// 40 columns end within a panel, so that the third part has panels of its own.
#[test]
fn neighbours_are_their_columns_and_join_within_panels() {
    let (rows, width) = (33, 70);
    let x = values(rows * width, 0.3);
    let parts = [(32, 1.0), (40, 2.0), (50, 3.0)].map(|(out, seed)| values(out * width, seed));
    let weights: Vec<&[f32]> = parts.iter().map(Vec::as_slice).collect();
    for precision in [Precision::F32, Precision::Bf16, Precision::Int8] {
        let packed = PackedMatrix::neighbours(&weights, width, precision);
        for (part, weight) in packed.iter().zip(&weights) {
            let alone = PackedMatrix::stacked(&[weight], width, precision);
            assert_eq!(part.multiply(&x), alone.multiply(&x), "{precision:?}");
            assert!(part.is_same(&part.clone()) && !part.is_same(&alone));
        }
        let both = PackedMatrix::joined(&packed[..2]).expect("they are neighbours");
        let stacked = PackedMatrix::stacked(&weights[..2], width, precision);
        assert_eq!(both.multiply(&x), stacked.multiply(&x), "{precision:?}");
        assert!(!both.is_same(&packed[0]));
        assert!(
            PackedMatrix::joined(&packed).is_none(),
            "the third is alone"
        );
        let swapped = [packed[1].clone(), packed[0].clone()];
        assert!(PackedMatrix::joined(&swapped).is_none());
        let equal = PackedMatrix::neighbours(&weights, width, precision);
        let mixed = [packed[0].clone(), equal[1].clone()];
        assert!(
            PackedMatrix::joined(&mixed).is_none(),
            "of different panels"
        );
    }
}

/// Also of columns that end within a panel, beside which others are.
#[test]
fn a_transpose_and_the_unpacked_weights_are_those_that_were_packed() {
    for (out, width) in [(1, 1), (17, 5), (48, 32), (100, 33), (130, 70), (96, 64)] {
        let weight = values(out * width, 1.7);
        for precision in [Precision::F32, Precision::Bf16] {
            let all = PackedMatrix::stacked(&[&weight], width, precision);
            for columns in [0..out, 0..out.min(7), out / 32 * 16..out] {
                let part = all.columns(columns.clone()).expect("a whole panel");
                let rows = &weight[columns.start * width..columns.end * width];
                let matrix = MatrixRef::new(rows, columns.len(), width);
                let expected = PackedMatrix::pack(matrix, precision);
                let found = part.transposed();
                assert_eq!(found.weight_dims(), [width, columns.len()]);
                assert_eq!(found.depth, expected.depth);
                assert!(
                    words(&found) == words(&expected),
                    "{precision:?} {out} {width} {columns:?}"
                );
                let rounded: Vec<f32> = match precision {
                    Precision::F32 => rows.to_vec(),
                    _ => rows.iter().map(|&x| bf16(x)).collect(),
                };
                assert_eq!(part.unpacked(), rounded);
            }
        }
    }
}

/// All words of a matrix's panels.
fn words(matrix: &PackedMatrix) -> Vec<u32> {
    match &matrix.panels {
        Panels::F32(lines) => lines.iter().flat_map(|l| l.0.map(f32::to_bits)).collect(),
        Panels::Bf16(lines) => lines.iter().flat_map(|line| line.0).collect(),
        Panels::Int8(..) => unreachable!("int8 has no transpose"),
    }
}
