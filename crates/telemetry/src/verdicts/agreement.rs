//! Agreement of people with the judge.

use serde::Serialize;

use crate::interval::Interval;
use crate::metrics::measurements::Measurements;
use crate::verdicts::{HumanVerdict, PairChoice, VerdictRow};

/// Counts of verdicts, and the agreement with the judge.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct VerdictSummary {
    /// Number of verdicts.
    pub(crate) verdicts: usize,
    /// Number of verdicts for one of the completions.
    pub(crate) decided: usize,
    /// Number of ties.
    pub(crate) ties: usize,
    /// Number of pairs of which neither completion is acceptable.
    pub(crate) both_bad: usize,
    /// Number of decided verdicts for the completion that was shown in the first place.
    pub(crate) first_shown: usize,
    /// Number of the last verdict, which can be withdrawn.
    pub(crate) last: Option<u64>,
    /// Agreement with the judge on all decided pairs.
    pub(crate) agreement: Agreement,
    /// Agreement with the judge on those that were drawn at random.
    pub(crate) random_agreement: Agreement,
}

/// Agreement with the judge.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Agreement {
    /// Number of pairs that both decide.
    pub(crate) pairs: usize,
    /// Fraction of them on which both prefer the same completion.
    #[serde(flatten)]
    pub(crate) rate: Interval,
}

impl VerdictSummary {
    pub(crate) fn of(rows: &[VerdictRow]) -> Self {
        let count = |is: &dyn Fn(&VerdictRow) -> bool| rows.iter().filter(|row| is(row)).count();
        let first_shown = |row: &VerdictRow| prefers_first(row).map(|first| first != row.swapped);
        Self {
            verdicts: rows.len(),
            decided: count(&|row| prefers_first(row).is_some()),
            ties: count(&|row| row.verdict == HumanVerdict::Tie),
            both_bad: count(&|row| row.verdict == HumanVerdict::BothBad),
            first_shown: count(&|row| first_shown(row) == Some(true)),
            last: rows.last().map(|row| row.id),
            agreement: Agreement::of(rows.iter()),
            random_agreement: Agreement::of(
                rows.iter().filter(|row| row.choice == PairChoice::Random),
            ),
        }
    }

    /// As metrics. The agreement is absent before a pair is decided by both.
    pub(crate) fn measurements(&self) -> Measurements {
        let mut measurements = Measurements::default();
        measurements.set("judge/human_verdicts", self.verdicts as f64);
        if self.agreement.pairs > 0 {
            let Interval { mean, low, high } = self.agreement.rate;
            measurements.set("judge/human_agreement", mean);
            measurements.set("judge/human_agreement_ci_low", low);
            measurements.set("judge/human_agreement_ci_high", high);
        }
        measurements
    }
}

impl Agreement {
    fn of<'a>(rows: impl Iterator<Item = &'a VerdictRow>) -> Self {
        let agreed: Vec<bool> = rows.filter_map(agrees).collect();
        let pairs = agreed.len();
        let count = agreed.iter().filter(|&&agrees| agrees).count();
        Self {
            pairs,
            rate: Interval::wilson(count as f64 / pairs.max(1) as f64, pairs),
        }
    }
}

/// Whether a person and the judge prefer the same completion; `None` unless both prefer one.
fn agrees(row: &VerdictRow) -> Option<bool> {
    let judge_prefers_first = match row.p? {
        p if p > 0.5 => true,
        p if p < 0.5 => false,
        _ => return None,
    };
    Some(prefers_first(row)? == judge_prefers_first)
}

fn prefers_first(row: &VerdictRow) -> Option<bool> {
    match row.verdict {
        HumanVerdict::First => Some(true),
        HumanVerdict::Second => Some(false),
        HumanVerdict::Tie | HumanVerdict::BothBad => None,
    }
}
