//! The service between its streams.

use std::num::{NonZeroU32, NonZeroUsize};

use std::time::Duration;

use futures_util::FutureExt;
use messages::{DropReason, JudgeVersion, PromptId, Purpose, Stage};
use telemetry::Exporter;
use tokio::time::sleep;
use transport::{ClosedBy, StreamCounts, StreamLimits, stream, stream_within};

use super::*;
use crate::error::JudgeError;
use crate::judge::Judge;
use crate::judge::fake::{FakeJudge, abstained, message_limits, pair, preferred};
use crate::pool::fake::{self, FakeReplica, pool};
use crate::pool::{JudgeReplicas, PoolSettings, Rebuild};

/// Streams, counters and shutdown of a service.
struct Harness {
    /// Completions per training pair.
    completions: usize,
    pairs: Option<Sender<Pair>>,
    pairs_receiver: Receiver<Pair>,
    labelled: (Sender<LabelledPair>, Receiver<LabelledPair>),
    drops: (Sender<Dropped>, Receiver<Dropped>),
    counters: Arc<StageCounters>,
    shutdown: watch::Sender<bool>,
}

impl Harness {
    fn with_deliveries(max_deliveries: u32) -> Self {
        let limits = StreamLimits {
            capacity: NonZeroUsize::new(64).unwrap(),
            max_deliveries: NonZeroU32::new(max_deliveries).unwrap(),
        };
        let (pairs, pairs_receiver) = stream_within("pairs", limits);
        Self {
            completions: 2,
            pairs: Some(pairs),
            pairs_receiver,
            labelled: stream("labelled pairs", 64),
            drops: stream("drops", 64),
            counters: Arc::new(StageCounters::new(Stage::Preference)),
            shutdown: watch::Sender::new(false),
        }
    }

    fn new() -> Self {
        Self::with_deliveries(5)
    }

    fn send(&self, pair: Pair) {
        let pairs = self.pairs.as_ref().expect("the stream is open");
        let sent = pairs.send(pair).now_or_never();
        sent.expect("the stream has room")
            .expect("the stream is open");
    }

    /// Sends pairs of the completions "a" and "b" with these ids.
    fn send_all(&self, ids: std::ops::Range<u64>) {
        ids.for_each(|id| self.send(pair(id, &["a", "b"])));
    }

    /// Counts of the stream of pairs.
    fn pair_counts(&self) -> StreamCounts {
        let counts = self.pairs_receiver.counts().now_or_never();
        counts.expect("it is ready").expect("it is in memory")
    }

    fn close(&mut self) {
        self.pairs = None;
    }

    fn parts(&self, judge: JudgePool) -> PreferenceServiceParts {
        PreferenceServiceParts {
            apo: None,
            judge,
            evaluation: Vec::new(),
            orders: OrdersSetting::Auto,
            penalties: LabelPenalties::default(),
            pairs: self.pairs_receiver.clone(),
            limits: message_limits(self.completions),
            weight_store: WeightStore::default(),
            labelled: self.labelled.0.clone(),
            drops: self.drops.0.clone(),
            counters: Arc::clone(&self.counters),
        }
    }

    async fn run(&self, judge: FakeJudge, max_batch: usize) -> Result<(), PreferenceError> {
        self.run_with(thread_pool(judge, max_batch)).await
    }

    async fn run_with(&self, judge: JudgePool) -> Result<(), PreferenceError> {
        let service = PreferenceService::new(self.parts(judge));
        service.run(self.shutdown.subscribe()).await
    }

    /// Ids of the labelled pairs sent so far, in order.
    fn labelled_ids(&self) -> Vec<u64> {
        take_all(&self.labelled.1)
            .iter()
            .map(|l| l.pair.id().0)
            .collect()
    }

    /// Ids, reasons and details of the drop notes sent so far, in order.
    fn notes(&self) -> Vec<(u64, DropReason, String)> {
        take_all(&self.drops.1)
            .into_iter()
            .inspect(|note| assert_eq!(note.stage, Stage::Preference))
            .map(|note| (note.prompt.0, note.reason, note.detail))
            .collect()
    }

