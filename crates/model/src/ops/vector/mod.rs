//! Loops over `f32` compiled for the widest vectors of the machine they run on.
//!
//! A [`Kernel`] is a loop written once over an [`Arithmetic`]; [`dispatch`] runs the copy compiled
//! for AVX-512, for AVX2 with FMA, or for the build's own target. Sums run over [`LANES`] partial
//! sums, always added in the same order, so one machine gives one answer. Machines with and
//! without fused multiply-add may differ in the last bits.

use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
mod x86;

/// Partial sums a reduction keeps: one 512-bit vector.
pub(super) const LANES: usize = 16;

/// One word for each of [`LANES`] columns, a cache line of them: an `f32`, two bf16 or four `i8`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(64))]
pub(super) struct Line<W>(pub [W; LANES]);

/// How a machine multiplies and adds.
pub(super) trait Arithmetic {
    /// Whether 32 vector registers of 512 bits are there to hold accumulators.
    const WIDE: bool;

    /// Rows of a product that are multiplied at a time: as many as leave the registers room for a line and a
    /// number beside the sums of 16 columns.
    const ROWS: usize;

    /// The same, of bf16 and bytes: what a line is taken apart into needs registers too.
    const ROWS_OF_PARTS: usize;

    /// Whether [`Arithmetic::dot_quads`] takes 128 off every byte of the row.
    const SIGNED: bool = false;

    /// [`LANES`] numbers, in registers if the machine has them.
    type Vector: Copy;

    /// [`LANES`] whole numbers.
    type Counts: Copy;

    /// Has a line brought near, to be met soon.
    #[inline(always)]
    fn prefetch<W>(_: &Line<W>) {}

    /// `a * b + c`.
    fn mul_add(a: f32, b: f32, c: f32) -> f32;

    fn load(numbers: &[f32; LANES]) -> Self::Vector;

    fn store(vector: Self::Vector, numbers: &mut [f32; LANES]);

    /// `a * x + sum` in every lane, rounded as [`Arithmetic::mul_add`] does.
    fn accumulate(a: f32, x: Self::Vector, sum: Self::Vector) -> Self::Vector;

    /// `sum + a₀ x₀ + a₁ x₁` in every lane: two bf16 to a word, the low half first. The products are
    /// exact; how the sums are rounded is the machine's affair.
    #[inline(always)]
    fn dot_pairs(a: u32, x: &Line<u32>, sum: Self::Vector) -> Self::Vector {
        let low = |word: u32| f32::from_bits(word << 16);
        let high = |word: u32| f32::from_bits(word & 0xffff_0000);
        let sum = Self::accumulate(low(a), Self::load(&x.0.map(low)), sum);
        Self::accumulate(high(a), Self::load(&x.0.map(high)), sum)
    }

    fn zero_counts() -> Self::Counts;

    fn counts(counts: Self::Counts) -> [i32; LANES];

    /// `sum + Σ aᵢ xᵢ` in every lane, exactly: four `u8` in `a`, four `i8` in each word of `x`, none of them
    /// -128; `sum + Σ (aᵢ - 128) xᵢ` where it is [`Arithmetic::SIGNED`].
    fn dot_quads(a: u32, x: &Line<u32>, sum: Self::Counts) -> Self::Counts;
}

/// [`Arithmetic::dot_quads`] where the machine has no instruction for it.
#[inline(always)]
fn dot_quads(a: u32, x: &Line<u32>, mut sum: [i32; LANES]) -> [i32; LANES] {
    let a = a.to_le_bytes();
    for (sum, x) in sum.iter_mut().zip(x.0) {
        let products = a.iter().zip(x.to_le_bytes());
        *sum += products
            .map(|(&a, x)| i32::from(a) * i32::from(x.cast_signed()))
            .sum::<i32>();
    }
    sum
}

/// Product and sum rounded separately: the build's own target.
pub(super) struct Separate;

impl Arithmetic for Separate {
    const WIDE: bool = false;
    const ROWS: usize = 4;
    const ROWS_OF_PARTS: usize = 4;

