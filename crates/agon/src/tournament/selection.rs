//! Selection: the settings with which a method takes part in the finals, chosen by win rate on seeds of their own.

use anyhow::Context;
use settings::Tournament;

use crate::tournament::{
    plan::{Candidate, PlannedRun, SelectedVariant},
    run_result::RunResult,
};

/// The best variant of each method by the selection `runs`; all variants of methods that keep all.
///
/// # Errors
/// When the result of a run cannot be read, or every variant of a method diverged.
pub(super) fn select(
    tournament: &Tournament,
    runs: &[PlannedRun],
) -> anyhow::Result<Vec<SelectedVariant>> {
    let mut selected = Vec::new();
    for (index, method) in tournament.methods.iter().enumerate() {
        if method.selects() {
            selected.push(best(tournament, index, runs)?);
            continue;
        }
        selected.extend(
            method
                .variants
                .iter()
                .enumerate()
                .map(|(variant_index, variant)| SelectedVariant {
                    method: method.name.clone(),
                    method_index: index,
                    variant_index,
                    label: variant.label.clone(),
                    score: None,
                    candidates: Vec::new(),
                }),
        );
    }
    Ok(selected)
}

fn best(
    tournament: &Tournament,
    method_index: usize,
    runs: &[PlannedRun],
) -> anyhow::Result<SelectedVariant> {
    let method = &tournament.methods[method_index];
    let mut candidates = Vec::new();
    for (index, variant) in method.variants.iter().enumerate() {
        let own = runs
            .iter()
            .filter(|run| (run.method, run.variant) == (method_index, index));
        let rates: Option<Vec<f64>> = own
            .map(|run| selection_rate(tournament, run))
            .collect::<anyhow::Result<_>>()?;
        let mean = |rates: Vec<f64>| rates.iter().sum::<f64>() / rates.len().max(1) as f64;
        candidates.push(Candidate {
            label: variant.label.clone(),
            score: rates.map(mean),
        });
    }
    let scored = candidates.iter().enumerate();
    let scored = scored.filter_map(|(index, candidate)| Some((index, candidate.score?)));
    // Of equal scores, the first.
    let best = scored.reduce(|best, next| if next.1 > best.1 { next } else { best });
    let (variant_index, score) = best.with_context(|| {
        format!(
            "every setting of {} diverged on a selection seed: widen its grid",
            method.name
        )
    })?;
    Ok(SelectedVariant {
        method: method.name.clone(),
        method_index,
        variant_index,
        label: candidates[variant_index].label.clone(),
        score: Some(score),
        candidates,
    })
}

/// The win rate of a selection run; `None` if it diverged.
fn selection_rate(tournament: &Tournament, run: &PlannedRun) -> anyhow::Result<Option<f64>> {
    let Some(result) = RunResult::read(run)? else {
        return Ok(None);
    };
    let rate = result.last_win_rate(&tournament.judge);
    let judge = tournament.judge.to_string();
    rate.map(Some).with_context(|| {
            format!(
                "the last evaluation of {} has no verdict of the judge {judge:?}: repair the judge, and remove {} to repeat \
                 the run",
                run.name,
                run.directory.display()
            )
        })
}
