//! Softmax of one row of logits: maximum, exponentials and their sum.

use crate::simd::{Arithmetic, Kernel, LANES, dispatch, exp, maximum, sum_lanes};

/// Values summed in `f32`, in `LANES` partial sums; the sums of such chunks are added in `f64`.
pub const SUM_CHUNK: usize = 1024;

/// ln Σ e^z, in nats. NaN where a logit is NaN.
pub fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = dispatch(Maximum(logits));
    let sum: f64 = logits
        .chunks(SUM_CHUNK)
        .map(|logits| f64::from(dispatch(SumOfExponentials { logits, max })))
        .sum();
    f64::from(max) + sum.ln()
}

/// The maximum of a row, ignoring NaN; -∞ if there is none.
pub fn max_value(logits: &[f32]) -> f32 {
    dispatch(Maximum(logits))
}

/// Unnormalised softmax: writes e^((z - max) / temperature) to `weights`, 0 where the exponent is below -86, and the
/// sum of each [`SUM_CHUNK`] of them to `sums`.
pub fn exponentials(
    logits: &[f32],
    max: f32,
    temperature: f64,
    weights: &mut Vec<f32>,
    sums: &mut Vec<f64>,
) {
    weights.clear();
    weights.resize(logits.len(), 0.0);
    sums.clear();
    let rate = (1.0 / temperature) as f32;
    for (logits, weights) in logits.chunks(SUM_CHUNK).zip(weights.chunks_mut(SUM_CHUNK)) {
        let sum = dispatch(Exponentials {
            logits,
            max,
            rate,
            weights,
        });
        sums.push(f64::from(sum));
    }
}

struct Maximum<'a>(&'a [f32]);

impl Kernel for Maximum<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<A: Arithmetic>(self) -> f32 {
        maximum(self.0)
    }
}

struct SumOfExponentials<'a> {
    logits: &'a [f32],
    max: f32,
}

impl Kernel for SumOfExponentials<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<A: Arithmetic>(self) -> f32 {
        let mut sums = [0.0; LANES];
        for logits in self.logits.chunks(LANES) {
            for (sum, &logit) in sums.iter_mut().zip(logits) {
                *sum += weight::<A>(logit - self.max);
            }
        }
        sum_lanes(sums)
    }
}

struct Exponentials<'a> {
    logits: &'a [f32],
    max: f32,
    rate: f32,
    weights: &'a mut [f32],
}

impl Kernel for Exponentials<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<A: Arithmetic>(self) -> f32 {
        let mut sums = [0.0; LANES];
        let logits = self.logits.chunks(LANES);
        for (logits, weights) in logits.zip(self.weights.chunks_mut(LANES)) {
            for ((sum, out), &logit) in sums.iter_mut().zip(weights).zip(logits) {
                *out = weight::<A>((logit - self.max) * self.rate);
                *sum += *out;
            }
        }
        sum_lanes(sums)
    }
}

/// e^x, or 0 for x < -86, where [`exp`] approaches its lower bound.
#[inline(always)]
fn weight<A: Arithmetic>(x: f32) -> f32 {
    let weight = exp::<A>(x);
    if x < -86.0 { 0.0 } else { weight }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_f64_at_any_length() {
        for length in [1usize, 15, 16, 17, 1023, 1024, 5000] {
            let logits: Vec<f32> = (0..length)
                .map(|i| (i as f32 * 0.37).sin() * 20.0)
                .collect();
            let exact: f64 = logits.iter().map(|&z| f64::from(z).exp()).sum();
            let found = log_sum_exp(&logits);
            assert!((found - exact.ln()).abs() < 1e-6, "{length}: {found}");
            let (mut weights, mut sums) = (Vec::new(), Vec::new());
            let max = max_value(&logits);
            exponentials(&logits, max, 0.5, &mut weights, &mut sums);
            let of = |z: f32| (2.0 * (f64::from(z) - f64::from(max))).exp();
            for (&weight, &z) in weights.iter().zip(&logits) {
                assert!((f64::from(weight) - of(z)).abs() < 1e-6);
            }
            let exact: f64 = logits.iter().map(|&z| of(z)).sum();
            assert!((sums.iter().sum::<f64>() / exact - 1.0).abs() < 1e-6);
        }
    }

    #[test]
    fn minus_infinity_has_weight_zero_and_nan_propagates() {
        let (mut weights, mut sums) = (Vec::new(), Vec::new());
        let logits = [f32::NEG_INFINITY, 0.0, -100.0];
        exponentials(&logits, 0.0, 1.0, &mut weights, &mut sums);
        assert_eq!((weights, sums), (vec![0.0, 1.0, 0.0], vec![1.0]));
        assert!(log_sum_exp(&[0.0, f32::NAN]).is_nan());
        assert!(log_sum_exp(&[f32::NEG_INFINITY; 3]).is_nan());
    }
}
