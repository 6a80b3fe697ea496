//! The vectors of x86-64 beyond its baseline, found at run time.
//!
//! [`Avx512`] and [`Avx2`] are named nowhere outside this file, and in it only by the functions
//! compiled for their instructions, which [`dispatch`] calls after detecting them. A kernel thus
//! meets them only where they work: that is the safety argument of every block below.
#![expect(
    unsafe_code,
    reason = "instructions beyond the baseline, used where they were detected"
)]

use std::arch::x86_64::{
    __m256, __m512, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_storeu_ps,
    _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_set1_ps, _mm512_storeu_ps,
};

use super::{Arithmetic, Kernel, LANES, Separate};

/// Runs `kernel` as compiled for the widest vectors this machine has.
pub(super) fn dispatch<K: Kernel>(kernel: K) -> K::Output {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    if avx2 && avx512 {
        // SAFETY: every feature `run_avx512` enables was just detected.
        unsafe { run_avx512(kernel) }
    } else if avx2 {
        // SAFETY: every feature `run_avx2` enables was just detected.
        unsafe { run_avx2(kernel) }
    } else {
        kernel.run::<Separate>()
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx512>()
}

#[target_feature(enable = "avx2,fma")]
fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Avx2>()
}

/// Product and sum rounded once, 16 lanes to a register.
struct Avx512;

impl Arithmetic for Avx512 {
    const WIDE: bool = true;

    type Vector = __m512;

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
}

/// Product and sum rounded once, 8 lanes to a register.
struct Avx2;

impl Arithmetic for Avx2 {
    const WIDE: bool = false;

    type Vector = [__m256; 2];

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
        let mut numbers = start;
        Chain(&mut numbers).run::<Separate>();
        assert_eq!(numbers, expected);
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            let mut numbers = start;
            // SAFETY: just detected.
            unsafe { run_avx2(Chain(&mut numbers)) };
            assert_eq!(numbers, expected);
        }
        let mut numbers = start;
        dispatch(Chain(&mut numbers));
        assert_eq!(numbers, expected);
    }
}
