//! Circuit breaker: opens after consecutive failures, then admits one probe request after a pause.
//!
//! A pure state machine over time and results; does not know what a replica is.

use std::time::Duration;

use tokio::time::Instant;

/// Thresholds of a circuit breaker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CircuitBreakerLimits {
    /// Consecutive failures that open it.
    pub failures: usize,
    /// Time from opening to the probe.
    pub probe_after: Duration,
}

#[derive(Debug)]
pub(crate) struct CircuitBreaker {
    limits: CircuitBreakerLimits,
    state: CircuitState,
}

#[derive(Debug)]
enum CircuitState {
    Closed { failures: usize },
    Open { until: Instant },
    Probing,
}

/// Requests that a circuit breaker admits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Admission {
    /// Any request: it is closed.
    Allow,
    /// One request, to test whether the replica has recovered.
    Probe,
    /// None before this instant.
    RetryAt(Instant),
    /// None until the probe has its result.
    Wait,
}

impl CircuitBreaker {
    pub(crate) fn new(limits: CircuitBreakerLimits) -> Self {
        Self {
            limits,
            state: CircuitState::Closed { failures: 0 },
        }
    }

    pub(crate) fn admission(&self, now: Instant) -> Admission {
        match self.state {
            CircuitState::Closed { .. } => Admission::Allow,
            CircuitState::Open { until } if until <= now => Admission::Probe,
            CircuitState::Open { until } => Admission::RetryAt(until),
            CircuitState::Probing => Admission::Wait,
        }
    }

    /// Whether it is open or probing.
    pub(crate) fn is_open(&self) -> bool {
        !matches!(self.state, CircuitState::Closed { .. })
    }

    /// Records that a request was sent, as [`Self::admission`] allowed.
    pub(crate) fn request_sent(&mut self) {
        if self.is_open() {
            self.state = CircuitState::Probing;
        }
    }

    /// Records an answer and closes, even if the request was sent before it opened.
    pub(crate) fn succeeded(&mut self) {
        self.state = CircuitState::Closed { failures: 0 };
    }

    /// Records a failure.
    pub(crate) fn failed(&mut self, now: Instant) {
        match &mut self.state {
            CircuitState::Closed { failures } => {
                *failures += 1;
                if *failures >= self.limits.failures {
                    self.open(now);
                }
            }
            CircuitState::Probing => self.open(now),
            // Sent before it opened.
            CircuitState::Open { .. } => {}
        }
    }

    /// Opens it regardless of the failure count.
    pub(crate) fn open(&mut self, now: Instant) {
        self.state = CircuitState::Open {
            until: now + self.limits.probe_after,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn it_opens_after_consecutive_failures_and_closes_after_a_successful_probe() {
        let start = Instant::now();
        let at = |seconds| start + seconds * SECOND;
        let mut circuit = CircuitBreaker::new(CircuitBreakerLimits {
            failures: 2,
            probe_after: 5 * SECOND,
        });
        circuit.failed(at(0));
        circuit.succeeded();
        circuit.failed(at(1));
        assert_eq!(
            circuit.admission(at(1)),
            Admission::Allow,
            "not consecutive"
        );
        circuit.failed(at(1));
        assert!(circuit.is_open());
        circuit.failed(at(3));
        assert_eq!(
            circuit.admission(at(4)),
            Admission::RetryAt(at(6)),
            "a late failure does not delay the probe"
        );
        assert_eq!(circuit.admission(at(6)), Admission::Probe);
        circuit.request_sent();
        assert_eq!(circuit.admission(at(7)), Admission::Wait, "one at a time");
        circuit.failed(at(7));
        assert_eq!(circuit.admission(at(11)), Admission::RetryAt(at(12)));
        assert_eq!(circuit.admission(at(12)), Admission::Probe);
        circuit.request_sent();
        assert!(circuit.is_open(), "until the probe is answered");
        circuit.succeeded();
        assert_eq!(circuit.admission(at(12)), Admission::Allow);
        circuit.failed(at(13));
        assert_eq!(circuit.admission(at(13)), Admission::Allow, "counted anew");
    }

    #[test]
    fn a_late_answer_closes_an_explicitly_opened_circuit() {
        let now = Instant::now();
        let mut circuit = CircuitBreaker::new(CircuitBreakerLimits {
            failures: 100,
            probe_after: SECOND,
        });
        circuit.open(now);
        assert_eq!(circuit.admission(now), Admission::RetryAt(now + SECOND));
        circuit.succeeded();
        assert_eq!(circuit.admission(now), Admission::Allow);
    }
}
