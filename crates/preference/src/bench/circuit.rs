//! The circuit of a replica: after some failures in a row the replica is left alone for a while, then
//! one question is tried.
//!
//! A pure state machine: it is told the time and what happened, and does not know what a replica is.

use std::time::Duration;

use tokio::time::Instant;

/// When a circuit opens, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CircuitLimits {
    /// Failures in a row that open it.
    pub failures: usize,
    /// How long it stays open before a probe.
    pub probe_after: Duration,
}

#[derive(Debug)]
pub(super) struct Circuit {
    limits: CircuitLimits,
    state: State,
}

#[derive(Debug)]
enum State {
    Closed { failures: usize },
    Open { until: Instant },
    Probing,
}

/// What a circuit allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Leave {
    /// Any question.
    Freely,
    /// One question, to see whether the replica is back.
    Probe,
    /// None before then.
    NotBefore(Instant),
    /// None until the probe has its answer.
    NotYet,
}

impl Circuit {
    pub(super) fn new(limits: CircuitLimits) -> Self {
        Self {
            limits,
            state: State::Closed { failures: 0 },
        }
    }

    pub(super) fn leave(&self, now: Instant) -> Leave {
        match self.state {
            State::Closed { .. } => Leave::Freely,
            State::Open { until } if until <= now => Leave::Probe,
            State::Open { until } => Leave::NotBefore(until),
            State::Probing => Leave::NotYet,
        }
    }

    /// Whether it is not closed.
    pub(super) fn is_open(&self) -> bool {
        !matches!(self.state, State::Closed { .. })
    }

    /// A question was asked, as [`Self::leave`] allowed.
    pub(super) fn asked(&mut self) {
        if self.is_open() {
            self.state = State::Probing;
        }
    }

    /// An answer came, also to a question from before it opened: the replica is back.
    pub(super) fn succeeded(&mut self) {
        self.state = State::Closed { failures: 0 };
    }

    /// No answer came.
    pub(super) fn failed(&mut self, now: Instant) {
        match &mut self.state {
            State::Closed { failures } => {
                *failures += 1;
                if *failures >= self.limits.failures {
                    self.open(now);
                }
            }
            State::Probing => self.open(now),
            // A question from before it opened.
            State::Open { .. } => {}
        }
    }

    /// Opens it, however few failures there were.
    pub(super) fn open(&mut self, now: Instant) {
        self.state = State::Open {
            until: now + self.limits.probe_after,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn it_opens_after_failures_in_a_row_tries_one_question_and_closes_with_an_answer() {
        let start = Instant::now();
        let at = |seconds| start + seconds * SECOND;
        let mut circuit = Circuit::new(CircuitLimits {
            failures: 2,
            probe_after: 5 * SECOND,
        });
        circuit.failed(at(0));
        circuit.succeeded();
        circuit.failed(at(1));
        assert_eq!(circuit.leave(at(1)), Leave::Freely, "not in a row");
        circuit.failed(at(1));
        assert!(circuit.is_open());
        circuit.failed(at(3));
        assert_eq!(
            circuit.leave(at(4)),
            Leave::NotBefore(at(6)),
            "a late failure does not put the probe off"
        );
        assert_eq!(circuit.leave(at(6)), Leave::Probe);
        circuit.asked();
        assert_eq!(circuit.leave(at(7)), Leave::NotYet, "one at a time");
        circuit.failed(at(7));
        assert_eq!(circuit.leave(at(11)), Leave::NotBefore(at(12)));
        assert_eq!(circuit.leave(at(12)), Leave::Probe);
        circuit.asked();
        assert!(circuit.is_open(), "until the probe is answered");
        circuit.succeeded();
        assert_eq!(circuit.leave(at(12)), Leave::Freely);
        circuit.failed(at(13));
        assert_eq!(circuit.leave(at(13)), Leave::Freely, "counted anew");
    }

    #[test]
    fn it_can_be_opened_at_once_and_a_late_answer_closes_it() {
        let now = Instant::now();
        let mut circuit = Circuit::new(CircuitLimits {
            failures: 100,
            probe_after: SECOND,
        });
        circuit.open(now);
        assert_eq!(circuit.leave(now), Leave::NotBefore(now + SECOND));
        circuit.succeeded();
        assert_eq!(circuit.leave(now), Leave::Freely);
    }
}