    type Vector = [f32; LANES];
    type Counts = [i32; LANES];

    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }

    #[inline(always)]
    fn load(numbers: &[f32; LANES]) -> Self::Vector {
        *numbers
    }

    #[inline(always)]
    fn store(vector: Self::Vector, numbers: &mut [f32; LANES]) {
        *numbers = vector;
    }

    #[inline(always)]
    fn accumulate(a: f32, x: Self::Vector, mut sum: Self::Vector) -> Self::Vector {
        for (sum, x) in sum.iter_mut().zip(x) {
            *sum += a * x;
        }
        sum
    }

    #[inline(always)]
    fn zero_counts() -> [i32; LANES] {
        [0; LANES]
    }

    #[inline(always)]
    fn counts(counts: [i32; LANES]) -> [i32; LANES] {
        counts
    }

    #[inline(always)]
    fn dot_quads(a: u32, x: &Line<u32>, sum: [i32; LANES]) -> [i32; LANES] {
        dot_quads(a, x, sum)
    }
}

/// A loop to be compiled once per kind of machine. `run` must be `#[inline(always)]`, and so must
/// whatever it calls in its inner loop.
pub(super) trait Kernel {
    type Output;

    fn run<A: Arithmetic>(self) -> Self::Output;
}

/// What loops are compiled for, the widest last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Level {
    /// The build's own target.
    Plain,
    /// 256 bits, fused multiply-add.
    Avx2,
    /// 512 bits.
    Avx512,
    /// 512 bits, and instructions for dot products of bf16 and of bytes.
    Avx512Dots,
}

impl Level {
    /// Those that work on this machine.
    #[cfg(test)]
    pub fn here() -> impl Iterator<Item = Self> {
        let all = [Self::Plain, Self::Avx2, Self::Avx512, Self::Avx512Dots];
        all.into_iter().filter(|&level| level <= detect())
    }

    /// Runs `kernel` as compiled for this, or for the widest below it that the machine has.
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[cfg(target_arch = "x86_64")]
        #[expect(unsafe_code, reason = "only what was detected is run")]
        // SAFETY: the level is at most what was detected.
        unsafe {
            x86::run(kernel, self.min(detect()))
        }
        #[cfg(not(target_arch = "x86_64"))]
        kernel.run::<Separate>()
    }
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Level {
    x86::detect()
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Level {
    Level::Plain
}

/// The level of this process: the widest that the machine has, unless `AGON_VECTORS` names a lower one.
pub(super) fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| asked().unwrap_or(Level::Avx512Dots).min(detect()))
}

/// What `AGON_VECTORS` names; all there is when it is not set.
fn asked() -> Result<Level, String> {
    let asked = std::env::var("AGON_VECTORS").unwrap_or_default();
    match asked.as_str() {
        "" => Ok(Level::Avx512Dots),
        "plain" => Ok(Level::Plain),
        "avx2" => Ok(Level::Avx2),
        "avx512" => Ok(Level::Avx512),
        other => Err(other.to_owned()),
    }
}

/// What the loops of this process are compiled for: "plain", "avx2", "avx512" or "avx512 with dot products".
///
/// # Errors
/// With what the environment variable `AGON_VECTORS` says, when it is none of the first three.
pub fn vectors() -> Result<&'static str, String> {
    asked()?;
    Ok(match level() {
        Level::Plain => "plain",
        Level::Avx2 => "avx2",
        Level::Avx512 => "avx512",
        Level::Avx512Dots => "avx512 with dot products",
    })
}

/// Runs `kernel` as compiled for this process.
pub(super) fn dispatch<K: Kernel>(kernel: K) -> K::Output {
    level().run(kernel)
}

/// 1.5 · 2^23: adding it rounds to an integer, left in the low bits of the mantissa.
pub(super) const ROUND: f32 = 12_582_912.0;

/// `e^x` to within 2 units in the last place for x in `[-87, 88]`; beyond, the value at the bound
/// (1.6e-38, 1.7e38). NaN stays NaN. Branch-free, so that a loop over it becomes vectors.
///
/// x = n ln 2 + r with |r| ≤ ln 2 / 2; the polynomial for e^r is Cephes' `expf`.
#[inline(always)]
pub(super) fn exp<A: Arithmetic>(x: f32) -> f32 {
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // Comparisons rather than clamp(), min() or max(): these keep NaN.
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let rounded = A::mul_add(x, std::f32::consts::LOG2_E, ROUND);
    let n = rounded - ROUND;
    let r = A::mul_add(n, -LN_2_HIGH, x);
    let r = A::mul_add(n, -LN_2_LOW, r);
    let p = A::mul_add(1.987_569_1e-4, r, 1.398_199_9e-3);
    let p = A::mul_add(p, r, 8.333_452e-3);
    let p = A::mul_add(p, r, 4.166_579_6e-2);
    let p = A::mul_add(p, r, 1.666_666_5e-1);
    let p = A::mul_add(p, r, 0.5);
    let power = A::mul_add(p, r * r, r) + 1.0;
    power * f32::from_bits((rounded.to_bits() << 23).wrapping_add(127 << 23))
}

