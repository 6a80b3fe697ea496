//! x86-64 instruction sets beyond the baseline, detected at run time.
//!
//! [`Avx512`] and [`Avx2`] are private to this file and used only by the functions compiled with their target
//! features, which [`run`] calls only if they were detected. A kernel therefore runs with them only on machines that
//! have them: that is the safety argument of every block below.
#![expect(
    unsafe_code,
    reason = "instructions beyond the baseline, used only if detected"
)]

use std::arch::x86_64::{
    __m256, __m256i, __m512, __m512bh, __m512i, _MM_HINT_T1, _mm_prefetch, _mm256_abs_epi8,
    _mm256_add_epi32, _mm256_and_si256, _mm256_castsi256_ps, _mm256_fmadd_ps, _mm256_load_si256,
    _mm256_loadu_ps, _mm256_madd_epi16, _mm256_maddubs_epi16, _mm256_set1_epi16, _mm256_set1_epi32,
    _mm256_set1_ps, _mm256_setzero_si256, _mm256_sign_epi8, _mm256_slli_epi32, _mm256_storeu_ps,
    _mm256_storeu_si256, _mm512_and_si512, _mm512_castsi512_ps, _mm512_dpbf16_ps,
    _mm512_dpbusd_epi32, _mm512_fmadd_ps, _mm512_load_si512, _mm512_loadu_ps, _mm512_loadu_si512,
    _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_si512, _mm512_slli_epi32, _mm512_storeu_ps,
    _mm512_storeu_si512,
};

use super::{Arithmetic, CacheLine, Kernel, LANES, Level, Portable};

/// The widest level that this machine has.
pub(super) fn detect() -> Level {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    let dots = is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512vnni");
    match (avx2, avx512, dots) {
        (true, true, true) => Level::Avx512Dots,
        (true, true, false) => Level::Avx512,
        (true, false, _) => Level::Avx2,
        (false, _, _) => Level::Plain,
    }
}

/// Runs `kernel` as compiled for `level`.
///
/// # Safety
/// The level must be at most what [`detect`] returns.
pub(super) unsafe fn run<K: Kernel>(kernel: K, level: Level) -> K::Output {
    match level {
        Level::Plain => kernel.run::<Portable>(),
        // SAFETY: the machine has the function's target features, by the caller's obligation.
        Level::Avx2 => unsafe { run_avx2(kernel) },
        // SAFETY: as above.
        Level::Avx512 => unsafe { run_avx512(kernel) },
        // SAFETY: as above.
        Level::Avx512Dots => unsafe { run_avx512_dots(kernel) },
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx2,fma")]
fn run_avx512_dots<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx512<true>>()
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx512<false>>()
}

#[target_feature(enable = "avx2,fma")]
fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx2>()
}

/// AVX-512: fused multiply-add, 16 lanes per register. `DOTS`: with the dot-product instructions of BF16 and VNNI.
struct Avx512<const DOTS: bool>;

impl<const DOTS: bool> Arithmetic for Avx512<DOTS> {
    const WIDE: bool = true;
    const MICRO_ROWS: usize = 8;
    const MICRO_ROWS_SUBWORD: usize = 8;

    type Vector = __m512;
    type IntVector = __m512i;

