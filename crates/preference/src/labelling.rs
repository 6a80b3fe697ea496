//! Labels of a pair: comparisons of its completions, answered by the judge pool.
//!
//! Promises: in training, which completion a judge sees first is random and repeats with the prompt's seed, however
//! the completions were sampled. Does not know streams.

use std::sync::Arc;

use futures_util::future::join_all;
use messages::{
    DropReason, EvaluationVerdict, InvalidMessage, JudgeVersion, Label, Pair, Prompt, Purpose,
};
use settings::OrdersSetting;

use crate::error::ComparisonError;
use crate::evaluation_judge::EvaluationJudge;
use crate::judge::Verdict;
use crate::label_penalties::LabelPenalties;
use crate::pool::{ComparisonRequest, JudgePool, Orders, Preference};

/// RNG stream id for the orders in which completions are compared.
const ORDER_STREAM: u64 = 0xbfd;

/// Labels pairs with a judge, and has evaluation pairs judged by the evaluation judges too.
pub(crate) struct Labeller {
    pub judge: JudgePool,
    pub evaluation: Vec<EvaluationJudge>,
    pub orders: OrdersSetting,
    /// Penalties of training labels; verdicts of evaluations have none.
    pub penalties: LabelPenalties,
}

/// Labels of one pair.
#[derive(Debug, PartialEq)]
pub(crate) struct PairLabels {
    /// Labels of all i < j in lexicographic order, or why the pair is dropped.
    pub labels: Result<Vec<Label>, DropCause>,
    /// Newest judge version among them.
    pub version: JudgeVersion,
    /// Score of every completion, where the judge has scores.
    pub scores: Option<Vec<f32>>,
    /// Verdicts of the evaluation judges on the first two completions.
    pub verdicts: Vec<EvaluationVerdict>,
}

/// The judge's own preference on two completions, and the verdict for their label.
struct JudgedPreference {
    own: Preference,
    label: Verdict,
}

/// Reason why a pair is dropped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DropCause {
    pub reason: DropReason,
    pub detail: String,
}

impl Labeller {
    /// Number of judge requests that a pair needs, at most.
    pub(crate) fn comparisons(&self, pair: &Pair) -> usize {
        if pair.prompt.purpose == Purpose::Apo {
            return 0;
        }
        Orders::of(self.orders, pair.prompt.purpose).count() * pair.compared().count()
    }

    /// Compares every two completions of `pair`. Samples for APO are not judged and get no labels: they are training
    /// data of a preference model.
    ///
    /// # Errors
    /// When no replica of the judge is left.
    pub(crate) async fn label(&self, pair: Arc<Pair>) -> Result<PairLabels, ComparisonError> {
        if pair.prompt.purpose == Purpose::Apo {
            return Ok(PairLabels {
                labels: Ok(Vec::new()),
                version: self.judge.version().unwrap_or_default(),
                scores: None,
                verdicts: Vec::new(),
            });
        }
        let orders = Orders::of(self.orders, pair.prompt.purpose);
        let is_swapped = |(first, second)| {
            orders == Orders::One
                && !self.judge.is_antisymmetric()
                && matches!(pair.prompt.purpose, Purpose::Train | Purpose::File)
                && draws_second(&pair.prompt, first, second)
        };
        let request = |(first, second)| {
            let request = ComparisonRequest::new(Arc::clone(&pair), first, second);
            match is_swapped((first, second)) {
                true => request.swapped(),
                false => request,
            }
        };
        let requests: Vec<_> = pair.compared().map(request).collect();
        let (preferences, verdicts) = tokio::join!(
            self.judge.compare_all(&requests, orders),
            self.verdicts(&pair, requests.first()),
        );
        let in_order = |(indices, preference): (_, Result<Preference, _>)| match preference {
            Ok(preference) if is_swapped(indices) => Ok(preference.swapped()),
            preference => preference,
        };
        let preferences = pair.compared().zip(preferences).map(in_order);
        let preferences = pair
            .compared()
            .zip(preferences)
            .map(|(indices, preference)| {
                let request = ComparisonRequest::new(Arc::clone(&pair), indices.0, indices.1);
                preference.map(|preference| JudgedPreference {
                    label: self.penalised(&request, &preference),
                    own: preference,
                })
            });
        PairLabels::new(&pair, preferences.collect(), verdicts)
    }

