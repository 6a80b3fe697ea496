//! The queue against a reference model that uses sets, over random interleavings.

use std::collections::{BTreeMap, BTreeSet};
use std::num::{NonZeroU32, NonZeroUsize};

use futures_util::FutureExt;
use proptest::prelude::*;

use super::*;

const CAPACITY: usize = 4;
const MAX_DELIVERIES: u32 = 3;

#[derive(Debug, Clone, Copy)]
enum QueueOp {
    Send,
    Receive,
    Acknowledge(usize),
    Return(usize),
    Close,
}

fn operation() -> impl Strategy<Value = QueueOp> {
    prop_oneof![
        8 => Just(QueueOp::Send),
        8 => Just(QueueOp::Receive),
        4 => any::<usize>().prop_map(QueueOp::Acknowledge),
        6 => any::<usize>().prop_map(QueueOp::Return),
        1 => Just(QueueOp::Close),
    ]
}

/// The expected contents of the queue, as sets of message indices.
struct ReferenceModel {
    queue: Arc<Queue<u64>>,
    in_flight: Vec<InFlightMessage<u64>>,
    sent: u64,
    queued: BTreeSet<u64>,
    acknowledged: BTreeSet<u64>,
    deliveries: BTreeMap<u64, u32>,
    closed: bool,
}

impl ReferenceModel {
    fn new() -> Self {
        let limits = StreamLimits {
            capacity: NonZeroUsize::new(CAPACITY).expect("not zero"),
            max_deliveries: NonZeroU32::new(MAX_DELIVERIES).expect("not zero"),
        };
        Self {
            queue: Queue::new("model", limits),
            in_flight: Vec::new(),
            sent: 0,
            queued: BTreeSet::new(),
            acknowledged: BTreeSet::new(),
            deliveries: BTreeMap::new(),
            closed: false,
        }
    }

    fn apply(&mut self, operation: QueueOp) {
        match operation {
            QueueOp::Send => self.send(),
            QueueOp::Receive => self.receive(),
            QueueOp::Acknowledge(at) if !self.in_flight.is_empty() => {
                let message = self.in_flight.swap_remove(at % self.in_flight.len());
                assert!(self.acknowledged.insert(*message.message()));
                message.acknowledge();
            }
            QueueOp::Return(at) if !self.in_flight.is_empty() => {
                let message = self.in_flight.swap_remove(at % self.in_flight.len());
                assert!(self.queued.insert(*message.message()));
            }
            QueueOp::Acknowledge(_) | QueueOp::Return(_) => {}
            QueueOp::Close => {
                self.queue.close(ClosedBy::Senders);
                self.closed = true;
            }
        }
    }

    fn send(&mut self) {
        let full = self.in_flight.len() + self.queued.len() == CAPACITY;
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
        let message = self.queue.try_receive();
        assert_eq!(
            message.as_ref().map(|message| *message.message()),
            self.queued.pop_first()
        );
        if let Some(message) = message {
            let deliveries = self.deliveries.entry(*message.message()).or_default();
            *deliveries += 1;
            assert_eq!(message.deliveries(), *deliveries);
            assert_eq!(
                message.exceeds_delivery_limit(),
                *deliveries > MAX_DELIVERIES
            );
            self.in_flight.push(message);
        }
    }

    fn assert_agrees(&self) {
        let counts = self.queue.counts();
        assert_eq!(counts.sent, self.sent);
        assert_eq!(counts.queued, self.queued.len() as u64);
        assert_eq!(counts.in_flight, self.in_flight.len() as u64);
        assert_eq!(counts.acknowledged, self.acknowledged.len() as u64);
        let dead_lettered = self.deliveries.values().filter(|&&d| d > MAX_DELIVERIES);
        assert_eq!(counts.dead_lettered, dead_lettered.count() as u64);
        let acknowledged = counts.acknowledged;
        assert_eq!(counts.sent, acknowledged + counts.queued + counts.in_flight);
        assert!(counts.queued + counts.in_flight <= CAPACITY as u64);
        assert_eq!(self.queue.ready.len() as u64, counts.queued);
        let occupied = self.in_flight.len() + self.queued.len();
        assert!(self.closed || self.queue.free_slots.len() == CAPACITY - occupied);
    }

    fn drain(&mut self) {
        self.apply(QueueOp::Close);
        while !(self.in_flight.is_empty() && self.queued.is_empty()) {
            self.apply(QueueOp::Receive);
            self.apply(QueueOp::Acknowledge(0));
            self.assert_agrees();
        }
    }
}

proptest! {
    #[test]
    fn every_message_is_accounted_for(
        operations in prop::collection::vec(operation(), 0..200),
    ) {
        let mut model = ReferenceModel::new();
        for operation in operations {
            model.apply(operation);
            model.assert_agrees();
        }
        model.drain();
        let closed = Closed { stream: "model", cause: ClosedBy::Senders };
        let received = model.queue.receive().now_or_never().expect("at once");
        prop_assert_eq!(received.err(), Some(closed));
        let acknowledged: Vec<u64> = model.acknowledged.iter().copied().collect();
        prop_assert_eq!(acknowledged, (0..model.sent).collect::<Vec<_>>());
    }
}
