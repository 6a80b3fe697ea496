//! The promises of the service, seen from its streams.

use std::num::{NonZeroU32, NonZeroUsize};

use std::time::Duration;

use futures_util::FutureExt;
use messages::{DropReason, JudgeVersion, PromptId, Purpose};
use telemetry::Exporter;
use tokio::time::sleep;
use transport::{ClosedBy, Counts, Limits, stream, stream_within};

use super::*;
use crate::bench::fake::{self, FakeReplica, bench};
use crate::bench::{BenchSettings, Judges, Rebuild};
use crate::judge::fake::{FakeJudge, abstained, pair, preferred};
use crate::{Judge, JudgeError};

/// The streams around a service, and what is needed to start one.
struct House {
    pairs: Option<Sender<Pair>>,
    intake: Receiver<Pair>,
    labelled: (Sender<LabelledPair>, Receiver<LabelledPair>),
    drops: (Sender<Dropped>, Receiver<Dropped>),
    counters: Arc<StationCounters>,
    shutdown: watch::Sender<bool>,
}

impl House {
    fn with_deliveries(max_deliveries: u32) -> Self {
        let limits = Limits {
            capacity: NonZeroUsize::new(64).unwrap(),
            max_deliveries: NonZeroU32::new(max_deliveries).unwrap(),
        };
        let (pairs, intake) = stream_within("pairs", limits);
        Self {
            pairs: Some(pairs),
            intake,
            labelled: stream("labelled pairs", 64),
            drops: stream("drops", 64),
            counters: Arc::new(StationCounters::new(Station::Preference)),
            shutdown: watch::Sender::new(false),
        }
    }

    fn new() -> Self {
        Self::with_deliveries(5)
    }

    fn send(&self, pair: Pair) {
        let pairs = self.pairs.as_ref().expect("the stream is open");
        let sent = pairs.send(pair).now_or_never();
        sent.expect("there is a place").expect("the stream is open");
    }

    /// Sends pairs of the completions "a" and "b" with these ids.
    fn send_all(&self, ids: std::ops::Range<u64>) {
        ids.for_each(|id| self.send(pair(id, &["a", "b"])));
    }

    /// What the stream of pairs says of itself.
    fn intake(&self) -> Counts {
        let counts = self.intake.counts().now_or_never();
        counts.expect("at once").expect("it is in memory")
    }

    fn close(&mut self) {
        self.pairs = None;
    }

    fn parts(&self, judge: Bench) -> PreferenceParts {
        PreferenceParts {
            player: None,
            judge,
            gold: None,
            orders: OrdersSetting::Auto,
            pairs: self.intake.clone(),
            labelled: self.labelled.0.clone(),
            drops: self.drops.0.clone(),
            counters: Arc::clone(&self.counters),
        }
    }

    async fn run(&self, judge: FakeJudge, max_batch: usize) -> Result<(), PreferenceError> {
        self.run_with(computing(judge, max_batch)).await
    }

    async fn run_with(&self, judge: Bench) -> Result<(), PreferenceError> {
        let service = Preference::new(self.parts(judge));
        service.run(self.shutdown.subscribe()).await
    }

    /// The ids of the labelled pairs that came out, in order.
    fn labelled_ids(&self) -> Vec<u64> {
        take_all(&self.labelled.1)
            .iter()
            .map(|l| l.pair.id().0)
            .collect()
    }

    /// Ids, reasons and details of the drop notes that came out, in order.
    fn notes(&self) -> Vec<(u64, DropReason, String)> {
        take_all(&self.drops.1)
            .into_iter()
            .inspect(|note| assert_eq!(note.station, Station::Preference))
            .map(|note| (note.prompt.0, note.reason, note.detail))
            .collect()
    }

    /// Taken, given, dropped and in hand; the books must balance.
    fn books(&self) -> [u64; 4] {
        let books = self.counters.snapshot();
        assert!(books.is_conserved(), "{books:?}");
        [
            books.taken,
            books.given,
            books.total_dropped(),
            books.in_hand,
        ]
    }
}

fn take_all<T>(receiver: &Receiver<T>) -> Vec<T>
where
    T: messages::wire::Message + Clone + Send + Sync + 'static,
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

