//! In-register transpose of 16 × 16 words.

use crate::simd::LANES;

/// 16 words of each of 16 rows.
pub(super) type Square<W> = [[W; LANES]; LANES];

/// Transposes a square in place: four rounds in which every two rows that are `STEP` apart exchange half of their
/// words. With vectors of 16 words each pair of rows takes two instructions.
#[inline(always)]
pub(super) fn transpose<W: Copy>(square: &mut Square<W>) {
    exchange::<W, 8>(square);
    exchange::<W, 4>(square);
    exchange::<W, 2>(square);
    exchange::<W, 1>(square);
}

#[inline(always)]
fn exchange<W: Copy, const STEP: usize>(square: &mut Square<W>) {
    for row in 0..LANES {
        if row & STEP == 0 {
            let (upper, lower) = (square[row], square[row + STEP]);
            for lane in 0..LANES {
                if lane & STEP == 0 {
                    square[row + STEP][lane] = upper[lane + STEP];
                } else {
                    square[row][lane] = lower[lane - STEP];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Arithmetic, Kernel, Level};

    struct Transpose(Square<u32>);

    impl Kernel for Transpose {
        type Output = Square<u32>;

        #[inline(always)]
        fn run<A: Arithmetic>(mut self) -> Self::Output {
            transpose(&mut self.0);
            self.0
        }
    }

    #[test]
    fn transposes_on_every_level() {
        let word = |row: usize, column: usize| (100 * row + column) as u32;
        let square = |word: &dyn Fn(usize, usize) -> u32| -> Square<u32> {
            std::array::from_fn(|row| std::array::from_fn(|column| word(row, column)))
        };
        for level in Level::available() {
            let transposed = level.run(Transpose(square(&word)));
            assert_eq!(
                transposed,
                square(&|row, column| word(column, row)),
                "{level:?}"
            );
        }
    }
}
