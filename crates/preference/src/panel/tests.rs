//! What becomes of pairs between comparisons and labels.

use super::*;
use crate::judge::fake::{FakeJudge, abstained, pair, preferred};

/// A judge of numbers that prefers the larger, certain of it by the eighth part of the difference.
fn larger() -> FakeJudge {
    FakeJudge::answering(|comparison| {
        let number = |text: &str| text.parse::<f32>();
        match (
            number(&comparison.first.text),
            number(&comparison.second.text),
        ) {
            (Ok(a), Ok(b)) => preferred(0.5 + (a - b) / 8.0),
            _ => abstained("not a number"),
        }
    })
}

fn evaluation(id: u64, texts: &[&str]) -> Arc<Pair> {
    let mut pair = pair(id, texts);
    pair.prompt.purpose = Purpose::Evaluate;
    Arc::new(pair)
}

fn training(id: u64, texts: &[&str]) -> Arc<Pair> {
    Arc::new(pair(id, texts))
}

fn labels(judgement: &Judgement) -> Vec<(u16, u16, f32)> {
    let labels = judgement.labels.as_ref().expect("it was labelled");
    labels
        .iter()
        .map(|l| (l.first, l.second, l.p.get()))
        .collect()
}

#[test]
fn every_two_completions_get_a_label_in_lexicographic_order() {
    let mut panel = Panel::new(Box::new(larger()), None, 64);
    let pairs = [training(0, &["3", "1", "2"]), training(1, &["0", "4"])];
    let answer = panel.judge(&pairs).unwrap();
    assert_eq!(answer.version, JudgeVersion(7));
    let seen: Vec<_> = answer.judgements.iter().map(labels).collect();
    let expected = [
        vec![(0, 1, 0.75), (0, 2, 0.625), (1, 2, 0.375)],
        vec![(0, 1, 0.0)],
    ];
    assert_eq!(seen, expected);
}

/// A name, the pairs, the limit and the sizes of the calls.
type Case<'a> = (&'a str, &'a [&'a Arc<Pair>], usize, &'a [usize]);

#[test]
fn no_call_exceeds_the_limit_and_a_comparison_is_asked_once_or_both_ways() {
    let (one, both) = (
        training(0, &["0", "1", "2", "3"]),
        evaluation(1, &["0", "1", "2"]),
    );
    let cases: [Case<'_>; 6] = [
        ("six comparisons by four", &[&one], 4, &[4, 2]),
        ("three in both orders", &[&both], 64, &[6]),
        ("three in both orders by five", &[&both], 5, &[4, 2]),
        ("the orders are not parted", &[&both], 1, &[2, 2, 2]),
        ("no batch of none", &[&one], 0, &[1, 1, 1, 1, 1, 1]),
        ("two calls for two ways", &[&both, &one], 64, &[6, 6]),
    ];
    for (name, pairs, max_batch, expected) in cases {
        let judge = larger();
        let calls = judge.calls();
        let mut panel = Panel::new(Box::new(judge), None, max_batch);
        let pairs: Vec<_> = pairs.iter().map(|&pair| Arc::clone(pair)).collect();
        let answer = panel.judge(&pairs).unwrap();
        assert_eq!(calls.recorded(), expected, "{name}");
        let asked: usize = pairs.iter().map(|pair| questions(pair, false)).sum();
        assert_eq!(asked, expected.iter().sum::<usize>(), "{name}");
        for (pair, judgement) in pairs.iter().zip(&answer.judgements) {
            let second_best = (0, 1, 0.375);
            assert_eq!(labels(judgement)[0], second_best, "{name}: {:?}", pair.id());
        }
    }
}

#[test]
fn only_evaluations_are_asked_in_both_orders_and_have_a_gold_preference() {
    let biased = FakeJudge::answering(|_| preferred(0.75));
    let gold = larger();
    let gold_calls = gold.calls();
    let mut panel = Panel::new(Box::new(biased), Some(Box::new(gold.antisymmetric())), 64);
    let pairs = [
        training(0, &["1", "2"]),
        evaluation(1, &["2", "1", "9"]),
        evaluation(2, &["0", "x"]),
        evaluation(3, &["0"]),
    ];
    let answer = panel.judge(&pairs).unwrap();
    let [train, evaluated, unknown, single] = &answer.judgements[..] else {
        panic!("{answer:?}");
    };
    assert_eq!(labels(train), [(0, 1, 0.75)]);
    assert_eq!(
        (train.gold, train.order_changes.as_slice()),
        (None, &[][..])
    );
    assert_eq!(labels(evaluated), [(0, 1, 0.5), (0, 2, 0.5), (1, 2, 0.5)]);
    assert_eq!(evaluated.gold.map(Probability::get), Some(0.625));
    assert_eq!(evaluated.order_changes, [true; 3]);
    assert_eq!(
        (labels(unknown).len(), unknown.gold),
        (1, None),
        "gold may abstain"
    );
    assert_eq!(single.gold, None);
    assert_eq!(
        gold_calls.recorded(),
        [2],
        "the first two completions of two pairs"
    );
}

#[test]
fn a_pair_without_all_its_labels_is_refused_and_spares_the_others() {
    let mut panel = Panel::new(Box::new(larger()), None, 64);
    let pairs = [
        training(0, &["1", "x", "2"]),
        training(1, &["1"]),
        training(2, &[]),
        training(3, &["1", "2"]),
    ];
    let answer = panel.judge(&pairs).unwrap();
    let refused = |reason, detail: &str| {
        Err(Refusal {
            reason,
            detail: detail.into(),
        })
    };
    let seen: Vec<_> = answer
        .judgements
        .iter()
        .map(|j| j.labels.as_ref().map(Vec::len).map_err(Clone::clone))
        .collect();
    let expected = [
        refused(DropReason::Abstained, "completions 0 and 1: not a number"),
        refused(
            DropReason::Failed,
            "the pair has 1 completions; from 2 to 65535 can be compared",
        ),
        refused(
            DropReason::Failed,
            "the pair has 0 completions; from 2 to 65535 can be compared",
        ),
        Ok(1),
    ];
    assert_eq!(seen, expected);
}

#[test]
fn a_gold_judge_that_fails_costs_the_gold_preference_alone() {
    let gold = FakeJudge::new(|_| Err(JudgeError::new("no gold")));
    let mut panel = Panel::new(Box::new(larger()), Some(Box::new(gold)), 64);
    let answer = panel.judge(&[evaluation(0, &["2", "1"])]).unwrap();
    assert_eq!(labels(&answer.judgements[0]), [(0, 1, 0.625)]);
    assert_eq!(answer.judgements[0].gold, None);
}
