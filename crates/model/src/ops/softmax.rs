//! The exponentials of one row of logits, and their sum.

use super::vector::{Arithmetic, Kernel, LANES, dispatch, exp, fold, largest};

/// Numbers that are added up in `f32`, in [`LANES`] partial sums; the sums of such parts in `f64`.
pub(crate) const PART: usize = 1024;

/// ln Σ e^z, in nats. NaN where a logit is NaN.
pub(crate) fn log_sum_exp(logits: &[f32]) -> f64 {
    let most = dispatch(Largest(logits));
    let sum: f64 = logits
        .chunks(PART)
        .map(|logits| f64::from(dispatch(Sum { logits, most })))
        .sum();
    f64::from(most) + sum.ln()
}

/// The largest of a row, NaN passed over; -∞ if there is none.
pub(crate) fn largest_of(logits: &[f32]) -> f32 {
    dispatch(Largest(logits))
}

/// e^((z - most) / temperature) into `weights`, zero where it is less than 1e-37, and the sums of each
/// [`PART`] of them into `sums`.
pub(crate) fn exponentials(
    logits: &[f32],
    (most, temperature): (f32, f64),
    weights: &mut Vec<f32>,
    sums: &mut Vec<f64>,
) {
    weights.clear();
    weights.resize(logits.len(), 0.0);
    sums.clear();
    let rate = (1.0 / temperature) as f32;
    for (logits, weights) in logits.chunks(PART).zip(weights.chunks_mut(PART)) {
        let sum = dispatch(Exponentials {
            logits,
            most,
            rate,
            weights,
        });
        sums.push(f64::from(sum));
    }
}

struct Largest<'a>(&'a [f32]);

impl Kernel for Largest<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<A: Arithmetic>(self) -> f32 {
        largest(self.0)
    }
}

struct Sum<'a> {
    logits: &'a [f32],
    most: f32,
}

impl Kernel for Sum<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<A: Arithmetic>(self) -> f32 {
        let mut sums = [0.0; LANES];
        for logits in self.logits.chunks(LANES) {
            for (sum, &logit) in sums.iter_mut().zip(logits) {
                *sum += weight::<A>(logit - self.most);
            }
        }
        fold(sums)
    }
}

struct Exponentials<'a> {
    logits: &'a [f32],
    most: f32,
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
            for ((sum, weight_), &logit) in sums.iter_mut().zip(weights).zip(logits) {
                *weight_ = weight::<A>((logit - self.most) * self.rate);
                *sum += *weight_;
            }
        }
        fold(sums)
    }
}

/// e^x, and nothing below what `f32` can tell from nothing.
#[inline(always)]
fn weight<A: Arithmetic>(x: f32) -> f32 {
    let weight = exp::<A>(x);
    if x < -86.0 { 0.0 } else { weight }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_of_rows_of_any_length() {
        for length in [1usize, 15, 16, 17, 1023, 1024, 5000] {
            let logits: Vec<f32> = (0..length)
                .map(|i| (i as f32 * 0.37).sin() * 20.0)
                .collect();
            let exact: f64 = logits.iter().map(|&z| f64::from(z).exp()).sum();
            let found = log_sum_exp(&logits);
            assert!((found - exact.ln()).abs() < 1e-6, "{length}: {found}");
            let (mut weights, mut sums) = (Vec::new(), Vec::new());
            let most = largest_of(&logits);
            exponentials(&logits, (most, 0.5), &mut weights, &mut sums);
            let of = |z: f32| (2.0 * (f64::from(z) - f64::from(most))).exp();
            for (&weight, &z) in weights.iter().zip(&logits) {
                assert!((f64::from(weight) - of(z)).abs() < 1e-6);
            }
            let exact: f64 = logits.iter().map(|&z| of(z)).sum();
            assert!((sums.iter().sum::<f64>() / exact - 1.0).abs() < 1e-6);
        }
    }

    #[test]
    fn what_has_no_probability_weighs_nothing_and_nan_is_told() {
        let (mut weights, mut sums) = (Vec::new(), Vec::new());
        let logits = [f32::NEG_INFINITY, 0.0, -100.0];
        exponentials(&logits, (0.0, 1.0), &mut weights, &mut sums);
        assert_eq!((weights, sums), (vec![0.0, 1.0, 0.0], vec![1.0]));
        assert!(log_sum_exp(&[0.0, f32::NAN]).is_nan());
        assert!(log_sum_exp(&[f32::NEG_INFINITY; 3]).is_nan());
    }
}