/// `x`, or 0 where it is below 2^-100: sums of products with such numbers fall below the normal ones, with which
/// processors are a hundred times slower. NaN stays.
#[inline(always)]
pub(super) fn flushed(x: f32) -> f32 {
    const LEAST: f32 = f32::from_bits((127 - 100) << 23);
    if x.abs() < LEAST { 0.0 } else { x }
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub(super) fn sigmoid<A: Arithmetic>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<A>(-x))
}

/// The sum of [`LANES`] partial sums, as a fixed tree.
#[inline(always)]
pub(super) fn fold(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Σ x·y over slices of equal length.
#[inline(always)]
pub(super) fn dot<A: Arithmetic>(x: &[f32], y: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    let (xs, x_rest) = x.as_chunks::<LANES>();
    let (ys, y_rest) = y.as_chunks::<LANES>();
    for (x, y) in xs.iter().zip(ys) {
        for lane in 0..LANES {
            lanes[lane] = A::mul_add(x[lane], y[lane], lanes[lane]);
        }
    }
    for (lane, (&x, &y)) in lanes.iter_mut().zip(x_rest.iter().zip(y_rest)) {
        *lane = A::mul_add(x, y, *lane);
    }
    fold(lanes)
}

/// The largest of `x`, NaN passed over; -∞ if there is none.
#[inline(always)]
pub(super) fn largest(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] = larger(lanes[lane], chunk[lane]);
        }
    }
    let most = lanes.into_iter().fold(f32::NEG_INFINITY, larger);
    rest.iter().copied().fold(most, larger)
}

#[inline(always)]
fn larger(most: f32, x: f32) -> f32 {
    if x > most { x } else { most }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Exponentials<'a>(&'a mut [f32]);

    impl Kernel for Exponentials<'_> {
        type Output = ();

        #[inline(always)]
        fn run<A: Arithmetic>(self) {
            for x in self.0 {
                *x = exp::<A>(*x);
            }
        }
    }

    struct Dot<'a>(&'a [f32], &'a [f32]);

    impl Kernel for Dot<'_> {
        type Output = f32;

        #[inline(always)]
        fn run<A: Arithmetic>(self) -> f32 {
            dot::<A>(self.0, self.1)
        }
    }

    #[test]
    fn exp_is_right_to_the_last_places_on_every_kind_of_machine() {
        let arguments: Vec<f32> = (0..35_001).map(|i| -87.0 + i as f32 * 0.005).collect();
        let worst = |results: &[f32]| {
            arguments
                .iter()
                .zip(results)
                .map(|(&x, &y)| (f64::from(y) / f64::from(x).exp() - 1.0).abs())
                .fold(0.0, f64::max)
        };
        for level in Level::here() {
            let mut found = arguments.clone();
            level.run(Exponentials(&mut found));
            let worst = worst(&found);
            assert!(worst < 2.0 * f64::from(f32::EPSILON), "{level:?}: {worst}");
        }
    }

    #[test]
    fn exp_at_its_bounds() {
        assert_eq!(exp::<Separate>(0.0), 1.0);
        assert!(exp::<Separate>(f32::NAN).is_nan());
        assert!(exp::<Separate>(f32::NEG_INFINITY) < 2e-38);
        assert!(exp::<Separate>(f32::INFINITY) > 1e38);
    }

    #[test]
    fn what_is_too_small_is_nothing() {
        assert_eq!([1e-30, -1e-30].map(flushed), [1e-30, -1e-30]);
        assert_eq!([1e-31, -1e-31, 1e-40].map(flushed), [0.0; 3]);
        assert!(flushed(f32::NAN).is_nan());
    }

    #[test]
    fn reductions_of_ragged_lengths() {
        for length in [0usize, 1, 15, 16, 17, 40] {
            let x: Vec<f32> = (0..length).map(|i| i as f32).collect();
            let ones = vec![1.0; length];
            let sum = (length * length.saturating_sub(1) / 2) as f32;
            assert_eq!(dot::<Separate>(&x, &ones), sum);
            assert_eq!(dispatch(Dot(&x, &ones)), sum);
            let most = length
                .checked_sub(1)
                .map_or(f32::NEG_INFINITY, |i| i as f32);
            assert_eq!(largest(&x), most);
        }
    }
}
