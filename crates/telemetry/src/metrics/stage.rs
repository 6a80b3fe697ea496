//! Message counters of a pipeline stage: received, emitted, dropped, in flight.
//!
//! Every received message is emitted, dropped or in flight; a leak shows as a violation of this conservation. The
//! check is meaningful because `in_flight` is set by the owner from the length of its own container and is never
//! derived from the other three. This part does not know what the messages are.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use messages::{DropReason, Stage};
use serde::{Deserialize, Serialize};

use crate::metrics::declaration::ProcessMetric;

const RECEIVED: &str = "agon_stage_received_total";
const EMITTED: &str = "agon_stage_emitted_total";
const DROPPED: &str = "agon_stage_dropped_total";
const IN_FLIGHT: &str = "agon_stage_in_flight";

/// All reasons. Each has a series from the start, so that sums over reasons are never absent.
const REASONS: [DropReason; 8] = [
    DropReason::Identical,
    DropReason::Failed,
    DropReason::Abstained,
    DropReason::Stale,
    DropReason::Duplicate,
    DropReason::Invalid,
    DropReason::Superseded,
    DropReason::NoSignal,
];

/// Counters of one stage, published as metrics with the label `stage`. Clones share the counts; a process has one
/// set of counters per stage, shared among its threads.
#[derive(Debug, Clone)]
pub struct StageCounters {
    stage: Stage,
    counts: Arc<Mutex<StageSnapshot>>,
    /// Totals of the sessions that this process took part in before, which exported totals include.
    before: Arc<StageSnapshot>,
}

/// Consistent snapshot of a stage's counts, in messages since the run began.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageSnapshot {
    /// Messages received.
    pub received: u64,
    /// Messages emitted.
    pub emitted: u64,
    /// Messages dropped, by reason.
    pub dropped: BTreeMap<DropReason, u64>,
    /// Messages in flight, as last set by the owner.
    pub in_flight: u64,
}

/// A time series of a stage.
#[derive(Debug, Clone, Copy)]
enum Series {
    Received,
    Emitted,
    Dropped(DropReason),
    InFlight,
}

/// In-flight count of one of several owners of a stage.
#[derive(Debug)]
pub struct InFlightGauge {
    counters: StageCounters,
    in_flight: u64,
}

impl InFlightGauge {
    /// Sets the number of messages that this owner has in flight: the length of its own container.
    pub fn set(&mut self, messages: u64) {
        let before = std::mem::replace(&mut self.in_flight, messages);
        self.counters.change(Series::InFlight, |counts| {
            counts.in_flight = (counts.in_flight + messages).saturating_sub(before);
        });
    }
}

impl StageCounters {
    /// Counters at zero.
    #[must_use]
    pub fn new(stage: Stage) -> Self {
        Self::after(stage, StageSnapshot::default())
    }

    /// Counters at zero for another session of the same run in this process. Their snapshots are of that session alone;
    /// the exported totals continue, since a counter of Prometheus decreases only when its process is restarted.
    #[must_use]
    pub fn following(&self) -> Self {
        let (ended, mut before) = (self.snapshot(), (*self.before).clone());
        before.received += ended.received;
        before.emitted += ended.emitted;
        for (reason, messages) in ended.dropped {
            *before.dropped.entry(reason).or_default() += messages;
        }
        Self::after(self.stage, before)
    }

    fn after(stage: Stage, before: StageSnapshot) -> Self {
        let counters = Self {
            stage,
            counts: Arc::default(),
            before: Arc::new(before),
        };
        counters.publish_all(&counters.counts());
        counters
    }

    /// The stage of these counters.
    #[must_use]
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// Counts received messages.
    pub fn received(&self, messages: u64) {
        self.change(Series::Received, |counts| counts.received += messages);
    }

    /// Counts messages that were sent and acknowledged by the stream.
    pub fn emitted(&self, messages: u64) {
        self.change(Series::Emitted, |counts| counts.emitted += messages);
    }

    /// Counts dropped messages by reason.
    pub fn dropped(&self, reason: DropReason, messages: u64) {
        self.change(Series::Dropped(reason), |counts| {
            *counts.dropped.entry(reason).or_default() += messages;
        });
    }

    /// Subtracts received messages that were returned to the stream unprocessed, for another consumer.
    pub fn returned(&self, messages: u64) {
        self.change(Series::Received, |counts| {
            counts.received = counts.received.saturating_sub(messages);
        });
    }

