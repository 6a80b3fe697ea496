//! Confidence intervals of means of outcomes between 0 and 1.

use serde::{Deserialize, Serialize};

/// A mean with its 95 % confidence interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// The mean.
    pub mean: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
}

impl Interval {
    /// Wilson's score interval (1927) for a mean of `n` outcomes in `[0, 1]`; conservative with ties that count one
    /// half, since they reduce the variance.
    #[must_use]
    pub fn wilson(mean: f64, n: usize) -> Self {
        if n == 0 {
            return Self {
                mean: 0.5,
                low: 0.0,
                high: 1.0,
            };
        }
        const Z: f64 = 1.959_963_984_540_054;
        let n = n as f64;
        let centre = (mean + Z * Z / (2.0 * n)) / (1.0 + Z * Z / n);
        let half = Z / (1.0 + Z * Z / n) * (mean * (1.0 - mean) / n + Z * Z / (4.0 * n * n)).sqrt();
        Self {
            mean,
            low: (centre - half).max(0.0),
            high: (centre + half).min(1.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wilsons_interval_agrees_with_textbook_values() {
        let close = |found: f64, expected: f64| {
            assert!((found - expected).abs() < 5e-4, "{found} {expected}");
        };
        let interval = Interval::wilson(0.8, 512);
        close(interval.low, 0.7633);
        close(interval.high, 0.8323);
        let none = Interval::wilson(0.0, 10);
        close(none.low, 0.0);
        close(none.high, 0.2775);
        let all = Interval::wilson(1.0, 10);
        close(all.low, 0.7225);
        close(all.high, 1.0);
    }
}
