//! Tests of streams in memory through their sender and receiver.

use std::collections::BTreeSet;
use std::pin::pin;

use futures_util::FutureExt;
use messages::{DropReason, Dropped, PromptId, Stage};

use super::*;
use crate::error::Closed;

/// A small message with this prompt id.
fn note(number: u64) -> Dropped {
    Dropped {
        prompt: PromptId(number),
        session: 0,
        stage: Stage::Actor,
        reason: DropReason::Failed,
        log_ratio: None,
        detail: String::new(),
    }
}

fn number(delivery: &Delivery<Dropped>) -> u64 {
    delivery.message().prompt.0
}

fn open(capacity: usize) -> (Sender<Dropped>, Receiver<Dropped>) {
    stream("notes", capacity)
}

fn closed(cause: ClosedBy) -> TransportError {
    TransportError::Closed(Closed {
        stream: "notes",
        cause,
    })
}

async fn counts(receiver: &Receiver<Dropped>) -> StreamCounts {
    receiver.counts().await.expect("it is in memory")
}

/// Sends these without waiting; the stream must have room.
async fn send(sender: &Sender<Dropped>, numbers: std::ops::Range<u64>) {
    for number in numbers {
        let sent = sender.send(note(number)).now_or_never();
        sent.expect("a slot is free").expect("it is open");
    }
}

/// Whether `future` is pending after one poll.
async fn waits<F: Future>(future: std::pin::Pin<&mut F>) -> bool {
    tokio::select! {
        biased;
        _ = future => false,
        () = std::future::ready(()) => true,
    }
}

/// A way to close a stream.
type CloseStream = fn(Sender<Dropped>);

/// A way to settle a delivery.
type SettleDelivery = fn(Delivery<Dropped>);

#[tokio::test]
async fn a_message_occupies_its_slot_until_acknowledged() {
    let (sender, receiver) = open(1);
    sender.send(note(0)).await.expect("a slot is free");
    let mut second = pin!(sender.send(note(1)));
    assert!(waits(second.as_mut()).await, "queued");

    let delivery = receiver.receive().await.expect("one is queued");
    let now = counts(&receiver).await;
    assert_eq!((now.queued, now.in_flight), (0, 1));
    assert!(waits(second.as_mut()).await, "in flight");

    delivery.return_for_redelivery();
    assert!(waits(second.as_mut()).await, "returned");

    receiver
        .receive()
        .await
        .expect("it was returned")
        .acknowledge();
    second.await.expect("its slot is free");
    assert_eq!(number(&receiver.receive().await.expect("it was sent")), 1);
}

#[tokio::test]
async fn every_message_is_redelivered_unless_acknowledged() {
    let cases: [(&str, bool, SettleDelivery); 6] = [
        ("acknowledged", true, Delivery::acknowledge),
        ("taken and acknowledged", true, |delivery| {
            delivery.take().1.acknowledge();
        }),
        ("returned", false, Delivery::return_for_redelivery),
        ("dropped", false, drop),
        ("taken and returned", false, |delivery| {
            delivery.take().1.return_for_redelivery();
        }),
        ("taken and dropped", false, |delivery| drop(delivery.take())),
    ];
    for (name, settles, settle) in cases {
        let (sender, receiver) = open(2);
        sender.send(note(7)).await.expect("a slot is free");
        settle(receiver.receive().await.expect("one is queued"));
        let again = receiver
            .try_receive()
            .map(|delivery| (number(&delivery), delivery.deliveries()));
        assert_eq!(again, (!settles).then_some((7, 2)), "{name}");
        let settled = counts(&receiver).await.acknowledged;
        assert_eq!(settled, u64::from(settles), "{name}");
    }
}

