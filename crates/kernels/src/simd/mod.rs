//! SIMD loops over `f32` with run-time dispatch.
//!
//! A [`Kernel`] is a loop written once, generic over an [`Arithmetic`]; [`dispatch`] runs the copy compiled for
//! AVX-512, for AVX2 with FMA, or for the build's own target.
//!
//! Promises: a reduction keeps [`LANES`] partial sums at every vector width and adds them in a fixed order, so one
//! machine gives one result. Machines with and without fused multiply-add may differ in the last bits.

use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
mod x86;

/// Lanes of a vector, and partial sums of a reduction: 512 bits of `f32`.
pub(crate) const LANES: usize = 16;

/// A cache line of 32-bit words, one for each of [`LANES`] columns: an `f32`, two bf16 or four `i8`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C, align(64))]
pub(crate) struct CacheLine<W>(pub [W; LANES]);

/// Vector operations of one instruction set.
pub(crate) trait Arithmetic {
    /// Whether there are 32 vector registers of 512 bits.
    const WIDE: bool;

    /// Rows of the f32 micro-kernel: their accumulators for 16 columns leave registers for a cache line and a
    /// broadcast value.
    const MICRO_ROWS: usize;

    /// Rows of the bf16 and int8 micro-kernels, which need more registers to unpack a cache line.
    const MICRO_ROWS_SUBWORD: usize;

    /// Whether [`Arithmetic::dot_int8`] subtracts the zero point, 128, from every byte of the row.
    const SIGNED: bool = false;

    /// [`LANES`] `f32` values, in registers if the machine has them.
    type Vector: Copy;

    /// [`LANES`] `i32` values.
    type IntVector: Copy;

    /// Prefetches a cache line.
    #[inline(always)]
    fn prefetch<W>(_: &CacheLine<W>) {}

    /// `a * b + c`.
    fn mul_add(a: f32, b: f32, c: f32) -> f32;

    fn load(values: &[f32; LANES]) -> Self::Vector;

    fn store(vector: Self::Vector, values: &mut [f32; LANES]);

    /// `a * x + sum` in every lane, rounded as [`Arithmetic::mul_add`] does.
    fn accumulate(a: f32, x: Self::Vector, sum: Self::Vector) -> Self::Vector;

    /// `sum + a₀ x₀ + a₁ x₁` in every lane: two bf16 per word, the low half first. The products are exact; the
    /// rounding of the sums depends on the instruction set.
    #[inline(always)]
    fn dot_bf16(a: u32, x: &CacheLine<u32>, sum: Self::Vector) -> Self::Vector {
        let low = |word: u32| f32::from_bits(word << 16);
        let high = |word: u32| f32::from_bits(word & 0xffff_0000);
        let sum = Self::accumulate(low(a), Self::load(&x.0.map(low)), sum);
        Self::accumulate(high(a), Self::load(&x.0.map(high)), sum)
    }

    fn int_zeros() -> Self::IntVector;

    fn to_ints(vector: Self::IntVector) -> [i32; LANES];

    /// `sum + Σ aᵢ xᵢ` in every lane, exactly: four `u8` in `a`, four `i8` in each word of `x`, none of them -128.
    /// If [`Arithmetic::SIGNED`], `sum + Σ (aᵢ - 128) xᵢ`.
    fn dot_int8(a: u32, x: &CacheLine<u32>, sum: Self::IntVector) -> Self::IntVector;
}

/// [`Arithmetic::dot_int8`] without a dot-product instruction.
#[inline(always)]
fn dot_int8(a: u32, x: &CacheLine<u32>, mut sum: [i32; LANES]) -> [i32; LANES] {
    let a = a.to_le_bytes();
    for (sum, x) in sum.iter_mut().zip(x.0) {
        let products = a.iter().zip(x.to_le_bytes());
        *sum += products
            .map(|(&a, x)| i32::from(a) * i32::from(x.cast_signed()))
            .sum::<i32>();
    }
    sum
}

