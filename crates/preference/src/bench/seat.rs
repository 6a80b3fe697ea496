//! A replica at the bench: its circuit, what it has in hand, and when it may be asked; and the choice
//! of one among several.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::Replica;
use super::circuit::{Circuit, CircuitLimits, Leave};

/// The longest that a replica is left alone because it asked for it.
const LONGEST_REST: Duration = Duration::from_secs(600);

pub(super) struct Seat {
    pub(super) replica: Arc<dyn Replica>,
    pub(super) circuit: Circuit,
    /// Batches that it is at.
    pub(super) in_hand: usize,
    /// Gone for good.
    pub(super) is_dead: bool,
    rests_until: Option<Instant>,
}

/// All replicas of a judge.
pub(super) struct Seats {
    seats: Vec<Seat>,
    /// Where the search for the next begins, so that equals take turns.
    next: usize,
}

/// Who is asked next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// This seat, and how many questions at most.
    Seat(usize, usize),
    /// Nobody; where known, the first moment at which that may change by itself.
    NobodyBefore(Option<Instant>),
}

impl Seat {
    /// How many questions may be asked now; else, where known, when that may change.
    fn room(&self, now: Instant) -> Result<usize, Option<Instant>> {
        if self.is_dead || self.in_hand >= self.replica.concurrency().max(1) {
            return Err(None);
        }
        if let Some(until) = self.rests_until.filter(|&until| until > now) {
            return Err(Some(until));
        }
        match self.circuit.leave(now) {
            Leave::Freely => Ok(self.replica.max_batch().max(1)),
            Leave::Probe => Ok(1),
            Leave::NotBefore(until) => Err(Some(until)),
            Leave::NotYet => Err(None),
        }
    }

    /// Leaves it alone for as long as it wishes.
    pub(super) fn rest(&mut self, now: Instant, rest: Duration) {
        self.rests_until = Some(now + rest.min(LONGEST_REST));
    }

    fn is_usable(&self) -> bool {
        !self.is_dead && !self.circuit.is_open()
    }

    fn rests(&self, now: Instant) -> bool {
        self.rests_until.is_some_and(|until| until > now)
    }
}

impl Seats {
    pub(super) fn new(replicas: &[Arc<dyn Replica>], limits: CircuitLimits) -> Self {
        let seat = |replica: &Arc<dyn Replica>| Seat {
            replica: Arc::clone(replica),
            circuit: Circuit::new(limits),
            in_hand: 0,
            is_dead: false,
            rests_until: None,
        };
        Self {
            seats: replicas.iter().map(seat).collect(),
            next: 0,
        }
    }

    pub(super) fn get_mut(&mut self, index: usize) -> &mut Seat {
        &mut self.seats[index]
    }

    /// The seat with the least in hand among those that may be asked. While another can answer,
    /// `avoided` is not asked, even if the other has no time now: who has just failed fails fastest, and
    /// would get every attempt.
    pub(super) fn choose(&self, now: Instant, avoided: Option<usize>) -> Choice {
        let count = self.seats.len();
        let order = (0..count).map(|place| (self.next + place) % count);
        let passed_over = avoided.filter(|&index| self.has_other(index, now));
        let free = order.filter_map(|index| {
            let room = self.seats[index].room(now).ok()?;
            let is_avoided = avoided == Some(index);
            let seat = (is_avoided, self.seats[index].in_hand, index, room);
            (passed_over != Some(index)).then_some(seat)
        });
        // Of equals the first in turn.
        match free.min_by_key(|&(is_avoided, in_hand, ..)| (is_avoided, in_hand)) {
            Some((_, _, index, room)) => Choice::Seat(index, room),
            None => {
                let known = |seat: &Seat| seat.room(now).err().flatten();
                Choice::NobodyBefore(self.seats.iter().filter_map(known).min())
            }
        }
    }

    /// Seat `index` has been asked.
    pub(super) fn asked(&mut self, index: usize) {
        let seat = &mut self.seats[index];
        seat.in_hand += 1;
        seat.circuit.asked();
        self.next = (index + 1) % self.seats.len();
    }

    /// Whether another seat than `index` can answer, if not at once.
    pub(super) fn has_other(&self, index: usize, now: Instant) -> bool {
        let mut others = self.seats.iter().enumerate().filter(|&(i, _)| i != index);
        others.any(|(_, seat)| seat.is_usable() && !seat.rests(now))
    }

    /// Whether none can answer now.
    pub(super) fn all_open(&self) -> bool {
        !self.seats.iter().any(Seat::is_usable)
    }

    /// Whether none will ever answer.
    pub(super) fn all_dead(&self) -> bool {
        self.seats.iter().all(|seat| seat.is_dead)
    }

