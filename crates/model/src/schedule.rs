//! The learning rate of every step.

use settings::LrSchedulerType;

/// Warm-up in a straight line from 0, then a fall to a share of the height.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// The learning rate at its height.
    pub learning_rate: f64,
    /// How it falls.
    pub kind: LrSchedulerType,
    /// Share of the steps over which it rises.
    pub warmup_ratio: f64,
    /// The share that linear and cosine leave at the end.
    pub min_lr_ratio: f64,
    /// Steps in all.
    pub steps: u64,
}

impl Schedule {
    /// The learning rate of step `step`, counted from 0.
    #[must_use]
    pub fn at(&self, step: u64) -> f64 {
        let warmup = (self.warmup_ratio * self.steps as f64).round();
        let done = step as f64;
        if done < warmup {
            return self.learning_rate * (done + 1.0) / warmup;
        }
        let left = (self.steps as f64 - warmup).max(1.0);
        let progress = ((done - warmup) / left).min(1.0);
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
    fn the_rate_rises_in_a_line_and_falls_as_its_kind_says() {
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