/// The build's own target. Multiply and add are rounded separately.
pub(crate) struct Portable;

impl Arithmetic for Portable {
    const WIDE: bool = false;
    const MICRO_ROWS: usize = 4;
    const MICRO_ROWS_SUBWORD: usize = 4;

    type Vector = [f32; LANES];
    type IntVector = [i32; LANES];

    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }

    #[inline(always)]
    fn load(values: &[f32; LANES]) -> Self::Vector {
        *values
    }

    #[inline(always)]
    fn store(vector: Self::Vector, values: &mut [f32; LANES]) {
        *values = vector;
    }

    #[inline(always)]
    fn accumulate(a: f32, x: Self::Vector, mut sum: Self::Vector) -> Self::Vector {
        for (sum, x) in sum.iter_mut().zip(x) {
            *sum += a * x;
        }
        sum
    }

    #[inline(always)]
    fn int_zeros() -> [i32; LANES] {
        [0; LANES]
    }

    #[inline(always)]
    fn to_ints(vector: [i32; LANES]) -> [i32; LANES] {
        vector
    }

    #[inline(always)]
    fn dot_int8(a: u32, x: &CacheLine<u32>, sum: [i32; LANES]) -> [i32; LANES] {
        dot_int8(a, x, sum)
    }
}

/// A loop that is compiled once per [`Level`]. `run` must be `#[inline(always)]`, and so must everything that it calls
/// in its inner loop.
pub(crate) trait Kernel {
    type Output;

    fn run<A: Arithmetic>(self) -> Self::Output;
}

/// Instruction sets that loops are compiled for, the widest last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    /// The build's own target.
    Plain,
    /// AVX2 with FMA: 256 bits.
    Avx2,
    /// AVX-512 F, BW, DQ, VL.
    Avx512,
    /// AVX-512 with the dot products of BF16 and VNNI.
    Avx512Dots,
}

impl Level {
    /// Levels that this machine has.
    #[cfg(test)]
    pub fn available() -> impl Iterator<Item = Self> {
        let all = [Self::Plain, Self::Avx2, Self::Avx512, Self::Avx512Dots];
        all.into_iter().filter(|&level| level <= detect())
    }

    /// Runs `kernel` as compiled for this level, or for the widest below it that the machine has.
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[cfg(target_arch = "x86_64")]
        #[expect(unsafe_code, reason = "runs detected instruction sets only")]
        // SAFETY: the level is at most the detected one.
        unsafe {
            x86::run(kernel, self.min(detect()))
        }
        #[cfg(not(target_arch = "x86_64"))]
        kernel.run::<Portable>()
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

/// Level of this process: the widest that the machine has, unless `AGON_VECTORS` names a lower one.
pub(crate) fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| requested().unwrap_or(Level::Avx512Dots).min(detect()))
}

/// The level that `AGON_VECTORS` names; the widest if it is not set.
fn requested() -> Result<Level, String> {
    let name = std::env::var("AGON_VECTORS").unwrap_or_default();
    match name.as_str() {
        "" => Ok(Level::Avx512Dots),
        "plain" => Ok(Level::Plain),
        "avx2" => Ok(Level::Avx2),
        "avx512" => Ok(Level::Avx512),
        other => Err(other.to_owned()),
    }
}

/// Instruction set of this process's loops: "plain", "avx2", "avx512" or "avx512 with dot products".
///
/// # Errors
/// The value of the environment variable `AGON_VECTORS`, if it is none of the first three.
pub fn vectors() -> Result<&'static str, String> {
    requested()?;
    Ok(match level() {
        Level::Plain => "plain",
        Level::Avx2 => "avx2",
        Level::Avx512 => "avx512",
        Level::Avx512Dots => "avx512 with dot products",
    })
}

/// Runs `kernel` as compiled for the level of this process.
pub(crate) fn dispatch<K: Kernel>(kernel: K) -> K::Output {
    level().run(kernel)
}

