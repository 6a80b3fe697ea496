//! Tests of the transport on a real NATS server, which is stopped, restarted, filled up and corrupted.

mod entry;
mod relay;
mod server;
mod trust;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use messages::{
    Classified, DropReason, Dropped, ErrorClass, PromptId, Stage, StoredWeights, WeightsVersion,
    wire::{self, WireMessage},
};
use settings::WeightsEncoding;
use tokio::time::{sleep, timeout};
use transport::{Delivery, Receiver, Transport, TransportError};

use server::TestServer;

/// Upper bound of every wait.
const DEADLINE: Duration = Duration::from_secs(30);

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

async fn next(receiver: &Receiver<Dropped>) -> Delivery<Dropped> {
    let received = timeout(DEADLINE, receiver.receive()).await;
    received.expect("in time").expect("the server runs")
}

fn number(delivery: &Delivery<Dropped>) -> u64 {
    delivery.message().prompt.0
}

/// Polls until the condition holds.
async fn until<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let polling = async {
        while !holds().await {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(DEADLINE, polling)
        .await
        .unwrap_or_else(|_| panic!("in time: {what}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn duplicates_are_delivered_once_and_runs_are_isolated() {
    let Some(server) = TestServer::start() else {
        return;
    };
    let (one, other) = (server.connect("one").await, server.connect("other").await);
    let (sender, receiver) = one.stream("notes", 8).await.expect("it is created");
    let (_, elsewhere) = other
        .stream::<Dropped>("notes", 8)
        .await
        .expect("it is created");
    for number in [3, 1, 3, 1, 3] {
        sender.send(note(number)).await.expect("a slot is free");
    }
    for expected in [3, 1] {
        let delivery = next(&receiver).await;
        assert_eq!((number(&delivery), delivery.deliveries()), (expected, 1));
        delivery.acknowledge();
    }
    one.flush().await;
    until("everything is acknowledged", async || {
        let counts = receiver.counts().await.expect("it answers");
        counts.sent == 2 && counts.acknowledged == 2
    })
    .await;
    assert_eq!(elsewhere.counts().await.expect("it answers").sent, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn senders_wait_while_a_stream_is_full() {
    let Some(server) = TestServer::start() else {
        return;
    };
    let transport = server.connect("full").await;
    let (sender, receiver) = transport.stream("notes", 2).await.expect("it is created");
    for number in 0..2 {
        sender.send(note(number)).await.expect("a slot is free");
    }
    let waiting = tokio::spawn(async move { sender.send(note(2)).await });
    let first = next(&receiver).await;
    sleep(Duration::from_millis(300)).await;
    assert!(
        !waiting.is_finished(),
        "a message in flight occupies its slot"
    );
    first.acknowledge();
    let sent = timeout(DEADLINE, waiting).await.expect("in time");
    sent.expect("no panic").expect("its slot is free");
    for expected in [1, 2] {
        let delivery = next(&receiver).await;
        assert_eq!(number(&delivery), expected);
        delivery.acknowledge();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_in_flight_stay_leased_until_their_process_dies() {
    let Some(server) = TestServer::start() else {
        return;
    };
    let (one, other) = (
        server.connect("leases").await,
        server.connect("leases").await,
    );
    let (sender, receiver) = one.stream("notes", 8).await.expect("it is created");
    let (_, second) = other
        .stream::<Dropped>("notes", 8)
        .await
        .expect("it is created");
    sender.send(note(5)).await.expect("a slot is free");
    let held = next(&receiver).await;
    // The message is processed for three lease durations, with progress acknowledgements.
    let early = timeout(Duration::from_secs(3), second.receive()).await;
    assert!(early.is_err(), "its consumer is alive");
    drop(held);
    let again = next(&second).await;
    assert_eq!((number(&again), again.deliveries()), (5, 2));
    drop((again, second, other));
    // A dead process sends nothing: its runtime ends with the message in flight.
    let settings = server.settings("");
    let thread = std::thread::spawn(move || {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        runtime.block_on(async {
            let transport = Transport::connect(&settings, "leases").await;
            let transport = transport.expect("the server runs");
            let (_, receiver) = transport
                .stream::<Dropped>("notes", 8)
                .await
                .expect("it is there");
            std::mem::forget((next(&receiver).await, receiver));
        });
        runtime.shutdown_background();
    });
    thread.join().expect("it received the message");
    let last = next(&receiver).await;
    assert_eq!((number(&last), last.deliveries()), (5, 4));
    last.acknowledge();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_exceeds_delivery_limit_is_copied_to_the_dead_letter_stream() {
    let Some(server) = TestServer::start() else {
        return;
    };
    let transport = server.connect_with("dead", "max_deliveries = 2").await;
    let (sender, receiver) = transport.stream("notes", 8).await.expect("it is created");
    sender.send(note(1)).await.expect("a slot is free");
    for delivery in 1..=2 {
        let held = next(&receiver).await;
        assert_eq!(
            (held.deliveries(), held.exceeds_delivery_limit()),
            (delivery, false)
        );
    }
    let dead = next(&receiver).await;
    assert!(dead.exceeds_delivery_limit());
    dead.acknowledge();
    until("it is a dead letter", async || {
        let counts = receiver.counts().await.expect("it answers");
        (counts.dead_lettered, counts.acknowledged) == (1, 1)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_are_undecodable_or_in_the_name_of_another_stage_become_dead_letters() {
    let Some(server) = TestServer::start() else {
        return;
    };
    let transport = server.connect("foreign").await;
    let (sender, receiver) = transport.stream("notes", 8).await.expect("it is created");
    let (_, others) = transport
        .stream::<Dropped>("others", 8)
        .await
        .expect("it is created");
    let client = server.client().await;
    // Stored first, before the next is sent.
    for (subject, payload) in [
        ("agon.foreign-notes", vec![9, 4, 0]),
        ("agon.foreign-notes", wire::encode(&note(1))),
        ("agon.foreign-notes.preference", wire::encode(&note(1))),
    ] {
        let foreign = client.publish(subject, payload.into());
        let sent = foreign.await.expect("it is sent");
        sent.await.expect("it is stored");
    }
    sender.send(note(2)).await.expect("a slot is free");
    let delivery = next(&receiver).await;
    assert_eq!(number(&delivery), 2);
    delivery.acknowledge();
    until("nothing is left", async || {
        let counts = receiver.counts().await.expect("it answers");
        (counts.sent, counts.acknowledged, counts.dead_lettered) == (4, 4, 3)
    })
    .await;
    let counts = others.counts().await.expect("it answers");
    assert_eq!(
        counts.dead_lettered, 0,
        "a dead letter counts for its own stream"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_cannot_become_a_dead_letter_stays_in_its_stream() {
    let Some(server) = TestServer::start() else {
        return;
    };
    let transport = server.connect("unkept").await;
    let (sender, receiver) = transport.stream("notes", 8).await.expect("it is created");
    let client = server.client().await;
    let deleted = client.delete_stream("agon-unkept-dead-letters").await;
    assert!(deleted.expect("it was there").success);
    let foreign = client.publish("agon.unkept-notes", vec![9, 4, 0].into());
    foreign
        .await
        .expect("it is sent")
        .await
        .expect("it is stored");
    sender.send(note(2)).await.expect("a slot is free");
    let stream = client.get_stream("agon-unkept-notes").await;
    let stream = stream.expect("it is there");
    let reading = tokio::spawn(async move {
        let delivery = next(&receiver).await;
        let read = number(&delivery);
        delivery.acknowledge();
        // Receives once more, since the foreign message may be redelivered after this one.
        let more = timeout(DEADLINE, receiver.receive()).await;
        (read, more.is_ok())
    });
    until(
        "it was redelivered, and only the other was removed",
        async || {
            let consumer = stream.consumer_info("readers").await.expect("it answers");
            let state = stream.get_info().await.expect("it answers").state;
            consumer.num_redelivered > 0 && (state.messages, state.first_sequence) == (1, 1)
        },
    )
    .await;
    let again = server.connect("unkept").await;
    let (sender, receiver) = again.stream("notes", 8).await.expect("it is created");
    until("it is a dead letter", async || {
        let counts = receiver.counts().await.expect("it answers");
        (counts.sent, counts.acknowledged, counts.dead_lettered) == (2, 2, 1)
    })
    .await;
    sender.send(note(3)).await.expect("a slot is free");
    let read = timeout(DEADLINE, reading).await.expect("in time");
    assert_eq!(read.expect("no panic"), (2, true));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_and_restarted_server_loses_nothing() {
    let Some(mut server) = TestServer::start() else {
        return;
    };
    let transport = server.connect("restart").await;
    let (sender, receiver) = transport.stream("notes", 64).await.expect("it is created");
    for number in 0..10 {
        sender.send(note(number)).await.expect("a slot is free");
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
    assert!(!sending.is_finished(), "the server is down");
    server.restart();
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
async fn senders_wait_while_the_storage_is_full() {
    let Some(server) = TestServer::with_jetstream_config("max_file_store: 64KB") else {
        return;
    };
    let transport = server.connect("store").await;
    let (sender, receiver) = transport
        .stream("notes", 1000)
        .await
        .expect("it is created");
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
    assert!(!filling.is_finished(), "160 KiB exceed the storage");
    let mut seen = BTreeSet::new();
    while seen.len() < 40 {
        let delivery = next(&receiver).await;
        seen.insert(number(&delivery));
        delivery.acknowledge();
    }
    filling.await.expect("no panic").expect("storage was freed");
}

fn weights(version: u64) -> Vec<u8> {
    let values = (0..50_000u64).map(|n| (n as f32).sin() * (1.0 + version as f32 * 1e-6));
    values.flat_map(f32::to_le_bytes).collect()
}

async fn upload(weight_store: &transport::WeightStore<Vec<u8>>, step: u64) {
    let published = weight_store.publish(WeightsVersion::at(step), weights(step));
    published.await.expect("it is newer");
}

#[tokio::test(flavor = "multi_thread")]
async fn early_and_late_readers_get_complete_weights() {
    let Some(server) = TestServer::start() else {
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
        let publisher = server.connect_with(run, encoding).await;
        let weight_store = publisher.weight_store().await.expect("it is created");
        let early = server.connect_with(run, encoding).await;
        let early = early
            .weight_store::<Vec<u8>>()
            .await
            .expect("it is created");
        let updates = early.subscribe();
        for step in 1..=7 {
            upload(&weight_store, step).await;
            let newest = timeout(DEADLINE, updates.at_least(WeightsVersion::at(step)));
            let newest = newest.await.expect("in time").expect("announced");
            let blob = early.fetch(newest).await.expect("it is stored");
            assert_eq!(*blob, weights(step), "{run} {step}");
        }
        let late = server.connect_with(run, encoding).await;
        let late = late.weight_store::<Vec<u8>>().await.expect("it is created");
        let newest = late.latest().expect("announced before it joined");
        assert_eq!(newest, WeightsVersion::at(7));
        assert_eq!(*late.fetch(newest).await.expect("complete"), weights(7));
        let old = weight_store.publish(WeightsVersion::at(6), weights(6));
        let refused = old.await.expect_err("versions only increase");
        assert!(
            matches!(refused, TransportError::NotNewer { .. }),
            "{refused}"
        );
        let resumed = WeightsVersion {
            session: 1,
            step: 4,
        };
        weight_store
            .publish(resumed, weights(4))
            .await
            .expect("a later session is newer");
        let newest = timeout(DEADLINE, updates.at_least(resumed)).await;
        newest.expect("in time").expect("announced");
    }
}

/// Weights that no other build reads or writes.
#[derive(Debug)]
struct OtherForm;

impl StoredWeights for OtherForm {
    fn into_blob(self: Arc<Self>) -> Result<Vec<u8>, String> {
        Err("it has no blob".into())
    }

    fn from_blob(blob: Arc<Vec<u8>>) -> Result<Self, String> {
        Err(format!("{} bytes of another form", blob.len()))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn weights_of_another_form_are_named_with_the_remedy() {
    let Some(server) = TestServer::start() else {
        return;
    };
    let transport = server.connect("form").await;
    let weight_store = transport.weight_store().await.expect("it is created");
    upload(&weight_store, 1).await;
    let reader = server.connect("form").await;
    let reader = reader.weight_store::<OtherForm>().await.expect("created");
    let version = WeightsVersion::at(1);
    let error = reader.fetch(version).await.expect_err("it is another form");
    assert_eq!(error.class(), ErrorClass::Usage);
    let text = error.to_string();
    assert!(
        text.contains("bytes of another form; start all processes of the run from the same build"),
        "{text}"
    );
    let error = reader.publish(WeightsVersion::at(2), OtherForm).await;
    let error = error.expect_err("it has no blob").to_string();
    assert_eq!(
        error,
        "failed to serialise weights version 2: it has no blob"
    );
    assert_eq!(reader.latest(), Some(version));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_corrupt_blob_is_rejected_and_uploaded_again() {
    let Some(server) = TestServer::start() else {
        return;
    };
    let transport = server.connect("corrupt").await;
    let weight_store = transport.weight_store().await.expect("it is created");
    upload(&weight_store, 1).await;
    let context = server.client().await;
    let store = context.get_object_store("agon-corrupt-weights");
    let store = store.await.expect("it is there");
    let other = weights(9);
    let corruptions: [&[u8]; 2] = [&other, &weights(1)[..100]];
    for corruption in corruptions {
        let mut bytes = corruption;
        store
            .put("0-1", &mut bytes)
            .await
            .expect("it is overwritten");
        let reader = server.connect("corrupt").await;
        let reader = reader.weight_store().await.expect("it is created");
        let version = WeightsVersion::at(1);
        let error = reader
            .fetch(version)
            .await
            .expect_err("it does not match its manifest");
        assert!(matches!(error, TransportError::Corrupt { .. }), "{error}");
        until_restored(&reader, 1).await;
    }
}

/// Waits until the reader gets the weights of `step`. Every failed read until then is a report to the publisher.
async fn until_restored(reader: &transport::WeightStore<Vec<u8>>, step: u64) {
    until("the weights are restored", async || {
        let blob = reader.fetch(WeightsVersion::at(step)).await;
        blob.is_ok_and(|blob| *blob == weights(step))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delta_whose_base_is_corrupt_is_uploaded_again_in_full() {
    let Some(server) = TestServer::start() else {
        return;
    };
    let publisher = server.connect_with("base", "weights = \"delta\"").await;
    let weight_store = publisher.weight_store().await.expect("it is created");
    upload(&weight_store, 1).await;
    upload(&weight_store, 2).await;
    let context = server.client().await;
    let store = context.get_object_store("agon-base-weights").await;
    let store = store.expect("it is there");
    let base = async |name: &str| {
        let object = store.info(name).await.expect("stored");
        object.metadata.get("base").cloned()
    };
    assert_eq!(base("0-2").await.as_deref(), Some("0-1"));
    let mut bytes: &[u8] = &weights(9);
    let overwritten = store.put("0-1", &mut bytes).await;
    overwritten.expect("it is overwritten");
    let reader = server.connect_with("base", "weights = \"delta\"").await;
    let reader = reader.weight_store().await.expect("it is created");
    until_restored(&reader, 2).await;
    assert_eq!(base("0-2").await, None);
    // The next delta refers to the new upload.
    upload(&weight_store, 3).await;
    assert_eq!(base("0-3").await.as_deref(), Some("0-2"));
    let updates = reader.subscribe();
    let newest = timeout(DEADLINE, updates.at_least(WeightsVersion::at(3))).await;
    newest.expect("in time").expect("announced");
    until_restored(&reader, 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_is_exclusive_until_it_expires_or_is_released() {
    let Some(server) = TestServer::start() else {
        return;
    };
    let (one, other) = (server.connect("lease").await, server.connect("lease").await);
    let registry = |transport: &Transport| transport.registry().expect("a server has one").clone();
    let held = registry(&one).acquire("learner", "the first").await;
    let held = held.expect("it is free");
    let refused = registry(&other).acquire("learner", "the second").await;
    let refused = refused.expect_err("the first is alive").to_string();
    assert!(
        refused.contains("the first has it and is alive"),
        "{refused}"
    );
    // Dropped, it is no longer renewed, as if its process had died.
    drop(held);
    let lease = registry(&other).acquire("learner", "the second").await;
    let lease = lease.expect("it has expired");
    lease.release().await;
    let registry = registry(&one);
    let free = timeout(
        Duration::from_millis(900),
        registry.acquire("learner", "the third"),
    );
    free.await
        .expect("without waiting for expiry")
        .expect("it was released");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_registry_is_read_while_its_entries_are_replaced() {
    let Some(server) = TestServer::start() else {
        return;
    };
    let [writer, reader] = [server.connect("run").await, server.connect("run").await];
    let registry = |transport: &Transport| transport.registry().expect("a server has one").clone();
    let (writer, reader) = (registry(&writer), registry(&reader));
    let keys: Vec<_> = (0..8).map(|number| format!("heartbeat.{number}")).collect();
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
        let all = timeout(Duration::from_secs(20), reader.all("heartbeat."));
        let all = all.await.expect("an answer").expect("a server");
        let found: Vec<_> = all.into_iter().map(|entry| entry.key).collect();
        assert_eq!(found, keys);
    }
    writing.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreachable_server_and_a_missing_file_are_reported_with_remedies() {
    let Some(server) = TestServer::start() else {
        return;
    };
    let mut unreachable = server.settings("");
    (unreachable.url, unreachable.timeout_seconds) = ("nats://127.0.0.1:1".into(), 1);
    let error = Transport::connect(&unreachable, "run")
        .await
        .expect_err("nothing listens");
    let message = error.to_string();
    assert!(
        message.contains("127.0.0.1:1") && message.contains("transport.url"),
        "{message}"
    );
    let mut unreadable = server.settings("");
    unreadable.token_path = "/no/such/file".into();
    let error = Transport::connect(&unreadable, "run")
        .await
        .expect_err("no such file");
    assert!(error.to_string().contains("/no/such/file"), "{error}");
}

#[test]
fn message_ids_identify_duplicates() {
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
async fn orphaned_messages_are_redelivered() {
    let Some(mut server) = TestServer::start() else {
        return;
    };
    let transport = server.connect("run").await;
    let (sender, receiver) = transport.stream("notes", 8).await.expect("it is created");
    for number in 1..=5 {
        sender.send(note(number)).await.expect("a slot is free");
    }
    // Restores the stored messages from before they were received, with the consumer state from after.
    let (messages, saved) = (server.messages_of("agon-run-notes"), tempfile::tempdir());
    let saved = saved.expect("a folder");
    server.stop();
    copy(&messages, saved.path());
    server.restart();
    for _ in 1..=5 {
        next(&receiver).await.acknowledge();
    }
    transport.flush().await;
    until("everything is acknowledged", async || {
        receiver
            .counts()
            .await
            .is_ok_and(|counts| counts.acknowledged == 5)
    })
    .await;
    server.stop();
    copy(saved.path(), &messages);
    server.restart();
    until("they are restored", async || {
        receiver
            .counts()
            .await
            .is_ok_and(|counts| counts.queued == 5)
    })
    .await;
    sender.send(note(6)).await.expect("a slot is free");
    let new = next(&receiver).await;
    assert_eq!(number(&new), 6, "the others are orphaned");
    new.acknowledge();
    transport.flush().await;
    assert!(!receiver.reclaim().await.expect("it answers"), "found once");
    assert!(receiver.reclaim().await.expect("it answers"));
    let mut again = BTreeSet::new();
    while again.len() < 5 {
        let delivery = next(&receiver).await;
        again.insert(number(&delivery));
        delivery.acknowledge();
    }
    assert_eq!(again, (1..=5).collect());
    transport.flush().await;
    until("nothing is left", async || {
        let counts = receiver.counts().await.expect("it answers");
        counts.queued + counts.in_flight == 0
    })
    .await;
    assert!(!receiver.reclaim().await.expect("it answers"));
}

#[tokio::test(flavor = "multi_thread")]
async fn superseded_weights_are_deleted_including_those_of_earlier_sessions() {
    let Some(server) = TestServer::start() else {
        return;
    };
    let stored_messages = async || {
        let context = server.client().await;
        let stream = context.get_stream("OBJ_agon-run-weights").await;
        stream
            .expect("there is a weight store")
            .cached_info()
            .state
            .messages
    };
    let publish = async |session: u64, steps: std::ops::Range<u64>| {
        let transport = server.connect("run").await;
        let weight_store = transport
            .weight_store::<Vec<u8>>()
            .await
            .expect("it is created");
        for step in steps {
            let (version, blob) = (WeightsVersion { session, step }, vec![step as u8; 100]);
            weight_store
                .publish(version, blob)
                .await
                .expect("it is newer");
        }
    };
    publish(0, 1..3).await;
    let two = stored_messages().await;
    publish(0, 3..9).await;
    assert_eq!(
        stored_messages().await,
        two,
        "one is deleted for each published"
    );
    // A new session does not know what an earlier one published.
    publish(1, 5..15).await;
    assert_eq!(stored_messages().await, two);
}
