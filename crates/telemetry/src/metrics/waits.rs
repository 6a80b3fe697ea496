//! Named waits, which distinguish a slow role from a hung one.
//!
//! A role enters a wait with a reason; others can query which waits are open, since when, and whether one exceeds a
//! limit. This part does not end waits and does not know what the reasons mean.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use crate::metrics::declaration::ProcessMetric;

const WAIT_SECONDS: &str = "agon_wait_seconds";
const WAIT_OPEN_SINCE: &str = "agon_wait_open_since_seconds";

/// Open waits of one role; clones share them.
#[derive(Debug, Clone)]
pub struct Waits {
    role: &'static str,
    open: Arc<Mutex<OpenWaits>>,
}

#[derive(Debug, Default)]
struct OpenWaits {
    next_id: u64,
    waits: BTreeMap<u64, (&'static str, Instant)>,
}

/// An open wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wait {
    /// Event for which the role waits.
    pub reason: &'static str,
    /// Duration so far.
    pub elapsed: Duration,
}

/// Guard of a wait, which ends when this is dropped; it may be held across an await.
#[derive(Debug)]
#[must_use = "the wait ends when this is dropped"]
pub struct WaitGuard {
    waits: Waits,
    id: u64,
    reason: &'static str,
    since: Instant,
}

/// The one wait that a loop is in, recorded under its reason until the reason changes.
#[derive(Debug)]
pub struct NamedWait {
    waits: Waits,
    current: Option<WaitGuard>,
}

impl NamedWait {
    /// A loop that is in no wait.
    #[must_use]
    pub fn new(waits: Waits) -> Self {
        Self {
            waits,
            current: None,
        }
    }

    /// Makes the loop's wait one for `reason`, or ends it with `None`.
    pub fn set(&mut self, reason: impl Into<Option<&'static str>>) {
        let reason = reason.into();
        if self.current.as_ref().map(|guard| guard.reason) != reason {
            // The current wait ends before the next one begins.
            self.current = None;
            self.current = reason.map(|reason| self.waits.enter(reason));
        }
    }
}

impl Waits {
    /// A set without open waits; `role` is their label.
    #[must_use]
    pub fn new(role: &'static str) -> Self {
        Self {
            role,
            open: Arc::default(),
        }
    }

    /// Begins a wait for `reason`, a noun such as "labelled pairs". Dropping the guard records the duration in the
    /// histogram `agon_wait_seconds{role, reason}`. Meanwhile the gauge `agon_wait_open_since_seconds{role, reason}`
    /// is the start time of the oldest such wait, in seconds since 1970; it is 0 while there is none.
    pub fn enter(&self, reason: &'static str) -> WaitGuard {
        self.enter_at(reason, Instant::now())
    }

    /// Open waits, longest first.
    #[must_use]
    pub fn current(&self) -> Vec<Wait> {
        self.current_at(Instant::now())
    }

    /// Reason and duration of the longest open wait, if it exceeds `limit`.
    #[must_use]
    pub fn overdue(&self, limit: Duration) -> Option<(&'static str, Duration)> {
        self.overdue_at(Instant::now(), limit)
    }

    fn enter_at(&self, reason: &'static str, since: Instant) -> WaitGuard {
        let mut open = self.open();
        let id = open.next_id;
        open.next_id += 1;
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

    fn publish(&self, open: &OpenWaits, reason: &'static str) {
        let mut same_reason = open.waits.values().filter(|(other, _)| *other == reason);
        let began = same_reason.next().map_or(0.0, |(_, since)| {
            let began = SystemTime::now().checked_sub(since.elapsed());
            let since_1970 = began.and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok());
            since_1970.unwrap_or_default().as_secs_f64()
        });
        metrics::gauge!(WAIT_OPEN_SINCE, "role" => self.role, "reason" => reason).set(began);
    }

    fn open(&self) -> MutexGuard<'_, OpenWaits> {
        // Each change is one insertion or one removal: the map is valid even after a panic.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl WaitGuard {
    /// Duration of this wait so far.
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

/// Metrics of waits.
pub(crate) const METRICS: &[ProcessMetric] = &[
    ProcessMetric {
        name: WAIT_SECONDS,
        kind: "histogram",
        labels: "role, reason",
        help: "time that a role waited, by reason",
    },
    ProcessMetric {
        name: WAIT_OPEN_SINCE,
        kind: "gauge",
        labels: "role, reason",
        help: "start time of the oldest open wait, in seconds since 1970; 0 while there is none",
    },
];

/// Registers the help texts with the current recorder.
pub(crate) fn describe() {
    let [ended, open] = METRICS else {
        unreachable!("there are two metrics of waits")
    };
    metrics::describe_histogram!(ended.name, ended.help);
    metrics::describe_gauge!(open.name, open.help);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::exporter::Exporter;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn waits_are_sorted_by_duration_and_overdue_after_the_limit() {
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
    fn an_ended_wait_is_recorded_with_role_and_reason() {
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
                "an open wait is recorded in\n{page}"
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
