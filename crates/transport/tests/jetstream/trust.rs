//! Rights on a server: signatures of the run's key, permissions of the roles, and servers that lack something.

use std::time::Duration;

use messages::{Dropped, Stage, WeightsManifest, WeightsVersion, wire};
use tokio::time::{sleep, timeout};
use transport::{NewKey, RoleAccess, Transport, TransportError};

use crate::{DEADLINE, next, note, number, until, upload, weights};
use crate::{relay::Relay, server::TestServer};

/// Time within which a problem of the server must be named: far below the timeout of the settings.
const AT_ONCE: Duration = Duration::from_secs(12);

/// Streams of the runs in these tests.
const STREAMS: [&str; 1] = ["notes"];

/// The role that sends and receives in these tests, and may not publish weights.
const ACTOR: RoleAccess = RoleAccess {
    role: "actor",
    leads: false,
    receives: &["notes"],
    sends: &["notes.actor"],
    writes: &["heartbeat.actor.>", "corrupt", "clock"],
    fetches_weights: true,
};

const LEARNER: RoleAccess = RoleAccess {
    role: "learner",
    leads: true,
    receives: &[],
    sends: &["notes.actor"],
    writes: &[],
    fetches_weights: true,
};

/// A folder with keys, and the settings that name them.
struct Keys(tempfile::TempDir);

impl Keys {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a folder"))
    }

    fn setting(&self, setting: &str, text: &str) -> String {
        let path = self.0.path().join(text);
        std::fs::write(&path, text).expect("it can be written");
        format!("{setting} = {:?}\n", path.display().to_string())
    }
}

fn announcement(step: u64) -> Vec<u8> {
    let manifest = WeightsManifest::of(WeightsVersion::at(step), &weights(step));
    wire::encode(&manifest)
}

