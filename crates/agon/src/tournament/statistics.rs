//! Statistics over seeds: t-intervals, paired differences, and Holm's correction for several comparisons.

use serde::Serialize;
use statrs::distribution::{ContinuousCDF, StudentsT};

/// Confidence level of the intervals.
const CONFIDENCE: f64 = 0.95;

/// A mean over seeds with its 95 % t-interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct SeedMean {
    pub(super) mean: f64,
    /// Ends of the interval; `None` for a single seed.
    pub(super) low: Option<f64>,
    pub(super) high: Option<f64>,
    pub(super) seeds: usize,
}

impl SeedMean {
    /// As [`Self::of`] for shares: the interval ends at 0 and 1.
    pub(super) fn of_shares(values: &[f64]) -> Option<Self> {
        let found = Self::of(values)?;
        Some(Self {
            low: found.low.map(|low| low.max(0.0)),
            high: found.high.map(|high| high.min(1.0)),
            ..found
        })
    }

    /// As [`Self::of`] for amounts, which are not below 0: neither is the interval, unless an estimate is.
    pub(super) fn of_amounts(values: &[f64]) -> Option<Self> {
        let found = Self::of(values)?;
        Some(Self {
            low: found.low.map(|low| low.max(found.mean.min(0.0))),
            ..found
        })
    }

    /// Mean and interval of one value a seed; `None` without values.
    pub(super) fn of(values: &[f64]) -> Option<Self> {
        let moments = SampleMoments::of(values)?;
        let half = moments.standard_error.map(|error| {
            let t = student(values.len()).inverse_cdf(0.5 + CONFIDENCE / 2.0);
            t * error
        });
        Some(Self {
            mean: moments.mean,
            low: half.map(|half| moments.mean - half),
            high: half.map(|half| moments.mean + half),
            seeds: values.len(),
        })
    }
}

/// Two-sided p-value of Student's t-test that the mean of `values` is `expected`; `None` for fewer than two.
pub(super) fn t_test(values: &[f64], expected: f64) -> Option<f64> {
    let moments = SampleMoments::of(values)?;
    let error = moments.standard_error?;
    let difference = (moments.mean - expected).abs();
    if error == 0.0 {
        return Some(if difference == 0.0 { 1.0 } else { 0.0 });
    }
    Some(2.0 * student(values.len()).sf(difference / error))
}

/// P-values adjusted for their number by the step-down method of Holm (1979), in the same order: those at most α are
/// significant at a family-wise error rate of α.
pub(super) fn holm(p: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|&a, &b| p[a].total_cmp(&p[b]));
    let mut adjusted = vec![1.0; p.len()];
    let mut largest = 0.0_f64;
    for (rank, &index) in order.iter().enumerate() {
        largest = largest.max(p[index] * (p.len() - rank) as f64);
        adjusted[index] = largest.min(1.0);
    }
    adjusted
}

struct SampleMoments {
    mean: f64,
    /// Standard error of the mean; `None` for a single value.
    standard_error: Option<f64>,
}

impl SampleMoments {
    fn of(values: &[f64]) -> Option<Self> {
        if values.is_empty() {
            return None;
        }
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        Some(Self {
            mean,
            standard_error: (values.len() > 1).then(|| (squares / (n - 1.0) / n).sqrt()),
        })
    }
}

/// Student's t-distribution of the mean of `count` values, at least two.
fn student(count: usize) -> StudentsT {
    let freedom = (count - 1) as f64;
    StudentsT::new(0.0, 1.0, freedom).expect("the degrees of freedom are positive")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(found: f64, expected: f64) {
        assert!((found - expected).abs() < 5e-4, "{found} is not {expected}");
    }

    #[test]
    fn intervals_agree_with_the_table_of_students_t() {
        // Mean .6, standard deviation .1, five values: the half-width is 2.776445 · .1/√5.
        let values = [
            0.6 - 0.1 * 2.0_f64.sqrt(),
            0.6,
            0.6,
            0.6,
            0.6 + 0.1 * 2.0_f64.sqrt(),
        ];
        let interval = SeedMean::of(&values).unwrap();
        close(interval.mean, 0.6);
        close(interval.low.unwrap(), 0.6 - 0.124166);
        close(interval.high.unwrap(), 0.6 + 0.124166);
        let single = SeedMean::of(&[0.7]).unwrap();
        assert_eq!((single.mean, single.low, single.high), (0.7, None, None));
        assert_eq!(SeedMean::of(&[]), None);
        let amount = SeedMean::of_amounts(&[0.1, 9.0]).unwrap();
        assert_eq!(amount.low, Some(0.0));
        assert!(amount.high.unwrap() > 50.0);
        let estimate = SeedMean::of_amounts(&[-0.3, -0.1]).unwrap();
        assert_eq!(estimate.low, Some(-0.2));
        let share = SeedMean::of_shares(&[0.9, 1.0]).unwrap();
        assert_eq!((share.mean, share.high), (0.95, Some(1.0)));
        assert!(share.low.unwrap() < 0.5);
    }

    #[test]
    fn p_values_agree_with_the_table_of_students_t() {
        // Critical values of t at 4 degrees of freedom: 2.776445 for .05, 4.604095 for .01.
        for (t, p) in [(2.776_445, 0.05), (4.604_095, 0.01), (0.0, 1.0)] {
            let shift = t * 0.1 / 5.0_f64.sqrt();
            let deviation = 0.1 * 2.0_f64.sqrt();
            let values = [shift - deviation, shift, shift, shift, shift + deviation];
            close(t_test(&values, 0.0).unwrap(), p);
            close(t_test(&values.map(|v| 0.5 - v), 0.5).unwrap(), p);
        }
        assert_eq!(t_test(&[0.5], 0.5), None);
        assert_eq!(t_test(&[0.5, 0.5], 0.5), Some(1.0));
        assert_eq!(t_test(&[0.6, 0.6], 0.5), Some(0.0));
    }

    #[test]
    fn holms_correction_by_hand() {
        let adjusted = holm(&[0.01, 0.04, 0.03, 0.005]);
        for (found, expected) in adjusted.iter().zip([0.03, 0.06, 0.06, 0.02]) {
            close(*found, expected);
        }
        assert_eq!(holm(&[0.9, 0.8]), [1.0, 1.0]);
        assert_eq!(holm(&[]), Vec::<f64>::new());
    }
}