    #[inline(always)]
    fn prefetch<W>(line: &CacheLine<W>) {
        // SAFETY: every x86-64 has the instruction, and it changes no state of the program.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(line).cast()) }
    }

    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }

    #[inline(always)]
    fn load(values: &[f32; LANES]) -> __m512 {
        // SAFETY: AVX-512 is available, as the module says; 16 values are read from an array of 16.
        unsafe { _mm512_loadu_ps(values.as_ptr()) }
    }

    #[inline(always)]
    fn store(vector: __m512, values: &mut [f32; LANES]) {
        // SAFETY: AVX-512 is available, as the module says; 16 values are written to an array of 16.
        unsafe { _mm512_storeu_ps(values.as_mut_ptr(), vector) }
    }

    #[inline(always)]
    fn accumulate(a: f32, x: __m512, sum: __m512) -> __m512 {
        // SAFETY: AVX-512 is available, as the module says.
        unsafe { _mm512_fmadd_ps(_mm512_set1_ps(a), x, sum) }
    }

    #[inline(always)]
    fn dot_bf16(a: u32, x: &CacheLine<u32>, sum: __m512) -> __m512 {
        if !DOTS {
            return fma_bf16(a, x, sum);
        }
        // SAFETY: AVX-512 with BF16 is available, as the module says; a cache line is 64 aligned bytes. Both vector
        // types are 512 bits.
        unsafe {
            let a = std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(a.cast_signed()));
            let x = std::mem::transmute::<__m512i, __m512bh>(load_line(x));
            _mm512_dpbf16_ps(sum, a, x)
        }
    }

    #[inline(always)]
    fn int_zeros() -> __m512i {
        // SAFETY: AVX-512 is available, as the module says.
        unsafe { _mm512_setzero_si512() }
    }

    #[inline(always)]
    fn to_ints(vector: __m512i) -> [i32; LANES] {
        let mut values = [0; LANES];
        // SAFETY: AVX-512 is available, as the module says; 16 values are written to an array of 16.
        unsafe { _mm512_storeu_si512(values.as_mut_ptr().cast(), vector) };
        values
    }

    #[inline(always)]
    fn dot_int8(a: u32, x: &CacheLine<u32>, sum: __m512i) -> __m512i {
        if DOTS {
            // SAFETY: AVX-512 with VNNI is available, as the module says.
            return unsafe {
                _mm512_dpbusd_epi32(sum, _mm512_set1_epi32(a.cast_signed()), load_line(x))
            };
        }
        let sums = super::dot_int8(a, x, Self::to_ints(sum));
        // SAFETY: AVX-512 is available, as the module says; 16 values are read from an array of 16.
        unsafe { _mm512_loadu_si512(sums.as_ptr().cast()) }
    }
}

/// [`Arithmetic::dot_bf16`] without a dot-product instruction: one fused multiply-add per half of the words.
#[inline(always)]
fn fma_bf16(a: u32, x: &CacheLine<u32>, sum: __m512) -> __m512 {
    // SAFETY: AVX-512 is available, as the module says.
    unsafe {
        let words = load_line(x);
        let low = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words));
        let mask = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
        let high = _mm512_castsi512_ps(_mm512_and_si512(words, mask));
        let sum = _mm512_fmadd_ps(_mm512_set1_ps(f32::from_bits(a << 16)), low, sum);
        _mm512_fmadd_ps(_mm512_set1_ps(f32::from_bits(a & 0xffff_0000)), high, sum)
    }
}

/// Loads a cache line.
///
/// # Safety
/// The machine must have AVX-512.
#[inline(always)]
unsafe fn load_line(words: &CacheLine<u32>) -> __m512i {
    // SAFETY: a cache line is 64 aligned bytes.
    unsafe { _mm512_load_si512(words.0.as_ptr().cast()) }
}

/// AVX2: fused multiply-add, 8 lanes per register.
struct Avx2;

impl Arithmetic for Avx2 {
    const WIDE: bool = false;
    const MICRO_ROWS: usize = 6;
    const MICRO_ROWS_SUBWORD: usize = 4;
    const SIGNED: bool = true;

    type Vector = [__m256; 2];
    type IntVector = [__m256i; 2];

