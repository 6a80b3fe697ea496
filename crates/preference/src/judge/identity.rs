//! Identity under which a remote judge answers, and the detection of its changes.
//!
//! The settings name an address; the model behind it is known only from its responses. Labels of another model follow
//! another preference, so a change is logged and counted, and no verdict from before it is taken from the cache.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use telemetry::publish;

/// Number of identities that are remembered, so that servers that take turns are not a change each time.
const REMEMBERED: usize = 64;

/// Identities of all replicas of one remote judge.
pub(super) struct IdentityMonitor {
    judge: &'static str,
    seen: Mutex<SeenIdentities>,
    /// Number of the identity that answered last.
    current: AtomicU64,
}

#[derive(Default)]
struct SeenIdentities {
    /// Identities with their numbers, the newest last.
    remembered: VecDeque<(String, u64)>,
    /// Number of identities so far.
    count: u64,
}

/// An identity that answers for the first time although another did before.
#[derive(Debug, PartialEq, Eq)]
struct IdentityChange {
    before: String,
    /// Number of changes so far, with this one.
    changes: u64,
}

impl IdentityMonitor {
    pub(super) fn new(judge: &'static str) -> Self {
        Self {
            judge,
            seen: Mutex::default(),
            current: AtomicU64::new(0),
        }
    }

    /// Number of the identity that answered last; constant while the judge does not change.
    pub(super) fn revision(&self) -> u64 {
        self.current.load(Ordering::Relaxed)
    }

    /// Records that `replica` answered under `identity`. Logs a change, and of many changes every second, fourth,
    /// eighth and so on.
    pub(super) fn observe(&self, replica: &str, identity: String) {
        let judge = self.judge;
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let now = identity.clone();
        let change = seen.observe(identity);
        self.current.store(seen.number(&now), Ordering::Relaxed);
        drop(seen);
        let Some(change) = change else {
            return;
        };
        #[expect(clippy::cast_precision_loss, reason = "no judge changes 2^53 times")]
        let changes = [("judge/model_changes", change.changes as f64)];
        publish(
            &changes.into_iter().collect(),
            &[("role", "preference"), ("judge", judge)],
        );
        if change.changes.is_power_of_two() {
            let IdentityChange { before, changes } = change;
            tracing::warn!(
                judge,
                replica,
                before,
                now,
                changes,
                "the model or version of the judge has changed: labels from here on follow its preference; \
                 name a fixed version in the judge's settings"
            );
        }
    }
}

impl SeenIdentities {
    /// Records the identity; `Some` if it is new and not the first.
    fn observe(&mut self, identity: String) -> Option<IdentityChange> {
        if self.remembered.iter().any(|(name, _)| *name == identity) {
            return None;
        }
        let before = self.remembered.back().map(|(name, _)| name.clone());
        self.remembered.push_back((identity, self.count));
        self.count += 1;
        if self.remembered.len() > REMEMBERED {
            self.remembered.pop_front();
        }
        Some(IdentityChange {
            before: before?,
            changes: self.count - 1,
        })
    }

    fn number(&self, identity: &str) -> u64 {
        let mut remembered = self.remembered.iter();
        let found = remembered.find(|(name, _)| name == identity);
        found.map_or(0, |&(_, number)| number)
    }
}

#[cfg(test)]
mod tests {
    use telemetry::Exporter;

    use super::*;

    #[test]
    fn only_new_identities_are_changes_and_the_revision_is_the_one_that_answers() {
        let monitor = IdentityMonitor::new("http");
        let recording = Exporter::recorder_only();
        let mut revisions = Vec::new();
        recording.during(|| {
            for identity in ["a", "a", "b", "a", "b", "c"] {
                monitor.observe("http://host", identity.into());
                revisions.push(monitor.revision());
            }
        });
        assert_eq!(revisions, [0, 0, 1, 0, 1, 2]);
        let page = recording.render();
        let line = "agon_judge_model_changes{role=\"preference\",judge=\"http\"} 2";
        assert!(page.lines().any(|l| l == line), "{page}");
    }

    #[test]
    fn the_memory_of_identities_is_bounded() {
        let mut seen = SeenIdentities::default();
        assert_eq!(seen.observe("0".into()), None, "the first is no change");
        for number in 1..=REMEMBERED as u64 {
            let change = IdentityChange {
                before: (number - 1).to_string(),
                changes: number,
            };
            assert_eq!(seen.observe(number.to_string()), Some(change));
        }
        assert_eq!(seen.remembered.len(), REMEMBERED);
        assert_eq!(seen.number(&REMEMBERED.to_string()), REMEMBERED as u64);
    }
}
