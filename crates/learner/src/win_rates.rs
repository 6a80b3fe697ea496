//! Win rates and agreement of the verdicts on an evaluation's pairs. Does not know whose verdicts they are.

use messages::{LabelledPair, Probability};

use crate::length_control;

/// 1 for a p above ½, 0 below, ½ for a tie.
#[must_use]
pub fn win(p: f64) -> f64 {
    if p > 0.5 {
        1.0
    } else if p < 0.5 {
        0.0
    } else {
        0.5
    }
}

/// Share of the pairs on which the run's judge and `verdict` prefer the same completion, ties of either excluded;
/// `None` without such pairs.
pub(crate) fn agreement<'a>(
    pairs: impl IntoIterator<Item = &'a LabelledPair>,
    verdict: &dyn Fn(&LabelledPair) -> Option<Probability>,
) -> Option<f64> {
    let agree = |labelled: &LabelledPair| {
        let judge = f64::from(labelled.labels.first()?.p.get()) - 0.5;
        let other = f64::from(verdict(labelled)?.get()) - 0.5;
        (judge * other != 0.0).then(|| f64::from(u8::from(judge * other > 0.0)))
    };
    let agreements: Vec<f64> = pairs.into_iter().filter_map(agree).collect();
    (!agreements.is_empty()).then(|| agreements.iter().sum::<f64>() / agreements.len() as f64)
}

/// Length-controlled win rate of `wins`, one for each of `pairs`.
pub(crate) fn length_controlled<P: std::borrow::Borrow<LabelledPair>>(
    pairs: &[P],
    wins: &[f64],
) -> f64 {
    let length = |l: &LabelledPair, i: usize| l.pair.completions[i].ids.len() as f64;
    let longer = |l: &LabelledPair| length(l, 0) - length(l, 1);
    let differences: Vec<f64> = pairs.iter().map(|l| longer(l.borrow())).collect();
    length_control::win_rate(wins, &differences)
}
