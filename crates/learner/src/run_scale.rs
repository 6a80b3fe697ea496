//! Thresholds of divergence from the run's past losses, gradient norms and weight norms.
//!
//! Weights that explode stay finite for a long time: what shows it is a value far beyond everything that the run has
//! seen. The limits are wide, so that only divergence exceeds them. Does not know what follows.

use serde::{Deserialize, Serialize};

/// Factor over the largest loss and gradient norm of the run at which a step has diverged.
const STEP_FACTOR: f64 = 1e3;

/// Number of steps after which losses and gradient norms have a scale: single batches may have none, such as one of
/// ties.
const MIN_STEPS: u64 = 8;

/// Factor over the largest norm of the run's valid weights at which weights have diverged. AdamW moves a weight by no
/// more than about the learning rate in a step, so that only an absurd rate grows them so fast.
const WEIGHT_FACTOR: f64 = 10.0;

/// Largest values of a run so far; part of every checkpoint.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct RunScale {
    /// Steps that were applied.
    steps: u64,
    /// Largest absolute loss of those.
    loss: f64,
    /// Largest gradient norm of those.
    grad_norm: f64,
    /// Largest norm of weights that were published or saved; 0: not yet known.
    weight_norm: f64,
}

/// Limits of a step: beyond them it changes nothing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct StepLimits {
    /// Largest absolute loss.
    loss: f64,
    /// Largest gradient norm.
    grad_norm: f64,
}

impl StepLimits {
    /// No limits but those of finite numbers.
    pub(crate) const FINITE: Self = Self {
        loss: f64::MAX,
        grad_norm: f64::MAX,
    };

    /// Whether a step of this loss and gradient norm may be applied; never if either is not finite.
    pub(crate) fn accept(&self, loss: f64, grad_norm: f64) -> bool {
        loss.abs() <= self.loss && grad_norm <= self.grad_norm
    }
}

impl RunScale {
    /// Limits of the next step.
    pub(crate) fn step_limits(&self) -> StepLimits {
        if self.steps < MIN_STEPS {
            return StepLimits::FINITE;
        }
        let limit = |largest: f64| match largest > 0.0 {
            true => STEP_FACTOR * largest,
            false => f64::MAX,
        };
        StepLimits {
            loss: limit(self.loss),
            grad_norm: limit(self.grad_norm),
        }
    }

    /// Counts a step that was applied.
    pub(crate) fn observe_step(&mut self, loss: f64, grad_norm: f64) {
        self.steps += 1;
        self.loss = self.loss.max(loss.abs());
        self.grad_norm = self.grad_norm.max(grad_norm);
    }

    /// Whether weights of this norm are valid: finite, and not far beyond those of the run's past. Those become part
    /// of it.
    pub(crate) fn accept_weights(&mut self, norm: f64) -> bool {
        let limit = match self.weight_norm > 0.0 {
            true => WEIGHT_FACTOR * self.weight_norm,
            false => f64::MAX,
        };
        let is_valid = norm <= limit;
        if is_valid {
            self.weight_norm = self.weight_norm.max(norm);
        }
        is_valid
    }

    /// Largest norm of the run's valid weights; 0: not yet known.
    pub(crate) fn weight_norm(&self) -> f64 {
        self.weight_norm
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn non_finite_values_are_never_accepted() {
        let mut scale = RunScale::default();
        for value in [f64::NAN, f64::INFINITY] {
            assert!(!StepLimits::FINITE.accept(value, 1.0));
            assert!(!StepLimits::FINITE.accept(-value, 1.0));
            assert!(!StepLimits::FINITE.accept(1.0, value));
            assert!(!scale.accept_weights(value));
        }
        assert!(StepLimits::FINITE.accept(-1e300, 1e300));
    }

    #[test]
    fn a_step_is_measured_against_all_of_the_past() {
        let mut scale = RunScale::default();
        // Ties have no loss and no gradient.
        scale.observe_step(0.0, 0.0);
        for _ in 1..MIN_STEPS {
            assert!(
                scale.step_limits().accept(1e30, 1e30),
                "the scale is unknown"
            );
            scale.observe_step(-2.0, 0.5);
        }
        for _ in 0..100 {
            scale.observe_step(0.0, 0.0);
        }
        let limits = scale.step_limits();
        for (loss, grad_norm, accepted) in [
            (1999.0, 499.0, true),
            (-1999.0, 0.0, true),
            (2001.0, 0.0, false),
            (-2001.0, 0.0, false),
            (0.0, 501.0, false),
        ] {
            assert_eq!(
                limits.accept(loss, grad_norm),
                accepted,
                "{loss} {grad_norm}"
            );
        }
    }

    #[test]
    fn weights_may_grow_but_not_explode() {
        let mut scale = RunScale::default();
        for (norm, accepted) in [
            (3.0, true),
            (31.0, false),
            (29.0, true),
            (0.1, true),
            (280.0, true),
            (1e10, false),
        ] {
            assert_eq!(scale.accept_weights(norm), accepted, "{norm}");
        }
        assert_eq!(scale.weight_norm(), 280.0);
    }
}