    /// Received, emitted, dropped and in flight; checks conservation.
    fn stage_counters(&self) -> [u64; 4] {
        let counters = self.counters.snapshot();
        assert!(counters.is_conserved(), "{counters:?}");
        [
            counters.received,
            counters.emitted,
            counters.total_dropped(),
            counters.in_flight,
        ]
    }
}

fn take_all<T>(receiver: &Receiver<T>) -> Vec<T>
where
    T: messages::wire::WireMessage + Clone + Send + Sync + 'static,
{
    let deliveries = std::iter::from_fn(|| receiver.try_receive());
    deliveries
        .map(|delivery| {
            let (message, receipt) = delivery.take();
            receipt.acknowledge();
            message
        })
        .collect()
}

/// A pool of one judge on its thread, without a rebuild function.
fn thread_pool(judge: FakeJudge, max_batch: usize) -> JudgePool {
    let judges = JudgeReplicas::on_threads(vec![Box::new(judge)], None).expect("a thread");
    JudgePool::new(judges, settings(max_batch))
}

/// Settings without a cache: all pairs of these tests have the same content.
fn settings(max_batch: usize) -> PoolSettings {
    PoolSettings {
        max_batch,
        ..fake::settings()
    }
}

fn even() -> FakeJudge {
    FakeJudge::answering(|_| preferred(0.5))
}

/// A judge that signals each batch and waits for permission to answer.
fn gated() -> (FakeJudge, tokio::sync::mpsc::UnboundedReceiver<()>, Gate) {
    let (started, batch_started) = tokio::sync::mpsc::unbounded_channel();
    let (open, opened) = std::sync::mpsc::channel::<()>();
    let judge = FakeJudge::new(move |batch| {
        started.send(()).ok();
        opened.recv().ok();
        Ok(vec![preferred(0.5); batch.len()])
    });
    (judge, batch_started, open)
}

type Gate = std::sync::mpsc::Sender<()>;

/// Name, number of pairs, their completions, batch limit, and expected batch sizes.
type Case<'a> = (&'a str, u64, &'a [&'a str], usize, &'a [usize]);

