//! The promises of the bench, seen from its door, with replicas that are not there and a clock that
//! only moves when everybody waits.

use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::future::join_all;
use messages::JudgeVersion;
use tokio::time::sleep;

use super::fake::{FakeReplica, bench, judges, question, settings};
use super::*;
use crate::judge::fake::{abstained, preferred};
use crate::{JudgeError, Verdict};

const SECOND: Duration = Duration::from_secs(1);

/// `count` questions that differ.
fn questions(count: usize) -> Vec<Question> {
    (0..count)
        .map(|i| question(&i.to_string(), "other"))
        .collect()
}

/// The verdicts of all of them, in one order.
async fn verdicts(bench: &Bench, questions: &[Question]) -> Vec<Result<Verdict, RulingError>> {
    let rulings = bench.rule_all(questions, Orders::One).await.into_iter();
    rulings.map(|r| r.map(|ruling| ruling.verdict)).collect()
}

fn failure() -> JudgeError {
    JudgeError::new("no route")
}

#[tokio::test(start_paused = true)]
async fn questions_are_asked_in_batches_that_wait_for_company_as_long_as_they_may() {
    for (name, count, max_batch, expected, millis) in [
        ("full batches wait for nobody", 4, 2, &[2, 2][..], 0),
        ("the last waits", 5, 2, &[2, 2, 1], 10),
        ("all together", 3, 64, &[3], 10),
        ("one by one", 3, 1, &[1, 1, 1], 0),
    ] {
        let replica = FakeReplica::even();
        let asked = replica.asked();
        let patient = BenchSettings {
            max_batch,
            max_wait: Duration::from_millis(10),
            ..settings()
        };
        let bench = bench([replica], patient);
        let begun = Instant::now();
        let seen = verdicts(&bench, &questions(count)).await;
        assert_eq!(seen, vec![Ok(preferred(0.5)); count], "{name}");
        assert_eq!(asked.sizes(), expected, "{name}");
        assert_eq!(begun.elapsed().as_millis(), millis, "{name}");
    }
}

#[tokio::test(start_paused = true)]
async fn replicas_share_the_work_and_take_turns() {
    let replicas = [0, 1, 2].map(|_| FakeReplica::even().delay(SECOND));
    let asked = replicas.each_ref().map(FakeReplica::asked);
    let bench = bench(replicas, settings());
    let begun = Instant::now();
    verdicts(&bench, &questions(6)).await;
    assert_eq!(begun.elapsed(), 2 * SECOND, "three at a time");
    assert_eq!(asked.each_ref().map(|a| a.sizes().len()), [2, 2, 2]);
    for one in questions(3) {
        bench.rule(&one, Orders::One).await.expect("it answers");
    }
    assert_eq!(
        asked.each_ref().map(|a| a.sizes().len()),
        [3, 3, 3],
        "also when one asks after the other"
    );
}

#[tokio::test(start_paused = true)]
async fn a_replica_is_at_as_many_batches_as_it_can_be() {
    let replica = FakeReplica::even().delay(SECOND).concurrency(4);
    let bench = bench([replica], settings());
    let begun = Instant::now();
    verdicts(&bench, &questions(8)).await;
    assert_eq!(begun.elapsed(), 2 * SECOND);
}

#[tokio::test(start_paused = true)]
async fn both_orders_are_asked_and_their_mean_is_the_ruling() {
    let for_the_first = || {
        FakeReplica::new(|batch| {
            let verdict = |q: &Question| match &*q.comparison().first.text {
                "?" => abstained("a question mark"),
                _ => preferred(0.75),
            };
            Ok(batch.iter().map(verdict).collect())
        })
    };
    let replica = for_the_first();
    let asked = replica.asked();
    let together = BenchSettings {
        max_batch: 8,
        ..settings()
    };
    let bench = bench([replica], together);
    let ruling = bench.rule(&question("a", "b"), Orders::Both).await.unwrap();
    assert_eq!(ruling.verdict, preferred(0.5));
    assert_eq!(ruling.order_gap(), Some(0.5));
    assert_eq!(ruling.version, JudgeVersion(7));
    assert_eq!(asked.batches(), [["a", "b"]], "one batch");
    let ruling = bench.rule(&question("a", "?"), Orders::Both).await.unwrap();
    assert_eq!(ruling.verdict, abstained("a question mark"));
    let antisymmetric = Judges {
        is_antisymmetric: true,
        ..judges([for_the_first()])
    };
    let bench = Bench::new(antisymmetric, together);
    let ruling = bench.rule(&question("a", "b"), Orders::Both).await.unwrap();
    assert_eq!(ruling.verdict, preferred(0.75), "asked once");
}

