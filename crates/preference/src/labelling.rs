//! Pairs become questions here, and rulings become labels again.
//!
//! This part asks the bench; it does not know streams.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use messages::{DropReason, JudgeVersion, Label, Pair, Probability, Purpose};
use settings::OrdersSetting;
use tokio::time::timeout;

use crate::bench::{Bench, Orders, Question};
use crate::{Ruling, RulingError, Verdict};

/// Who labels pairs, and how.
pub(crate) struct Labelling {
    pub judge: Bench,
    pub gold: Option<Bench>,
    pub orders: OrdersSetting,
    /// A gold judge that fails is told of once.
    pub gold_failed: AtomicBool,
}

/// What is said about one pair.
#[derive(Debug, PartialEq)]
pub(crate) struct Judgement {
    /// The labels of all i < j in lexicographic order, or why there are none.
    pub labels: Result<Vec<Label>, Refusal>,
    /// The version of the judge that gave them.
    pub version: JudgeVersion,
    /// Every completion's score, where the judge has scores.
    pub scores: Option<Vec<f32>>,
    /// The gold preference for the first completion over the second.
    pub gold: Option<Probability>,
}

/// Why a pair got no labels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub reason: DropReason,
    pub detail: String,
}

/// All i < j of a pair's completions in lexicographic order, of an evaluation's the policy's and the
/// reference's alone; none where two cannot be told by `u16` indices or there are no two.
pub(crate) fn couples(pair: &Pair) -> impl Iterator<Item = (u16, u16)> {
    let count = match pair.prompt.purpose {
        Purpose::Evaluate => pair.completions.len().min(2),
        Purpose::Train | Purpose::Contest => pair.completions.len(),
    };
    let count = u16::try_from(count).unwrap_or(0);
    (0..count).flat_map(move |i| (i + 1..count).map(move |j| (i, j)))
}

impl Labelling {
    /// How many questions a pair is to its judge at most.
    pub(crate) fn questions(&self, pair: &Pair) -> usize {
        if pair.prompt.purpose == Purpose::Contest {
            return 0;
        }
        Orders::of(self.orders, pair.prompt.purpose).count() * couples(pair).count()
    }

    /// Has every two completions of `pair` compared; those of the adversarial game are not, they are what a
    /// model is fitted to.
    ///
    /// # Errors
    /// When no judge is left: the pair is as it was.
    pub(crate) async fn judge(&self, pair: Arc<Pair>) -> Result<Judgement, RulingError> {
        if pair.prompt.purpose == Purpose::Contest {
            return Ok(Judgement {
                labels: Ok(Vec::new()),
                version: self.judge.version().unwrap_or_default(),
                scores: None,
                gold: None,
            });
        }
        let orders = Orders::of(self.orders, pair.prompt.purpose);
        let question = |(first, second)| Question::new(Arc::clone(&pair), first, second);
        let questions: Vec<_> = couples(&pair).map(question).collect();
        let (rulings, gold) = tokio::join!(
            self.judge.rule_all(&questions, orders),
            self.gold(&pair, questions.first()),
        );
        Judgement::new(&pair, rulings, gold)
    }

    /// What is said about a pair that no service could label in `deliveries` before this one: a pair on
    /// which every judge panics does not hold up the run, and its credit is not lost.
    pub(crate) fn given_up(&self, deliveries: u32) -> Judgement {
        Judgement {
            labels: Err(Refusal {
                reason: DropReason::Failed,
                detail: format!("no label after {} deliveries", deliveries - 1),
            }),
            version: self.judge.version().unwrap_or_default(),
            scores: None,
            gold: None,
        }
    }

    /// The gold preference between the first two completions of a pair that is for evaluation, where it
    /// can be had.
    async fn gold(&self, pair: &Pair, question: Option<&Question>) -> Option<Probability> {
        let (gold, question) = (self.gold.as_ref()?, question?);
        if pair.prompt.purpose != Purpose::Evaluate {
            return None;
        }
        let ruling = timeout(gold.settings().timeout, gold.rule(question, Orders::Both)).await;
        let error = match ruling {
            Ok(Ok(ruling)) => {
                return match ruling.verdict {
                    Verdict::Preference(p) => Some(p),
                    Verdict::Abstained { .. } => None,
                };
            }
            Ok(Err(error)) => error.to_string(),
            Err(elapsed) => elapsed.to_string(),
        };
        if !self.gold_failed.swap(true, Ordering::Relaxed) {
            let judge = gold.name();
            tracing::warn!(
                judge,
                error,
                "gold judge failed; its pairs go without a gold preference"
            );
        }
        None
    }
}