/// 1.5 · 2^23: adding it rounds to the nearest integer, ties to even, which is then in the low bits of the mantissa.
pub(crate) const ROUND: f32 = 12_582_912.0;

/// `e^x` to within 2 units in the last place for x in `[-87, 88]`; beyond, the value at the bound
/// (1.6e-38, 1.7e38). NaN stays NaN. Branch-free, so that a loop over it is vectorised.
///
/// x = n ln 2 + r with |r| ≤ ln 2 / 2; the polynomial for e^r is Cephes' `expf`.
#[inline(always)]
pub(crate) fn exp<A: Arithmetic>(x: f32) -> f32 {
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

/// `x`, or 0 if |x| < 2^-100. Products with smaller values sum to subnormal numbers, which processors handle about a
/// hundred times slower. NaN stays NaN.
#[inline(always)]
pub(crate) fn flush_to_zero(x: f32) -> f32 {
    const LEAST: f32 = f32::from_bits((127 - 100) << 23);
    if x.abs() < LEAST { 0.0 } else { x }
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub(crate) fn sigmoid<A: Arithmetic>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<A>(-x))
}

/// The sum of [`LANES`] partial sums, by a fixed tree.
#[inline(always)]
pub(crate) fn sum_lanes(mut lanes: [f32; LANES]) -> f32 {
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
pub(crate) fn dot<A: Arithmetic>(x: &[f32], y: &[f32]) -> f32 {
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
    sum_lanes(lanes)
}

/// The maximum of `x`, ignoring NaN; -∞ if there is none.
#[inline(always)]
pub(crate) fn maximum(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] = larger(lanes[lane], chunk[lane]);
        }
    }
    let max = lanes.into_iter().fold(f32::NEG_INFINITY, larger);
    rest.iter().copied().fold(max, larger)
}

#[inline(always)]
fn larger(max: f32, x: f32) -> f32 {
    if x > max { x } else { max }
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
    fn exp_is_within_two_ulps_on_every_level() {
        let arguments: Vec<f32> = (0..35_001).map(|i| -87.0 + i as f32 * 0.005).collect();
        let worst = |results: &[f32]| {
            arguments
                .iter()
                .zip(results)
                .map(|(&x, &y)| (f64::from(y) / f64::from(x).exp() - 1.0).abs())
                .fold(0.0, f64::max)
        };
        for level in Level::available() {
            let mut found = arguments.clone();
            level.run(Exponentials(&mut found));
            let worst = worst(&found);
            assert!(worst < 2.0 * f64::from(f32::EPSILON), "{level:?}: {worst}");
        }
    }

    #[test]
    fn exp_at_its_bounds() {
        assert_eq!(exp::<Portable>(0.0), 1.0);
        assert!(exp::<Portable>(f32::NAN).is_nan());
        assert!(exp::<Portable>(f32::NEG_INFINITY) < 2e-38);
        assert!(exp::<Portable>(f32::INFINITY) > 1e38);
    }

    #[test]
    fn values_below_2_to_the_minus_100_are_flushed_to_zero() {
        assert_eq!([1e-30, -1e-30].map(flush_to_zero), [1e-30, -1e-30]);
        assert_eq!([1e-31, -1e-31, 1e-40].map(flush_to_zero), [0.0; 3]);
        assert!(flush_to_zero(f32::NAN).is_nan());
    }

    #[test]
    fn reductions_of_any_length() {
        for length in [0usize, 1, 15, 16, 17, 40] {
            let x: Vec<f32> = (0..length).map(|i| i as f32).collect();
            let ones = vec![1.0; length];
            let sum = (length * length.saturating_sub(1) / 2) as f32;
            assert_eq!(dot::<Portable>(&x, &ones), sum);
            assert_eq!(dispatch(Dot(&x, &ones)), sum);
            let max = length
                .checked_sub(1)
                .map_or(f32::NEG_INFINITY, |i| i as f32);
            assert_eq!(maximum(&x), max);
        }
    }
}
