//! State of every replica of a judge, and the choice of one for the next batch.

use std::sync::Arc;

use tokio::time::Instant;

use crate::pool::Replica;
use crate::pool::circuit_breaker::{Admission, CircuitBreaker, CircuitBreakerLimits};
use crate::pool::replica_pause::ReplicaPause;

/// A replica with its circuit breaker and load.
pub(crate) struct ReplicaState {
    pub(crate) replica: Arc<dyn Replica>,
    pub(crate) circuit: CircuitBreaker,
    /// Batches in flight.
    pub(crate) in_flight: usize,
    /// Whether it will never answer again.
    pub(crate) is_dead: bool,
    /// The pause that it asked for.
    pub(crate) pause: ReplicaPause,
}

/// All replicas of a judge.
pub(crate) struct ReplicaSet {
    replicas: Vec<ReplicaState>,
    /// Index at which the next search starts, for round-robin among equals.
    next: usize,
}

/// Choice of a replica.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ReplicaChoice {
    /// A replica that accepts a batch of at most `limit` requests.
    Available { index: usize, limit: usize },
    /// No replica is available; where known, the first instant at which a pause ends.
    Unavailable { until: Option<Instant> },
}

impl ReplicaState {
    /// Largest batch that may be sent now; else, where known, the instant at which that may change.
    fn batch_limit(&self, now: Instant) -> Result<usize, Option<Instant>> {
        if self.is_dead || self.in_flight >= self.replica.concurrency().max(1) {
            return Err(None);
        }
        if let Some(until) = self.pause.until(now) {
            return Err(Some(until));
        }
        match self.circuit.admission(now) {
            Admission::Allow => Ok(self.replica.max_batch().max(1)),
            Admission::Probe => Ok(1),
            Admission::RetryAt(until) => Err(Some(until)),
            Admission::Wait => Err(None),
        }
    }

    fn is_usable(&self) -> bool {
        !self.is_dead && !self.circuit.is_open()
    }

    fn is_paused(&self, now: Instant) -> bool {
        self.pause.until(now).is_some()
    }
}

impl ReplicaSet {
    pub(crate) fn new(replicas: &[Arc<dyn Replica>], limits: CircuitBreakerLimits) -> Self {
        let state = |replica: &Arc<dyn Replica>| ReplicaState {
            replica: Arc::clone(replica),
            circuit: CircuitBreaker::new(limits),
            in_flight: 0,
            is_dead: false,
            pause: ReplicaPause::default(),
        };
        Self {
            replicas: replicas.iter().map(state).collect(),
            next: 0,
        }
    }

    pub(crate) fn get_mut(&mut self, index: usize) -> &mut ReplicaState {
        &mut self.replicas[index]
    }

    /// The least loaded of the available replicas. `avoided` is skipped while another replica is usable, even if that
    /// one is busy: a replica that fails fast would otherwise get every retry.
    pub(crate) fn choose(&self, now: Instant, avoided: Option<usize>) -> ReplicaChoice {
        let count = self.replicas.len();
        let order = (0..count).map(|offset| (self.next + offset) % count);
        let skipped = avoided.filter(|&index| self.has_other(index, now));
        let free = order.filter_map(|index| {
            let limit = self.replicas[index].batch_limit(now).ok()?;
            let is_avoided = avoided == Some(index);
            let candidate = (is_avoided, self.replicas[index].in_flight, index, limit);
            (skipped != Some(index)).then_some(candidate)
        });
        // The first of equals, in round-robin order.
        match free.min_by_key(|&(is_avoided, in_flight, ..)| (is_avoided, in_flight)) {
            Some((_, _, index, limit)) => ReplicaChoice::Available { index, limit },
            None => {
                let until = |replica: &ReplicaState| replica.batch_limit(now).err().flatten();
                let until = self.replicas.iter().filter_map(until).min();
                ReplicaChoice::Unavailable { until }
            }
        }
    }

    /// Records that a batch was sent to replica `index`.
    pub(crate) fn batch_sent(&mut self, index: usize) {
        let replica = &mut self.replicas[index];
        replica.in_flight += 1;
        replica.circuit.request_sent();
        self.next = (index + 1) % self.replicas.len();
    }

    /// Whether a replica other than `index` is usable, if not at once.
    pub(crate) fn has_other(&self, index: usize, now: Instant) -> bool {
        let mut others = self
            .replicas
            .iter()
            .enumerate()
            .filter(|&(i, _)| i != index);
        others.any(|(_, replica)| replica.is_usable() && !replica.is_paused(now))
    }

    /// Whether every replica is dead or has an open circuit breaker.
    pub(crate) fn all_open(&self) -> bool {
        !self.replicas.iter().any(ReplicaState::is_usable)
    }

    /// Whether every replica that is usable has asked for a pause.
    pub(crate) fn all_paused(&self, now: Instant) -> bool {
        let mut usable = self.replicas.iter().filter(|replica| replica.is_usable());
        usable.all(|replica| replica.is_paused(now))
    }

    /// Whether every replica is dead.
    pub(crate) fn all_dead(&self) -> bool {
        self.replicas.iter().all(|replica| replica.is_dead)
    }

