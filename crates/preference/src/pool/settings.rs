//! Settings of a judge pool.

use std::time::Duration;

use settings::PreferenceSettings;

use crate::pool::order_swap::Margins;

/// Settings of a [`JudgePool`](crate::JudgePool), from `[preference]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PoolSettings {
    /// Largest batch, in requests.
    pub max_batch: usize,
    /// Time that a request waits for others to fill its batch.
    pub max_wait: Duration,
    /// Capacity of the queue, in requests.
    pub max_queue: usize,
    /// A p closer to ½ than this is a tie.
    pub tie_margin: f64,
    /// Largest |p − (1 − p′)| between both orders; beyond it the verdict is an abstention.
    pub max_order_gap: f64,
    /// Capacity of the verdict cache; 0 disables it.
    pub cache_size: usize,
    /// Time limit of a batch.
    pub timeout: Duration,
    /// Retries of a failed request while the judge answers others.
    pub max_retries: usize,
    /// Upper bound of the backoff before the first retry.
    pub retry_base: Duration,
    /// Consecutive failures that open a circuit breaker.
    pub circuit_failures: usize,
    /// Time from opening to the probe.
    pub circuit_probe: Duration,
}

impl From<&PreferenceSettings> for PoolSettings {
    fn from(settings: &PreferenceSettings) -> Self {
        Self {
            max_batch: settings.max_batch,
            max_wait: Duration::from_millis(settings.max_wait_ms),
            max_queue: settings.max_queue,
            tie_margin: settings.tie_margin,
            max_order_gap: settings.max_order_gap,
            cache_size: settings.cache_size,
            timeout: seconds(settings.timeout_seconds),
            max_retries: settings.max_retries,
            retry_base: Duration::from_millis(settings.retry_base_ms),
            circuit_failures: settings.circuit_failures,
            circuit_probe: seconds(settings.circuit_probe_seconds),
        }
    }
}

/// A duration of `seconds`, at most a day: adding it to an `Instant` cannot overflow.
fn seconds(seconds: f64) -> Duration {
    const DAY: Duration = Duration::from_secs(86_400);
    Duration::try_from_secs_f64(seconds).map_or(DAY, |time| time.min(DAY))
}

impl PoolSettings {
    pub(crate) fn margins(&self) -> Margins {
        Margins {
            tie: self.tie_margin,
            max_order_gap: self.max_order_gap,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_bounded_by_a_day() {
        for (given, expected) in [
            (0.25, Duration::from_millis(250)),
            (1e300, Duration::from_secs(86_400)),
            (f64::NAN, Duration::from_secs(86_400)),
        ] {
            assert_eq!(seconds(given), expected, "{given}");
        }
    }
}
