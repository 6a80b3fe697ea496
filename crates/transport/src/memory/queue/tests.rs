//! The queue against a twin that keeps its books with sets, over random interleavings.

use std::collections::{BTreeMap, BTreeSet};
use std::num::{NonZeroU32, NonZeroUsize};

use futures_util::FutureExt;
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
    deliveries: BTreeMap<u64, u32>,
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
            deliveries: BTreeMap::new(),
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
                assert!(self.queued.insert(*held.message()));
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
        match self.queue.send(self.sent).now_or_never() {
            Some(Ok(())) => {
                assert!(!full && !self.closed);
                self.queued.insert(self.sent);
                self.sent += 1;
            }
            None => assert!(full && !self.closed),
            Some(Err(_)) => assert!(self.closed),
        }
    }

    fn receive(&mut self) {
        let held = self.queue.try_receive();
        assert_eq!(
            held.as_ref().map(|held| *held.message()),
            self.queued.pop_first()
        );
        if let Some(held) = held {
            let deliveries = self.deliveries.entry(*held.message()).or_default();
            *deliveries += 1;
            assert_eq!(held.deliveries(), *deliveries);
            assert_eq!(held.is_given_up(), *deliveries > MAX_DELIVERIES);
            self.held.push(held);
        }
    }

    fn agree(&self) {
        let counts = self.queue.counts();
        assert_eq!(counts.sent, self.sent);
        assert_eq!(counts.queued, self.queued.len() as u64);
        assert_eq!(counts.in_hand, self.held.len() as u64);
        assert_eq!(counts.acknowledged, self.acknowledged.len() as u64);
        let given_up = self.deliveries.values().filter(|&&d| d > MAX_DELIVERIES);
        assert_eq!(counts.given_up, given_up.count() as u64);
        let settled = counts.acknowledged;
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
        let received = twin.queue.receive().now_or_never().expect("at once");
        prop_assert_eq!(received.err(), Some(ended));
        let settled: Vec<u64> = twin.acknowledged.iter().copied().collect();
        prop_assert_eq!(settled, (0..twin.sent).collect::<Vec<_>>());
    }
}
