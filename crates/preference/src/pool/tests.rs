//! The pool with fake replicas and paused time.

use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::future::join_all;
use messages::JudgeVersion;
use tokio::time::sleep;

use super::*;
use crate::error::JudgeError;
use crate::judge::Verdict;
use crate::judge::fake::{abstained, preferred};
use crate::pool::fake::{FakeReplica, judges, pool, request, settings};

const SECOND: Duration = Duration::from_secs(1);

/// `count` requests that differ.
fn requests(count: usize) -> Vec<ComparisonRequest> {
    (0..count)
        .map(|i| request(&i.to_string(), "other"))
        .collect()
}

/// Verdicts on all requests, in one order.
async fn verdicts(
    pool: &JudgePool,
    requests: &[ComparisonRequest],
) -> Vec<Result<Verdict, ComparisonError>> {
    let preferences = pool.compare_all(requests, Orders::One).await.into_iter();
    preferences
        .map(|r| r.map(|preference| preference.verdict))
        .collect()
}

fn failure() -> JudgeError {
    JudgeError::new("no route")
}

#[tokio::test(start_paused = true)]
async fn batches_are_sent_when_full_or_after_max_wait() {
    for (name, count, max_batch, expected, millis) in [
        ("full batches do not wait", 4, 2, &[2, 2][..], 0),
        ("the last waits", 5, 2, &[2, 2, 1], 10),
        ("all together", 3, 64, &[3], 10),
        ("one by one", 3, 1, &[1, 1, 1], 0),
    ] {
        let replica = FakeReplica::even();
        let batches = replica.batches();
        let waiting = PoolSettings {
            max_batch,
            max_wait: Duration::from_millis(10),
            ..settings()
        };
        let pool = pool([replica], waiting);
        let start = Instant::now();
        let actual = verdicts(&pool, &requests(count)).await;
        assert_eq!(actual, vec![Ok(preferred(0.5)); count], "{name}");
        assert_eq!(batches.sizes(), expected, "{name}");
        assert_eq!(start.elapsed().as_millis(), millis, "{name}");
    }
}

#[tokio::test(start_paused = true)]
async fn replicas_share_the_load_round_robin() {
    let replicas = [0, 1, 2].map(|_| FakeReplica::even().delay(SECOND));
    let batches = replicas.each_ref().map(FakeReplica::batches);
    let pool = pool(replicas, settings());
    let start = Instant::now();
    verdicts(&pool, &requests(6)).await;
    assert_eq!(start.elapsed(), 2 * SECOND, "three at a time");
    assert_eq!(batches.each_ref().map(|a| a.sizes().len()), [2, 2, 2]);
    for one in requests(3) {
        pool.compare(&one, Orders::One).await.expect("it answers");
    }
    assert_eq!(
        batches.each_ref().map(|a| a.sizes().len()),
        [3, 3, 3],
        "also for sequential requests"
    );
}

#[tokio::test(start_paused = true)]
async fn a_replica_gets_concurrent_batches_up_to_its_limit() {
    let replica = FakeReplica::even().delay(SECOND).concurrency(4);
    let pool = pool([replica], settings());
    let start = Instant::now();
    verdicts(&pool, &requests(8)).await;
    assert_eq!(start.elapsed(), 2 * SECOND);
}

#[tokio::test(start_paused = true)]
async fn both_orders_are_averaged() {
    let biased = || {
        FakeReplica::new(|batch| {
            let verdict = |q: &ComparisonRequest| match &*q.comparison().first.text {
                "?" => abstained("a question mark"),
                _ => preferred(0.75),
            };
            Ok(batch.iter().map(verdict).collect())
        })
    };
    let replica = biased();
    let batches = replica.batches();
    let together = PoolSettings {
        max_batch: 8,
        ..settings()
    };
    let pool = pool([replica], together);
    let preference = pool
        .compare(&request("a", "b"), Orders::Both)
        .await
        .unwrap();
    assert_eq!(preference.verdict, preferred(0.5));
    assert_eq!(preference.order_gap(), Some(0.5));
    assert_eq!(preference.version, JudgeVersion(7));
    assert_eq!(batches.texts(), [["a", "b"]], "one batch");
    let preference = pool
        .compare(&request("a", "?"), Orders::Both)
        .await
        .unwrap();
    assert_eq!(preference.verdict, abstained("a question mark"));
    let antisymmetric = JudgeReplicas {
        is_antisymmetric: true,
        ..judges([biased()])
    };
    let pool = JudgePool::new(antisymmetric, together);
    let preference = pool
        .compare(&request("a", "b"), Orders::Both)
        .await
        .unwrap();
    assert_eq!(preference.verdict, preferred(0.75), "one request");
}

