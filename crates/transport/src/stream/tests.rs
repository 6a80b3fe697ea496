//! The promises of a stream, seen from its two ends.

use std::collections::BTreeSet;
use std::pin::pin;

use messages::{DropReason, Dropped, PromptId, Station};

use super::*;

/// The smallest message there is, told apart by its number.
fn note(number: u64) -> Dropped {
    Dropped {
        prompt: PromptId(number),
        station: Station::Actor,
        reason: DropReason::Failed,
        detail: String::new(),
    }
}

fn number(delivery: &Delivery<Dropped>) -> u64 {
    delivery.message().prompt.0
}

fn open(capacity: usize) -> (Sender<Dropped>, Receiver<Dropped>) {
    stream("notes", capacity)
}

fn closed(cause: ClosedBy) -> Closed {
    Closed {
        stream: "notes",
        cause,
    }
}

/// Whether `future` still waits after one poll.
async fn waits<F: Future>(future: std::pin::Pin<&mut F>) -> bool {
    tokio::select! {
        biased;
        _ = future => false,
        () = std::future::ready(()) => true,
    }
}

/// A way to end a stream.
type Closing = fn(Sender<Dropped>);

/// A way to end a delivery.
type Settlement = fn(Delivery<Dropped>);

#[tokio::test]
async fn a_message_keeps_its_place_until_it_is_acknowledged() {
    let (sender, receiver) = open(1);
    sender.send(note(0)).await.expect("there is a place");
    let mut second = pin!(sender.send(note(1)));
    assert!(waits(second.as_mut()).await, "queued");

    let delivery = receiver.receive().await.expect("one is queued");
    assert_eq!(
        (receiver.depth(), receiver.in_hand(), receiver.capacity()),
        (0, 1, 1)
    );
    assert!(waits(second.as_mut()).await, "in hand");

    delivery.return_for_redelivery();
    assert!(waits(second.as_mut()).await, "returned");

    receiver
        .receive()
        .await
        .expect("it was returned")
        .acknowledge();
    second.await.expect("its place is free");
    assert_eq!(number(&receiver.receive().await.expect("it was sent")), 1);
}

#[tokio::test]
async fn only_an_acknowledgement_keeps_a_message_from_coming_back() {
    let cases: [(&str, bool, Settlement); 6] = [
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
        sender.send(note(7)).await.expect("there is a place");
        settle(receiver.receive().await.expect("one is queued"));
        let again = receiver
            .try_receive()
            .map(|delivery| (number(&delivery), delivery.deliveries()));
        assert_eq!(again, (!settles).then_some((7, 2)), "{name}");
        assert_eq!(receiver.counts().acknowledged, u64::from(settles), "{name}");
    }
}

#[test]
fn a_consumer_that_panics_loses_nothing() {
    let (sender, receiver) = open(2);
    sender.send_blocking(note(3)).expect("there is a place");
    let consumer = receiver.clone();
    std::thread::spawn(move || {
        let _held = consumer.receive_blocking().expect("one is queued");
        std::panic::resume_unwind(Box::new("the consumer fails"));
    })
    .join()
    .expect_err("it panicked");
    let delivery = receiver.try_receive().expect("it came back");
    assert_eq!((number(&delivery), delivery.deliveries()), (3, 2));
}

#[test]
fn a_message_taken_by_value_is_the_one_that_was_sent() {
    let (sender, receiver) = open(1);
    sender.try_send(note(9)).expect("there is a place");
    let (message, receipt) = receiver.try_receive().expect("one is queued").take();
    assert_eq!(message, note(9));
    assert_eq!(receiver.in_hand(), 1);
    receipt.acknowledge();
    assert_eq!(receiver.in_hand(), 0);
}