    /// The verdict for a label: less the penalties, except of an evaluation, where the judge's own counts.
    fn penalised(&self, request: &ComparisonRequest, preference: &Preference) -> Verdict {
        let (comparison, verdict) = (request.comparison(), preference.verdict.clone());
        match comparison.prompt.purpose {
            purpose if purpose.is_evaluation() => verdict,
            _ => (self.penalties).apply(verdict, preference.scores, &comparison),
        }
    }

    /// Labels of a pair that is dropped for this cause without being judged.
    pub(crate) fn unlabelled(&self, cause: DropCause) -> PairLabels {
        PairLabels {
            labels: Err(cause),
            version: self.judge.version().unwrap_or_default(),
            scores: None,
            verdicts: Vec::new(),
        }
    }

    /// Verdicts of the evaluation judges on an evaluation pair, in their order; those that fail or abstain give none.
    async fn verdicts(
        &self,
        pair: &Pair,
        request: Option<&ComparisonRequest>,
    ) -> Vec<EvaluationVerdict> {
        let Some(request) = request.filter(|_| pair.prompt.purpose.is_evaluation()) else {
            return Vec::new();
        };
        let verdicts = self.evaluation.iter().map(|judge| judge.verdict(request));
        join_all(verdicts).await.into_iter().flatten().collect()
    }
}

impl PairLabels {
    fn new(
        pair: &Pair,
        preferences: Vec<Result<JudgedPreference, ComparisonError>>,
        verdicts: Vec<EvaluationVerdict>,
    ) -> Result<Self, ComparisonError> {
        let mut version = JudgeVersion::default();
        let mut labels = Ok(Vec::with_capacity(preferences.len()));
        let mut scores = vec![None; pair.completions.len()];
        for ((first, second), preference) in pair.compared().zip(preferences) {
            let label = match preference {
                Err(error @ ComparisonError::NoJudge { .. }) => return Err(error),
                Err(error) => Err(DropCause {
                    reason: DropReason::Failed,
                    detail: error.to_string(),
                }),
                Ok(preference) => {
                    version = version.max(preference.own.version);
                    if let Some(both) = preference.own.scores {
                        for (index, score) in [first, second].into_iter().zip(both) {
                            scores[usize::from(index)] = Some(score);
                        }
                    }
                    label(first, second, &preference)
                }
            };
            // The first drop cause wins.
            labels = labels.and_then(|mut labels| {
                labels.push(label?);
                Ok(labels)
            });
        }
        if labels.as_ref().is_ok_and(Vec::is_empty) {
            labels = Err(wrong_completion_count(pair.completions.len()));
        }
        Ok(Self {
            labels,
            version,
            // `None` unless every completion has a score.
            scores: scores.into_iter().collect(),
            verdicts,
        })
    }
}

/// Whether a judge that sees one order sees completion `second` first.
fn draws_second(prompt: &Prompt, first: u16, second: u16) -> bool {
    let pair = u64::from(first) << 16 | u64::from(second);
    let drawn = prompt.seed.derive(ORDER_STREAM).derive(pair);
    drawn.0 % 2 == 1
}

impl PairLabels {
    /// Whether the pair is dropped because it does not fit the run.
    pub(crate) fn is_invalid(&self) -> bool {
        (self.labels.as_ref()).is_err_and(|cause| cause.reason == DropReason::Invalid)
    }
}

impl DropCause {
    /// Cause of a pair that exceeds its delivery limit; `deliveries` includes the current one. A pair on which every
    /// judge panics thus does not block the run, and its credit is returned.
    pub(crate) fn exhausted(deliveries: u32) -> Self {
        Self {
            reason: DropReason::Failed,
            detail: format!("no label after {} deliveries", deliveries - 1),
        }
    }

    /// Cause of a pair that does not fit the run.
    pub(crate) fn invalid(cause: &InvalidMessage) -> Self {
        Self {
            reason: DropReason::Invalid,
            detail: cause.to_string(),
        }
    }
}

fn label(first: u16, second: u16, preference: &JudgedPreference) -> Result<Label, DropCause> {
    match &preference.label {
        &Verdict::Preference(p) => Ok(Label {
            first,
            second,
            p,
            judged: match preference.own.verdict {
                Verdict::Preference(own) => Some(own),
                Verdict::Abstained { .. } => None,
            },
        }),
        Verdict::Abstained { reason } => Err(DropCause {
            reason: DropReason::Abstained,
            detail: format!("completions {first} and {second}: {reason}"),
        }),
    }
}

