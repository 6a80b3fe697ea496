//! The books of a station: what it took, gave, dropped and holds.
//!
//! What is taken is given, dropped or in hand; a leak shows as a station that is not conserved. That
//! can be seen only because `in_hand` is told by the owner from its own container and is never worked
//! out from the other three. This part does not know what the messages are.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use messages::{DropReason, Station};
use serde::{Deserialize, Serialize};

use crate::metrics_page::ProcessMetric;

const TAKEN: &str = "agon_station_taken_total";
const GIVEN: &str = "agon_station_given_total";
const DROPPED: &str = "agon_station_dropped_total";
const IN_HAND: &str = "agon_station_in_hand";

/// Every reason has its series from the start, so that sums over reasons are never absent.
const REASONS: [DropReason; 7] = [
    DropReason::Identical,
    DropReason::Failed,
    DropReason::Abstained,
    DropReason::Stale,
    DropReason::Duplicate,
    DropReason::Poisoned,
    DropReason::Superseded,
];

/// The counters of one station, also as metrics with the label `station`. Clones count together; a
/// process has one set of counters a station and shares it among its threads.
#[derive(Debug, Clone)]
pub struct StationCounters {
    station: Station,
    counts: Arc<Mutex<StationSnapshot>>,
}

/// A station's counts at one moment, counted in messages since the run began.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StationSnapshot {
    /// Messages taken.
    pub taken: u64,
    /// Messages given.
    pub given: u64,
    /// Messages dropped, by reason.
    pub dropped: BTreeMap<DropReason, u64>,
    /// Messages held, as the owner last counted them.
    pub in_hand: u64,
}

/// A metric of a station.
#[derive(Debug, Clone, Copy)]
enum Series {
    Taken,
    Given,
    Dropped(DropReason),
    InHand,
}

/// What one of several owners of a station holds.
#[derive(Debug)]
pub struct Holder {
    counters: StationCounters,
    held: u64,
}

impl Holder {
    /// Sets how many messages this owner holds: the length of its own container.
    pub fn set(&mut self, messages: u64) {
        let before = std::mem::replace(&mut self.held, messages);
        self.counters.change(Series::InHand, |counts| {
            counts.in_hand = (counts.in_hand + messages).saturating_sub(before);
        });
    }
}

impl StationCounters {
    /// Counters at zero.
    #[must_use]
    pub fn new(station: Station) -> Self {
        let counters = Self {
            station,
            counts: Arc::default(),
        };
        counters.publish_all(&counters.counts());
        counters
    }

    /// The station that is counted.
    #[must_use]
    pub fn station(&self) -> Station {
        self.station
    }

    /// Counts `messages` that came in.
    pub fn taken(&self, messages: u64) {
        self.change(Series::Taken, |counts| counts.taken += messages);
    }

    /// Counts `messages` that went out and are stored.
    pub fn given(&self, messages: u64) {
        self.change(Series::Given, |counts| counts.given += messages);
    }

    /// Counts `messages` that will go no further, because of `reason`.
    pub fn dropped(&self, reason: DropReason, messages: u64) {
        self.change(Series::Dropped(reason), |counts| {
            *counts.dropped.entry(reason).or_default() += messages;
        });
    }

    /// Counts out `messages` that were taken and are given back as they were: somebody else takes them.
    pub fn returned(&self, messages: u64) {
        self.change(Series::Taken, |counts| {
            counts.taken = counts.taken.saturating_sub(messages);
        });
    }

    /// Sets how many messages the station holds: the length of the owner's own container, never a
    /// difference of the other counts.
    pub fn set_in_hand(&self, messages: u64) {
        self.change(Series::InHand, |counts| counts.in_hand = messages);
    }

    /// One owner among several of the same station: what each holds is added up.
    #[must_use]
    pub fn holder(&self) -> Holder {
        Holder {
            counters: self.clone(),
            held: 0,
        }
    }

    /// The counts now, all of one moment.
    #[must_use]
    pub fn snapshot(&self) -> StationSnapshot {
        self.counts().clone()
    }

    /// Takes the counts of a checkpoint, from which counting goes on.
    pub fn restore(&self, snapshot: StationSnapshot) {
        let mut counts = self.counts();
        *counts = snapshot;
        self.publish_all(&counts);
    }

    fn change(&self, series: Series, change: impl FnOnce(&mut StationSnapshot)) {
        let mut counts = self.counts();
        change(&mut counts);
        self.publish(series, &counts);
    }

    fn counts(&self) -> MutexGuard<'_, StationSnapshot> {
        // Each change is one addition or one assignment: counts are sound even after a panic.
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Publishes a total, not an increment: right even when the exporter started after the counting, or
    /// the counts were restored. One series a change: a look-up of a metric costs more than counting.
    fn publish(&self, series: Series, counts: &StationSnapshot) {
        let station = self.station.name();
        match series {
            Series::Taken => metrics::counter!(TAKEN, "station" => station).absolute(counts.taken),
            Series::Given => metrics::counter!(GIVEN, "station" => station).absolute(counts.given),
            Series::Dropped(reason) => {
                let dropped = counts.dropped.get(&reason).copied().unwrap_or_default();
                metrics::counter!(DROPPED, "station" => station, "reason" => reason.name())
                    .absolute(dropped);
            }
            #[expect(clippy::cast_precision_loss, reason = "no station holds 2^53 messages")]
            Series::InHand => {
                metrics::gauge!(IN_HAND, "station" => station).set(counts.in_hand as f64);
            }
        }
    }