#[tokio::test]
async fn queued_pairs_are_judged_in_batches_and_keep_their_order() {
    let three = ["a", "b", "c"];
    let cases: [Case<'_>; 5] = [
        ("ten comparisons by four", 10, &["a", "b"], 4, &[4, 4, 2]),
        ("one by one", 3, &["a", "b"], 1, &[1, 1, 1]),
        ("all at once", 10, &["a", "b"], 64, &[10]),
        ("a pair is split over batches", 5, &three, 7, &[7, 7, 1]),
        ("a pair larger than a batch", 2, &three, 2, &[2, 2, 2]),
    ];
    for (name, count, texts, max_batch, expected) in cases {
        let mut harness = Harness::new();
        harness.completions = texts.len();
        (0..count).for_each(|id| harness.send(pair(id, texts)));
        harness.close();
        let judge = even();
        let calls = judge.calls();
        harness.run(judge, max_batch).await.expect(name);
        assert_eq!(calls.recorded(), expected, "{name}");
        assert_eq!(
            harness.labelled_ids(),
            (0..count).collect::<Vec<_>>(),
            "{name}"
        );
        assert_eq!(harness.stage_counters(), [count, count, 0, 0], "{name}");
        assert_eq!(harness.pair_counts().acknowledged, count, "{name}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_batch_waits_at_most_max_wait_from_its_first_request() {
    let harness = Harness::new();
    let judge = FakeReplica::even();
    let batches = judge.batches();
    let client = async {
        harness.send_all(0..1);
        sleep(Duration::from_millis(1)).await;
        harness.send_all(1..2);
        // After the deadline of the first pair, before that of the second.
        sleep(Duration::from_micros(2500)).await;
        harness.send_all(2..3);
        for id in 0..3 {
            let labelled = harness
                .labelled
                .1
                .receive()
                .await
                .expect("the service runs");
            assert_eq!(labelled.message().pair.id(), PromptId(id));
            labelled.acknowledge();
        }
        harness.shutdown.send_replace(true);
    };
    let (ended, ()) = tokio::join!(harness.run_with(pool([judge], settings(64))), client);
    ended.expect("it was stopped");
    assert_eq!(batches.sizes(), [2, 1]);
}

#[tokio::test]
async fn a_labelled_pair_carries_labels_judge_and_verdicts_of_evaluations() {
    let mut harness = Harness::new();
    harness.completions = 3;
    let train = pair(0, &["a", "b", "c"]);
    let mut evaluate = pair(1, &["b", "a"]);
    evaluate.prompt.purpose = Purpose::Evaluate;
    harness.send(train.clone());
    harness.send(evaluate.clone());
    harness.close();
    let judge = FakeJudge::answering(|comparison| {
        let is_first = comparison.first.text < comparison.second.text;
        preferred(if is_first { 1.0 } else { 0.25 })
    });
    let gold = FakeJudge::answering(|_| preferred(0.125)).antisymmetric();
    let parts = PreferenceServiceParts {
        evaluation: vec![EvaluationJudge::new(
            messages::GOLD.into(),
            thread_pool(gold, 64),
        )],
        ..harness.parts(thread_pool(judge, 64))
    };
    let service = PreferenceService::new(parts);
    service
        .run(harness.shutdown.subscribe())
        .await
        .expect("the stream ended");

    let [trained, evaluated] = &take_all(&harness.labelled.1)[..] else {
        panic!("two pairs were sent");
    };
    let labels = |labelled: &LabelledPair| -> Vec<(u16, u16, f32)> {
        labelled
            .labels
            .iter()
            .map(|l| (l.first, l.second, l.p.get()))
            .collect()
    };
    assert_eq!(trained.pair, train);
    assert_eq!(labels(trained), [(0, 1, 1.0), (0, 2, 1.0), (1, 2, 1.0)]);
    assert_eq!(
        (trained.judge.as_str(), trained.judge_version),
        ("fake", JudgeVersion(7))
    );
    assert_eq!(trained.verdicts, []);
    assert_eq!(evaluated.pair, evaluate);
    assert_eq!(
        labels(evaluated),
        [(0, 1, 0.125)],
        "the mean of 0.25 and 1 - 1"
    );
    assert_eq!(
        evaluated.gold().map(messages::Probability::get),
        Some(0.125)
    );
}

#[tokio::test]
async fn unlabelled_pairs_are_dropped_with_a_reason_and_not_retried() {
    let mut harness = Harness::new();
    harness.send(pair(0, &["a", "!"]));
    harness.send_all(1..2);
    harness.send(pair(2, &["a", "?"]));
    harness.send(pair(3, &["alone"]));
    harness.send_all(4..6);
    harness.close();
    let judge = FakeJudge::new(|batch| {
        if batch.iter().any(|c| c.second.text == "!") {
            return Err(JudgeError::permanent("permanent"));
        }
        let verdict = |second: &str| match second {
            "?" => abstained("abstains"),
            _ => preferred(0.5),
        };
        Ok(batch.iter().map(|c| verdict(&c.second.text)).collect())
    });
    let calls = judge.calls();
    harness
        .run(judge, 2)
        .await
        .expect("failures cost only their pairs");

    let single = "the pair has 1 completions; the settings ask for 2";
    let expected = [
        (0, DropReason::Abstained, "completions 0 and 1: permanent"),
        (2, DropReason::Abstained, "completions 0 and 1: abstains"),
        (3, DropReason::Invalid, single),
    ];
    let expected = expected.map(|(id, reason, detail)| (id, reason, detail.to_owned()));
    assert_eq!(harness.notes(), expected);
    assert_eq!(harness.labelled_ids(), [1, 4, 5]);
    assert_eq!(
        calls.recorded(),
        [2, 2, 1, 1, 1],
        "the two of the first batch are retried alone"
    );
    assert_eq!(harness.stage_counters(), [6, 3, 3, 0]);
    assert_eq!(harness.pair_counts().acknowledged, 6);
}

/// An alteration that makes a pair invalid, and part of the reason.
type InvalidCase = (fn(&mut Pair), &'static str);

#[tokio::test]
async fn invalid_pairs_are_rejected_and_neither_judged_nor_collected() {
    let mut harness = Harness::new();
    let altered = |id, alter: fn(&mut Pair)| {
        let mut pair = pair(id, &["a", "b"]);
        alter(&mut pair);
        pair
    };
    let cases: [InvalidCase; 6] = [
        (|p| p.completions[1].ids = vec![8], "token 8"),
        (|p| p.completions[0].logp[0] = f32::NAN, "must be finite"),
        (|p| p.version.step = u64::MAX, "newest announced weights"),
        (|p| p.version.session = u64::MAX, "newest announced weig"),
        (
            |p| p.completions = vec![p.completions[0].clone(); 70_000],
            "has 70000 completions",
        ),
        (
            |p| {
                p.prompt.purpose = Purpose::Apo;
                p.prompt.ids.clear();
            },
            "the prompt has 0 tokens",
        ),
    ];
    for (id, (alter, _)) in cases.iter().enumerate() {
        harness.send(altered(id as u64, *alter));
    }
    harness.send_all(6..7);
    harness.close();
    let judge = even();
    let calls = judge.calls();
    harness.run(judge, 4).await.expect("they end nothing");
    assert_eq!(calls.recorded(), [1]);
    let notes = harness.notes();
    assert_eq!(notes.len(), cases.len());
    for ((id, reason, detail), (_, expected)) in notes.into_iter().zip(cases) {
        assert_eq!(reason, DropReason::Invalid, "{id}");
        assert!(detail.contains(expected), "{id}: {detail}");
    }
    assert_eq!(harness.labelled_ids(), [6]);
    assert_eq!(harness.stage_counters(), [7, 1, 6, 0]);
    assert_eq!(harness.pair_counts().acknowledged, 7);
}

#[tokio::test]
async fn a_panic_of_the_last_judge_ends_the_service_and_returns_its_pairs() {
    let mut harness = Harness::new();
    harness.send_all(0..3);
    harness.close();
    let mut calls = 0;
    let judge = FakeJudge::new(move |batch| {
        calls += 1;
        assert!(calls < 2, "call {calls}");
        Ok(vec![preferred(0.5); batch.len()])
    });
    let error = harness
        .run(judge, 2)
        .await
        .expect_err("it panicked")
        .to_string();
    assert!(
        error.contains("the judge fake has no replica left: preference-judge: it panicked: call 2"),
        "{error}"
    );
    assert_eq!(harness.stage_counters(), [2, 2, 0, 0]);

    harness.run(even(), 2).await.expect("the stream ended");
    assert_eq!(harness.labelled_ids(), [0, 1, 2]);
    assert_eq!(harness.stage_counters(), [3, 3, 0, 0]);
}

#[tokio::test]
async fn a_pair_on_which_every_judge_panics_is_dropped_with_a_note() {
    let mut harness = Harness::with_deliveries(2);
    harness.send_all(0..1);
    harness.close();
    for _ in 0..2 {
        let judge = FakeJudge::answering(|_| panic!("not this one"));
        harness.run(judge, 4).await.expect_err("it panicked");
    }
    harness.run(even(), 4).await.expect("the stream ended");
    let note = (
        0,
        DropReason::Failed,
        "no label after 2 deliveries".to_owned(),
    );
    assert_eq!(harness.notes(), [note]);
    assert_eq!(harness.labelled_ids(), [0; 0]);
    assert_eq!(harness.stage_counters(), [1, 0, 1, 0]);
}

#[tokio::test]
async fn a_rebuilt_judge_loses_only_the_pair_on_which_it_panics() {
    let mut harness = Harness::new();
    harness.send_all(0..2);
    harness.send(pair(2, &["a", "!"]));
    harness.send_all(3..4);
    harness.close();
    let judge = || {
        FakeJudge::answering(|comparison| {
            assert!(comparison.second.text != "!", "permanent");
            preferred(0.5)
        })
    };
    let rebuild: Rebuild = Arc::new(move || Ok(Box::new(judge()) as Box<dyn Judge>));
    let judges =
        JudgeReplicas::on_threads(vec![Box::new(judge())], Some(&rebuild)).expect("a thread");
    let settings = PoolSettings {
        max_retries: 1,
        circuit_probe: Duration::from_millis(1),
        ..settings(4)
    };
    harness
        .run_with(JudgePool::new(judges, settings))
        .await
        .expect("the stream ended");
    let note = "the judge fake failed: it panicked: permanent".to_owned();
    assert_eq!(harness.notes(), [(2, DropReason::Failed, note)]);
    assert_eq!(harness.labelled_ids(), [0, 1, 3]);
    assert_eq!(harness.stage_counters(), [4, 3, 1, 0]);
}

#[tokio::test(start_paused = true)]
async fn during_an_outage_pairs_wait_and_the_wait_is_named() {
    let mut harness = Harness::new();
    harness.send_all(0..40);
    harness.close();
    let failures = (0..12).map(|_| JudgeError::new("no route"));
    let judge = pool([FakeReplica::failing(failures)], settings(8));
    let mut outage = judge.outage();
    let service = PreferenceService::new(harness.parts(judge));
    let waits = service.waits();
    let watching = async {
        outage
            .wait_for(Option::is_some)
            .await
            .expect("the pool lives");
        // Lets the service observe the change too.
        tokio::task::yield_now().await;
        let reasons: Vec<_> = waits.current().iter().map(|wait| wait.reason).collect();
        assert_eq!(reasons, ["a judge: every circuit is open"]);
        outage
            .wait_for(Option::is_none)
            .await
            .expect("the pool lives");
    };
    let (ended, ()) = tokio::join!(service.run(harness.shutdown.subscribe()), watching);
    ended.expect("the stream ended");
    assert_eq!(harness.notes(), []);
    assert_eq!(harness.labelled_ids(), (0..40).collect::<Vec<_>>());
    assert_eq!(harness.stage_counters(), [40, 40, 0, 0]);
}

#[tokio::test(start_paused = true)]
async fn pairs_in_flight_are_limited_by_max_queue() {
    let harness = Harness::new();
    harness.send_all(0..10);
    let narrow = PoolSettings {
        max_queue: 3,
        ..settings(1)
    };
    let judge = FakeReplica::even().delay(Duration::from_secs(1));
    let service = PreferenceService::new(harness.parts(pool([judge], narrow)));
    let watching = async {
        for _ in 0..10 {
            assert!(
                harness.pair_counts().in_flight <= 3,
                "{:?}",
                harness.pair_counts()
            );
            let labelled = harness
                .labelled
                .1
                .receive()
                .await
                .expect("the service runs");
            labelled.acknowledge();
        }
        harness.shutdown.send_replace(true);
    };
    let (ended, ()) = tokio::join!(service.run(harness.shutdown.subscribe()), watching);
    ended.expect("it was stopped");
    assert_eq!(harness.stage_counters(), [10, 10, 0, 0]);
}

#[tokio::test]
async fn a_service_cancelled_during_a_batch_returns_its_pairs() {
    let mut harness = Harness::new();
    harness.send_all(0..4);
    harness.close();
    let (judge, mut batch_started, gate) = gated();
    tokio::select! {
        biased;
        ended = harness.run(judge, 3) => panic!("it ended: {ended:?}"),
        started = batch_started.recv() => assert_eq!(started, Some(())),
    }
    drop(gate);
    assert_eq!(harness.labelled_ids(), [0; 0]);
    assert_eq!(
        (
            harness.pair_counts().in_flight,
            harness.pair_counts().queued
        ),
        (0, 4)
    );

    harness.run(even(), 3).await.expect("the stream ended");
    assert_eq!(harness.labelled_ids(), [0, 1, 2, 3]);
    assert_eq!(harness.stage_counters(), [4, 4, 0, 0]);
}

#[tokio::test]
async fn a_shutdown_finishes_received_pairs_and_receives_no_more() {
    let harness = Harness::new();
    harness.send_all(0..2);
    let (judge, mut batch_started, gate) = gated();
    let service = PreferenceService::new(harness.parts(thread_pool(judge, 2)));
    let waits = service.waits();
    let stop = async {
        batch_started.recv().await.expect("the judge is called");
        let waited: Vec<_> = waits.current().iter().map(|wait| wait.reason).collect();
        assert_eq!(waited, ["verdicts"]);
        harness.send_all(2..3);
        harness.shutdown.send_replace(true);
        gate.send(()).expect("the judge waits");
    };
    let (ended, ()) = tokio::join!(service.run(harness.shutdown.subscribe()), stop);
    ended.expect("it was stopped");
    assert_eq!(harness.labelled_ids(), [0, 1]);
    assert_eq!(harness.stage_counters(), [2, 2, 0, 0]);
    assert_eq!(
        harness.pair_counts().queued,
        1,
        "the third was not received"
    );
    assert!(waits.current().is_empty());
}

#[tokio::test]
async fn pairs_received_beyond_a_batch_are_judged_before_a_shutdown() {
    let mut harness = Harness::new();
    harness.completions = 3;
    (0..2).for_each(|id| harness.send(pair(id, &["a", "b", "c"])));
    let (judge, mut batch_started, gate) = gated();
    let calls = judge.calls();
    let stop = async {
        batch_started.recv().await.expect("the judge is called");
        assert_eq!(harness.stage_counters(), [2, 0, 0, 2]);
        harness.shutdown.send_replace(true);
        drop(gate);
    };
    let (ended, ()) = tokio::join!(harness.run(judge, 4), stop);
    ended.expect("it was stopped");
    assert_eq!(calls.recorded(), [4, 2]);
    assert_eq!(harness.labelled_ids(), [0, 1]);
}

#[tokio::test]
async fn a_dropped_shutdown_sender_stops_the_service() {
    let harness = Harness::new();
    let (shutdown, receiver) = watch::channel(false);
    drop(shutdown);
    let service = PreferenceService::new(harness.parts(thread_pool(even(), 4)));
    let task = tokio::spawn(service.run(receiver));
    task.await.expect("no panic").expect("it was stopped");
}

#[tokio::test]
async fn a_pair_whose_label_has_no_receiver_is_not_acknowledged() {
    for (shutdown, expected) in [(false, Some(ClosedBy::Receivers)), (true, None)] {
        let mut harness = Harness::new();
        let (labelled, receiver) = stream("labelled pairs", 1);
        harness.labelled.0 = labelled;
        drop(receiver);
        harness.send_all(0..2);
        let (judge, mut batch_started, gate) = gated();
        let stop = async {
            batch_started.recv().await.expect("the judge is called");
            harness.shutdown.send_replace(shutdown);
            drop(gate);
        };
        let (ended, ()) = tokio::join!(harness.run(judge, 2), stop);
        let cause = ended.err().map(|error| match error {
            PreferenceError::Transport(TransportError::Closed(closed)) => closed.cause,
            other => panic!("{other}"),
        });
        assert_eq!(cause, expected);
        let counts = harness
            .pairs_receiver
            .counts()
            .await
            .expect("it is in memory");
        assert_eq!((counts.acknowledged, counts.queued), (0, 2));
        assert_eq!(harness.stage_counters(), [0; 4], "returned");
    }
}

#[test]
fn judge_metrics_are_published() {
    let mut harness = Harness::new();
    harness.send_all(0..3);
    harness.close();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap();
    let recording = Exporter::recorder_only();
    recording.during(|| {
        runtime
            .block_on(harness.run(even(), 2))
            .expect("the stream ended");
    });
    let page = recording.render();
    for line in [
        "agon_judge_batch_size{role=\"preference\",judge=\"fake\"} 1.5",
        "agon_judge_tie_rate{role=\"preference\",judge=\"fake\"} 1",
        "agon_judge_latency_seconds_count{role=\"preference\",judge=\"fake\"} 3",
        "agon_stage_emitted_total{stage=\"preference\"} 3",
        "agon_wait_seconds_count{role=\"preference\",reason=\"room for labels\"} 3",
    ] {
        assert!(
            page.lines().any(|l| l == line),
            "no line {line:?} in\n{page}"
        );
    }
}