impl Judgement {
    fn new(
        pair: &Pair,
        rulings: Vec<Result<Ruling, RulingError>>,
        gold: Option<Probability>,
    ) -> Result<Self, RulingError> {
        let mut version = JudgeVersion::default();
        let mut labels = Ok(Vec::with_capacity(rulings.len()));
        let mut scores = vec![None; pair.completions.len()];
        for (couple, ruling) in couples(pair).zip(rulings) {
            let label = match ruling {
                Err(gone @ RulingError::NoJudge { .. }) => return Err(gone),
                Err(error) => Err(Refusal {
                    reason: DropReason::Failed,
                    detail: error.to_string(),
                }),
                Ok(ruling) => {
                    version = version.max(ruling.version);
                    if let Some([first, second]) = ruling.scores {
                        scores[usize::from(couple.0)] = Some(first);
                        scores[usize::from(couple.1)] = Some(second);
                    }
                    label(couple, ruling.verdict)
                }
            };
            // The first refusal is the pair's.
            labels = labels.and_then(|mut labels| {
                labels.push(label?);
                Ok(labels)
            });
        }
        if labels.as_ref().is_ok_and(Vec::is_empty) {
            labels = Err(incomparable(pair.completions.len()));
        }
        Ok(Self {
            labels,
            version,
            // All completions have one, or it is no judge of scores.
            scores: scores.into_iter().collect(),
            gold,
        })
    }
}

fn label((first, second): (u16, u16), verdict: Verdict) -> Result<Label, Refusal> {
    match verdict {
        Verdict::Preference(p) => Ok(Label { first, second, p }),
        Verdict::Abstained { reason } => Err(Refusal {
            reason: DropReason::Abstained,
            detail: format!("completions {first} and {second}: {reason}"),
        }),
    }
}