fn wrong_completion_count(completions: usize) -> DropCause {
    DropCause {
        reason: DropReason::Failed,
        detail: format!(
            "the pair has {completions} completions; from 2 to {} can be compared",
            u16::MAX
        ),
    }
}

#[cfg(test)]
mod tests {
    use messages::GOLD;

    use super::*;
    use crate::error::JudgeError;
    use crate::judge::fake::{abstained, pair, preferred};
    use crate::pool::PoolSettings;
    use crate::pool::fake::{FakeReplica, pool, settings};

    /// Prefers the larger of two numbers, with p = ½ + difference / 8.
    fn larger() -> FakeReplica {
        let verdict = |request: &ComparisonRequest| {
            let comparison = request.comparison();
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

    fn labeller(judge: FakeReplica, gold: Option<FakeReplica>) -> Labeller {
        Labeller {
            judge: pool([judge], settings()),
            evaluation: gold
                .into_iter()
                .map(|gold| EvaluationJudge::new(GOLD.into(), pool([gold], settings())))
                .collect(),
            orders: OrdersSetting::Auto,
            penalties: LabelPenalties::default(),
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

    fn labels(labels: &PairLabels) -> Vec<(u16, u16, f32)> {
        let labels = labels.labels.as_ref().expect("it was labelled");
        labels
            .iter()
            .map(|l| (l.first, l.second, l.p.get()))
            .collect()
    }

    #[tokio::test(start_paused = true)]
    async fn all_completion_pairs_are_labelled_in_lexicographic_order() {
        let labeller = labeller(larger(), None);
        for (texts, expected) in [
            (
                &["3", "1", "2"][..],
                &[(0, 1, 0.75), (0, 2, 0.625), (1, 2, 0.375)][..],
            ),
            (&["0", "4"], &[(0, 1, 0.0)]),
        ] {
            let labelled = labeller.label(training(texts)).await.unwrap();
            assert_eq!(labels(&labelled), expected);
            assert_eq!(labelled.version, JudgeVersion(7));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_judge_of_one_order_sees_either_completion_first_and_the_labels_do_not_show_it() {
        let larger = larger();
        let batches = larger.batches();
        let labeller = labeller(larger, None);
        let seeded = |seed| {
            let mut pair = pair(0, &["3", "1", "2"]);
            pair.prompt.seed = messages::Seed(seed);
            Arc::new(pair)
        };
        for seed in 0..100 {
            let labelled = labeller.label(seeded(seed)).await.unwrap();
            let expected = [(0, 1, 0.75), (0, 2, 0.625), (1, 2, 0.375)];
            assert_eq!(labels(&labelled), expected, "{seed}");
        }
        let firsts: Vec<_> = batches.texts().concat();
        // Completion 0 would be first in 200 of 300 comparisons without a draw.
        for text in ["3", "1", "2"] {
            let count = firsts.iter().filter(|first| **first == text).count();
            assert!((75..125).contains(&count), "{text}: {count}");
        }
        labeller.label(seeded(7)).await.unwrap();
        labeller.label(seeded(7)).await.unwrap();
        let texts = batches.texts();
        assert_eq!(texts[300..303], texts[303..306], "a seed repeats");
    }

    #[tokio::test(start_paused = true)]
    async fn only_evaluation_pairs_are_compared_in_both_orders_and_by_the_judges_of_evaluations() {
        let biased = FakeReplica::new(|batch| Ok(vec![preferred(0.75); batch.len()]));
        let (batches, gold) = (biased.batches(), larger());
        let gold_batches = gold.batches();
        let labeller = labeller(biased, Some(gold));
        let cases = [
            (training(&["1", "2"]), vec![(0, 1, 0.75)], None, 1),
            (
                // A third completion is used only for the KL.
                evaluation(&["2", "1", "9"]),
                vec![(0, 1, 0.5)],
                Some(0.625),
                2,
            ),
            (evaluation(&["0", "x"]), vec![(0, 1, 0.5)], None, 2),
        ];
        let mut before = 0;
        for (pair, expected, gold, comparisons) in cases {
            assert_eq!(labeller.comparisons(&pair), comparisons);
            let labelled = labeller.label(pair).await.unwrap();
            assert_eq!(labels(&labelled), expected);
            let p = labelled.verdicts.first().map(|verdict| verdict.p.get());
            assert_eq!(p, gold);
            let calls = batches.sizes().len();
            assert_eq!(calls - before, comparisons);
            before = calls;
        }
        assert_eq!(
            gold_batches.sizes().len(),
            4,
            "the first two completions of two evaluations, both ways"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn penalties_change_labels_of_training_and_the_judges_own_preference_stays_beside_them() {
        let labeller = Labeller {
            penalties: LabelPenalties {
                per_token: 1.0,
                ..LabelPenalties::default()
            },
            ..labeller(larger(), None)
        };
        for (purpose, is_penalised) in [
            (Purpose::Train, true),
            (Purpose::File, true),
            (Purpose::Evaluate, false),
            (Purpose::EvaluateAverage, false),
            (Purpose::EvaluateReference, false),
        ] {
            let mut pair = pair(0, &["3", "1"]);
            pair.prompt.purpose = purpose;
            pair.completions[0].ids = vec![0; 20];
            let labelled = labeller.label(Arc::new(pair)).await.unwrap();
            let label = labelled.labels.unwrap()[0];
            assert_eq!(label.p.get() < 0.5, is_penalised, "{purpose:?}: {label:?}");
            let own = label.judged.map(messages::Probability::get);
            assert_eq!(own, Some(0.75), "{purpose:?}");
        }
    }

    #[tokio::test]
    async fn pairs_carry_scores_of_a_scoring_judge() {
        let rules = [settings::RuleSettings::Length {
            min: 3,
            max: 9,
            weight: 2.0,
        }];
        let rules = crate::Rules::new(1.0, &rules).unwrap();
        let thread = crate::judge_thread::JudgeThread::start(0, Box::new(rules), None).unwrap();
        let judges = crate::pool::JudgeReplicas {
            name: "rule".into(),
            version: Some(JudgeVersion(0)),
            is_antisymmetric: true,
            digest: None,
            replicas: vec![Arc::new(thread)],
        };
        let labeller = Labeller {
            judge: JudgePool::new(judges, settings()),
            ..labeller(larger(), None)
        };
        // Lengths 1, 2 and 3 for a minimum of 3; the second time the verdicts are cached, in either order.
        for _ in 0..2 {
            let labelled = labeller.label(training(&["a", "a b", "a b c"])).await;
            assert_eq!(labelled.unwrap().scores, Some(vec![-4.0, -2.0, 0.0]));
            let labelled = labeller.label(training(&["a b", "a"])).await;
            assert_eq!(labelled.unwrap().scores, Some(vec![-2.0, -4.0]));
        }
        let without = self::labeller(larger(), None);
        let labelled = without.label(training(&["1", "2"])).await.unwrap();
        assert_eq!(labelled.scores, None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_pair_with_a_missing_label_is_dropped() {
        let labeller = labeller(larger(), None);
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
            let labelled = labeller.label(training(texts)).await.unwrap();
            assert_eq!(labelled.labels, Err(DropCause { reason, detail }));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn penalties_are_of_training_labels_only() {
        let labeller = Labeller {
            penalties: LabelPenalties {
                missing_eos: 3f64.ln(),
                ..LabelPenalties::default()
            },
            ..labeller(larger(), None)
        };
        let cut_off = |mut pair: Pair| {
            pair.completions[0].finish = messages::Finish::Length;
            pair.completions[1].finish = messages::Finish::EndOfText;
            Arc::new(pair)
        };
        let train = cut_off(pair(0, &["2", "2"]));
        let [(_, _, p)] = labels(&labeller.label(train).await.unwrap())[..] else {
            panic!("one label");
        };
        assert!((p - 0.25).abs() < 1e-6, "{p}");
        let mut evaluated = pair(0, &["2", "2"]);
        evaluated.prompt.purpose = Purpose::Evaluate;
        let evaluated = labeller.label(cut_off(evaluated)).await.unwrap();
        assert_eq!(labels(&evaluated), [(0, 1, 0.5)]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_failing_judge_of_evaluations_costs_only_its_own_verdict() {
        let gold = FakeReplica::new(|_| Err(JudgeError::new("no gold")));
        let mut labeller = labeller(larger(), Some(larger()));
        let one_failure = PoolSettings {
            circuit_failures: 1,
            ..settings()
        };
        let failing = EvaluationJudge::new("failing".into(), pool([gold], one_failure));
        labeller.evaluation.push(failing);
        let labelled = labeller.label(evaluation(&["2", "1"])).await.unwrap();
        assert_eq!(labels(&labelled), [(0, 1, 0.625)]);
        let judges: Vec<_> = labelled.verdicts.iter().map(|v| v.judge.as_str()).collect();
        assert_eq!(judges, [GOLD]);
    }
}