#[tokio::test(start_paused = true)]
async fn a_question_that_was_answered_is_not_asked_again() {
    let replica = FakeReplica::new(|batch| {
        let verdict = |q: &Question| match &*q.comparison().second.text {
            "?" => abstained("a question mark"),
            _ => preferred(0.75),
        };
        Ok(batch.iter().map(verdict).collect())
    });
    let asked = replica.asked();
    let remembering = BenchSettings {
        cache_size: 8,
        ..settings()
    };
    let bench = bench([replica], remembering);
    let (plain, odd) = (question("a", "b"), question("a", "?"));
    for (orders, question, calls) in [
        (Orders::One, &plain, 1),
        (Orders::One, &plain, 1),
        (Orders::Both, &plain, 2),
        (Orders::Both, &plain.swapped(), 2),
        (Orders::One, &odd, 3),
        (Orders::One, &odd, 4),
    ] {
        bench.rule(question, orders).await.expect("it answers");
        assert_eq!(asked.sizes().len(), calls, "{orders:?} {question:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_failure_is_tried_again_elsewhere() {
    let (bad, good) = (FakeReplica::failing([failure()]), FakeReplica::even());
    let (of_bad, of_good) = (bad.asked(), good.asked());
    let bench = bench([bad, good], settings());
    let begun = Instant::now();
    let seen = verdicts(&bench, &questions(1)).await;
    assert_eq!(seen, [Ok(preferred(0.5))]);
    assert_eq!((of_bad.sizes(), of_good.sizes()), (vec![1], vec![1]));
    assert!(begun.elapsed() <= Duration::from_millis(100), "the base");
}

#[tokio::test(start_paused = true)]
async fn a_question_is_given_up_only_when_the_judge_answers_others() {
    let odd = |batch: &[Question]| batch.iter().any(|q| q.comparison().first.text == "0");
    let replica = FakeReplica::new(move |batch| {
        if odd(batch) {
            Err(JudgeError::new("out of memory"))
        } else {
            Ok(vec![preferred(0.5); batch.len()])
        }
    });
    let asked = replica.asked();
    let bench = bench([replica], settings());
    let all = questions(2);
    let others = async {
        sleep(20 * SECOND).await;
        let tries = asked.sizes().len();
        assert!(tries > 4, "more than its retries: {tries}");
        loop {
            let others = verdicts(&bench, &all[1..]).await;
            assert_eq!(others, [Ok(preferred(0.5))]);
            sleep(SECOND).await;
        }
    };
    let failed = RulingError::Failed {
        judge: "fake".into(),
        reason: "out of memory".into(),
    };
    tokio::select! {
        odd = verdicts(&bench, &all[..1]) => assert_eq!(odd, [Err(failed)]),
        () = others => {}
    }
}

#[tokio::test(start_paused = true)]
async fn an_outage_costs_no_question_its_retries() {
    let once_back = FakeReplica::failing((0..12).map(|_| failure()));
    let never_back = || FakeReplica::new(|_| Err(failure()));
    let replicas = [never_back(), once_back.delay(SECOND / 10), never_back()];
    let hasty = BenchSettings {
        max_retries: 0,
        circuit_probe: SECOND / 100,
        ..settings()
    };
    let bench = bench(replicas, hasty);
    let seen = verdicts(&bench, &questions(40)).await;
    assert_eq!(seen, vec![Ok(preferred(0.5)); 40]);
}

#[tokio::test(start_paused = true)]
async fn what_can_never_be_answered_is_abstained_from_and_spares_its_company() {
    let replica = FakeReplica::new(|batch| {
        if batch.iter().any(|q| q.comparison().first.text == "1") {
            Err(JudgeError::permanent("too long"))
        } else {
            Ok(vec![preferred(0.5); batch.len()])
        }
    });
    let asked = replica.asked();
    let together = BenchSettings {
        max_batch: 3,
        ..settings()
    };
    let bench = bench([replica], together);
    let seen = verdicts(&bench, &questions(3)).await;
    let expected = [preferred(0.5), abstained("too long"), preferred(0.5)].map(Ok);
    assert_eq!(seen, expected);
    assert_eq!(asked.sizes(), [3, 1, 1, 1]);
}

#[tokio::test(start_paused = true)]
async fn a_judge_that_asks_for_time_gets_it_and_it_costs_no_retries() {
    let busy = || JudgeError::busy("too many requests", 7 * SECOND);
    let replica = FakeReplica::failing((0..10).map(|_| busy()));
    let bench = bench([replica], settings());
    let begun = Instant::now();
    let seen = verdicts(&bench, &questions(1)).await;
    assert_eq!(seen, [Ok(preferred(0.5))]);
    assert_eq!(begun.elapsed(), 70 * SECOND);
    assert_eq!(*bench.outage().borrow(), None, "it answers, if not this");
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_takes_too_long_or_counts_wrong_is_a_failure() {
    let slow = FakeReplica::even().delay(61 * SECOND);
    let miscounting = FakeReplica::new(|_| Ok(vec![]));
    for (replica, reason) in [
        (slow, "fake: no answer within 60 s"),
        (miscounting, "fake: it gave 0 verdicts on 1 comparisons"),
    ] {
        let bench = bench([replica], settings());
        let mut outage = bench.outage();
        let all = questions(1);
        let reasons = async {
            let outage = outage.wait_for(Option::is_some).await.expect("it goes on");
            outage.clone().map(|outage| outage.reason)
        };
        tokio::select! {
            seen = verdicts(&bench, &all) => panic!("{seen:?}"),
            told = reasons => assert_eq!(told.as_deref(), Some(reason)),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn with_every_circuit_open_questions_wait_until_a_probe_is_answered() {
    let away = || (0..8).map(|_| failure());
    let replicas = [FakeReplica::failing(away()), FakeReplica::failing(away())];
    let asked = replicas.each_ref().map(FakeReplica::asked);
    let bench = bench(replicas, settings());
    let mut outage = bench.outage();
    let begun = Instant::now();
    let watching = async {
        outage.wait_for(Option::is_some).await.expect("it goes on");
        let calls = || asked.iter().map(|a| a.sizes().len()).sum::<usize>();
        assert_eq!(calls(), 10, "five failures in a row of each");
        sleep(4 * SECOND).await;
        assert_eq!(calls(), 10, "they are left alone");
        outage.wait_for(Option::is_none).await.expect("it goes on");
        assert_eq!(begun.elapsed(), 20 * SECOND, "the fourth probe is answered");
    };
    let all = questions(20);
    let (seen, ()) = tokio::join!(verdicts(&bench, &all), watching);
    assert_eq!(seen, vec![Ok(preferred(0.5)); 20], "nothing is lost");
}

#[tokio::test(start_paused = true)]
async fn a_replica_that_is_gone_loses_nothing_and_the_last_one_is_told() {
    let dying = || {
        let mut calls = 0;
        FakeReplica::new(move |batch| {
            calls += 1;
            if calls == 3 {
                return Err(JudgeError::of(
                    crate::JudgeErrorKind::Dead,
                    "it panicked: oh",
                ));
            }
            Ok(vec![preferred(0.5); batch.len()])
        })
    };
    let survivor = bench([dying(), FakeReplica::even()], settings());
    let seen = verdicts(&survivor, &questions(10)).await;
    assert_eq!(seen, vec![Ok(preferred(0.5)); 10]);

    let none = bench([dying()], settings());
    let seen = verdicts(&none, &questions(4)).await;
    let gone = || {
        Err(RulingError::NoJudge {
            judge: "fake".into(),
            reason: "fake: it panicked: oh".into(),
        })
    };
    let even = || Ok(preferred(0.5));
    assert_eq!(seen, [even(), even(), gone(), gone()]);
    assert_eq!(verdicts(&none, &questions(1)).await, [gone()], "ever after");
}

#[tokio::test(start_paused = true)]
async fn the_queue_is_bounded_streams_wait_and_others_are_told() {
    let replica = FakeReplica::even().delay(SECOND);
    let narrow = BenchSettings {
        max_queue: 2,
        ..settings()
    };
    let bench = bench([replica], narrow);
    let all = questions(6);
    let stream = verdicts(&bench, &all);
    let visitor = async {
        sleep(SECOND / 2).await;
        // One is with the judge, two wait, three are at the door.
        let refused = bench.rule_within(SECOND, &all[..1], Orders::One).await;
        assert_eq!(refused, Err(RulingError::Full { waiting: 2 }));
        sleep(6 * SECOND).await;
        let more_than_places = bench.rule_within(20 * SECOND, &all, Orders::Both).await;
        assert_eq!(more_than_places.map(|all| all.len()), Ok(6));
    };
    let (seen, ()) = tokio::join!(stream, visitor);
    assert_eq!(seen, vec![Ok(preferred(0.5)); 6]);
}

#[tokio::test(start_paused = true)]
async fn a_caller_with_a_deadline_is_told_why_and_what_it_asked_is_forgotten() {
    let replica = FakeReplica::failing((0..6).map(|_| failure()));
    let asked = replica.asked();
    let fragile = BenchSettings {
        circuit_failures: 1,
        ..settings()
    };
    let bench = bench([replica], fragile);
    let all = questions(1);
    let late = bench.rule_within(3 * SECOND, &all, Orders::One);
    let told = late.await.expect_err("no judge").to_string();
    assert_eq!(
        told,
        "no answer within 3 s: every circuit of the judge is open (fake: no route)"
    );
    sleep(60 * SECOND).await;
    assert_eq!(asked.sizes().len(), 1, "nobody waits for it");
    let slow = FakeReplica::even().delay(9 * SECOND);
    let bench = super::fake::bench([slow], settings());
    let late = bench.rule_within(3 * SECOND, &all, Orders::One);
    assert_eq!(
        late.await.expect_err("too slow").to_string(),
        "no answer within 3 s"
    );
}

#[tokio::test(start_paused = true)]
async fn judges_are_replaced_without_holding_anybody_up() {
    let (let_go, gone) = tokio::sync::oneshot::channel::<()>();
    let old = FakeReplica::new(move |batch| {
        let _held = &let_go;
        Ok(vec![preferred(0.25); batch.len()])
    });
    let remembering = BenchSettings {
        cache_size: 8,
        ..settings()
    };
    let bench = bench([old.delay(SECOND)], remembering);
    let all = questions(3);
    let replacing = async {
        sleep(SECOND / 2).await;
        let new = FakeReplica::new(|batch| Ok(vec![preferred(0.75); batch.len()]));
        let new = Judges {
            version: Some(JudgeVersion(8)),
            ..judges([new])
        };
        bench.replace(new);
        assert_eq!(bench.version(), Some(JudgeVersion(8)));
        verdicts(&bench, &all[..1]).await
    };
    let (before, after) = tokio::join!(verdicts(&bench, &all), replacing);
    assert_eq!(
        before,
        vec![Ok(preferred(0.25)); 3],
        "also who still waited"
    );
    assert_eq!(after, [Ok(preferred(0.75))]);
    assert!(gone.await.is_err(), "the old judge is let go");
}

#[tokio::test(start_paused = true)]
async fn a_new_judge_ends_the_outage_of_the_old_one() {
    let away = FakeReplica::new(|_| Err(failure()));
    let bench = bench([away], settings());
    let mut outage = bench.outage();
    let all = questions(1);
    let next = async {
        outage.wait_for(Option::is_some).await.expect("it goes on");
        bench.replace(judges([FakeReplica::even()]));
        assert_eq!(*outage.borrow(), None);
        verdicts(&bench, &all).await
    };
    tokio::select! {
        seen = verdicts(&bench, &all) => panic!("{seen:?}"),
        seen = next => assert_eq!(seen, [Ok(preferred(0.5))]),
    }
}

#[tokio::test(start_paused = true)]
async fn many_callers_at_once_are_all_answered_by_flaky_replicas() {
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
    let generous = BenchSettings {
        max_batch: 64,
        max_retries: 64,
        ..settings()
    };
    let bench = bench([replica(), replica(), replica()], generous);
    let callers = (0..1000).map(|i| {
        let bench = bench.clone();
        tokio::spawn(async move {
            let question = question(&i.to_string(), "other");
            bench.rule(&question, Orders::Both).await
        })
    });
    let rulings = join_all(callers.collect::<Vec<_>>()).await;
    let answered = rulings.into_iter().filter(|ruling| {
        let ruling = ruling.as_ref().expect("no panic").as_ref();
        ruling.is_ok_and(|ruling| ruling.verdict == preferred(0.5))
    });
    assert_eq!(answered.count(), 1000);
}