#[test]
fn what_is_returned_comes_before_what_is_new_in_the_order_it_was_sent() {
    let (sender, receiver) = open(4);
    (0..4).for_each(|n| sender.send_blocking(note(n)).expect("there is a place"));
    let held: Vec<_> = (0..3)
        .map(|_| receiver.try_receive().expect("four were sent"))
        .collect();
    held.into_iter().rev().for_each(drop);
    let order: Vec<_> = std::iter::from_fn(|| {
        let delivery = receiver.try_receive()?;
        let seen = (number(&delivery), delivery.deliveries());
        delivery.acknowledge();
        Some(seen)
    })
    .collect();
    assert_eq!(order, [(0, 2), (1, 2), (2, 2), (3, 1)]);
}

#[test]
fn a_message_nobody_acknowledges_becomes_a_dead_letter_and_frees_its_place() {
    let (sender, receiver) = open(1);
    let give_up = |n| {
        sender.try_send(note(n)).expect("the place is free");
        let deliveries = std::iter::from_fn(|| receiver.try_receive()).map(|d| d.deliveries());
        assert_eq!(
            deliveries.collect::<Vec<_>>(),
            [1, 2, 3, 4, 5],
            "message {n}"
        );
    };
    give_up(0);
    assert_eq!(
        receiver.dead_letters(),
        [DeadLetter {
            message: note(0),
            deliveries: 5
        }]
    );
    assert_eq!(receiver.dead_letters(), [], "each is handed out once");

    (1..=3).for_each(give_up);
    assert_eq!(
        receiver.dead_letters(),
        [DeadLetter {
            message: note(3),
            deliveries: 5
        }]
    );
    let counts = receiver.counts();
    assert_eq!(
        (
            counts.sent,
            counts.dead,
            counts.discarded,
            counts.redelivered
        ),
        (4, 4, 2, 16)
    );
}

#[test]
fn the_limits_say_how_often_a_message_is_delivered() {
    let once = Limits {
        max_deliveries: NonZeroU32::MIN,
        ..Limits::of(NonZeroUsize::MIN)
    };
    let (sender, receiver) = stream_within("notes", once);
    sender.try_send(note(0)).expect("there is a place");
    drop(receiver.try_receive().expect("one is queued"));
    assert!(receiver.try_receive().is_none());
    assert_eq!(
        receiver.dead_letters(),
        [DeadLetter {
            message: note(0),
            deliveries: 1
        }]
    );
}

#[test]
#[should_panic(expected = "room for at least one message")]
fn a_stream_without_room_is_refused() {
    drop(open(0));
}

#[tokio::test]
async fn closing_loses_nothing_that_was_sent() {
    let closings: [(&str, Closing); 2] = [("closed", |sender| sender.close()), ("dropped", drop)];
    for (name, close) in closings {
        let (sender, receiver) = open(2);
        sender.send(note(0)).await.expect("there is a place");
        close(sender);
        let delivery = receiver.receive().await.expect("it was sent before");
        let mut end = pin!(receiver.receive());
        assert!(
            waits(end.as_mut()).await,
            "{name}: what is in hand may come back"
        );
        drop(delivery);
        let again = end.await.expect("it came back");
        assert_eq!(again.deliveries(), 2, "{name}");
        again.acknowledge();
        assert_eq!(
            receiver.receive().await.err(),
            Some(closed(ClosedBy::Senders)),
            "{name}"
        );
        assert_eq!(
            receiver.receive_timeout(Duration::ZERO).err(),
            Some(closed(ClosedBy::Senders))
        );
    }
}

#[tokio::test]
async fn the_last_acknowledgement_wakes_whoever_waits_for_the_end() {
    let (sender, receiver) = open(1);
    sender.send(note(0)).await.expect("there is a place");
    drop(sender);
    let delivery = receiver.receive().await.expect("it was sent before");
    let consumer = receiver.clone();
    let thread = std::thread::spawn(move || consumer.receive_blocking().err());
    let mut end = pin!(receiver.receive());
    assert!(waits(end.as_mut()).await);
    delivery.acknowledge();
    assert_eq!(end.await.err(), Some(closed(ClosedBy::Senders)));
    assert_eq!(
        thread.join().expect("no panic"),
        Some(closed(ClosedBy::Senders))
    );
}

