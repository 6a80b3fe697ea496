//! Learning-rate schedules.

use settings::{LrSchedulerType, OptimizerSettings};

/// Linear warm-up followed by a constant, linear or cosine decay.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Shape of the decay.
    pub kind: LrSchedulerType,
    /// Fraction of the steps spent on warm-up.
    pub warmup_ratio: f64,
    /// Final learning rate of linear and cosine decay, as a fraction of the peak.
    pub min_lr_ratio: f64,
    /// Total number of steps.
    pub steps: u64,
}

impl Schedule {
    /// Schedule of a section of the settings over `steps` steps.
    #[must_use]
    pub fn new(settings: &OptimizerSettings, steps: u64) -> Self {
        Self {
            learning_rate: settings.learning_rate,
            kind: settings.lr_scheduler_type,
            warmup_ratio: settings.warmup_ratio,
            min_lr_ratio: settings.min_lr_ratio,
            steps,
        }
    }

    /// Learning rate at `step`, counted from 0.
    #[must_use]
    pub fn at(&self, step: u64) -> f64 {
        let warmup = (self.warmup_ratio * self.steps as f64).round();
        let done = step as f64;
        if done < warmup {
            return self.learning_rate * (done + 1.0) / warmup;
        }
        let decay_steps = (self.steps as f64 - warmup).max(1.0);
        let progress = ((done - warmup) / decay_steps).min(1.0);
        let shape = match self.kind {
            LrSchedulerType::Constant => return self.learning_rate,
            LrSchedulerType::Linear => 1.0 - progress,
            LrSchedulerType::Cosine => (1.0 + (std::f64::consts::PI * progress).cos()) / 2.0,
        };
        self.learning_rate * (self.min_lr_ratio + (1.0 - self.min_lr_ratio) * shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warmup_is_linear_and_decay_follows_the_kind() {
        let of = |kind, step| {
            let schedule = Schedule {
                learning_rate: 2.0,
                kind,
                warmup_ratio: 0.2,
                min_lr_ratio: 0.1,
                steps: 10,
            };
            schedule.at(step)
        };
        for kind in [
            LrSchedulerType::Constant,
            LrSchedulerType::Linear,
            LrSchedulerType::Cosine,
        ] {
            assert_eq!((of(kind, 0), of(kind, 1), of(kind, 2)), (1.0, 2.0, 2.0));
        }
        assert_eq!(of(LrSchedulerType::Constant, 9), 2.0);
        assert!((of(LrSchedulerType::Linear, 6) - (0.2 + 1.8 * 0.5)).abs() < 1e-12);
        assert!((of(LrSchedulerType::Cosine, 6) - (0.2 + 1.8 * 0.5)).abs() < 1e-12);
        assert!((of(LrSchedulerType::Cosine, 4) - (0.2 + 1.8 * 0.853_553_390_593)).abs() < 1e-9);
        assert!((of(LrSchedulerType::Linear, 10) - 0.2).abs() < 1e-12);
    }
}
