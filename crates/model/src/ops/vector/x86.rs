//! The vectors of x86-64 beyond its baseline, found at run time.
//!
//! [`Avx512`] and [`Avx2`] are named nowhere outside this file, and in it only by the functions
//! compiled for their instructions, which [`run`] calls where they were detected. A kernel thus
//! meets them only where they work: that is the safety argument of every block below.
#![expect(
    unsafe_code,
    reason = "instructions beyond the baseline, used where they were detected"
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

use super::{Arithmetic, Kernel, LANES, Level, Line, Separate};

/// The widest vectors this machine has.
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
/// The machine must have it: it is at most what [`detect`] found.
pub(super) unsafe fn run<K: Kernel>(kernel: K, level: Level) -> K::Output {
    match level {
        Level::Plain => kernel.run::<Separate>(),
        // SAFETY: the machine has what the function is compiled for, says the caller; so below.
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

/// Product and sum rounded once, 16 lanes to a register. `DOTS`: with the instructions for dot products
/// of bf16 and of bytes.
struct Avx512<const DOTS: bool>;

impl<const DOTS: bool> Arithmetic for Avx512<DOTS> {
    const WIDE: bool = true;
    const ROWS: usize = 8;
    const ROWS_OF_PARTS: usize = 8;

    type Vector = __m512;
    type Counts = __m512i;

    #[inline(always)]
    fn prefetch<W>(line: &Line<W>) {
        // SAFETY: every x86-64 has the instruction, and it changes no state of the program.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(line).cast()) }
    }

    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }

    #[inline(always)]
    fn load(numbers: &[f32; LANES]) -> __m512 {
        // SAFETY: AVX-512 is there, as the module says; 16 numbers are read of a reference to 16.
        unsafe { _mm512_loadu_ps(numbers.as_ptr()) }
    }

    #[inline(always)]
    fn store(vector: __m512, numbers: &mut [f32; LANES]) {
        // SAFETY: AVX-512 is there, as the module says; 16 numbers are written to as many.
        unsafe { _mm512_storeu_ps(numbers.as_mut_ptr(), vector) }
    }

    #[inline(always)]
    fn accumulate(a: f32, x: __m512, sum: __m512) -> __m512 {
        // SAFETY: AVX-512 is there, as the module says.
        unsafe { _mm512_fmadd_ps(_mm512_set1_ps(a), x, sum) }
    }

    #[inline(always)]
    fn dot_pairs(a: u32, x: &Line<u32>, sum: __m512) -> __m512 {
        if !DOTS {
            return halves(a, x, sum);
        }
        // SAFETY: AVX-512 with BF16 is there, as the module says; a line is 64 bytes, aligned to them. The
        // two vector types are the same 512 bits.
        unsafe {
            let a = std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(a.cast_signed()));
            let x = std::mem::transmute::<__m512i, __m512bh>(line(x));
            _mm512_dpbf16_ps(sum, a, x)
        }
    }

    #[inline(always)]
    fn zero_counts() -> __m512i {
        // SAFETY: AVX-512 is there, as the module says.
        unsafe { _mm512_setzero_si512() }
    }

    #[inline(always)]
    fn counts(counts: __m512i) -> [i32; LANES] {
        let mut numbers = [0; LANES];
        // SAFETY: AVX-512 is there, as the module says; 16 numbers are written to as many.
        unsafe { _mm512_storeu_si512(numbers.as_mut_ptr().cast(), counts) };
        numbers
    }

    #[inline(always)]
    fn dot_quads(a: u32, x: &Line<u32>, sum: __m512i) -> __m512i {
        if DOTS {
            // SAFETY: AVX-512 with VNNI is there, as the module says.
            return unsafe {
                _mm512_dpbusd_epi32(sum, _mm512_set1_epi32(a.cast_signed()), line(x))
            };
        }
        let sums = super::dot_quads(a, x, Self::counts(sum));
        // SAFETY: AVX-512 is there, as the module says; 16 numbers are read of as many.
        unsafe { _mm512_loadu_si512(sums.as_ptr().cast()) }
    }
}

/// The two halves of every word as products of their own.
#[inline(always)]
fn halves(a: u32, x: &Line<u32>, sum: __m512) -> __m512 {
    // SAFETY: AVX-512 is there, as the module says.
    unsafe {
        let words = line(x);
        let low = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words));
        let mask = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
        let high = _mm512_castsi512_ps(_mm512_and_si512(words, mask));
        let sum = _mm512_fmadd_ps(_mm512_set1_ps(f32::from_bits(a << 16)), low, sum);
        _mm512_fmadd_ps(_mm512_set1_ps(f32::from_bits(a & 0xffff_0000)), high, sum)
    }
}