#[tokio::test]
async fn a_consumer_that_panics_loses_nothing() {
    let (sender, receiver) = open(2);
    send(&sender, 3..4).await;
    let consumer = receiver.clone();
    tokio::spawn(async move {
        let _delivery = consumer.receive().await.expect("one is queued");
        std::panic::resume_unwind(Box::new("the consumer fails"));
    })
    .await
    .expect_err("it panicked");
    let delivery = receiver.try_receive().expect("it was redelivered");
    assert_eq!((number(&delivery), delivery.deliveries()), (3, 2));
}

#[tokio::test]
async fn a_message_taken_by_value_equals_the_sent_one() {
    let (sender, receiver) = open(1);
    send(&sender, 9..10).await;
    let (message, receipt) = receiver.try_receive().expect("one is queued").take();
    assert_eq!(message, note(9));
    assert_eq!(counts(&receiver).await.in_flight, 1);
    receipt.acknowledge();
    assert_eq!(counts(&receiver).await.in_flight, 0);
}

#[tokio::test]
async fn returned_messages_precede_new_ones_in_send_order() {
    let (sender, receiver) = open(4);
    send(&sender, 0..4).await;
    let deliveries: Vec<_> = (0..3)
        .map(|_| receiver.try_receive().expect("four were sent"))
        .collect();
    deliveries.into_iter().rev().for_each(drop);
    let order: Vec<_> = std::iter::from_fn(|| {
        let delivery = receiver.try_receive()?;
        let seen = (number(&delivery), delivery.deliveries());
        delivery.acknowledge();
        Some(seen)
    })
    .collect();
    assert_eq!(order, [(0, 2), (1, 2), (2, 2), (3, 1)]);
}

#[tokio::test]
async fn a_message_exceeds_delivery_limit_after_max_deliveries() {
    for max_deliveries in [1, 2, 5] {
        let limits = StreamLimits {
            max_deliveries: NonZeroU32::new(max_deliveries).expect("not zero"),
            ..StreamLimits::of(NonZeroUsize::MIN)
        };
        let (sender, receiver) = stream_within("notes", limits);
        send(&sender, 0..1).await;
        for delivery in 1..=max_deliveries {
            let received = receiver.try_receive().expect("it was redelivered");
            assert_eq!(
                (received.deliveries(), received.exceeds_delivery_limit()),
                (delivery, false)
            );
        }
        for _ in 0..2 {
            assert!(
                receiver
                    .try_receive()
                    .expect("given up")
                    .exceeds_delivery_limit()
            );
        }
        let last = receiver.try_receive().expect("given up");
        last.acknowledge();
        let now = counts(&receiver).await;
        assert_eq!((now.dead_lettered, now.acknowledged, now.queued), (1, 1, 0));
    }
}

#[test]
#[should_panic(expected = "room for at least one message")]
fn a_stream_of_capacity_zero_panics() {
    drop(open(0));
}

#[tokio::test]
async fn closing_loses_no_sent_message() {
    let closings: [(&str, CloseStream); 2] =
        [("closed", |sender| sender.close()), ("dropped", drop)];
    for (name, close) in closings {
        let (sender, receiver) = open(2);
        sender.send(note(0)).await.expect("a slot is free");
        close(sender);
        let delivery = receiver.receive().await.expect("it was sent before");
        let mut end = pin!(receiver.receive());
        assert!(
            waits(end.as_mut()).await,
            "{name}: a message in flight may be returned"
        );
        drop(delivery);
        let again = end.await.expect("it was redelivered");
        assert_eq!(again.deliveries(), 2, "{name}");
        again.acknowledge();
        let ended = receiver.receive().await.err();
        assert_eq!(ended, Some(closed(ClosedBy::Senders)), "{name}");
    }
}

#[tokio::test]
async fn the_last_acknowledgement_wakes_waiting_receivers() {
    let (sender, receiver) = open(1);
    sender.send(note(0)).await.expect("a slot is free");
    drop(sender);
    let delivery = receiver.receive().await.expect("it was sent before");
    let consumer = receiver.clone();
    let task = tokio::spawn(async move { consumer.receive().await.err() });
    let mut end = pin!(receiver.receive());
    assert!(waits(end.as_mut()).await);
    delivery.acknowledge();
    assert_eq!(end.await.err(), Some(closed(ClosedBy::Senders)));
    assert_eq!(
        task.await.expect("no panic"),
        Some(closed(ClosedBy::Senders))
    );
}

