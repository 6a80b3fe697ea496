//! The queue against a twin that keeps its books with sets, over random interleavings.

use std::collections::BTreeSet;
use std::num::{NonZeroU32, NonZeroUsize};

use proptest::prelude::*;

use super::*;

const CAPACITY: usize = 4;
const MAX_DELIVERIES: u32 = 3;

#[derive(Debug, Clone, Copy)]
enum Step {
    Send,
    Receive,
    Acknowledge(usize),
    Return(usize),
    Close,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => Just(Step::Send),
        8 => Just(Step::Receive),
        4 => any::<usize>().prop_map(Step::Acknowledge),
        6 => any::<usize>().prop_map(Step::Return),
        1 => Just(Step::Close),
    ]
}

/// What the queue should hold, kept by other means: sets of message numbers.
struct Twin {
    queue: Arc<Queue<u64>>,
    held: Vec<Held<u64>>,
    sent: u64,
    queued: BTreeSet<u64>,
    acknowledged: BTreeSet<u64>,
    dead: BTreeSet<u64>,
    closed: bool,
}

impl Twin {
    fn new() -> Self {
        let limits = Limits {
            capacity: NonZeroUsize::new(CAPACITY).expect("not zero"),
            max_deliveries: NonZeroU32::new(MAX_DELIVERIES).expect("not zero"),
        };
        Self {
            queue: Queue::new("twin", limits),
            held: Vec::new(),
            sent: 0,
            queued: BTreeSet::new(),
            acknowledged: BTreeSet::new(),
            dead: BTreeSet::new(),
            closed: false,
        }
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Send => self.send(),
            Step::Receive => self.receive(),
            Step::Acknowledge(at) if !self.held.is_empty() => {
                let held = self.held.swap_remove(at % self.held.len());
                assert!(self.acknowledged.insert(*held.message()));
                held.acknowledge();
            }
            Step::Return(at) if !self.held.is_empty() => {
                let held = self.held.swap_remove(at % self.held.len());
                let last = held.deliveries() == MAX_DELIVERIES;
                let to = if last {
                    &mut self.dead
                } else {
                    &mut self.queued
                };
                assert!(to.insert(*held.message()));
            }
            Step::Acknowledge(_) | Step::Return(_) => {}
            Step::Close => {
                self.queue.close(ClosedBy::Senders);
                self.closed = true;
            }
        }
    }

    fn send(&mut self) {
        let full = self.held.len() + self.queued.len() == CAPACITY;
        match self.queue.try_send(self.sent) {
            Ok(()) => {
                assert!(!full && !self.closed);
                self.queued.insert(self.sent);
                self.sent += 1;
            }
            Err(Unsent::Full(message)) => {
                assert!(full && !self.closed);
                assert_eq!(message, self.sent);
            }
            Err(Unsent::Closed(message, _)) => {
                assert!(self.closed);
                assert_eq!(message, self.sent);
            }
        }
    }

    fn receive(&mut self) {
        let held = self.queue.try_receive();
        assert_eq!(
            held.as_ref().map(|held| *held.message()),
            self.queued.pop_first()
        );
        self.held.extend(held);
    }

    fn agree(&self) {
        let counts = self.queue.counts();
        assert_eq!(counts.sent, self.sent);
        assert_eq!(counts.queued, self.queued.len() as u64);
        assert_eq!(counts.in_hand, self.held.len() as u64);
        assert_eq!(counts.acknowledged, self.acknowledged.len() as u64);
        assert_eq!(counts.dead, self.dead.len() as u64);
        let settled = counts.acknowledged + counts.dead;
        assert_eq!(counts.sent, settled + counts.queued + counts.in_hand);
        assert!(counts.queued + counts.in_hand <= CAPACITY as u64);
        assert_eq!(self.queue.tickets.len() as u64, counts.queued);
        let taken = self.held.len() + self.queued.len();
        assert!(self.closed || self.queue.places.len() == CAPACITY - taken);
    }

    fn drain(&mut self) {
        self.take(Step::Close);
        while !(self.held.is_empty() && self.queued.is_empty()) {
            self.take(Step::Receive);
            self.take(Step::Acknowledge(0));
            self.agree();
        }
    }
}

proptest! {
    #[test]
    fn every_message_is_accounted_for_whatever_happens(
        steps in prop::collection::vec(step(), 0..200),
    ) {
        let mut twin = Twin::new();
        for step in steps {
            twin.take(step);
            twin.agree();
        }
        twin.drain();
        let ended = Closed { stream: "twin", cause: ClosedBy::Senders };
        prop_assert_eq!(twin.queue.receive_blocking().err(), Some(ended));
        prop_assert!(twin.acknowledged.is_disjoint(&twin.dead));
        let settled: Vec<u64> = twin.acknowledged.union(&twin.dead).copied().collect();
        prop_assert_eq!(settled, (0..twin.sent).collect::<Vec<_>>());
    }
}