/// The words of a line.
///
/// # Safety
/// AVX-512 must be there.
#[inline(always)]
unsafe fn line(words: &Line<u32>) -> __m512i {
    // SAFETY: a line is 64 bytes, aligned to them.
    unsafe { _mm512_load_si512(words.0.as_ptr().cast()) }
}

/// Product and sum rounded once, 8 lanes to a register.
struct Avx2;

impl Arithmetic for Avx2 {
    const WIDE: bool = false;
    const ROWS: usize = 6;
    const ROWS_OF_PARTS: usize = 4;
    const SIGNED: bool = true;

    type Vector = [__m256; 2];
    type Counts = [__m256i; 2];

    #[inline(always)]
    fn prefetch<W>(line: &Line<W>) {
        // SAFETY: every x86-64 has the instruction, and it changes no state of the program.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(line).cast()) }
    }

    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }

    #[inline(always)]
    fn load(numbers: &[f32; LANES]) -> [__m256; 2] {
        let (low, high) = numbers.split_at(LANES / 2);
        // SAFETY: AVX2 is there, as the module says; 8 numbers are read of each slice of 8.
        unsafe {
            [
                _mm256_loadu_ps(low.as_ptr()),
                _mm256_loadu_ps(high.as_ptr()),
            ]
        }
    }

    #[inline(always)]
    fn store(vector: [__m256; 2], numbers: &mut [f32; LANES]) {
        let (low, high) = numbers.split_at_mut(LANES / 2);
        // SAFETY: AVX2 is there, as the module says; 8 numbers are written to each slice of 8.
        unsafe {
            _mm256_storeu_ps(low.as_mut_ptr(), vector[0]);
            _mm256_storeu_ps(high.as_mut_ptr(), vector[1]);
        }
    }

    #[inline(always)]
    fn accumulate(a: f32, x: [__m256; 2], sum: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: AVX2 and FMA are there, as the module says.
        unsafe {
            let a = _mm256_set1_ps(a);
            [
                _mm256_fmadd_ps(a, x[0], sum[0]),
                _mm256_fmadd_ps(a, x[1], sum[1]),
            ]
        }
    }

    #[inline(always)]
    fn dot_pairs(a: u32, x: &Line<u32>, sum: [__m256; 2]) -> [__m256; 2] {
        // SAFETY: AVX2 and FMA are there, as the module says.
        unsafe {
            let high = _mm256_set1_epi32(0xffff_0000_u32.cast_signed());
            let a = _mm256_set1_epi32(a.cast_signed());
            let [x0, x1] = eights(x);
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
    fn zero_counts() -> [__m256i; 2] {
        // SAFETY: AVX2 is there, as the module says.
        unsafe { [_mm256_setzero_si256(); 2] }
    }

    #[inline(always)]
    fn counts(counts: [__m256i; 2]) -> [i32; LANES] {
        let mut numbers = [0; LANES];
        let (low, high) = numbers.split_at_mut(LANES / 2);
        // SAFETY: AVX2 is there, as the module says; 8 numbers are written to each slice of 8.
        unsafe {
            _mm256_storeu_si256(low.as_mut_ptr().cast(), counts[0]);
            _mm256_storeu_si256(high.as_mut_ptr().cast(), counts[1]);
        }
        numbers
    }

    /// The instruction for it takes bytes without a sign on one side and adds two products in 16 bits: sizes
    /// on that side, of 128 at most, and their signs on the other keep it from overflowing.
    #[inline(always)]
    fn dot_quads(a: u32, x: &Line<u32>, sum: [__m256i; 2]) -> [__m256i; 2] {
        // SAFETY: AVX2 is there, as the module says.
        unsafe {
            let a = _mm256_set1_epi32((a ^ 0x8080_8080).cast_signed());
            let sizes = _mm256_abs_epi8(a);
            let [x0, x1] = eights(x);
            let ones = _mm256_set1_epi16(1);
            let dot = |x| {
                let two = _mm256_maddubs_epi16(sizes, _mm256_sign_epi8(x, a));
                _mm256_madd_epi16(two, ones)
            };
            [
                _mm256_add_epi32(sum[0], dot(x0)),
                _mm256_add_epi32(sum[1], dot(x1)),
            ]
        }
    }
}

/// The words of a line.
///
/// # Safety
/// AVX2 must be there.
#[inline(always)]
unsafe fn eights(words: &Line<u32>) -> [__m256i; 2] {
    let first = words.0.as_ptr().cast::<__m256i>();
    // SAFETY: a line is 64 bytes, aligned to them: twice 32.
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
    fn every_width_this_machine_has_gives_the_same_small_integers() {
        let start: [f32; LANES] = std::array::from_fn(|lane| lane as f32 + 1.0);
        let mut expected = start.map(|x| 4.0 * x);
        expected[0] = 41.0;
        for level in Level::here() {
            let mut numbers = start;
            level.run(Chain(&mut numbers));
            assert_eq!(numbers, expected, "{level:?}");
        }
    }
}