    /// Sets the number of messages in flight: the length of the owner's own container, never a difference of the
    /// other counts.
    pub fn set_in_flight(&self, messages: u64) {
        self.change(Series::InFlight, |counts| counts.in_flight = messages);
    }

    /// An in-flight gauge for one of several owners of this stage; their values are added.
    #[must_use]
    pub fn in_flight_gauge(&self) -> InFlightGauge {
        InFlightGauge {
            counters: self.clone(),
            in_flight: 0,
        }
    }

    /// Consistent snapshot of all counts.
    #[must_use]
    pub fn snapshot(&self) -> StageSnapshot {
        self.counts().clone()
    }

    /// Restores the counts of a checkpoint; counting continues from them.
    pub fn restore(&self, snapshot: StageSnapshot) {
        let mut counts = self.counts();
        *counts = snapshot;
        self.publish_all(&counts);
    }

    fn change(&self, series: Series, change: impl FnOnce(&mut StageSnapshot)) {
        let mut counts = self.counts();
        change(&mut counts);
        self.publish(series, &counts);
    }

    fn counts(&self) -> MutexGuard<'_, StageSnapshot> {
        // Each change is one addition or one assignment: the counts are valid even after a panic.
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Publishes the total rather than an increment, which is correct even when the exporter started later or the
    /// counts were restored. Only the changed series is published: a metric look-up costs more than counting.
    fn publish(&self, series: Series, counts: &StageSnapshot) {
        let (stage, before) = (self.stage.name(), &self.before);
        match series {
            Series::Received => {
                metrics::counter!(RECEIVED, "stage" => stage)
                    .absolute(before.received + counts.received);
            }
            Series::Emitted => {
                metrics::counter!(EMITTED, "stage" => stage)
                    .absolute(before.emitted + counts.emitted);
            }
            Series::Dropped(reason) => {
                let of = |counts: &StageSnapshot| counts.dropped.get(&reason).copied();
                let dropped = of(before).unwrap_or_default() + of(counts).unwrap_or_default();
                metrics::counter!(DROPPED, "stage" => stage, "reason" => reason.name())
                    .absolute(dropped);
            }
            #[expect(
                clippy::cast_precision_loss,
                reason = "a stage has fewer than 2^53 messages in flight"
            )]
            Series::InFlight => {
                metrics::gauge!(IN_FLIGHT, "stage" => stage).set(counts.in_flight as f64);
            }
        }
    }

    fn publish_all(&self, counts: &StageSnapshot) {
        let dropped = REASONS.map(Series::Dropped);
        for series in [Series::Received, Series::Emitted, Series::InFlight]
            .into_iter()
            .chain(dropped)
        {
            self.publish(series, counts);
        }
    }
}

impl StageSnapshot {
    /// Messages dropped for any reason.
    #[must_use]
    pub fn total_dropped(&self) -> u64 {
        self.dropped.values().sum()
    }

    /// Whether received = emitted + dropped + in flight. It holds whenever the owner has set `in_flight` after its
    /// last change.
    #[must_use]
    pub fn is_conserved(&self) -> bool {
        self.received == self.emitted + self.total_dropped() + self.in_flight
    }
}

/// Metrics of stages.
pub(crate) const METRICS: &[ProcessMetric] = &[
    counter(
        RECEIVED,
        "stage",
        "messages that a stage received, since the run began",
    ),
    counter(
        EMITTED,
        "stage",
        "messages that a stage emitted, since the run began",
    ),
    counter(
        DROPPED,
        "stage, reason",
        "messages that a stage dropped, since the run began",
    ),
    ProcessMetric {
        name: IN_FLIGHT,
        kind: "gauge",
        labels: "stage",
        help: "messages that a stage has in flight",
    },
];

const fn counter(name: &'static str, labels: &'static str, help: &'static str) -> ProcessMetric {
    ProcessMetric {
        name,
        kind: "counter",
        labels,
        help,
    }
}