fn incomparable(completions: usize) -> Refusal {
    Refusal {
        reason: DropReason::Failed,
        detail: format!(
            "the pair has {completions} completions; from 2 to {} can be compared",
            u16::MAX
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::JudgeError;
    use crate::bench::BenchSettings;
    use crate::bench::fake::{FakeReplica, bench, settings};
    use crate::judge::fake::{abstained, pair, preferred};

    /// A judge of numbers that prefers the larger, certain of it by the eighth part of the difference.
    fn larger() -> FakeReplica {
        let verdict = |question: &Question| {
            let comparison = question.comparison();
            let number = |text: &str| text.parse::<f32>();
            match (
                number(&comparison.first.text),
                number(&comparison.second.text),
            ) {
                (Ok(a), Ok(b)) => preferred(0.5 + (a - b) / 8.0),
                _ => abstained("not a number"),
            }
        };
        FakeReplica::new(move |batch| Ok(batch.iter().map(verdict).collect()))
    }

    fn labelling(judge: FakeReplica, gold: Option<FakeReplica>) -> Labelling {
        Labelling {
            judge: bench([judge], settings()),
            gold: gold.map(|gold| bench([gold], settings())),
            orders: OrdersSetting::Auto,
            gold_failed: AtomicBool::new(false),
        }
    }

    fn evaluation(texts: &[&str]) -> Arc<Pair> {
        let mut pair = pair(0, texts);
        pair.prompt.purpose = Purpose::Evaluate;
        Arc::new(pair)
    }

    fn training(texts: &[&str]) -> Arc<Pair> {
        Arc::new(pair(0, texts))
    }

    fn labels(judgement: &Judgement) -> Vec<(u16, u16, f32)> {
        let labels = judgement.labels.as_ref().expect("it was labelled");
        labels
            .iter()
            .map(|l| (l.first, l.second, l.p.get()))
            .collect()
    }

    #[tokio::test(start_paused = true)]
    async fn every_two_completions_get_a_label_in_lexicographic_order() {
        let labelling = labelling(larger(), None);
        for (texts, expected) in [
            (
                &["3", "1", "2"][..],
                &[(0, 1, 0.75), (0, 2, 0.625), (1, 2, 0.375)][..],
            ),
            (&["0", "4"], &[(0, 1, 0.0)]),
        ] {
            let judgement = labelling.judge(training(texts)).await.unwrap();
            assert_eq!(labels(&judgement), expected);
            assert_eq!(judgement.version, JudgeVersion(7));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn only_evaluations_are_asked_in_both_orders_and_have_a_gold_preference() {
        let biased = FakeReplica::new(|batch| Ok(vec![preferred(0.75); batch.len()]));
        let (asked, gold) = (biased.asked(), larger());
        let gold_asked = gold.asked();
        let labelling = labelling(biased, Some(gold));
        let cases = [
            (training(&["1", "2"]), vec![(0, 1, 0.75)], None, 1),
            (
                // A third completion is for the KL alone.
                evaluation(&["2", "1", "9"]),
                vec![(0, 1, 0.5)],
                Some(0.625),
                2,
            ),
            (evaluation(&["0", "x"]), vec![(0, 1, 0.5)], None, 2),
        ];
        let mut before = 0;
        for (pair, expected, gold, questions) in cases {
            assert_eq!(labelling.questions(&pair), questions);
            let judgement = labelling.judge(pair).await.unwrap();
            assert_eq!(labels(&judgement), expected);
            assert_eq!(judgement.gold.map(Probability::get), gold);
            let calls = asked.sizes().len();
            assert_eq!(calls - before, questions);
            before = calls;
        }
        assert_eq!(
            gold_asked.sizes().len(),
            4,
            "the first two completions of two evaluations, both ways"
        );
    }

    #[tokio::test]
    async fn a_pair_has_the_scores_of_a_judge_that_scores() {
        let rules = [settings::RuleSettings::Length {
            min: 3,
            max: 9,
            weight: 2.0,
        }];
        let rules = crate::Rules::new(1.0, &rules).unwrap();
        let thread = crate::judge_thread::JudgeThread::start(0, Box::new(rules), None).unwrap();
        let judges = crate::bench::Judges {
            name: "rule".into(),
            version: Some(JudgeVersion(0)),
            is_antisymmetric: true,
            replicas: vec![Arc::new(thread)],
        };
        let labelling = Labelling {
            judge: Bench::new(judges, settings()),
            ..labelling(larger(), None)
        };
        // One word of three, two, and enough; asked again the verdicts are remembered, in either order.
        for _ in 0..2 {
            let judgement = labelling.judge(training(&["a", "a b", "a b c"])).await;
            assert_eq!(judgement.unwrap().scores, Some(vec![-4.0, -2.0, 0.0]));
            let judgement = labelling.judge(training(&["a b", "a"])).await;
            assert_eq!(judgement.unwrap().scores, Some(vec![-2.0, -4.0]));
        }
        let without = self::labelling(larger(), None);
        let judgement = without.judge(training(&["1", "2"])).await.unwrap();
        assert_eq!(judgement.scores, None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_pair_without_all_its_labels_is_refused() {
        let labelling = labelling(larger(), None);
        let single = "completions; from 2 to 65535 can be compared";
        for (texts, reason, detail) in [
            (
                &["1", "x", "2"][..],
                DropReason::Abstained,
                "completions 0 and 1: not a number".to_owned(),
            ),
            (
                &["1"],
                DropReason::Failed,
                format!("the pair has 1 {single}"),
            ),
            (&[], DropReason::Failed, format!("the pair has 0 {single}")),
        ] {
            let judgement = labelling.judge(training(texts)).await.unwrap();
            assert_eq!(judgement.labels, Err(Refusal { reason, detail }));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_gold_judge_that_fails_costs_the_gold_preference_alone() {
        let gold = FakeReplica::new(|_| Err(JudgeError::new("no gold")));
        let mut labelling = labelling(larger(), None);
        let impatient = BenchSettings {
            circuit_failures: 1,
            ..settings()
        };
        labelling.gold = Some(bench([gold], impatient));
        let judgement = labelling.judge(evaluation(&["2", "1"])).await.unwrap();
        assert_eq!(labels(&judgement), [(0, 1, 0.625)]);
        assert_eq!(judgement.gold, None);
    }
}