#[tokio::test]
async fn a_closed_stream_takes_nothing_and_wakes_whoever_waits_to_send() {
    let (sender, receiver) = open(1);
    sender.send(note(0)).await.expect("there is a place");
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
    assert_eq!(other.send_blocking(note(2)), Err(closed(ClosedBy::Senders)));
    assert_eq!(receiver.counts().sent, 1);
}

#[tokio::test]
async fn senders_learn_that_every_receiver_is_gone() {
    let (sender, receiver) = open(1);
    sender.send(note(0)).await.expect("there is a place");
    let mut waiting = pin!(sender.send(note(1)));
    drop(receiver.clone());
    assert!(waits(waiting.as_mut()).await, "one receiver is left");
    drop(receiver);
    assert_eq!(waiting.await, Err(closed(ClosedBy::Receivers)));
    match sender.try_send(note(2)) {
        Err(Unsent::Closed(message, why)) => {
            assert_eq!((message, why), (note(2), closed(ClosedBy::Receivers)));
            assert_eq!(why.to_string(), "use stream notes: every receiver is gone");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_cancelled_wait_takes_nothing() {
    let (sender, receiver) = open(1);
    {
        let mut receive = pin!(receiver.receive());
        assert!(waits(receive.as_mut()).await);
        sender.try_send(note(0)).expect("there is a place");
        let mut send = pin!(sender.send(note(1)));
        assert!(waits(send.as_mut()).await);
    }
    receiver
        .try_receive()
        .expect("the cancelled receive left it")
        .acknowledge();
    sender
        .try_send(note(2))
        .expect("the cancelled send left the place");
    assert_eq!(receiver.counts().sent, 2);
}

#[test]
fn an_empty_stream_gives_nothing_and_says_so() {
    let (_sender, receiver) = open(1);
    assert!(receiver.try_receive().is_none());
    assert!(
        receiver
            .receive_timeout(Duration::ZERO)
            .expect("open")
            .is_none()
    );
}

/// Takes everything, failing once at every third message; returns what it acknowledged.
fn consume(deliveries: impl Iterator<Item = Delivery<Dropped>>) -> Vec<u64> {
    let mut done = Vec::new();
    for delivery in deliveries {
        if number(&delivery).is_multiple_of(3) && delivery.deliveries() == 1 {
            continue;
        }
        done.push(number(&delivery));
        delivery.acknowledge();
    }
    done
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tasks_and_threads_share_a_stream_and_every_message_is_settled_once() {
    const EACH: u64 = 2_000;
    let (sender, receiver) = open(3);
    let thread_sender = sender.clone();
    let thread = std::thread::spawn(move || {
        (0..EACH).try_for_each(|n| thread_sender.send_blocking(note(n)))
    });
    let task = tokio::spawn(async move {
        for n in EACH..2 * EACH {
            sender.send(note(n)).await?;
        }
        Ok::<_, Closed>(())
    });
    let thread_receiver = receiver.clone();
    let consumer = std::thread::spawn(move || {
        consume(std::iter::from_fn(|| {
            thread_receiver.receive_blocking().ok()
        }))
    });
    let mut done = Vec::new();
    while let Ok(delivery) = receiver.receive().await {
        done.extend(consume(std::iter::once(delivery)));
    }
    task.await.expect("no panic").expect("open to the end");
    thread.join().expect("no panic").expect("open to the end");
    done.extend(consumer.join().expect("no panic"));

    assert_eq!(done.len() as u64, 2 * EACH, "none twice");
    assert_eq!(BTreeSet::from_iter(done), BTreeSet::from_iter(0..2 * EACH));
    let expected = Counts {
        sent: 2 * EACH,
        acknowledged: 2 * EACH,
        redelivered: (2 * EACH).div_ceil(3),
        ..Counts::default()
    };
    assert_eq!(receiver.counts(), expected);
}