/// A bench with one judge on its thread, which is not made again.
fn computing(judge: FakeJudge, max_batch: usize) -> Bench {
    let judges = Judges::computing(vec![Box::new(judge)], None).expect("a thread");
    Bench::new(judges, settings(max_batch))
}

/// No verdict is remembered: all these pairs look alike.
fn settings(max_batch: usize) -> BenchSettings {
    BenchSettings {
        max_batch,
        ..fake::settings()
    }
}

fn even() -> FakeJudge {
    FakeJudge::answering(|_| preferred(0.5))
}

/// A judge that says when it is asked, and answers when it is let.
fn gated() -> (FakeJudge, tokio::sync::mpsc::UnboundedReceiver<()>, Sluice) {
    let (asked, is_asked) = tokio::sync::mpsc::unbounded_channel();
    let (open, opened) = std::sync::mpsc::channel::<()>();
    let judge = FakeJudge::new(move |batch| {
        asked.send(()).ok();
        opened.recv().ok();
        Ok(vec![preferred(0.5); batch.len()])
    });
    (judge, is_asked, open)
}

type Sluice = std::sync::mpsc::Sender<()>;

/// A name, how many pairs of which completions, the limit and the sizes of the judge's calls.
type Case<'a> = (&'a str, u64, &'a [&'a str], usize, &'a [usize]);

