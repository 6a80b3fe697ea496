//! Pauses that a replica asks for: "too many requests", or an error with `Retry-After`.
//!
//! A pure state machine over time and requests, within bounds: a replica neither stops a run by a distant time nor is
//! asked without rest when it gives none.

use std::time::Duration;

use tokio::time::Instant;

/// Longest pause, whatever the replica asks for: half of the default `learner.batch_timeout_seconds`.
pub(crate) const MAX_PAUSE: Duration = Duration::from_secs(300);
/// First pause when the replica names no time; doubles with every further one in a row.
const FIRST_BACKOFF: Duration = Duration::from_secs(1);
/// Longest pause when the replica names no time.
const MAX_BACKOFF: Duration = Duration::from_secs(60);
/// Shortest pause, the first in a row; doubles up to [`FIRST_BACKOFF`].
const MIN_PAUSE: Duration = Duration::from_millis(10);

/// The pause of one replica.
#[derive(Debug, Default)]
pub(crate) struct ReplicaPause {
    until: Option<Instant>,
    /// Pauses without an answer between them.
    in_a_row: u32,
}

impl ReplicaPause {
    /// End of the pause, if it is not over.
    pub(crate) fn until(&self, now: Instant) -> Option<Instant> {
        self.until.filter(|&until| until > now)
    }

    /// Pauses for the time that the replica asks for. Requests that were sent together and are refused together make
    /// one pause. Returns its length from now on.
    pub(crate) fn begin(&mut self, now: Instant, asked: Option<Duration>) -> Duration {
        if self.until(now).is_none() {
            self.in_a_row = self.in_a_row.saturating_add(1);
        }
        let doubled = |base: Duration, max: Duration| {
            let doublings = self.in_a_row.saturating_sub(1).min(16);
            (base * (1 << doublings)).min(max)
        };
        let length = match asked.filter(|asked| !asked.is_zero()) {
            Some(asked) => asked.max(doubled(MIN_PAUSE, FIRST_BACKOFF)).min(MAX_PAUSE),
            None => doubled(FIRST_BACKOFF, MAX_BACKOFF),
        };
        let until = self.until.max(Some(now + length));
        self.until = until;
        until.map_or(length, |until| until - now)
    }

    /// Records an answer.
    pub(crate) fn answered(&mut self) {
        self.in_a_row = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lengths of pauses in a row, each begun when the one before is over.
    fn in_a_row(asked: Option<Duration>, count: usize) -> Vec<f64> {
        let mut pause = ReplicaPause::default();
        let mut now = Instant::now();
        let mut next = || {
            let length = pause.begin(now, asked);
            now += length;
            length.as_secs_f64()
        };
        (0..count).map(|_| next()).collect()
    }

    #[test]
    fn a_time_that_is_named_is_honoured_within_bounds_and_else_pauses_double() {
        let seconds = |seconds| Some(Duration::from_secs_f64(seconds));
        for (asked, expected) in [
            (seconds(7.0), vec![7.0; 4]),
            (seconds(86_400.0), vec![300.0; 2]),
            (Some(Duration::MAX), vec![300.0; 2]),
            (
                seconds(0.001),
                vec![0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.0, 1.0],
            ),
            (
                seconds(0.0),
                vec![1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0],
            ),
            (None, vec![1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]),
        ] {
            assert_eq!(in_a_row(asked, expected.len()), expected, "{asked:?}");
        }
        assert_eq!(in_a_row(None, 100).last(), Some(&60.0), "no overflow");
    }

    #[test]
    fn requests_refused_together_make_one_pause_and_an_answer_ends_the_row() {
        let now = Instant::now();
        let mut pause = ReplicaPause::default();
        for _ in 0..8 {
            assert_eq!(pause.begin(now, None), Duration::from_secs(1));
        }
        let three = Some(Duration::from_secs(3));
        assert_eq!(
            pause.begin(now, three),
            Duration::from_secs(3),
            "the longest"
        );
        assert_eq!(pause.begin(now, None), Duration::from_secs(3));
        let later = now + Duration::from_secs(3);
        assert_eq!(pause.until(later), None);
        assert_eq!(pause.begin(later, None), Duration::from_secs(2), "in a row");
        pause.answered();
        let later = later + Duration::from_secs(2);
        assert_eq!(pause.begin(later, None), Duration::from_secs(1));
    }
}