/// Registers the help texts with the current recorder.
pub(crate) fn describe() {
    for ProcessMetric {
        name, kind, help, ..
    } in METRICS
    {
        match *kind {
            "counter" => metrics::describe_counter!(*name, *help),
            _ => metrics::describe_gauge!(*name, *help),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::metrics::exporter::Exporter;

    #[test]
    fn conservation_holds_only_with_the_missing_messages_in_flight() {
        let counters = StageCounters::new(Stage::Learner);
        counters.received(10);
        counters.emitted(5);
        counters.dropped(DropReason::Stale, 2);
        counters.dropped(DropReason::Stale, 1);
        counters.dropped(DropReason::Duplicate, 1);
        for (in_flight, conserved) in [(0, false), (1, true), (2, false)] {
            counters.set_in_flight(in_flight);
            assert_eq!(
                counters.snapshot().is_conserved(),
                conserved,
                "{in_flight} in flight"
            );
        }
        assert_eq!(counters.snapshot().total_dropped(), 4);
    }

    #[test]
    fn counts_continue_from_a_checkpoint() {
        let counters = StageCounters::new(Stage::Actor);
        counters.received(3);
        counters.dropped(DropReason::Identical, 1);
        counters.set_in_flight(2);
        let saved = serde_json::to_string(&counters.snapshot()).unwrap();
        assert_eq!(
            saved,
            r#"{"received":3,"emitted":0,"dropped":{"identical":1},"in_flight":2}"#
        );

        let resumed = StageCounters::new(Stage::Actor);
        resumed.restore(serde_json::from_str(&saved).unwrap());
        resumed.emitted(1);
        resumed.set_in_flight(1);
        let expected = StageSnapshot {
            received: 3,
            emitted: 1,
            dropped: BTreeMap::from([(DropReason::Identical, 1)]),
            in_flight: 1,
        };
        assert_eq!(resumed.snapshot(), expected);
        assert!(resumed.snapshot().is_conserved());
    }

    #[test]
    fn counts_from_several_threads_are_complete() {
        let counters = StageCounters::new(Stage::Preference);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..250 {
                        counters.received(1);
                        counters.clone().emitted(1);
                    }
                });
            }
        });
        let counts = counters.snapshot();
        assert_eq!((counts.received, counts.emitted), (1000, 1000));
    }

    #[test]
    fn totals_are_published_to_an_exporter_that_starts_late() {
        let counters = StageCounters::new(Stage::Learner);
        counters.received(7);
        counters.dropped(DropReason::Invalid, 1);
        let recording = Exporter::recorder_only();
        recording.during(|| counters.restore(counters.snapshot()));
        recording.during(|| counters.set_in_flight(6));
        let page = recording.render();
        for line in [
            "# TYPE agon_stage_received_total counter",
            "agon_stage_received_total{stage=\"learner\"} 7",
            "agon_stage_emitted_total{stage=\"learner\"} 0",
            "agon_stage_dropped_total{stage=\"learner\",reason=\"invalid\"} 1",
            "agon_stage_dropped_total{stage=\"learner\",reason=\"stale\"} 0",
            "agon_stage_in_flight{stage=\"learner\"} 6",
        ] {
            assert!(
                page.lines().any(|l| l == line),
                "no line {line:?} in\n{page}"
            );
        }
    }

    #[test]
    fn exported_totals_continue_in_another_session_and_snapshots_begin_again() {
        let recording = Exporter::recorder_only();
        let next = recording.during(|| {
            let counters = StageCounters::new(Stage::Preference);
            counters.received(7);
            counters.emitted(4);
            counters.dropped(DropReason::Failed, 1);
            counters.set_in_flight(2);
            let next = counters.following();
            assert_eq!(next.snapshot(), StageSnapshot::default());
            next.received(2);
            next.emitted(1);
            let last = next.following();
            last.emitted(1);
            last.dropped(DropReason::Failed, 1);
            next
        });
        assert_eq!((next.snapshot().received, next.snapshot().emitted), (2, 1));
        let page = recording.render();
        for line in [
            "agon_stage_received_total{stage=\"preference\"} 9",
            "agon_stage_emitted_total{stage=\"preference\"} 6",
            "agon_stage_dropped_total{stage=\"preference\",reason=\"failed\"} 2",
            "agon_stage_in_flight{stage=\"preference\"} 0",
        ] {
            assert!(page.lines().any(|l| l == line), "no {line:?} in\n{page}");
        }
    }

    #[test]
    fn in_flight_gauges_of_several_owners_are_added() {
        let counters = StageCounters::new(Stage::Actor);
        let (mut first, mut second) = (counters.in_flight_gauge(), counters.in_flight_gauge());
        for (one, two, sum) in [(3, 0, 3), (3, 4, 7), (1, 4, 5), (0, 0, 0)] {
            first.set(one);
            second.set(two);
            assert_eq!(counters.snapshot().in_flight, sum);
        }
    }
}
