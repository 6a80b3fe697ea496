//! The promises of the transport over a real NATS server, which is stopped, started again, filled up and
//! lied to.

mod entry;
mod server;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use messages::{
    DropReason, Dropped, PromptId, Station, WeightsManifest, WeightsVersion, wire::Message,
};
use settings::WeightsEncoding;
use tokio::time::{sleep, timeout};
use transport::{Delivery, Hub, Receiver, TransportError};

use server::Server;

/// No step of these tests takes near so long.
const DEADLINE: Duration = Duration::from_secs(30);

fn note(number: u64) -> Dropped {
    Dropped {
        prompt: PromptId(number),
        session: 0,
        station: Station::Actor,
        reason: DropReason::Failed,
        log_ratio: None,
        detail: String::new(),
    }
}

async fn next(receiver: &Receiver<Dropped>) -> Delivery<Dropped> {
    let received = timeout(DEADLINE, receiver.receive()).await;
    received.expect("in time").expect("the server runs")
}

fn number(delivery: &Delivery<Dropped>) -> u64 {
    delivery.message().prompt.0
}

/// Asks again until it holds.
async fn until<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let asking = async {
        while !holds().await {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(DEADLINE, asking)
        .await
        .unwrap_or_else(|_| panic!("in time: {what}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_sent_twice_is_delivered_once_and_runs_do_not_meet() {
    let Some(server) = Server::start() else {
        return;
    };
    let (one, other) = (server.hub("one").await, server.hub("other").await);
    let (sender, receiver) = one.stream("notes", 8).await.expect("it is made");
    let (_, elsewhere) = other
        .stream::<Dropped>("notes", 8)
        .await
        .expect("it is made");
    for number in [3, 1, 3, 1, 3] {
        sender.send(note(number)).await.expect("there is a place");
    }
    for expected in [3, 1] {
        let delivery = next(&receiver).await;
        assert_eq!((number(&delivery), delivery.deliveries()), (expected, 1));
        delivery.acknowledge();
    }
    one.flush().await;
    until("all is settled", async || {
        let counts = receiver.counts().await.expect("it answers");
        counts.sent == 2 && counts.acknowledged == 2
    })
    .await;
    assert_eq!(elsewhere.counts().await.expect("it answers").sent, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_stream_lets_senders_wait_until_something_is_acknowledged() {
    let Some(server) = Server::start() else {
        return;
    };
    let hub = server.hub("full").await;
    let (sender, receiver) = hub.stream("notes", 2).await.expect("it is made");
    for number in 0..2 {
        sender.send(note(number)).await.expect("there is a place");
    }
    let waiting = tokio::spawn(async move { sender.send(note(2)).await });
    let first = next(&receiver).await;
    sleep(Duration::from_millis(300)).await;
    assert!(!waiting.is_finished(), "what is in hand keeps its place");
    first.acknowledge();
    let sent = timeout(DEADLINE, waiting).await.expect("in time");
    sent.expect("no panic").expect("its place is free");
    for expected in [1, 2] {
        let delivery = next(&receiver).await;
        assert_eq!(number(&delivery), expected);
        delivery.acknowledge();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_process_holds_stays_with_it_while_it_lives_and_is_given_to_others_after() {
    let Some(server) = Server::start() else {
        return;
    };
    let (one, other) = (server.hub("leases").await, server.hub("leases").await);
    let (sender, receiver) = one.stream("notes", 8).await.expect("it is made");
    let (_, second) = other
        .stream::<Dropped>("notes", 8)
        .await
        .expect("it is made");
    sender.send(note(5)).await.expect("there is a place");
    let held = next(&receiver).await;
    // Three leases long it works on the message, and says so.
    let early = timeout(Duration::from_secs(3), second.receive()).await;
    assert!(early.is_err(), "its holder lives");
    drop(held);
    let again = next(&second).await;
    assert_eq!((number(&again), again.deliveries()), (5, 2));
    drop((again, second, other));
    // A process that is gone says nothing at all: its runtime ends with the message in its hands.
    let settings = server.settings("");
    let gone = std::thread::spawn(move || {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        runtime.block_on(async {
            let hub = Hub::connect(&settings, "leases").await;
            let hub = hub.expect("the server runs");
            let (_, receiver) = hub
                .stream::<Dropped>("notes", 8)
                .await
                .expect("it is there");
            std::mem::forget((next(&receiver).await, receiver));
        });
        runtime.shutdown_background();
    });
    gone.join().expect("it took the message");
    let last = next(&receiver).await;
    assert_eq!((number(&last), last.deliveries()), (5, 4));
    last.acknowledge();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_nobody_acknowledges_is_given_up_and_kept_for_people() {
    let Some(server) = Server::start() else {
        return;
    };
    let hub = server.hub_with("dead", "max_deliveries = 2").await;
    let (sender, receiver) = hub.stream("notes", 8).await.expect("it is made");
    sender.send(note(1)).await.expect("there is a place");
    for delivery in 1..=2 {
        let held = next(&receiver).await;
        assert_eq!((held.deliveries(), held.is_given_up()), (delivery, false));
    }
    let dead = next(&receiver).await;
    assert!(dead.is_given_up());
    dead.acknowledge();
    until("it lies among the dead letters", async || {
        let counts = receiver.counts().await.expect("it answers");
        (counts.given_up, counts.acknowledged) == (1, 1)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_of_another_build_is_put_aside_and_the_next_one_is_read() {
    let Some(server) = Server::start() else {
        return;
    };
    let hub = server.hub("foreign").await;
    let (sender, receiver) = hub.stream("notes", 8).await.expect("it is made");
    let client = server.client().await;
    // Stored, and so the first, before the next is sent.
    let foreign = client.publish("agon.foreign-notes", vec![9, 4, 0].into());
    foreign
        .await
        .expect("it is sent")
        .await
        .expect("it is stored");
    sender.send(note(2)).await.expect("there is a place");
    let delivery = next(&receiver).await;
    assert_eq!(number(&delivery), 2);
    delivery.acknowledge();
    until("nothing is left", async || {
        let counts = receiver.counts().await.expect("it answers");
        (counts.sent, counts.acknowledged, counts.given_up) == (2, 2, 1)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_kept_as_a_dead_letter_stays_where_it_is() {
    let Some(server) = Server::start() else {
        return;
    };
    let hub = server.hub("unkept").await;
    let (sender, receiver) = hub.stream("notes", 8).await.expect("it is made");
    let client = server.client().await;
    let deleted = client.delete_stream("agon-unkept-dead-letters").await;
    assert!(deleted.expect("it was there").success);
    let foreign = client.publish("agon.unkept-notes", vec![9, 4, 0].into());
    foreign
        .await
        .expect("it is sent")
        .await
        .expect("it is stored");
    sender.send(note(2)).await.expect("there is a place");
    let stream = client.get_stream("agon-unkept-notes").await;
    let stream = stream.expect("it is there");
    let reading = tokio::spawn(async move {
        let delivery = next(&receiver).await;
        let read = number(&delivery);
        delivery.acknowledge();
        // Asks for more, for the foreign one may come back after this.
        let more = timeout(DEADLINE, receiver.receive()).await;
        (read, more.is_ok())
    });
    until(
        "it was offered again, and only the other is gone",
        async || {
            let reader = stream.consumer_info("readers").await.expect("it answers");
            let state = stream.get_info().await.expect("it answers").state;
            reader.num_redelivered > 0 && (state.messages, state.first_sequence) == (1, 1)
        },
    )
    .await;
    let again = server.hub("unkept").await;
    let (sender, receiver) = again.stream("notes", 8).await.expect("it is made");
    until("it is put aside", async || {
        let counts = receiver.counts().await.expect("it answers");
        (counts.sent, counts.acknowledged, counts.given_up) == (2, 2, 1)
    })
    .await;
    sender.send(note(3)).await.expect("there is a place");
    let read = timeout(DEADLINE, reading).await.expect("in time");
    assert_eq!(read.expect("no panic"), (2, true));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_dies_and_comes_back_loses_nothing() {
    let Some(mut server) = Server::start() else {
        return;
    };
    let hub = server.hub("restart").await;
    let (sender, receiver) = hub.stream("notes", 64).await.expect("it is made");
    for number in 0..10 {
        sender.send(note(number)).await.expect("there is a place");
    }
    let held = next(&receiver).await;
    server.kill();
    let sending = tokio::spawn(async move {
        for number in 10..20 {
            sender.send(note(number)).await?;
        }
        Ok::<_, TransportError>(())
    });
    sleep(Duration::from_millis(500)).await;
    assert!(!sending.is_finished(), "there is no server");
    server.again();
    held.acknowledge();
    let mut seen = BTreeSet::from([0]);
    while seen.len() < 20 {
        let delivery = next(&receiver).await;
        seen.insert(number(&delivery));
        delivery.acknowledge();
    }
    let sent = timeout(DEADLINE, sending).await.expect("in time");
    sent.expect("no panic").expect("the server is back");
    assert_eq!(seen, BTreeSet::from_iter(0..20));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_store_is_waited_for() {
    let Some(server) = Server::within("max_file_store: 64KB") else {
        return;
    };
    let hub = server.hub("store").await;
    let (sender, receiver) = hub.stream("notes", 1000).await.expect("it is made");
    let filling = tokio::spawn(async move {
        for number in 0..40 {
            let detail = "x".repeat(4 << 10);
            let sent = sender.send(Dropped {
                detail,
                ..note(number)
            });
            sent.await?;
        }
        Ok::<_, TransportError>(())
    });
    sleep(Duration::from_millis(700)).await;
    assert!(!filling.is_finished(), "the store holds no 160 KiB");
    let mut seen = BTreeSet::new();
    while seen.len() < 40 {
        let delivery = next(&receiver).await;
        seen.insert(number(&delivery));
        delivery.acknowledge();
    }
    filling
        .await
        .expect("no panic")
        .expect("there was room in the end");
}

fn weights(version: u64) -> Vec<u8> {
    let numbers = (0..50_000u64).map(|n| (n as f32).sin() * (1.0 + version as f32 * 1e-6));
    numbers.flat_map(f32::to_le_bytes).collect()
}

async fn lay_down(shelf: &transport::WeightsShelf, step: u64) {
    let blob = weights(step);
    let manifest = WeightsManifest::of(WeightsVersion::at(step), &blob);
    shelf.publish(manifest, blob).await.expect("it is newer");
}

#[tokio::test(flavor = "multi_thread")]
async fn weights_come_whole_to_whoever_joins_early_or_late() {
    let Some(server) = Server::start() else {
        return;
    };
    for (run, encoding) in [
        ("full", "weights = \"full\""),
        ("delta", "weights = \"delta\"\nfull_every = 3"),
    ] {
        assert_eq!(
            server.settings(encoding).weights == WeightsEncoding::Delta,
            run == "delta"
        );
        let publisher = server.hub_with(run, encoding).await;
        let shelf = publisher.shelf().await.expect("it is made");
        let early = server.hub_with(run, encoding).await;
        let early = early.shelf().await.expect("it is made");
        let news = early.subscribe();
        for step in 1..=7 {
            lay_down(&shelf, step).await;
            let newest = timeout(DEADLINE, news.at_least(WeightsVersion::at(step)));
            let newest = newest.await.expect("in time").expect("announced");
            let blob = early.fetch(newest.version).await.expect("it lies there");
            assert_eq!(*blob, weights(step), "{run} {step}");
        }
        let late = server.hub_with(run, encoding).await;
        let late = late.shelf().await.expect("it is made");
        let newest = late.latest().expect("announced before it came");
        assert_eq!(newest.version, WeightsVersion::at(7));
        assert_eq!(
            *late.fetch(newest.version).await.expect("whole"),
            weights(7)
        );
        let old = shelf.publish(
            WeightsManifest::of(WeightsVersion::at(6), &weights(6)),
            weights(6),
        );
        let refused = old.await.expect_err("versions only grow");
        assert!(
            matches!(refused, TransportError::NotNewer { .. }),
            "{refused}"
        );
        let resumed = WeightsVersion {
            session: 1,
            step: 4,
        };
        let manifest = WeightsManifest::of(resumed, &weights(4));
        shelf
            .publish(manifest, weights(4))
            .await
            .expect("a later session is newer");
        let newest = timeout(DEADLINE, news.at_least(resumed)).await;
        newest.expect("in time").expect("announced");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_that_was_torn_is_refused_and_laid_down_again() {
    let Some(server) = Server::start() else {
        return;
    };
    let hub = server.hub("torn").await;
    let shelf = hub.shelf().await.expect("it is made");
    lay_down(&shelf, 1).await;
    let context = server.client().await;
    let store = context.get_object_store("agon-torn-weights");
    let store = store.await.expect("it is there");
    let other = weights(9);
    let halves: [&[u8]; 2] = [&other, &weights(1)[..100]];
    for lie in halves {
        let mut bytes = lie;
        store
            .put("0-1", &mut bytes)
            .await
            .expect("it lets itself be lied to");
        let reader = server.hub("torn").await;
        let reader = reader.shelf().await.expect("it is made");
        let version = WeightsVersion::at(1);
        let torn = reader
            .fetch(version)
            .await
            .expect_err("it is not what was announced");
        assert!(matches!(torn, TransportError::Torn { .. }), "{torn}");
        let reader = Arc::new(reader);
        until("it is whole again", async || {
            reader
                .fetch(version)
                .await
                .is_ok_and(|blob| *blob == weights(1))
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_is_refused_while_its_holder_lives_and_taken_over_after() {
    let Some(server) = Server::start() else {
        return;
    };
    let (one, other) = (server.hub("claim").await, server.hub("claim").await);
    let register = |hub: &Hub| hub.register().expect("a server keeps one").clone();
    let held = register(&one).claim("learner", "the first").await;
    let held = held.expect("nobody has it");
    let refused = register(&other).claim("learner", "the second").await;
    let refused = refused.expect_err("the first lives").to_string();
    assert!(
        refused.contains("the first has it and is alive"),
        "{refused}"
    );
    // Dropped, it is no longer renewed: as if its process were gone.
    drop(held);
    let taken = register(&other).claim("learner", "the second").await;
    let taken = taken.expect("the first is gone");
    taken.release().await;
    let register = register(&one);
    let free = timeout(
        Duration::from_millis(900),
        register.claim("learner", "the third"),
    );
    free.await
        .expect("nobody need be waited for")
        .expect("it was given up");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_register_is_read_while_its_entries_are_replaced() {
    let Some(server) = Server::start() else {
        return;
    };
    let [writer, reader] = [server.hub("run").await, server.hub("run").await];
    let register = |hub: &Hub| hub.register().expect("a server keeps one").clone();
    let (writer, reader) = (register(&writer), register(&reader));
    let keys: Vec<_> = (0..8).map(|number| format!("present.{number}")).collect();
    for key in &keys {
        writer.put(key, b"0".to_vec()).await.expect("a server");
    }
    let replaced = keys.clone();
    let writing = tokio::spawn(async move {
        for key in replaced.iter().cycle() {
            writer.put(key, b"1".to_vec()).await.expect("a server");
        }
    });
    for _ in 0..300 {
        let all = timeout(Duration::from_secs(20), reader.all("present."));
        let all = all.await.expect("an answer").expect("a server");
        let found: Vec<_> = all.into_iter().map(|entry| entry.key).collect();
        assert_eq!(found, keys);
    }
    writing.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_not_there_or_refuses_is_told_with_the_remedy() {
    let Some(server) = Server::start() else {
        return;
    };
    let mut away = server.settings("");
    (away.url, away.timeout_seconds) = ("nats://127.0.0.1:1".into(), 1);
    let error = Hub::connect(&away, "run")
        .await
        .expect_err("nobody listens");
    let words = error.to_string();
    assert!(
        words.contains("127.0.0.1:1") && words.contains("transport.url"),
        "{words}"
    );
    let mut secret = server.settings("");
    secret.token_path = "/no/such/file".into();
    let error = Hub::connect(&secret, "run")
        .await
        .expect_err("no such file");
    assert!(error.to_string().contains("/no/such/file"), "{error}");
}

#[test]
fn ids_tell_a_message_that_is_sent_again_from_a_new_one() {
    let again = Dropped {
        session: 1,
        ..note(7)
    };
    assert_eq!(note(7).id(), note(7).id());
    assert_ne!(note(7).id(), again.id());
    assert_ne!(note(7).id(), note(8).id());
}

fn copy(from: &Path, to: &Path) {
    if to.exists() {
        std::fs::remove_dir_all(to).expect("it is ours");
    }
    std::fs::create_dir_all(to).expect("it is ours");
    for entry in std::fs::read_dir(from).expect("the server keeps messages") {
        let path = entry.expect("an entry of a folder").path();
        let name = path.file_name().expect("an entry has a name");
        std::fs::copy(&path, to.join(name)).expect("it is ours");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_server_comes_back_with_and_delivers_to_nobody_is_delivered_again() {
    let Some(mut server) = Server::start() else {
        return;
    };
    let hub = server.hub("run").await;
    let (sender, receiver) = hub.stream("notes", 8).await.expect("it is made");
    for number in 1..=5 {
        sender.send(note(number)).await.expect("there is a place");
    }
    // The messages as they were before they were read, beside a reader that has read them.
    let (messages, saved) = (server.messages_of("agon-run-notes"), tempfile::tempdir());
    let saved = saved.expect("a folder");
    server.stop();
    copy(&messages, saved.path());
    server.again();
    for _ in 1..=5 {
        next(&receiver).await.acknowledge();
    }
    hub.flush().await;
    until("all is settled", async || {
        receiver
            .counts()
            .await
            .is_ok_and(|counts| counts.acknowledged == 5)
    })
    .await;
    server.stop();
    copy(saved.path(), &messages);
    server.again();
    until("they are back", async || {
        receiver
            .counts()
            .await
            .is_ok_and(|counts| counts.queued == 5)
    })
    .await;
    sender.send(note(6)).await.expect("there is a place");
    let new = next(&receiver).await;
    assert_eq!(number(&new), 6, "the others are delivered to nobody");
    new.acknowledge();
    hub.flush().await;
    assert!(!receiver.reclaim().await.expect("it answers"), "seen once");
    assert!(receiver.reclaim().await.expect("it answers"));
    let mut again = BTreeSet::new();
    while again.len() < 5 {
        let delivery = next(&receiver).await;
        again.insert(number(&delivery));
        delivery.acknowledge();
    }
    assert_eq!(again, (1..=5).collect());
    hub.flush().await;
    until("nothing is left", async || {
        let counts = receiver.counts().await.expect("it answers");
        counts.queued + counts.in_hand == 0
    })
    .await;
    assert!(!receiver.reclaim().await.expect("it answers"));
}

#[tokio::test(flavor = "multi_thread")]
async fn superseded_weights_leave_nothing_behind_not_even_those_of_a_session_that_was_killed() {
    let Some(server) = Server::start() else {
        return;
    };
    let held = async || {
        let context = server.client().await;
        let stream = context.get_stream("OBJ_agon-run-weights").await;
        stream
            .expect("there is a shelf")
            .cached_info()
            .state
            .messages
    };
    let publish = async |session: u64, steps: std::ops::Range<u64>| {
        let hub = server.hub("run").await;
        let shelf = hub.shelf().await.expect("it is made");
        for step in steps {
            let (version, blob) = (WeightsVersion { session, step }, vec![step as u8; 100]);
            let manifest = WeightsManifest::of(version, &blob);
            shelf.publish(manifest, blob).await.expect("it is newer");
        }
    };
    publish(0, 1..3).await;
    let two = held().await;
    publish(0, 3..9).await;
    assert_eq!(held().await, two, "one goes for one that comes");
    // Another learner knows nothing of what this one laid down.
    publish(1, 5..15).await;
    assert_eq!(held().await, two);
}