    /// First instant at which a pause ends or an open circuit breaker admits a probe; `now` when one is due or in
    /// flight.
    pub(crate) fn probe_at(&self, now: Instant) -> Instant {
        let alive = self.replicas.iter().filter(|replica| !replica.is_dead);
        let at = alive.map(|replica| {
            let admitted = match replica.circuit.admission(now) {
                Admission::RetryAt(until) => until,
                Admission::Allow | Admission::Probe | Admission::Wait => now,
            };
            replica.pause.until(now).unwrap_or(now).max(admitted)
        });
        at.min().unwrap_or(now)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::pool::fake::FakeReplica;

    const LIMITS: CircuitBreakerLimits = CircuitBreakerLimits {
        failures: 1,
        probe_after: Duration::from_secs(5),
    };

    /// `count` replicas with concurrency 2 and batches of at most 8.
    fn replicas(count: usize) -> ReplicaSet {
        let replica = || {
            let replica = FakeReplica::even().concurrency(2).max_batch(8);
            Arc::new(replica) as Arc<dyn Replica>
        };
        ReplicaSet::new(&(0..count).map(|_| replica()).collect::<Vec<_>>(), LIMITS)
    }

    fn send_batch(
        replicas: &mut ReplicaSet,
        now: Instant,
        avoided: Option<usize>,
    ) -> Option<usize> {
        match replicas.choose(now, avoided) {
            ReplicaChoice::Available { index, .. } => {
                replicas.batch_sent(index);
                Some(index)
            }
            ReplicaChoice::Unavailable { .. } => None,
        }
    }

    #[test]
    fn the_least_loaded_replica_is_chosen_and_equals_alternate() {
        let now = Instant::now();
        let mut replicas = replicas(3);
        let chosen: Vec<_> = (0..4)
            .map(|_| send_batch(&mut replicas, now, None))
            .collect();
        assert_eq!(chosen, [Some(0), Some(1), Some(2), Some(0)]);
        replicas.get_mut(2).in_flight = 0;
        let chosen: Vec<_> = (0..4)
            .map(|_| send_batch(&mut replicas, now, None))
            .collect();
        assert_eq!(
            chosen,
            [Some(2), Some(1), Some(2), None],
            "all have two batches"
        );
        assert_eq!(
            replicas.choose(now, None),
            ReplicaChoice::Unavailable { until: None }
        );
        let mut alternating = self::replicas(2);
        let turns: Vec<_> = (0..6)
            .map(|_| {
                let chosen = send_batch(&mut alternating, now, None);
                chosen.inspect(|&index| alternating.get_mut(index).in_flight -= 1)
            })
            .collect();
        assert_eq!(
            turns,
            [0, 1, 0, 1, 0, 1].map(Some),
            "idle replicas alternate"
        );
    }

    #[test]
    fn open_paused_and_dead_replicas_are_skipped_until_they_recover() {
        let now = Instant::now();
        let mut replicas = replicas(3);
        replicas.get_mut(0).circuit.failed(now);
        let pause = &mut replicas.get_mut(1).pause;
        pause.begin(now, Some(Duration::from_secs(2)));
        replicas.get_mut(2).is_dead = true;
        assert!(!replicas.all_open(), "the second is only paused");
        assert!(replicas.all_paused(now));
        assert_eq!(replicas.probe_at(now), now + Duration::from_secs(2));
        let soon = now + Duration::from_secs(2);
        assert_eq!(
            replicas.choose(now, None),
            ReplicaChoice::Unavailable { until: Some(soon) }
        );
        assert_eq!(
            replicas.choose(soon, None),
            ReplicaChoice::Available { index: 1, limit: 8 }
        );
        let later = now + Duration::from_secs(5);
        assert_eq!(
            replicas.choose(later, Some(1)),
            ReplicaChoice::Available { index: 0, limit: 1 },
            "a probe"
        );
        replicas.get_mut(1).circuit.failed(now);
        assert!(replicas.all_open() && !replicas.all_dead());
        assert_eq!(replicas.probe_at(now), later);
    }

    #[test]
    fn an_avoided_replica_is_chosen_only_when_no_other_is_usable() {
        let now = Instant::now();
        let mut replicas = replicas(2);
        assert_eq!(send_batch(&mut replicas, now, Some(0)), Some(1));
        assert_eq!(send_batch(&mut replicas, now, Some(0)), Some(1));
        assert_eq!(
            send_batch(&mut replicas, now, Some(0)),
            None,
            "the other is full"
        );
        assert_eq!(send_batch(&mut replicas, now, None), Some(0));
        let pause = &mut replicas.get_mut(1).pause;
        pause.begin(now, Some(Duration::from_secs(1)));
        assert!(!replicas.all_paused(now), "one of two");
        assert_eq!(
            send_batch(&mut replicas, now, Some(0)),
            Some(0),
            "the other is paused"
        );
        replicas.get_mut(0).in_flight = 0;
        let resumed = now + Duration::from_secs(1);
        assert!(replicas.has_other(0, resumed));
        replicas.get_mut(1).is_dead = true;
        assert!(!replicas.has_other(0, resumed));
        assert_eq!(send_batch(&mut replicas, resumed, Some(0)), Some(0));
    }
}