    /// The first moment at which an open circuit lets a probe through; `now` when one does already or
    /// is at it.
    pub(super) fn probe_at(&self, now: Instant) -> Instant {
        let alive = self.seats.iter().filter(|seat| !seat.is_dead);
        let at = alive.map(|seat| match seat.circuit.leave(now) {
            Leave::NotBefore(until) => until,
            Leave::Freely | Leave::Probe | Leave::NotYet => now,
        });
        at.min().unwrap_or(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::fake::FakeReplica;

    const LIMITS: CircuitLimits = CircuitLimits {
        failures: 1,
        probe_after: Duration::from_secs(5),
    };

    /// `count` replicas that take two batches of at most eight questions each.
    fn seats(count: usize) -> Seats {
        let replica = || {
            let replica = FakeReplica::even().concurrency(2).max_batch(8);
            Arc::new(replica) as Arc<dyn Replica>
        };
        Seats::new(&(0..count).map(|_| replica()).collect::<Vec<_>>(), LIMITS)
    }

    fn ask(seats: &mut Seats, now: Instant, avoided: Option<usize>) -> Option<usize> {
        match seats.choose(now, avoided) {
            Choice::Seat(index, _) => {
                seats.asked(index);
                Some(index)
            }
            Choice::NobodyBefore(_) => None,
        }
    }

    #[test]
    fn equals_take_turns_and_the_least_loaded_goes_first() {
        let now = Instant::now();
        let mut seats = seats(3);
        let asked: Vec<_> = (0..4).map(|_| ask(&mut seats, now, None)).collect();
        assert_eq!(asked, [Some(0), Some(1), Some(2), Some(0)]);
        seats.get_mut(2).in_hand = 0;
        let asked: Vec<_> = (0..4).map(|_| ask(&mut seats, now, None)).collect();
        assert_eq!(asked, [Some(2), Some(1), Some(2), None], "all are at two");
        assert_eq!(seats.choose(now, None), Choice::NobodyBefore(None));
        let mut alternating = self::seats(2);
        let turns: Vec<_> = (0..6)
            .map(|_| {
                let asked = ask(&mut alternating, now, None);
                asked.inspect(|&index| alternating.get_mut(index).in_hand -= 1)
            })
            .collect();
        assert_eq!(turns, [0, 1, 0, 1, 0, 1].map(Some), "idle ones take turns");
    }

    #[test]
    fn open_resting_and_dead_seats_are_passed_over_until_their_time() {
        let now = Instant::now();
        let mut seats = seats(3);
        seats.get_mut(0).circuit.failed(now);
        seats.get_mut(1).rest(now, Duration::from_secs(2));
        seats.get_mut(2).is_dead = true;
        assert!(!seats.all_open(), "the second only rests");
        let soon = now + Duration::from_secs(2);
        assert_eq!(seats.choose(now, None), Choice::NobodyBefore(Some(soon)));
        assert_eq!(seats.choose(soon, None), Choice::Seat(1, 8));
        let later = now + Duration::from_secs(5);
        assert_eq!(seats.choose(later, Some(1)), Choice::Seat(0, 1), "a probe");
        seats.get_mut(1).circuit.failed(now);
        assert!(seats.all_open() && !seats.all_dead());
        assert_eq!(seats.probe_at(now), later);
    }

    #[test]
    fn an_avoided_seat_is_asked_only_when_no_other_can_answer() {
        let now = Instant::now();
        let mut seats = seats(2);
        assert_eq!(ask(&mut seats, now, Some(0)), Some(1));
        assert_eq!(ask(&mut seats, now, Some(0)), Some(1));
        assert_eq!(ask(&mut seats, now, Some(0)), None, "the other is full");
        assert_eq!(ask(&mut seats, now, None), Some(0));
        seats.get_mut(1).rest(now, Duration::from_secs(1));
        assert_eq!(ask(&mut seats, now, Some(0)), Some(0), "the other rests");
        seats.get_mut(0).in_hand = 0;
        let rested = now + Duration::from_secs(1);
        assert!(seats.has_other(0, rested));
        seats.get_mut(1).is_dead = true;
        assert!(!seats.has_other(0, rested));
        assert_eq!(ask(&mut seats, rested, Some(0)), Some(0));
    }

    #[test]
    fn no_rest_is_endless() {
        let now = Instant::now();
        let mut seats = seats(1);
        seats.get_mut(0).rest(now, Duration::MAX);
        let until = now + LONGEST_REST;
        assert_eq!(seats.choose(now, None), Choice::NobodyBefore(Some(until)));
    }
}
