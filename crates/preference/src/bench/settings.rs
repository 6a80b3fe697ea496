//! How a bench goes about it, in the units of the code.

use std::time::Duration;

use settings::PreferenceSettings;

use super::ruling::Margins;

/// What a bench needs to know of `[preference]`; the settings' documentation says what each means.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BenchSettings {
    /// Questions asked together, at most.
    pub max_batch: usize,
    /// How long a batch waits for company.
    pub max_wait: Duration,
    /// Questions that may wait for a judge.
    pub max_queue: usize,
    /// A p nearer to ½ than this is a tie.
    pub tie_margin: f64,
    /// Orders further apart than this are no answer.
    pub max_order_gap: f64,
    /// Verdicts remembered.
    pub cache_size: usize,
    /// How long a replica may take over a batch.
    pub timeout: Duration,
    /// How often a question that failed is asked again, while the judge answers others.
    pub max_retries: usize,
    /// The longest pause before the first retry.
    pub retry_base: Duration,
    /// Failures in a row that open a circuit.
    pub circuit_failures: usize,
    /// How long it stays open before a probe.
    pub circuit_probe: Duration,
}

impl From<&PreferenceSettings> for BenchSettings {
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

/// A time that is too long to be told is a day: far beyond any wait, and still a moment on the clock.
fn seconds(seconds: f64) -> Duration {
    const DAY: Duration = Duration::from_secs(86_400);
    Duration::try_from_secs_f64(seconds).map_or(DAY, |time| time.min(DAY))
}

impl BenchSettings {
    pub(super) fn margins(&self) -> Margins {
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
    fn every_time_can_be_waited_for() {
        for (given, expected) in [
            (0.25, Duration::from_millis(250)),
            (1e300, Duration::from_secs(86_400)),
            (f64::NAN, Duration::from_secs(86_400)),
        ] {
            assert_eq!(seconds(given), expected, "{given}");
        }
    }
}