#[tokio::test]
async fn pairs_that_wait_are_judged_in_batches_up_to_the_limit_and_keep_their_order() {
    let three = ["a", "b", "c"];
    let cases: [Case<'_>; 5] = [
        ("ten comparisons by four", 10, &["a", "b"], 4, &[4, 4, 2]),
        ("one by one", 3, &["a", "b"], 1, &[1, 1, 1]),
        ("all at once", 10, &["a", "b"], 64, &[10]),
        ("a pair is parted for company", 5, &three, 7, &[7, 7, 1]),
        ("a pair larger than a batch", 2, &three, 2, &[2, 2, 2]),
    ];
    for (name, count, texts, max_batch, expected) in cases {
        let mut house = House::new();
        (0..count).for_each(|id| house.send(pair(id, texts)));
        house.close();
        let judge = even();
        let calls = judge.calls();
        house.run(judge, max_batch).await.expect(name);
        assert_eq!(calls.recorded(), expected, "{name}");
        assert_eq!(
            house.labelled_ids(),
            (0..count).collect::<Vec<_>>(),
            "{name}"
        );
        assert_eq!(house.books(), [count, count, 0, 0], "{name}");
        assert_eq!(house.intake().acknowledged, count, "{name}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_batch_waits_for_company_no_longer_than_it_may() {
    let house = House::new();
    let judge = FakeReplica::even();
    let asked = judge.asked();
    let visitors = async {
        house.send_all(0..1);
        sleep(Duration::from_millis(1)).await;
        house.send_all(1..2);
        // Later than the first may wait, though not than the second might.
        sleep(Duration::from_micros(2500)).await;
        house.send_all(2..3);
        for id in 0..3 {
            let labelled = house.labelled.1.receive().await.expect("the service runs");
            assert_eq!(labelled.message().pair.id(), PromptId(id));
            labelled.acknowledge();
        }
        house.shutdown.send_replace(true);
    };
    let (ended, ()) = tokio::join!(house.run_with(bench([judge], settings(64))), visitors);
    ended.expect("it was stopped");
    assert_eq!(asked.sizes(), [2, 1]);
}

#[tokio::test]
async fn a_labelled_pair_carries_all_that_was_said_of_it() {
    let mut house = House::new();
    let train = pair(0, &["a", "b", "c"]);
    let mut evaluate = pair(1, &["b", "a"]);
    evaluate.prompt.purpose = Purpose::Evaluate;
    house.send(train.clone());
    house.send(evaluate.clone());
    house.close();
    let judge = FakeJudge::answering(|comparison| {
        let is_first = comparison.first.text < comparison.second.text;
        preferred(if is_first { 1.0 } else { 0.25 })
    });
    let gold = FakeJudge::answering(|_| preferred(0.125)).antisymmetric();
    let parts = PreferenceParts {
        gold: Some(computing(gold, 64)),
        ..house.parts(computing(judge, 64))
    };
    let service = Preference::new(parts);
    service
        .run(house.shutdown.subscribe())
        .await
        .expect("the stream ended");

    let [trained, evaluated] = &take_all(&house.labelled.1)[..] else {
        panic!("two pairs went in");
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
    assert_eq!(trained.gold, None);
    assert_eq!(evaluated.pair, evaluate);
    assert_eq!(
        labels(evaluated),
        [(0, 1, 0.125)],
        "the mean of 0.25 and 1 - 1"
    );
    assert_eq!(evaluated.gold.map(messages::Probability::get), Some(0.125));
}

#[tokio::test]
async fn what_is_not_judged_is_dropped_with_its_reason_and_never_asked_again() {
    let mut house = House::new();
    house.send(pair(0, &["a", "!"]));
    house.send_all(1..2);
    house.send(pair(2, &["a", "?"]));
    house.send(pair(3, &["alone"]));
    house.send_all(4..6);
    house.close();
    let judge = FakeJudge::new(|batch| {
        if batch.iter().any(|c| c.second.text == "!") {
            return Err(JudgeError::permanent("too loud"));
        }
        let verdict = |second: &str| match second {
            "?" => abstained("no words"),
            _ => preferred(0.5),
        };
        Ok(batch.iter().map(|c| verdict(&c.second.text)).collect())
    });
    let calls = judge.calls();
    house
        .run(judge, 2)
        .await
        .expect("failures cost their pairs");

    let single = "the pair has 1 completions; from 2 to 65535 can be compared";
    let expected = [
        (0, DropReason::Abstained, "completions 0 and 1: too loud"),
        (2, DropReason::Abstained, "completions 0 and 1: no words"),
        (3, DropReason::Failed, single),
    ];
    let expected = expected.map(|(id, reason, detail)| (id, reason, detail.to_owned()));
    assert_eq!(house.notes(), expected);
    assert_eq!(house.labelled_ids(), [1, 4, 5]);
    assert_eq!(
        calls.recorded(),
        [2, 2, 1, 1, 1],
        "the two of the first batch again, each alone"
    );
    assert_eq!(house.books(), [6, 3, 3, 0]);
    assert_eq!(house.intake().acknowledged, 6);
}

#[tokio::test]
async fn a_panic_of_the_last_judge_ends_the_service_and_its_pairs_wait_for_the_next() {
    let mut house = House::new();
    house.send_all(0..3);
    house.close();
    let mut asked = 0;
    let judge = FakeJudge::new(move |batch| {
        asked += 1;
        assert!(asked < 2, "asked {asked} times");
        Ok(vec![preferred(0.5); batch.len()])
    });
    let error = house
        .run(judge, 2)
        .await
        .expect_err("it panicked")
        .to_string();
    assert!(
        error.contains("the judge fake is gone: preference-judge: it panicked: asked 2 times"),
        "{error}"
    );
    assert_eq!(house.books(), [2, 2, 0, 0]);

    house.run(even(), 2).await.expect("the stream ended");
    assert_eq!(house.labelled_ids(), [0, 1, 2]);
    assert_eq!(house.books(), [3, 3, 0, 0]);
}

#[tokio::test]
async fn a_pair_on_which_every_judge_panics_is_given_up_with_a_note() {
    let mut house = House::with_deliveries(2);
    house.send_all(0..1);
    house.close();
    for _ in 0..2 {
        let judge = FakeJudge::answering(|_| panic!("not this one"));
        house.run(judge, 4).await.expect_err("it panicked");
    }
    house.run(even(), 4).await.expect("the stream ended");
    let note = (
        0,
        DropReason::Failed,
        "no label after 2 deliveries".to_owned(),
    );
    assert_eq!(house.notes(), [note]);
    assert_eq!(house.labelled_ids(), [0; 0]);
    assert_eq!(house.books(), [1, 0, 1, 0]);
}

#[tokio::test]
async fn a_judge_that_is_made_again_spares_all_pairs_but_the_one_on_which_it_panics() {
    let mut house = House::new();
    house.send_all(0..2);
    house.send(pair(2, &["a", "!"]));
    house.send_all(3..4);
    house.close();
    let judge = || {
        FakeJudge::answering(|comparison| {
            assert!(comparison.second.text != "!", "too loud");
            preferred(0.5)
        })
    };
    let rebuild: Rebuild = Arc::new(move || Ok(Box::new(judge()) as Box<dyn Judge>));
    let judges = Judges::computing(vec![Box::new(judge())], Some(&rebuild)).expect("a thread");
    let settings = BenchSettings {
        max_retries: 1,
        circuit_probe: Duration::from_millis(1),
        ..settings(4)
    };
    house
        .run_with(Bench::new(judges, settings))
        .await
        .expect("the stream ended");
    let note = "the judge fake failed: it panicked: too loud".to_owned();
    assert_eq!(house.notes(), [(2, DropReason::Failed, note)]);
    assert_eq!(house.labelled_ids(), [0, 1, 3]);
    assert_eq!(house.books(), [4, 3, 1, 0]);
}

#[tokio::test(start_paused = true)]
async fn while_every_circuit_is_open_pairs_wait_and_the_wait_has_its_name() {
    let mut house = House::new();
    house.send_all(0..40);
    house.close();
    let away = (0..12).map(|_| JudgeError::new("no route"));
    let judge = bench([FakeReplica::failing(away)], settings(8));
    let mut outage = judge.outage();
    let service = Preference::new(house.parts(judge));
    let waits = service.waits();
    let watching = async {
        outage.wait_for(Option::is_some).await.expect("it goes on");
        // The service is told with us.
        tokio::task::yield_now().await;
        let reasons: Vec<_> = waits.current().iter().map(|wait| wait.reason).collect();
        assert_eq!(reasons, ["a judge: every circuit is open"]);
        outage.wait_for(Option::is_none).await.expect("it goes on");
    };
    let (ended, ()) = tokio::join!(service.run(house.shutdown.subscribe()), watching);
    ended.expect("the stream ended");
    assert_eq!(house.notes(), []);
    assert_eq!(house.labelled_ids(), (0..40).collect::<Vec<_>>());
    assert_eq!(house.books(), [40, 40, 0, 0]);
}

#[tokio::test(start_paused = true)]
async fn no_more_pairs_are_taken_than_questions_may_wait() {
    let house = House::new();
    house.send_all(0..10);
    let narrow = BenchSettings {
        max_queue: 3,
        ..settings(1)
    };
    let judge = FakeReplica::even().delay(Duration::from_secs(1));
    let service = Preference::new(house.parts(bench([judge], narrow)));
    let watching = async {
        for _ in 0..10 {
            assert!(house.intake().in_hand <= 3, "{:?}", house.intake());
            let labelled = house.labelled.1.receive().await.expect("the service runs");
            labelled.acknowledge();
        }
        house.shutdown.send_replace(true);
    };
    let (ended, ()) = tokio::join!(service.run(house.shutdown.subscribe()), watching);
    ended.expect("it was stopped");
    assert_eq!(house.books(), [10, 10, 0, 0]);
}

#[tokio::test]
async fn a_service_that_is_cancelled_in_the_middle_of_a_batch_loses_nothing() {
    let mut house = House::new();
    house.send_all(0..4);
    house.close();
    let (judge, mut is_asked, gate) = gated();
    tokio::select! {
        biased;
        ended = house.run(judge, 3) => panic!("it ended: {ended:?}"),
        asked = is_asked.recv() => assert_eq!(asked, Some(())),
    }
    drop(gate);
    assert_eq!(house.labelled_ids(), [0; 0]);
    assert_eq!((house.intake().in_hand, house.intake().queued), (0, 4));

    house.run(even(), 3).await.expect("the stream ended");
    assert_eq!(house.labelled_ids(), [0, 1, 2, 3]);
    assert_eq!(house.books(), [4, 4, 0, 0]);
}

#[tokio::test]
async fn a_shutdown_finishes_the_work_in_hand_and_takes_no_more() {
    let house = House::new();
    house.send_all(0..2);
    let (judge, mut is_asked, gate) = gated();
    let service = Preference::new(house.parts(computing(judge, 2)));
    let waits = service.waits();
    let stop = async {
        is_asked.recv().await.expect("the judge is asked");
        let waited: Vec<_> = waits.current().iter().map(|wait| wait.reason).collect();
        assert_eq!(waited, ["verdicts"]);
        house.send_all(2..3);
        house.shutdown.send_replace(true);
        gate.send(()).expect("the judge waits");
    };
    let (ended, ()) = tokio::join!(service.run(house.shutdown.subscribe()), stop);
    ended.expect("it was stopped");
    assert_eq!(house.labelled_ids(), [0, 1]);
    assert_eq!(house.books(), [2, 2, 0, 0]);
    assert_eq!(house.intake().queued, 1, "the third was not taken");
    assert!(waits.current().is_empty());
}

#[tokio::test]
async fn a_pair_that_was_taken_beyond_a_batch_is_judged_too_before_the_end() {
    let house = House::new();
    (0..2).for_each(|id| house.send(pair(id, &["a", "b", "c"])));
    let (judge, mut is_asked, gate) = gated();
    let calls = judge.calls();
    let stop = async {
        is_asked.recv().await.expect("the judge is asked");
        assert_eq!(house.books(), [2, 0, 0, 2]);
        house.shutdown.send_replace(true);
        drop(gate);
    };
    let (ended, ()) = tokio::join!(house.run(judge, 4), stop);
    ended.expect("it was stopped");
    assert_eq!(calls.recorded(), [4, 2]);
    assert_eq!(house.labelled_ids(), [0, 1]);
}

#[tokio::test]
async fn a_caller_that_is_gone_stops_the_service() {
    let house = House::new();
    let (shutdown, receiver) = watch::channel(false);
    drop(shutdown);
    let service = Preference::new(house.parts(computing(even(), 4)));
    let task = tokio::spawn(service.run(receiver));
    task.await.expect("no panic").expect("it was stopped");
}

#[tokio::test]
async fn a_pair_whose_label_nobody_takes_is_not_acknowledged() {
    for (asked_to_stop, expected) in [(false, Some(ClosedBy::Receivers)), (true, None)] {
        let mut house = House::new();
        let (labelled, receiver) = stream("labelled pairs", 1);
        house.labelled.0 = labelled;
        drop(receiver);
        house.send_all(0..2);
        let (judge, mut is_asked, gate) = gated();
        let stop = async {
            is_asked.recv().await.expect("the judge is asked");
            house.shutdown.send_replace(asked_to_stop);
            drop(gate);
        };
        let (ended, ()) = tokio::join!(house.run(judge, 2), stop);
        let cause = ended.err().map(|error| match error {
            PreferenceError::Transport(TransportError::Closed(closed)) => closed.cause,
            other => panic!("{other}"),
        });
        assert_eq!(cause, expected);
        let counts = house.intake.counts().await.expect("it is in memory");
        assert_eq!((counts.acknowledged, counts.queued), (0, 2));
        assert_eq!(house.books(), [0; 4], "given back");
    }
}

#[test]
fn the_judges_metrics_are_published_while_it_works() {
    let mut house = House::new();
    house.send_all(0..3);
    house.close();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap();
    let recording = Exporter::recorder_only();
    recording.during(|| {
        runtime
            .block_on(house.run(even(), 2))
            .expect("the stream ended");
    });
    let page = recording.render();
    for line in [
        "agon_judge_batch_size{role=\"preference\",judge=\"fake\"} 1.5",
        "agon_judge_tie_rate{role=\"preference\",judge=\"fake\"} 1",
        "agon_judge_latency_seconds_count{role=\"preference\",judge=\"fake\"} 3",
        "agon_station_given_total{station=\"preference\"} 3",
        "agon_wait_seconds_count{role=\"preference\",reason=\"room for labels\"} 3",
    ] {
        assert!(
            page.lines().any(|l| l == line),
            "no line {line:?} in\n{page}"
        );
    }
}
