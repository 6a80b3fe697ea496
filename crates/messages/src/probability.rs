//! Probabilities: numbers in `[0, 1]`, validated on construction.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A finite number in `[0, 1]`.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd, Serialize, Deserialize)]
#[serde(try_from = "f32", into = "f32")]
pub struct Probability(f32);

/// A number outside `[0, 1]` where a probability is expected.
#[derive(Debug, Clone, Copy, PartialEq, Error)]
#[error("{0} is not a probability: it must be a number from 0 to 1")]
pub struct InvalidProbability(pub f32);

impl Probability {
    /// Even odds: a judge's label for a tie.
    pub const HALF: Self = Self(0.5);

    /// Validates `value`.
    ///
    /// # Errors
    /// When `value` is not finite or outside `[0, 1]`.
    pub fn new(value: f32) -> Result<Self, InvalidProbability> {
        if (0.0..=1.0).contains(&value) {
            Ok(Self(value))
        } else {
            Err(InvalidProbability(value))
        }
    }

    /// The logistic function of a log-odds.
    ///
    /// # Errors
    /// When `log_odds` is NaN.
    pub fn from_log_odds(log_odds: f64) -> Result<Self, InvalidProbability> {
        #[expect(
            clippy::cast_possible_truncation,
            reason = "a probability needs no more than f32"
        )]
        Self::new((1.0 / (1.0 + (-log_odds).exp())) as f32)
    }

    /// Value in `[0, 1]`.
    #[must_use]
    pub fn get(self) -> f32 {
        self.0
    }

    /// Probability of the complementary event.
    #[must_use]
    pub fn complement(self) -> Self {
        Self(1.0 - self.0)
    }
}

impl TryFrom<f32> for Probability {
    type Error = InvalidProbability;
    fn try_from(value: f32) -> Result<Self, InvalidProbability> {
        Self::new(value)
    }
}

impl From<Probability> for f32 {
    fn from(p: Probability) -> Self {
        p.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_numbers_from_zero_to_one_are_probabilities() {
        for good in [0.0, 0.25, 1.0] {
            assert_eq!(Probability::new(good).map(Probability::get), Ok(good));
        }
        for bad in [-0.01, 1.01, f32::NAN, f32::INFINITY] {
            assert!(Probability::new(bad).is_err(), "{bad}");
        }
        assert!(Probability::from_log_odds(f64::NAN).is_err());
        assert_eq!(
            Probability::from_log_odds(f64::INFINITY).map(Probability::get),
            Ok(1.0)
        );
    }
}