#[tokio::test]
async fn closing_wakes_waiting_senders_and_rejects_messages() {
    let (sender, receiver) = open(1);
    sender.send(note(0)).await.expect("a slot is free");
    let other = sender.clone();
    let mut waiting = pin!(other.send(note(1)));
    assert!(waits(waiting.as_mut()).await);
    sender.close();
    assert_eq!(waiting.await, Err(closed(ClosedBy::Senders)));
    receiver
        .receive()
        .await
        .expect("it was sent before")
        .acknowledge();
    assert_eq!(other.send(note(2)).await, Err(closed(ClosedBy::Senders)));
    assert_eq!(counts(&receiver).await.sent, 1);
}

#[tokio::test]
async fn dropping_the_last_receiver_wakes_senders() {
    let (sender, receiver) = open(1);
    sender.send(note(0)).await.expect("a slot is free");
    let mut waiting = pin!(sender.send(note(1)));
    drop(receiver.clone());
    assert!(waits(waiting.as_mut()).await, "one receiver is left");
    drop(receiver);
    assert_eq!(waiting.await, Err(closed(ClosedBy::Receivers)));
    let why = sender.send(note(2)).await.expect_err("no receiver is left");
    assert_eq!(why, closed(ClosedBy::Receivers));
    assert_eq!(
        why.to_string(),
        "failed to use stream notes: all its receivers were dropped"
    );
}

#[tokio::test]
async fn receive_and_send_are_cancel_safe() {
    let (sender, receiver) = open(1);
    {
        let mut receive = pin!(receiver.receive());
        assert!(waits(receive.as_mut()).await);
        send(&sender, 0..1).await;
        let mut sending = pin!(sender.send(note(1)));
        assert!(waits(sending.as_mut()).await);
    }
    receiver
        .try_receive()
        .expect("the cancelled receive left it")
        .acknowledge();
    send(&sender, 2..3).await;
    assert_eq!(counts(&receiver).await.sent, 2);
    assert_eq!(number(&receiver.try_receive().expect("one is queued")), 2);
    let (_sender, empty) = open(1);
    assert!(empty.try_receive().is_none());
}

/// Receives everything, returning every third message once; returns the acknowledged numbers.
async fn consume(receiver: Receiver<Dropped>) -> Vec<u64> {
    let mut done = Vec::new();
    while let Ok(delivery) = receiver.receive().await {
        if number(&delivery).is_multiple_of(3) && delivery.deliveries() == 1 {
            continue;
        }
        done.push(number(&delivery));
        delivery.acknowledge();
    }
    done
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_tasks_acknowledge_every_message_once() {
    const EACH: u64 = 2_000;
    let (sender, receiver) = open(3);
    let senders = [(0..EACH), (EACH..2 * EACH)].map(|numbers| {
        let sender = sender.clone();
        tokio::spawn(async move {
            for n in numbers {
                sender.send(note(n)).await?;
            }
            Ok::<_, TransportError>(())
        })
    });
    drop(sender);
    let consumers = [0, 1].map(|_| tokio::spawn(consume(receiver.clone())));
    for sender in senders {
        sender.await.expect("no panic").expect("open to the end");
    }
    let mut done = Vec::new();
    for consumer in consumers {
        done.extend(consumer.await.expect("no panic"));
    }
    assert_eq!(done.len() as u64, 2 * EACH, "none twice");
    assert_eq!(BTreeSet::from_iter(done), BTreeSet::from_iter(0..2 * EACH));
    let expected = StreamCounts {
        sent: 2 * EACH,
        acknowledged: 2 * EACH,
        redelivered: (2 * EACH).div_ceil(3),
        ..StreamCounts::default()
    };
    assert_eq!(counts(&receiver).await, expected);
}