    #[inline(always)]
    fn prefetch<W>(line: &CacheLine<W>) {
        // SAFETY: every x86-64 has the instruction, and it changes no state of the program.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(line).cast()) }
    }

    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }

    #[inline(always)]
    fn load(values: &[f32; LANES]) -> [__m256; 2] {
        let (low, high) = values.split_at(LANES / 2);
        // SAFETY: AVX2 is available, as the module says; 8 values are read from each slice of 8.
        unsafe {
            [
                _mm256_loadu_ps(low.as_ptr()),
                _mm256_loadu_ps(high.as_ptr()),
            ]
        }
    }

    #[inline(always)]
    fn store(vector: [__m256; 2], values: &mut [f32; LANES]) {
        let (low, high) = values.split_at_mut(LANES / 2);
        // SAFETY: AVX2 is available, as the module says; 8 values are written to each slice of 8.
        unsafe {
            _mm256_storeu_ps(low.as_mut_ptr(), vector[0]);
            _mm256_storeu_ps(high.as_mut_ptr(), vector[1]);
        }
    }

    #[inline(always)]
    fn accumulate(a: f32, x: [__m256; 2], sum: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: AVX2 and FMA are available, as the module says.
        unsafe {
            let a = _mm256_set1_ps(a);
            [
                _mm256_fmadd_ps(a, x[0], sum[0]),
                _mm256_fmadd_ps(a, x[1], sum[1]),
            ]
        }
    }

    #[inline(always)]
    fn dot_bf16(a: u32, x: &CacheLine<u32>, sum: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: AVX2 and FMA are available, as the module says.
        unsafe {
            let high = _mm256_set1_epi32(0xffff_0000_u32.cast_signed());
            let a = _mm256_set1_epi32(a.cast_signed());
            let [x0, x1] = load_halves(x);
            let low = |words| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words));
            let high = |words| _mm256_castsi256_ps(_mm256_and_si256(words, high));
            let (a_low, a_high) = (low(a), high(a));
            [
                _mm256_fmadd_ps(a_high, high(x0), _mm256_fmadd_ps(a_low, low(x0), sum[0])),
                _mm256_fmadd_ps(a_high, high(x1), _mm256_fmadd_ps(a_low, low(x1), sum[1])),
            ]
        }
    }

    #[inline(always)]
    fn int_zeros() -> [__m256i; 2] {
        // SAFETY: AVX2 is available, as the module says.
        unsafe { [_mm256_setzero_si256(); 2] }
    }

    #[inline(always)]
    fn to_ints(vector: [__m256i; 2]) -> [i32; LANES] {
        let mut values = [0; LANES];
        let (low, high) = values.split_at_mut(LANES / 2);
        // SAFETY: AVX2 is available, as the module says; 8 values are written to each slice of 8.
        unsafe {
            _mm256_storeu_si256(low.as_mut_ptr().cast(), vector[0]);
            _mm256_storeu_si256(high.as_mut_ptr().cast(), vector[1]);
        }
        values
    }

    /// `maddubs` multiplies unsigned by signed bytes and adds two products in saturating 16 bits. Passing magnitudes,
    /// at most 128, as the unsigned side and moving their signs to the other keeps the sums from saturating.
    #[inline(always)]
    fn dot_int8(a: u32, x: &CacheLine<u32>, sum: [__m256i; 2]) -> [__m256i; 2] {
        // SAFETY: AVX2 is available, as the module says.
        unsafe {
            let a = _mm256_set1_epi32((a ^ 0x8080_8080).cast_signed());
            let magnitudes = _mm256_abs_epi8(a);
            let [x0, x1] = load_halves(x);
            let ones = _mm256_set1_epi16(1);
            let dot = |x| {
                let two = _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(x, a));
                _mm256_madd_epi16(two, ones)
            };
            [
                _mm256_add_epi32(sum[0], dot(x0)),
                _mm256_add_epi32(sum[1], dot(x1)),
            ]
        }
    }
}

/// Loads a cache line into two registers.
///
/// # Safety
/// The machine must have AVX2.
#[inline(always)]
unsafe fn load_halves(words: &CacheLine<u32>) -> [__m256i; 2] {
    let first = words.0.as_ptr().cast::<__m256i>();
    // SAFETY: a cache line is 64 aligned bytes: twice 32.
    unsafe { [_mm256_load_si256(first), _mm256_load_si256(first.add(1))] }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Chain<'a>(&'a mut [f32; LANES]);

    impl Kernel for Chain<'_> {
        type Output = ();

        #[inline(always)]
        fn run<A: Arithmetic>(self) {
            let x = A::load(self.0);
            A::store(A::accumulate(3.0, x, x), self.0);
            self.0[0] = A::mul_add(self.0[0], 10.0, 1.0);
        }
    }

    #[test]
    fn small_integers_are_exact_on_every_level() {
        let start: [f32; LANES] = std::array::from_fn(|lane| lane as f32 + 1.0);
        let mut expected = start.map(|x| 4.0 * x);
        expected[0] = 41.0;
        for level in Level::available() {
            let mut values = start;
            level.run(Chain(&mut values));
            assert_eq!(values, expected, "{level:?}");
        }
    }
}
