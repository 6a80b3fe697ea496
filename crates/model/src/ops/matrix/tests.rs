use super::*;
use crate::ops::vector::Level;

fn numbers(count: usize, seed: f32) -> Vec<f32> {
    (0..count)
        .map(|i| ((i as f32 * 0.731 + seed) * 12.9898).sin() * 2.0)
        .collect()
}

/// The product in f64, of factors rounded by `round`.
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
    f32::from_bits(rows::pair(x, 0.0) << 16)
}

fn worst(found: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let gaps = found.iter().zip(expected);
    gaps.map(|(&f, e)| (f64::from(f) - e).abs())
        .fold(0.0, f64::max)
}

/// Rows, columns and inner dimensions on and beside the edges of blocks.
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
        let (x, weight) = (numbers(rows * width, 0.3), numbers(out * width, 1.7));
        let product = |precision| PackedMatrix::stacked(&[&weight], width, precision).multiply(&x);
        let exact = expected(&x, &weight, width, |x| x);
        let size = width as f64;
        let gap = worst(&product(Precision::F32), &exact);
        assert!(gap < 4e-6 * size, "f32 {rows} {out} {width}: {gap}");
        let rounded = expected(&x, &weight, width, bf16);
        let gap = worst(&product(Precision::Bf16), &rounded);
        assert!(gap < 4e-6 * size, "bf16 {rows} {out} {width}: {gap}");
        // Half a step of each factor, steps of 2 / 127 at most.
        let gap = worst(&product(Precision::Int8), &exact);
        assert!(gap < 0.033 * size, "int8 {rows} {out} {width}: {gap}");
        assert!(gap > 0.0 || width == 1, "bytes are rounded");
    }
}

#[test]
fn a_row_depends_neither_on_the_others_nor_on_threads() {
    let (out, width) = (3000, 70);
    let (x, weight) = (numbers(70 * width, 0.3), numbers(out * width, 1.7));
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
fn every_level_gives_the_same_within_rounding_and_bytes_the_same_exactly() {
    let (rows, out, width) = (13, 100, 66);
    let (x, weight) = (numbers(rows * width, 0.3), numbers(out * width, 1.7));
    let of = |format: &dyn Fn(Level) -> Vec<f32>, tolerance: f32| {
        let plain = format(Level::Plain);
        for level in Level::here() {
            let found = format(level);
            let gaps = found.iter().zip(&plain).map(|(a, b)| (a - b).abs());
            let gap = gaps.fold(0.0, f32::max);
            assert!(gap <= tolerance, "{level:?}: {gap}");
        }
        plain
    };
    let floats = PackedMatrix::stacked(&[&weight], width, Precision::F32);
    let halves = PackedMatrix::stacked(&[&weight], width, Precision::Bf16);
    let bytes = PackedMatrix::stacked(&[&weight], width, Precision::Int8);
    let Lines::F32(lines) = &floats.lines else {
        unreachable!()
    };
    let left = Left::Rows {
        words: &x[..],
        stride: width,
    };
    of(&|level| at(level, &floats, &F32, left, lines), 1e-4);
    let Lines::Bf16(lines) = &halves.lines else {
        unreachable!()
    };
    let left = Factor::new(&x, x.len() / width, width);
    let words = rows::halves(left, halves.depth, Layout::Rows, LANES);
    let left = Left::Rows {
        words: &words[..],
        stride: halves.depth,
    };
    of(&|level| at(level, &halves, &Bf16, left, lines), 1e-4);
    of(&|level| bytes_at(level, &bytes, &x), 0.0);
}

#[test]
fn bytes_at_their_bounds_do_not_overflow() {
    let (rows, out, width) = (13, 100, 66);
    let x: Vec<f32> = (0..rows * width).map(|i| [1.0, -1.0][i % 2]).collect();
    for flip in [1.0, -1.0] {
        let weight: Vec<f32> = (0..out * width)
            .map(|i| flip * [1.0, -1.0][i % 2])
            .collect();
        let bytes = PackedMatrix::stacked(&[&weight], width, Precision::Int8);
        for level in Level::here() {
            for sum in bytes_at(level, &bytes, &x) {
                assert!((sum - flip * width as f32).abs() < 1e-4, "{level:?}: {sum}");
            }
        }
    }
}

fn bytes_at(level: Level, matrix: &PackedMatrix, x: &[f32]) -> Vec<f32> {
    let rounded = Bytes::of(x, matrix.width, matrix.depth);
    let Lines::Int8(lines, columns) = &matrix.lines else {
        unreachable!()
    };
    let format = Int8 {
        rows: &rounded.scales,
        columns,
    };
    let left = Left::Rows {
        words: &rounded.words[..],
        stride: matrix.depth,
    };
    at(level, matrix, &format, left, lines)
}

fn at<F: Format>(
    level: Level,
    matrix: &PackedMatrix,
    format: &F,
    left: Left<'_, F::Word>,
    lines: &[Line<F::Word>],
) -> Vec<f32> {
    let mut out = vec![0.0; 13 * matrix.out];
    for part in Target::over(&mut out, Begin::Anew).split(matrix.out, (5, 48)) {
        level.run(Task {
            format,
            begin: Begin::Anew,
            left,
            lines,
            depth: matrix.depth,
            part,
        });
    }
    out
}

#[test]
fn factors_that_lie_across_and_sums_that_are_added_to() {
    for (m, n, k) in [(1, 1, 1), (9, 50, 31), (300, 33, 450)] {
        let (a, b) = (numbers(m * k, 0.3), numbers(k * n, 1.7));
        let across = |x: &[f32], rows: usize, columns: usize| -> Vec<f32> {
            let at = |i: usize| x[i % rows * columns + i / rows];
            (0..x.len()).map(at).collect()
        };
        let (a_, b_) = (across(&a, m, k), across(&b, k, n));
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
            let lefts = [Factor::new(&a, m, k), Factor::new(&a_, k, m).transposed()];
            let rights = [Factor::new(&b, k, n), Factor::new(&b_, n, k).transposed()];
            let mut first: Option<Vec<f32>> = None;
            for (left, right) in lefts.into_iter().flat_map(|l| rights.map(|r| (l, r))) {
                let mut out = vec![1.0; m * n];
                let (rows, packed) = (
                    PackedRows::of(left, precision),
                    PackedMatrix::of(right, precision),
                );
                packed.put(Threads::All, &rows, (Begin::There, &mut out));
                let gap = worst(&out, &expected);
                assert!(gap < 4e-6 * k as f64, "{precision:?} {m} {n} {k}: {gap}");
                assert_eq!(first.get_or_insert(out.clone()), &out, "the same bits");
                packed.put(Threads::This, &rows, (Begin::Anew, &mut out));
                assert_eq!(
                    product(left, right, precision),
                    out,
                    "on all threads or on one"
                );
                let gap = worst(&out, &expected.iter().map(|x| x - 1.0).collect::<Vec<_>>());
                assert!(
                    gap < 4e-6 * k as f64,
                    "anew {precision:?} {m} {n} {k}: {gap}"
                );
            }
        }
    }
}

#[test]
fn nan_stays_in_its_row() {
    let (out, width) = (20, 40);
    let weight = numbers(out * width, 1.0);
    for bad in [f32::NAN, f32::INFINITY] {
        let mut x = numbers(3 * width, 0.0);
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
