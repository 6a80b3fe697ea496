//! Every wait has a name, so that slow and hung do not look alike.
//!
//! Who waits says for what; anyone may ask what is waited for, since when, and whether that is too
//! long. This part ends no wait and does not know what the things waited for are.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use crate::metrics_page::ProcessMetric;

const WAIT_SECONDS: &str = "agon_wait_seconds";
const WAIT_OPEN_SINCE: &str = "agon_wait_open_since_seconds";

/// The waits of one role; clones share them.
#[derive(Debug, Clone)]
pub struct Waits {
    role: &'static str,
    open: Arc<Mutex<Open>>,
}

#[derive(Debug, Default)]
struct Open {
    next: u64,
    waits: BTreeMap<u64, (&'static str, Instant)>,
}

/// A wait that has not ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wait {
    /// What is waited for.
    pub reason: &'static str,
    /// For how long so far.
    pub elapsed: Duration,
}

/// A wait, which lasts until this is dropped; it may be held across an await.
#[derive(Debug)]
#[must_use = "the wait ends when this is dropped"]
pub struct WaitGuard {
    waits: Waits,
    id: u64,
    reason: &'static str,
    since: Instant,
}

impl Waits {
    /// No waits yet; `role` labels them.
    #[must_use]
    pub fn new(role: &'static str) -> Self {
        Self {
            role,
            open: Arc::default(),
        }
    }

    /// Begins to wait for `reason`, a noun: "labelled pairs". When the guard is dropped the time is
    /// added to the histogram `agon_wait_seconds{role, reason}`. Meanwhile the gauge
    /// `agon_wait_open_since_seconds{role, reason}` tells when the oldest such wait began, in seconds since
    /// 1970; it is 0 while there is none.
    pub fn enter(&self, reason: &'static str) -> WaitGuard {
        self.enter_at(reason, Instant::now())
    }

    /// What is waited for now, the longest wait first.
    #[must_use]
    pub fn current(&self) -> Vec<Wait> {
        self.current_at(Instant::now())
    }

    /// The longest wait, when it is longer than `limit`: what is waited for, and for how long.
    #[must_use]
    pub fn overdue(&self, limit: Duration) -> Option<(&'static str, Duration)> {
        self.overdue_at(Instant::now(), limit)
    }

    fn enter_at(&self, reason: &'static str, since: Instant) -> WaitGuard {
        let mut open = self.open();
        let id = open.next;
        open.next += 1;
        open.waits.insert(id, (reason, since));
        self.publish(&open, reason);
        drop(open);
        WaitGuard {
            waits: self.clone(),
            id,
            reason,
            since,
        }
    }

    fn current_at(&self, now: Instant) -> Vec<Wait> {
        let elapsed = |&(reason, since): &(&'static str, Instant)| Wait {
            reason,
            elapsed: now.saturating_duration_since(since),
        };
        let mut current: Vec<_> = self.open().waits.values().map(elapsed).collect();
        current.sort_by_key(|wait| std::cmp::Reverse(wait.elapsed));
        current
    }

    fn overdue_at(&self, now: Instant, limit: Duration) -> Option<(&'static str, Duration)> {
        let longest = self.current_at(now).into_iter().next()?;
        (longest.elapsed > limit).then_some((longest.reason, longest.elapsed))
    }

    fn publish(&self, open: &Open, reason: &'static str) {
        let mut same = open.waits.values().filter(|(other, _)| *other == reason);
        let began = same.next().map_or(0.0, |(_, since)| {
            let began = SystemTime::now().checked_sub(since.elapsed());
            let since_1970 = began.and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok());
            since_1970.unwrap_or_default().as_secs_f64()
        });
        metrics::gauge!(WAIT_OPEN_SINCE, "role" => self.role, "reason" => reason).set(began);
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        // Each change is one insertion or one removal: the list is sound even after a panic.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl WaitGuard {
    /// For how long this has waited.
    #[must_use]
    pub fn elapsed(&self) -> Duration {
        self.since.elapsed()
    }
}

impl Drop for WaitGuard {
    fn drop(&mut self) {
        let mut open = self.waits.open();
        open.waits.remove(&self.id);
        let (role, reason) = (self.waits.role, self.reason);
        self.waits.publish(&open, reason);
        drop(open);
        metrics::histogram!(WAIT_SECONDS, "role" => role, "reason" => reason)
            .record(self.elapsed().as_secs_f64());
    }
}

/// What waits publish.
pub(crate) const METRICS: &[ProcessMetric] = &[
    ProcessMetric {
        name: WAIT_SECONDS,
        kind: "histogram",
        labels: "role, reason",
        help: "time a role waited, by what it waited for",
    },
    ProcessMetric {
        name: WAIT_OPEN_SINCE,
        kind: "gauge",
        labels: "role, reason",
        help: "when the oldest wait that goes on began, in seconds since 1970; 0 while there is none",
    },
];

/// Tells the current recorder what the waits' metrics are.
pub(crate) fn describe() {
    let [ended, open] = METRICS else {
        unreachable!("waits publish two metrics")
    };
    metrics::describe_histogram!(ended.name, ended.help);
    metrics::describe_gauge!(open.name, open.help);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Exporter;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn the_longest_wait_is_told_first_and_is_overdue_after_the_limit() {
        let waits = Waits::new("learner");
        let start = Instant::now();
        assert_eq!(waits.overdue_at(start, Duration::ZERO), None);
        let weights = waits.enter_at("weights", start + 2 * SECOND);
        let pairs = waits.clone().enter_at("labelled pairs", start);
        let now = start + 5 * SECOND;
        let expected = [("labelled pairs", 5 * SECOND), ("weights", 3 * SECOND)];
        let current: Vec<_> = waits
            .current_at(now)
            .iter()
            .map(|w| (w.reason, w.elapsed))
            .collect();
        assert_eq!(current, expected);
        for (limit, overdue) in [(4, true), (5, false), (6, false)] {
            let expected = overdue.then_some(("labelled pairs", 5 * SECOND));
            assert_eq!(
                waits.overdue_at(now, limit * SECOND),
                expected,
                "limit {limit} s"
            );
        }
        drop(pairs);
        assert_eq!(waits.overdue_at(now, SECOND), Some(("weights", 3 * SECOND)));
        drop(weights);
        assert!(waits.current().is_empty());
    }

    #[test]
    fn a_wait_that_ended_is_in_the_histogram_of_its_role_and_reason() {
        let recording = Exporter::recorder_only();
        recording.during(|| {
            let waits = Waits::new("actor");
            drop(waits.enter("prompts"));
            drop(waits.enter("prompts"));
            let _open = waits.enter("weights");
            assert_eq!(waits.overdue(Duration::from_secs(3600)), None);
            let page = recording.render();
            let line = "agon_wait_seconds_count{role=\"actor\",reason=\"prompts\"} 2\n";
            assert!(page.contains(line), "no line {line:?} in\n{page}");
            assert!(
                !page.contains("agon_wait_seconds_count{role=\"actor\",reason=\"weights\"}"),
                "a wait that goes on is recorded in\n{page}"
            );
            let since = |reason: &str| {
                let name =
                    format!("agon_wait_open_since_seconds{{role=\"actor\",reason=\"{reason}\"}} ");
                let value = page
                    .lines()
                    .find_map(|line| line.strip_prefix(name.as_str()));
                value.unwrap().parse::<f64>().unwrap()
            };
            assert_eq!(since("prompts"), 0.0);
            assert!(since("weights") > 1.6e9, "{page}");
        });
    }
}