    fn publish_all(&self, counts: &StationSnapshot) {
        let dropped = REASONS.map(Series::Dropped);
        for series in [Series::Taken, Series::Given, Series::InHand]
            .into_iter()
            .chain(dropped)
        {
            self.publish(series, counts);
        }
    }
}

impl StationSnapshot {
    /// Messages dropped for whatever reason.
    #[must_use]
    pub fn total_dropped(&self) -> u64 {
        self.dropped.values().sum()
    }

    /// Whether taken = given + dropped + in hand. It holds whenever the owner has counted what it
    /// holds after its last message moved.
    #[must_use]
    pub fn is_conserved(&self) -> bool {
        self.taken == self.given + self.total_dropped() + self.in_hand
    }
}

/// What stations publish.
pub(crate) const METRICS: &[ProcessMetric] = &[
    counter(
        TAKEN,
        "station",
        "messages a station took, since the run began",
    ),
    counter(
        GIVEN,
        "station",
        "messages a station gave, since the run began",
    ),
    counter(
        DROPPED,
        "station, reason",
        "messages a station dropped, since the run began",
    ),
    ProcessMetric {
        name: IN_HAND,
        kind: "gauge",
        labels: "station",
        help: "messages a station holds",
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

/// Tells the current recorder what the stations' metrics are.
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
    use crate::Exporter;

    #[test]
    fn a_station_is_conserved_only_when_its_owner_holds_what_is_missing() {
        let counters = StationCounters::new(Station::Learner);
        counters.taken(10);
        counters.given(5);
        counters.dropped(DropReason::Stale, 2);
        counters.dropped(DropReason::Stale, 1);
        counters.dropped(DropReason::Duplicate, 1);
        for (in_hand, conserved) in [(0, false), (1, true), (2, false)] {
            counters.set_in_hand(in_hand);
            assert_eq!(
                counters.snapshot().is_conserved(),
                conserved,
                "{in_hand} in hand"
            );
        }
        assert_eq!(counters.snapshot().total_dropped(), 4);
    }

    #[test]
    fn counts_go_on_where_a_checkpoint_left_them() {
        let counters = StationCounters::new(Station::Actor);
        counters.taken(3);
        counters.dropped(DropReason::Identical, 1);
        counters.set_in_hand(2);
        let saved = serde_json::to_string(&counters.snapshot()).unwrap();
        assert_eq!(
            saved,
            r#"{"taken":3,"given":0,"dropped":{"identical":1},"in_hand":2}"#
        );

        let resumed = StationCounters::new(Station::Actor);
        resumed.restore(serde_json::from_str(&saved).unwrap());
        resumed.given(1);
        resumed.set_in_hand(1);
        let expected = StationSnapshot {
            taken: 3,
            given: 1,
            dropped: BTreeMap::from([(DropReason::Identical, 1)]),
            in_hand: 1,
        };
        assert_eq!(resumed.snapshot(), expected);
        assert!(resumed.snapshot().is_conserved());
    }

    #[test]
    fn threads_that_share_the_counters_lose_nothing() {
        let counters = StationCounters::new(Station::Preference);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..250 {
                        counters.taken(1);
                        counters.clone().given(1);
                    }
                });
            }
        });
        let counts = counters.snapshot();
        assert_eq!((counts.taken, counts.given), (1000, 1000));
    }

    #[test]
    fn metrics_show_the_totals_even_when_the_exporter_came_late() {
        let counters = StationCounters::new(Station::Learner);
        counters.taken(7);
        counters.dropped(DropReason::Poisoned, 1);
        let recording = Exporter::recorder_only();
        recording.during(|| counters.restore(counters.snapshot()));
        recording.during(|| counters.set_in_hand(6));
        let page = recording.render();
        for line in [
            "# TYPE agon_station_taken_total counter",
            "agon_station_taken_total{station=\"learner\"} 7",
            "agon_station_given_total{station=\"learner\"} 0",
            "agon_station_dropped_total{station=\"learner\",reason=\"poisoned\"} 1",
            "agon_station_dropped_total{station=\"learner\",reason=\"stale\"} 0",
            "agon_station_in_hand{station=\"learner\"} 6",
        ] {
            assert!(
                page.lines().any(|l| l == line),
                "no line {line:?} in\n{page}"
            );
        }
    }

    #[test]
    fn what_several_owners_hold_is_added_up() {
        let counters = StationCounters::new(Station::Actor);
        let (mut first, mut second) = (counters.holder(), counters.holder());
        for (one, two, sum) in [(3, 0, 3), (3, 4, 7), (1, 4, 5), (0, 0, 0)] {
            first.set(one);
            second.set(two);
            assert_eq!(counters.snapshot().in_hand, sum);
        }
    }
}