#[tokio::test(flavor = "multi_thread")]
async fn weights_that_the_learner_has_not_signed_are_ignored() {
    let Some(server) = TestServer::start() else {
        return;
    };
    let (keys, key, other) = (
        Keys::new(),
        NewKey::run().expect("a key"),
        NewKey::run().expect("a key"),
    );
    let signs = |key: &NewKey| keys.setting("run_key_path", &key.seed);
    let checks = keys.setting("run_key_path", &key.public);
    let leader = server.connect_with("run", &signs(&key)).await;
    let store = leader.weight_store().await.expect("it is created");
    upload(&store, 1).await;
    let settings = server.settings(&checks);
    let reader = Transport::find(&settings, "run", "actor").await;
    let reader = reader.expect("it answers").expect("the run is there");
    let store_of_reader = reader.weight_store::<Vec<u8>>().await.expect("it is there");
    let newest = || store_of_reader.latest().map(|version| version.step);
    assert_eq!(newest(), Some(1));
    // Without a signature, with one of another key, and with a form of another build.
    let stranger = server.connect_with("other", &signs(&other)).await;
    let registry = stranger.registry().expect("a server has one");
    let forged = registry.put_signed("weights", &announcement(98)).await;
    forged.expect("it is written");
    let forged = registry.get("weights").await.expect("it answers");
    let forged = forged.expect("it is there").value;
    let unsigned = [&[0], announcement(99).as_slice()].concat();
    let client = server.client().await;
    for value in [forged, unsigned, announcement(97)] {
        let put = client.publish("$KV.agon-run-registry.weights", value.into());
        put.await.expect("it is sent").await.expect("it is stored");
        let late = Transport::find(&settings, "run", "actor").await;
        let late = late.expect("it answers").expect("the run is there");
        let late = late.weight_store::<Vec<u8>>().await.expect("it is there");
        assert_eq!(late.latest(), None, "a late reader has seen nothing else");
        let registry = reader.registry().expect("a server has one");
        let refused = registry.get_signed("weights", "weights").await;
        let refused = refused.expect_err("not the learner's");
        assert!(
            matches!(
                refused,
                TransportError::Unauthentic { .. } | TransportError::Foreign { .. }
            ),
            "{refused}"
        );
    }
    assert_eq!(newest(), Some(1));
    // The learner is not misled either, and its next weights arrive.
    upload(&store, 2).await;
    until("the next weights", async || newest() == Some(2)).await;
    let fetched = store_of_reader.fetch(WeightsVersion::at(2)).await;
    assert_eq!(*fetched.expect("complete"), weights(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_learner_needs_the_seed_of_the_run_key() {
    let Some(server) = TestServer::start() else {
        return;
    };
    let (keys, key) = (Keys::new(), NewKey::run().expect("a key"));
    let client = NewKey::client().expect("a key");
    for text in [&key.public, &client.seed, "nonsense"] {
        let settings = server.settings(&keys.setting("run_key_path", text));
        let error = Transport::connect(&settings, "run").await;
        let error = error.expect_err("no seed of a run key").to_string();
        assert!(error.contains("seed"), "{error}");
        assert!(
            !error.contains(&client.seed) || *text == client.seed,
            "{error}"
        );
    }
}

/// A server with a user for each of the two roles, and the settings of the users.
fn server_with_roles(keys: &Keys) -> Option<(TestServer, [String; 2])> {
    let [actor, learner] = [(); 2].map(|()| NewKey::client().expect("a key"));
    let user = |key: &NewKey, role: RoleAccess| {
        let permissions = role.permissions("run", &STREAMS);
        format!(
            "{{ nkey: {}, permissions: {{ publish: {{ allow: {:?} }}, subscribe: {{ allow: {:?} }} }} }}",
            key.public, permissions.publish, permissions.subscribe
        )
    };
    let config = format!(
        "authorization {{ users: [ {}, {} ] }}",
        user(&actor, ACTOR),
        user(&learner, LEARNER)
    );
    let server = TestServer::with_config(&config)?;
    let settings = [actor, learner].map(|key| keys.setting("nkey_path", &key.seed));
    Some((server, settings))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_can_do_its_work_and_not_the_learners() {
    let keys = Keys::new();
    let Some((server, [actor, learner])) = server_with_roles(&keys) else {
        return;
    };
    let absent = Transport::find(&server.settings(&actor), "run", "actor").await;
    assert!(absent.expect("it may look").is_none(), "nobody leads");
    let leader = server.connect_with("run", &learner).await;
    let (sender, _) = leader.stream("notes", 8).await.expect("it is created");
    let store = leader.weight_store().await.expect("it is created");
    upload(&store, 1).await;
    let joined = Transport::find(&server.settings(&actor), "run", "actor").await;
    let joined = joined.expect("it may look").expect("the run is there");
    let (answers, receiver) = joined.stream("notes", 8).await.expect("it is there");
    sender.send(note(1)).await.expect("a slot is free");
    let delivery = next(&receiver).await;
    assert_eq!(number(&delivery), 1);
    answers.send(note(2)).await.expect("it may send");
    delivery.acknowledge();
    joined.flush().await;
    until("it is acknowledged", async || {
        receiver
            .counts()
            .await
            .is_ok_and(|counts| counts.acknowledged == 1)
    })
    .await;
    let reads = joined.weight_store::<Vec<u8>>().await.expect("it is there");
    let blob = reads.fetch(WeightsVersion::at(1)).await;
    assert_eq!(*blob.expect("it may read"), weights(1));
    let registry = joined.registry().expect("a server has one");
    let present = registry.put("heartbeat.actor.a", b"1".to_vec()).await;
    present.expect("it may be present");
    assert_eq!(
        registry.all("heartbeat.").await.expect("it may list").len(),
        1
    );
    registry.now().await.expect("it may read the clock");
    // What the learner does is refused, and named.
    let of_the_judge = Dropped {
        stage: Stage::Preference,
        ..note(3)
    };
    let refused = timeout(AT_ONCE, async {
        tokio::join!(
            reads.publish(WeightsVersion::at(2), weights(2)),
            registry.put("run", b"{}".to_vec()),
            joined.remove(&STREAMS),
            answers.send(of_the_judge),
        )
    });
    let (forged, record, removal, note) = refused.await.expect("at once");
    let may_not = "it may not";
    let (forged, record) = (forged.expect_err(may_not), record.expect_err(may_not));
    let (removal, note) = (removal.expect_err(may_not), note.expect_err(may_not));
    for error in [forged, record, removal, note] {
        let text = error.to_string();
        assert!(matches!(error, TransportError::Rejected { .. }), "{text}");
        assert!(text.contains("Permissions Violation"), "{text}");
        assert!(text.contains("agon nats-config"), "{text}");
    }
    assert_eq!(store.latest(), Some(WeightsVersion::at(1)));
    leader.remove(&STREAMS).await.expect("the leader may");
}

/// Has the server write one of its answers into an entry of the run's registry, as every client with a permission for any
/// request can.
async fn overwrite_with_an_answer(server: &TestServer, key: &str) {
    let client = server.client().await.client();
    let reply = format!("$KV.agon-run-registry.{key}");
    let request = "$JS.API.STREAM.INFO.agon-run-notes";
    let sent = client.publish_with_reply(request, reply, "".into()).await;
    sent.expect("the server runs");
    client.flush().await.expect("the server runs");
}

/// Has the server store the answer to a request for what is not there: an entry with a status and no value, which reads as
/// none.
async fn overwrite_with_nothing(server: &TestServer, key: &str) {
    let client = server.client().await.client();
    let reply = format!("$KV.agon-run-registry.{key}");
    let request = "$JS.API.DIRECT.GET.KV_agon-run-registry";
    let absent = r#"{"last_by_subj": "$KV.agon-run-registry.nothing"}"#;
    let sent = client
        .publish_with_reply(request, reply, absent.into())
        .await;
    sent.expect("the server runs");
    client.flush().await.expect("the server runs");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_record_and_the_lease_are_written_again_when_others_overwrite_them() {
    let Some(server) = TestServer::start() else {
        return;
    };
    let keys = Keys::new();
    let key = NewKey::run().expect("a key");
    let more = keys.setting("run_key_path", &key.seed);
    let leader = server.connect_with("run", &more).await;
    let notes = leader.stream::<messages::Dropped>("notes", 8).await;
    notes.expect("it is created");
    let registry = leader.registry().expect("a server has one");
    let lease = registry.acquire("learner", "the first").await;
    let lease = lease.expect("it is free");
    let kept = registry.keep_signed("run", b"record").await;
    let kept = kept.expect("it is written");
    let stored = async |key: &str| {
        let entry = registry.get(key).await.expect("it answers");
        entry.map(|entry| entry.value)
    };
    for key in ["run", "learner"] {
        let before = stored(key).await;
        assert!(before.is_some());
        overwrite_with_an_answer(&server, key).await;
        until("it is overwritten", async || stored(key).await != before).await;
        until("it is written again", async || stored(key).await == before).await;
        overwrite_with_nothing(&server, key).await;
        until("it cannot be read", async || stored(key).await.is_none()).await;
        until("it is written again", async || stored(key).await == before).await;
    }
    let record = registry.get_signed("run", "the record").await;
    assert_eq!(
        record.expect("it is signed").as_deref(),
        Some(&b"record"[..])
    );
    let lost = timeout(Duration::from_secs(2), lease.lost()).await;
    assert!(lost.is_err(), "nobody else leads");
    let other = server.connect_with("run", &more).await;
    let other = other.registry().expect("a server has one");
    let refused = other.acquire("learner", "the second").await;
    let error = refused.expect_err("it is held").to_string();
    assert!(error.contains("the first has it and is alive"), "{error}");
    // What is left when the leader has gone is nobody's.
    drop((lease, kept));
    overwrite_with_an_answer(&server, "learner").await;
    let taken = timeout(AT_ONCE, other.acquire("learner", "the second")).await;
    drop(taken.expect("in time").expect("it is free"));
    overwrite_with_nothing(&server, "learner").await;
    let taken = timeout(AT_ONCE, other.acquire("learner", "the third")).await;
    taken.expect("in time").expect("it is free");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_is_removed_without_the_runs_whose_names_begin_with_its() {
    let Some(server) = TestServer::start() else {
        return;
    };
    let (one, other) = (server.connect("a").await, server.connect("a-b").await);
    for transport in [&one, &other] {
        let created = transport.stream::<messages::Dropped>("notes", 8).await;
        created.expect("it is created");
    }
    one.remove(&STREAMS).await.expect("it answers");
    one.remove(&STREAMS).await.expect("it is gone already");
    let found = Transport::find(&server.settings(""), "a", "view").await;
    assert!(found.expect("it answers").is_none());
    let found = Transport::find(&server.settings(""), "a-b", "view").await;
    let found = found.expect("it answers").expect("it is there");
    let (_, receiver) = found
        .stream::<messages::Dropped>("notes", 8)
        .await
        .expect("it is there");
    assert_eq!(receiver.counts().await.expect("it answers").sent, 0);
    // A process of the removed run learns that it is gone.
    let registry = one.registry().expect("a server has one");
    assert!(registry.get("run").await.expect("it answers").is_none());
}

/// The error of a connection, in time.
async fn rejected(server: &TestServer, more: &str) -> String {
    let settings = server.settings(more);
    let started = async {
        let transport = Transport::connect(&settings, "run").await?;
        transport.stream::<messages::Dropped>("notes", 8).await?;
        let store = transport.weight_store::<Vec<u8>>().await?;
        store.put_file("model", vec![1; 1 << 20]).await
    };
    match timeout(AT_ONCE, started).await {
        Ok(Err(error @ TransportError::Rejected { .. })) => error.to_string(),
        other => format!("not rejected at once: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_server_lacks_is_named_at_once() {
    let cases: [(&str, &str, &str, &[&str]); 6] = [
        (
            "",
            "max_payload: 100KB",
            "",
            &["102400 bytes", "max_payload: "],
        ),
        ("", "no_header_support: true", "", &["no_header_support"]),
        ("", "", "replicas = 3", &["transport.replicas"]),
        ("max_file_store: 300KB", "", "", &["max_file_store"]),
        (
            "",
            "accounts { A { users: [ { user: a, password: b } ] } }, no_auth_user: a",
            "",
            &["enable JetStream for the account"],
        ),
        (
            "",
            "authorization { users: [ { user: a, password: b, permissions: { publish: [\"x\"] } } ] }, no_auth_user: a",
            "",
            &["Permissions Violation", "agon nats-config"],
        ),
    ];
    for (jetstream, config, settings, expected) in cases {
        let Some(server) = TestServer::configured(jetstream, config) else {
            return;
        };
        let error = rejected(&server, settings).await;
        for part in expected {
            assert!(error.contains(part), "{part:?} is not in {error}");
        }
    }
    let server = TestServer::without_jetstream().expect("there is one");
    let error = rejected(&server, "").await;
    assert!(error.contains("without JetStream"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_process_waits_for_a_server_that_is_away() {
    let Some(mut server) = TestServer::start() else {
        return;
    };
    let settings = server.settings_with("timeout_seconds = 1\nmax_outage_seconds = 60");
    let transport = Transport::connect(&settings, "run").await;
    let transport = transport.expect("the server runs");
    let (sender, receiver) = transport.stream("notes", 8).await.expect("it is created");
    let registry = transport.registry().expect("a server has one").clone();
    assert_eq!(receiver.outage_time(), Duration::ZERO);
    transport.set_started();
    server.stop();
    let sending = tokio::spawn(async move { sender.send(note(1)).await });
    let writing = tokio::spawn(async move { registry.put("run", b"x".to_vec()).await });
    let receiving = receiver.clone();
    let receiving = tokio::spawn(async move { timeout(DEADLINE, receiving.receive()).await });
    sleep(Duration::from_secs(3)).await;
    for finished in [
        sending.is_finished(),
        writing.is_finished(),
        receiving.is_finished(),
    ] {
        assert!(!finished, "the server is away for longer than a timeout");
    }
    assert!(receiver.outage_time() > Duration::from_secs(2));
    server.restart();
    sending.await.expect("no panic").expect("it is back");
    writing.await.expect("no panic").expect("it is back");
    let delivery = receiving.await.expect("no panic").expect("in time");
    let delivery = delivery.expect("it is back");
    assert_eq!(number(&delivery), 1);
    delivery.acknowledge();
    let away = receiver.outage_time();
    sleep(Duration::from_millis(50)).await;
    assert_eq!(receiver.outage_time(), away, "it is back");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_hangs_is_no_empty_stream() {
    let Some(server) = TestServer::start() else {
        return;
    };
    let relay = Relay::before(server.port).await;
    let settings = TestServer::settings_at(relay.port, "timeout_seconds = 7");
    let transport = Transport::connect(&settings, "run").await;
    let transport = transport.expect("the server runs");
    let (sender, receiver) = transport.stream("notes", 8).await.expect("it is created");
    transport.set_started();
    sender.send(note(1)).await.expect("a slot is free");
    next(&receiver).await.acknowledge();
    let waiting = timeout(Duration::from_secs(6), receiver.receive()).await;
    assert!(waiting.is_err(), "an empty stream is waited for");
    relay.hang();
    let received = timeout(DEADLINE, receiver.receive()).await;
    let error = received.expect("in time").expect_err("it hangs");
    let (action, reason) = ("failed to read stream notes", "the server does not answer");
    let error = error.to_string();
    assert!(error.contains(action) && error.contains(reason), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_larger_than_its_record_is_not_read() {
    let Some(server) = TestServer::start() else {
        return;
    };
    let transport = server.connect("run").await;
    let store = transport
        .weight_store::<Vec<u8>>()
        .await
        .expect("it is created");
    let put = store.put_file("config.json", vec![7; 3000]).await;
    put.expect("it is stored");
    let read = store.get_file("config.json", 3000).await;
    assert_eq!(read.expect("it fits"), Some(vec![7; 3000]));
    let error = store.get_file("config.json", 2999).await;
    let error = error.expect_err("it does not").to_string();
    assert!(error.contains("2999 bytes"), "{error}");
}