#[tokio::test(start_paused = true)]
async fn a_repeated_request_is_answered_from_the_cache() {
    let replica = FakeReplica::new(|batch| {
        let verdict = |q: &ComparisonRequest| match &*q.comparison().second.text {
            "?" => abstained("a question mark"),
            _ => preferred(0.75),
        };
        Ok(batch.iter().map(verdict).collect())
    });
    let batches = replica.batches();
    let cached = PoolSettings {
        cache_size: 8,
        ..settings()
    };
    let pool = pool([replica], cached);
    let (plain, odd) = (request("a", "b"), request("a", "?"));
    for (orders, request, calls) in [
        (Orders::One, &plain, 1),
        (Orders::One, &plain, 1),
        (Orders::Both, &plain, 2),
        (Orders::Both, &plain.swapped(), 2),
        (Orders::One, &odd, 3),
        (Orders::One, &odd, 4),
    ] {
        pool.compare(request, orders).await.expect("it answers");
        assert_eq!(batches.sizes().len(), calls, "{orders:?} {request:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_failure_is_retried_on_another_replica() {
    let (bad, good) = (FakeReplica::failing([failure()]), FakeReplica::even());
    let (bad_batches, good_batches) = (bad.batches(), good.batches());
    let pool = pool([bad, good], settings());
    let start = Instant::now();
    let actual = verdicts(&pool, &requests(1)).await;
    assert_eq!(actual, [Ok(preferred(0.5))]);
    assert_eq!(
        (bad_batches.sizes(), good_batches.sizes()),
        (vec![1], vec![1])
    );
    assert!(start.elapsed() <= Duration::from_millis(100), "the base");
}

#[tokio::test(start_paused = true)]
async fn a_request_fails_only_while_the_judge_answers_others() {
    let odd = |batch: &[ComparisonRequest]| batch.iter().any(|q| q.comparison().first.text == "0");
    let replica = FakeReplica::new(move |batch| {
        if odd(batch) {
            Err(JudgeError::new("out of memory"))
        } else {
            Ok(vec![preferred(0.5); batch.len()])
        }
    });
    let batches = replica.batches();
    let pool = pool([replica], settings());
    let all = requests(2);
    let others = async {
        sleep(20 * SECOND).await;
        let tries = batches.sizes().len();
        assert!(tries > 4, "more than its retries: {tries}");
        loop {
            let others = verdicts(&pool, &all[1..]).await;
            assert_eq!(others, [Ok(preferred(0.5))]);
            sleep(SECOND).await;
        }
    };
    let failed = ComparisonError::JudgeFailed {
        judge: "fake".into(),
        reason: "out of memory".into(),
    };
    tokio::select! {
        odd = verdicts(&pool, &all[..1]) => assert_eq!(odd, [Err(failed)]),
        () = others => {}
    }
}

#[tokio::test(start_paused = true)]
async fn an_outage_does_not_use_up_retries() {
    let recovering = FakeReplica::failing((0..12).map(|_| failure()));
    let failing = || FakeReplica::new(|_| Err(failure()));
    let replicas = [failing(), recovering.delay(SECOND / 10), failing()];
    let no_retries = PoolSettings {
        max_retries: 0,
        circuit_probe: SECOND / 100,
        ..settings()
    };
    let pool = pool(replicas, no_retries);
    let actual = verdicts(&pool, &requests(40)).await;
    assert_eq!(actual, vec![Ok(preferred(0.5)); 40]);
}

#[tokio::test(start_paused = true)]
async fn a_permanent_failure_is_an_abstention_of_that_request_alone() {
    let replica = FakeReplica::new(|batch| {
        if batch.iter().any(|q| q.comparison().first.text == "1") {
            Err(JudgeError::permanent("too long"))
        } else {
            Ok(vec![preferred(0.5); batch.len()])
        }
    });
    let batches = replica.batches();
    let together = PoolSettings {
        max_batch: 3,
        ..settings()
    };
    let pool = pool([replica], together);
    let actual = verdicts(&pool, &requests(3)).await;
    let expected = [preferred(0.5), abstained("too long"), preferred(0.5)].map(Ok);
    assert_eq!(actual, expected);
    assert_eq!(batches.sizes(), [3, 1, 1, 1]);
}

#[tokio::test(start_paused = true)]
async fn a_rate_limited_replica_is_paused_without_using_up_retries() {
    let rate_limited =
        || JudgeError::rate_limited("too many requests").with_retry_after(7 * SECOND);
    let replica = FakeReplica::failing((0..10).map(|_| rate_limited()));
    let pool = pool([replica], settings());
    let start = Instant::now();
    let actual = verdicts(&pool, &requests(1)).await;
    assert_eq!(actual, [Ok(preferred(0.5))]);
    assert_eq!(start.elapsed(), 70 * SECOND);
    assert_eq!(*pool.outage().borrow(), None, "it answers");
}

#[tokio::test(start_paused = true)]
async fn a_judge_that_refuses_every_request_is_named_and_asked_less_often() {
    let replica = FakeReplica::new(|_| Err(JudgeError::rate_limited("quota exceeded")));
    let batches = replica.batches();
    let pool = pool([replica], settings());
    let mut outage = pool.outage();
    let all = requests(1);
    let late = pool.compare_within(600 * SECOND, &all, Orders::One);
    let watching = async {
        let outage = outage.wait_for(Option::is_some).await;
        outage.expect("the pool lives").clone().expect("an outage")
    };
    let (late, outage) = tokio::join!(late, watching);
    assert_eq!(outage.cause, OutageCause::Paused);
    assert_eq!(outage.wait_reason(), "a judge: its rate limit");
    assert_eq!(
        late.expect_err("no verdict").to_string(),
        "no answer within 600 s: the judge asks for a pause (fake: quota exceeded)"
    );
    // After 1, 3, 7, 15, 31 and 63 s, then once a minute.
    assert_eq!(batches.sizes().len(), 15);
}

#[tokio::test(start_paused = true)]
async fn the_position_bias_is_measured_in_training_and_in_both_orders() {
    let evaluation = |index: usize| {
        let mut pair = crate::judge::fake::pair(0, &[&index.to_string(), "other"]);
        pair.prompt.purpose = messages::Purpose::Evaluate;
        ComparisonRequest::new(Arc::new(pair), 0, 1)
    };
    let training = requests(40);
    let evaluations: Vec<_> = (0..40).map(evaluation).collect();
    for (name, requests, orders, is_antisymmetric, expected) in [
        ("in training", &training, Orders::One, false, Some("0.25")),
        (
            "in both orders",
            &evaluations,
            Orders::Both,
            false,
            Some("0.25"),
        ),
        ("the policy's first", &evaluations, Orders::One, false, None),
        ("by construction", &training, Orders::Both, true, None),
    ] {
        let biased = FakeReplica::new(|batch| Ok(vec![preferred(0.75); batch.len()]));
        let recording = telemetry::Exporter::recorder_only();
        let pool = JudgePool::new(
            JudgeReplicas {
                is_antisymmetric,
                ..judges([biased])
            },
            settings(),
        );
        let mut comparing = Box::pin(pool.compare_all(requests, orders));
        let done = std::future::poll_fn(|context| {
            let mut poll = None;
            recording.during(|| poll = Some(comparing.as_mut().poll(context)));
            poll.expect("it was polled")
        });
        done.await;
        let line = expected.map(|bias| {
            format!("agon_judge_position_bias{{role=\"preference\",judge=\"fake\"}} {bias}")
        });
        let page = recording.render();
        let found = page
            .lines()
            .find(|l| l.starts_with("agon_judge_position_bias{"));
        assert_eq!(found.map(str::to_owned), line, "{name}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_timeout_or_a_wrong_number_of_verdicts_is_a_failure() {
    let slow = FakeReplica::even().delay(61 * SECOND);
    let miscounting = FakeReplica::new(|_| Ok(vec![]));
    for (replica, reason) in [
        (slow, "fake: no answer within 60 s"),
        (miscounting, "fake: it gave 0 verdicts on 1 comparisons"),
    ] {
        let pool = pool([replica], settings());
        let mut outage = pool.outage();
        let all = requests(1);
        let reasons = async {
            let outage = outage
                .wait_for(Option::is_some)
                .await
                .expect("the pool lives");
            outage.clone().map(|outage| outage.reason)
        };
        tokio::select! {
            actual = verdicts(&pool, &all) => panic!("{actual:?}"),
            reason_seen = reasons => assert_eq!(reason_seen.as_deref(), Some(reason)),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn with_every_circuit_open_requests_wait_for_a_successful_probe() {
    let failures = || (0..8).map(|_| failure());
    let replicas = [
        FakeReplica::failing(failures()),
        FakeReplica::failing(failures()),
    ];
    let batches = replicas.each_ref().map(FakeReplica::batches);
    let pool = pool(replicas, settings());
    let mut outage = pool.outage();
    let start = Instant::now();
    let watching = async {
        outage
            .wait_for(Option::is_some)
            .await
            .expect("the pool lives");
        let calls = || batches.iter().map(|a| a.sizes().len()).sum::<usize>();
        assert_eq!(calls(), 10, "five consecutive failures each");
        sleep(4 * SECOND).await;
        assert_eq!(calls(), 10, "open circuits admit no request");
        outage
            .wait_for(Option::is_none)
            .await
            .expect("the pool lives");
        assert_eq!(start.elapsed(), 20 * SECOND, "the fourth probe is answered");
    };
    let all = requests(20);
    let (actual, ()) = tokio::join!(verdicts(&pool, &all), watching);
    assert_eq!(actual, vec![Ok(preferred(0.5)); 20], "nothing is lost");
}

#[tokio::test(start_paused = true)]
async fn a_dead_replica_loses_nothing_and_without_a_replica_requests_fail() {
    let dying = || {
        let mut calls = 0;
        FakeReplica::new(move |batch| {
            calls += 1;
            if calls == 3 {
                return Err(JudgeError::with_kind(
                    crate::error::JudgeErrorKind::Dead,
                    "it panicked: oh",
                ));
            }
            Ok(vec![preferred(0.5); batch.len()])
        })
    };
    let survivor = pool([dying(), FakeReplica::even()], settings());
    let actual = verdicts(&survivor, &requests(10)).await;
    assert_eq!(actual, vec![Ok(preferred(0.5)); 10]);

    let none = pool([dying()], settings());
    let actual = verdicts(&none, &requests(4)).await;
    let no_judge = || {
        Err(ComparisonError::NoJudge {
            judge: "fake".into(),
            reason: "fake: it panicked: oh".into(),
        })
    };
    let even = || Ok(preferred(0.5));
    assert_eq!(actual, [even(), even(), no_judge(), no_judge()]);
    assert_eq!(
        verdicts(&none, &requests(1)).await,
        [no_judge()],
        "later requests too"
    );
}

#[tokio::test(start_paused = true)]
async fn a_full_queue_blocks_compare_and_fails_compare_within() {
    let replica = FakeReplica::even().delay(SECOND);
    let narrow = PoolSettings {
        max_queue: 2,
        ..settings()
    };
    let pool = pool([replica], narrow);
    let all = requests(6);
    let stream = verdicts(&pool, &all);
    let client = async {
        sleep(SECOND / 2).await;
        // One is in flight, two are queued, three wait for admission.
        let result = pool.compare_within(SECOND, &all[..1], Orders::One).await;
        assert_eq!(result, Err(ComparisonError::QueueFull { waiting: 2 }));
        sleep(6 * SECOND).await;
        let larger_than_queue = pool.compare_within(20 * SECOND, &all, Orders::Both).await;
        assert_eq!(larger_than_queue.map(|all| all.len()), Ok(6));
    };
    let (actual, ()) = tokio::join!(stream, client);
    assert_eq!(actual, vec![Ok(preferred(0.5)); 6]);
}

#[tokio::test(start_paused = true)]
async fn a_timed_out_request_reports_the_outage_and_is_cancelled() {
    let replica = FakeReplica::failing((0..6).map(|_| failure()));
    let batches = replica.batches();
    let fragile = PoolSettings {
        circuit_failures: 1,
        ..settings()
    };
    let pool = pool([replica], fragile);
    let all = requests(1);
    let late = pool.compare_within(3 * SECOND, &all, Orders::One);
    let message = late.await.expect_err("no judge").to_string();
    assert_eq!(
        message,
        "no answer within 3 s: every circuit breaker of the judge is open (fake: no route)"
    );
    sleep(60 * SECOND).await;
    assert_eq!(batches.sizes().len(), 1, "it is cancelled");
    let slow = FakeReplica::even().delay(9 * SECOND);
    let pool = crate::pool::fake::pool([slow], settings());
    let late = pool.compare_within(3 * SECOND, &all, Orders::One);
    assert_eq!(
        late.await.expect_err("it times out").to_string(),
        "no answer within 3 s"
    );
}

#[tokio::test(start_paused = true)]
async fn replicas_are_replaced_without_blocking() {
    let (drop_guard, dropped) = tokio::sync::oneshot::channel::<()>();
    let old = FakeReplica::new(move |batch| {
        let _guard = &drop_guard;
        Ok(vec![preferred(0.25); batch.len()])
    });
    let cached = PoolSettings {
        cache_size: 8,
        ..settings()
    };
    let pool = pool([old.delay(SECOND)], cached);
    let all = requests(3);
    let replacing = async {
        sleep(SECOND / 2).await;
        let new = FakeReplica::new(|batch| Ok(vec![preferred(0.75); batch.len()]));
        let new = JudgeReplicas {
            version: Some(JudgeVersion(8)),
            ..judges([new])
        };
        pool.install(new);
        assert_eq!(pool.version(), Some(JudgeVersion(8)));
        verdicts(&pool, &all[..1]).await
    };
    let (before, after) = tokio::join!(verdicts(&pool, &all), replacing);
    assert_eq!(before, vec![Ok(preferred(0.25)); 3], "queued requests too");
    assert_eq!(after, [Ok(preferred(0.75))]);
    assert!(dropped.await.is_err(), "the old judge is dropped");
}

#[tokio::test(start_paused = true)]
async fn installing_replicas_ends_the_outage() {
    let failing = FakeReplica::new(|_| Err(failure()));
    let pool = pool([failing], settings());
    let mut outage = pool.outage();
    let all = requests(1);
    let next = async {
        outage
            .wait_for(Option::is_some)
            .await
            .expect("the pool lives");
        pool.install(judges([FakeReplica::even()]));
        assert_eq!(*outage.borrow(), None);
        verdicts(&pool, &all).await
    };
    tokio::select! {
        actual = verdicts(&pool, &all) => panic!("{actual:?}"),
        actual = next => assert_eq!(actual, [Ok(preferred(0.5))]),
    }
}

#[tokio::test(start_paused = true)]
async fn concurrent_callers_are_all_answered_by_flaky_replicas() {
    let calls = Arc::new(AtomicUsize::new(0));
    let replica = || {
        let calls = Arc::clone(&calls);
        let replica = FakeReplica::new(move |batch| {
            if calls.fetch_add(1, Ordering::Relaxed).is_multiple_of(5) {
                return Err(failure());
            }
            Ok(vec![preferred(0.5); batch.len()])
        });
        replica.delay(SECOND / 100).concurrency(3).max_batch(7)
    };
    let generous = PoolSettings {
        max_batch: 64,
        max_retries: 64,
        ..settings()
    };
    let pool = pool([replica(), replica(), replica()], generous);
    let callers = (0..1000).map(|i| {
        let pool = pool.clone();
        tokio::spawn(async move {
            let request = request(&i.to_string(), "other");
            pool.compare(&request, Orders::Both).await
        })
    });
    let preferences = join_all(callers.collect::<Vec<_>>()).await;
    let answered = preferences.into_iter().filter(|preference| {
        let preference = preference.as_ref().expect("no panic").as_ref();
        preference.is_ok_and(|preference| preference.verdict == preferred(0.5))
    });
    assert_eq!(answered.count(), 1000);
}
