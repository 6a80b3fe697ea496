//! Whoever judges a batch of pairs: the judge, and the gold judge beside it for evaluations. Pairs
//! become comparisons here, and verdicts become labels again.
//!
//! The panel computes and never waits; it lives on the judge's thread. It does not know streams.

use std::sync::Arc;

use messages::{DropReason, JudgeVersion, Label, Pair, Probability, Purpose};

use crate::judge::{Ruling, one_order};
use crate::{Comparison, Judge, JudgeError, Verdict, both_orders};

pub(crate) struct Panel {
    judge: Box<dyn Judge>,
    gold: Option<Box<dyn Judge>>,
    max_batch: usize,
    gold_failed: bool,
}

/// What the panel says about a batch.
#[derive(Debug)]
pub(crate) struct Answer {
    /// The judge's version when it was asked.
    pub version: JudgeVersion,
    /// One for every pair, in their order.
    pub judgements: Vec<Judgement>,
}

/// What the panel says about one pair.
#[derive(Debug)]
pub(crate) struct Judgement {
    /// The labels of all i < j in lexicographic order, or why there are none.
    pub labels: Result<Vec<Label>, Refusal>,
    /// The gold preference for the first completion over the second.
    pub gold: Option<Probability>,
    /// For every comparison that was answered in both orders, whether its winner changed.
    pub order_changes: Vec<bool>,
}

/// Why a pair got no labels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub reason: DropReason,
    pub detail: String,
}

/// In how many orders a comparison is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Orders {
    One,
    Both,
}

impl Orders {
    /// Training asks once: which completion stands first is chance there, and a preference for the
    /// first averages out. Evaluations, whose first completion is always the policy's, ask both ways
    /// unless that is known to tell nothing.
    pub(crate) fn of(purpose: Purpose, is_antisymmetric: bool) -> Self {
        match purpose {
            Purpose::Evaluate if !is_antisymmetric => Self::Both,
            Purpose::Evaluate | Purpose::Train | Purpose::Contest => Self::One,
        }
    }
}

/// How many comparisons a pair puts to its judge, the other order counted as one more.
pub(crate) fn questions(pair: &Pair, is_antisymmetric: bool) -> usize {
    let each = match Orders::of(pair.prompt.purpose, is_antisymmetric) {
        Orders::One => 1,
        Orders::Both => 2,
    };
    each * couples(pair).count()
}

/// All i < j of a pair's completions in lexicographic order; none where two cannot be told by `u16`
/// indices or there are no two.
fn couples(pair: &Pair) -> impl Iterator<Item = (u16, u16)> {
    let count = u16::try_from(pair.completions.len()).unwrap_or(0);
    (0..count).flat_map(move |i| (i + 1..count).map(move |j| (i, j)))
}

fn comparison(pair: &Pair, (i, j): (u16, u16)) -> Comparison<'_> {
    Comparison {
        prompt: &pair.prompt,
        first: &pair.completions[usize::from(i)],
        second: &pair.completions[usize::from(j)],
    }
}

impl Panel {
    /// `max_batch` bounds the comparisons of one call of a judge.
    pub(crate) fn new(
        judge: Box<dyn Judge>,
        gold: Option<Box<dyn Judge>>,
        max_batch: usize,
    ) -> Self {
        Self {
            judge,
            gold,
            max_batch,
            gold_failed: false,
        }
    }

    pub(crate) fn judge_ref(&self) -> &dyn Judge {
        &*self.judge
    }

    /// Judges every pair. The gold judge's failure leaves `gold` empty and is said once.
    ///
    /// # Errors
    /// When the judge fails.
    pub(crate) fn judge(&mut self, pairs: &[Arc<Pair>]) -> Result<Answer, JudgeError> {
        let version = self.judge.version();
        let asked: Vec<_> = pairs
            .iter()
            .flat_map(|pair| couples(pair).map(|couple| (pair.as_ref(), couple)))
            .collect();
        let mut rulings = ask_all(&mut *self.judge, &asked, self.max_batch)?.into_iter();
        let golds = self.golds(pairs);
        let judgements = pairs.iter().zip(golds).map(|(pair, gold)| {
            let own = couples(pair).zip(rulings.by_ref());
            Judgement::new(pair, own, gold)
        });
        Ok(Answer {
            version,
            judgements: judgements.collect(),
        })
    }

    /// The gold preference of every pair that is for evaluation, where it can be had.
    fn golds(&mut self, pairs: &[Arc<Pair>]) -> Vec<Option<Probability>> {
        let mut golds = vec![None; pairs.len()];
        let Some(gold) = &mut self.gold else {
            return golds;
        };
        let evaluated = pairs.iter().enumerate().filter(|(_, pair)| {
            pair.prompt.purpose == Purpose::Evaluate && couples(pair).next().is_some()
        });
        let (places, asked): (Vec<_>, Vec<_>) = evaluated
            .map(|(place, pair)| (place, (pair.as_ref(), (0, 1))))
            .unzip();
        match ask_all(&mut **gold, &asked, self.max_batch) {
            Ok(rulings) => {
                for (place, ruling) in places.into_iter().zip(rulings) {
                    golds[place] = match ruling.verdict {
                        Verdict::Preference(p) => Some(p),
                        Verdict::Abstained { .. } => None,
                    };
                }
            }
            Err(error) if !self.gold_failed => {
                self.gold_failed = true;
                let judge = gold.name();
                tracing::warn!(judge, %error, "gold judge failed; its pairs go without a gold preference");
            }
            Err(_) => {}
        }
        golds
    }
}

/// A pair, and which two of its completions are compared.
type Asked<'a> = (&'a Pair, (u16, u16));

/// The rulings on all that is asked, in its order. What is asked in one order and what is asked in both
/// go into separate calls.
fn ask_all(
    judge: &mut dyn Judge,
    asked: &[Asked<'_>],
    max_batch: usize,
) -> Result<Vec<Ruling>, JudgeError> {
    let mut rulings: Vec<Option<Ruling>> = vec![None; asked.len()];
    for orders in [Orders::One, Orders::Both] {
        let is_antisymmetric = judge.is_antisymmetric();
        let group = asked
            .iter()
            .enumerate()
            .filter(|(_, (pair, _))| Orders::of(pair.prompt.purpose, is_antisymmetric) == orders);
        let (places, batch): (Vec<_>, Vec<_>) = group
            .map(|(place, (pair, couple))| (place, comparison(pair, *couple)))
            .unzip();
        let answers = ask_in_calls(judge, &batch, orders, max_batch)?;
        for (place, ruling) in places.into_iter().zip(answers) {
            rulings[place] = Some(ruling);
        }
    }
    let complete: Option<Vec<_>> = rulings.into_iter().collect();
    Ok(complete.expect("every comparison is asked in one order or in both"))
}

/// As many calls as it takes for none to exceed `max_batch`, but for the two orders of one comparison,
/// which are never parted.
fn ask_in_calls(
    judge: &mut dyn Judge,
    batch: &[Comparison<'_>],
    orders: Orders,
    max_batch: usize,
) -> Result<Vec<Ruling>, JudgeError> {
    let (size, ask): (_, fn(&mut dyn Judge, &[Comparison<'_>]) -> _) = match orders {
        Orders::One => (max_batch, one_order),
        Orders::Both => (max_batch / 2, both_orders),
    };
    let mut rulings = Vec::with_capacity(batch.len());
    for call in batch.chunks(size.max(1)) {
        rulings.extend(ask(judge, call)?);
    }
    Ok(rulings)
}

impl Judgement {
    fn new(
        pair: &Pair,
        rulings: impl Iterator<Item = ((u16, u16), Ruling)>,
        gold: Option<Probability>,
    ) -> Self {
        let mut order_changes = Vec::new();
        let labels: Result<Vec<_>, _> = rulings
            .map(|(couple, ruling)| {
                order_changes.extend(ruling.changes_with_order());
                label(couple, ruling.verdict)
            })
            .collect();
        let labels = labels.and_then(|labels| {
            if labels.is_empty() {
                Err(incomparable(pair.completions.len()))
            } else {
                Ok(labels)
            }
        });
        Self {
            labels,
            gold,
            order_changes,
        }
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
mod tests;
