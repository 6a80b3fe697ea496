//! The summary of a run as JSON and as Markdown.

use std::fmt::{self, Write as _};

use learner::{Ending, Evaluation};
use preference::apo::{PolicySampleQuality, Quality, RoundReport};
use serde_json::{Map, Value, json};
use settings::Settings;

use crate::{
    assembly::RunInputs,
    report::{ArmProbabilities, WIN_RATE_CHART, charts::judge_names, conclusion},
    run::RunOutcome,
};

/// The summary for programs: `report.json`.
pub(super) fn to_json(
    settings: &Settings,
    inputs: &RunInputs,
    outcome: &RunOutcome,
    bandit: Option<&ArmProbabilities>,
) -> Value {
    let summary = &outcome.summary;
    let last = summary.evaluations.last();
    let last_value = |f: &dyn Fn(&Evaluation) -> f64| last.map_or(Value::Null, |e| json!(f(e)));
    let gold = last.and_then(|e| e.gold_win_rate);
    let mut report = training_json(inputs, outcome);
    let evaluation = json!({
        "finished": summary.ending == Ending::Finished,
        "objective": settings.learner.objective,
        "judge": settings.preference.judge,
        "win_rate": last_value(&|e| e.win_rate.mean),
        "win_rate_ci_low": last_value(&|e| e.win_rate.low),
        "win_rate_ci_high": last_value(&|e| e.win_rate.high),
        "soft_win_rate": last_value(&|e| e.soft_win_rate),
        "win_rate_lc": last.and_then(|e| e.win_rate_lc),
        "gold_win_rate": gold.map(|g| g.mean),
        "gold_win_rate_ci_low": gold.map(|g| g.low),
        "gold_win_rate_ci_high": gold.map(|g| g.high),
        "evaluation_judges": last.map(|e| &e.judges),
        "kl": last_value(&|e| e.kl),
        "entropy": last_value(&|e| e.entropy),
        "response_length": last_value(&|e| e.response_length),
        "reference_length": last_value(&|e| e.reference_length),
        "eval_prompts": last.map(|e| e.prompts),
        "eval_unjudged": last.map(|e| e.unjudged),
        "evaluated_at_step": last.map(|e| e.step),
        "truncation_rate": last.and_then(|e| e.truncation_rate),
        "reference_truncation_rate": last.and_then(|e| e.reference_truncation_rate),
        "evaluation_conditions": last.and_then(|e| e.conditions.as_ref()),
        "average": last.and_then(|e| e.average.as_ref()),
        "reference_version": last.and_then(|e| e.reference_version),
        "current_reference": last.and_then(|e| e.current_reference.as_ref()),
        "evaluations": summary.evaluations,
    });
    for (key, value) in evaluation.as_object().into_iter().flatten() {
        report[key] = value.clone();
    }
    if let Some(arms) = bandit {
        report["reference"] = json!(arms.reference);
        report["policy"] = json!(arms.policy);
        report["mixture"] = json!(arms.mixture);
        report["average_policy"] = json!(arms.average);
    }
    report
}

/// The part of the summary on training.
fn training_json(inputs: &RunInputs, outcome: &RunOutcome) -> Value {
    let summary = &outcome.summary;
    json!({
        "steps": summary.steps,
        "pairs": summary.pairs,
        "pairs_from_files": summary.file_pairs,
        "tokens": summary.tokens,
        "pairs_per_second": summary.pairs as f64 / summary.wall_seconds.max(1e-9),
        "wall_seconds": summary.wall_seconds,
        "base_seconds": inputs.model.base_seconds,
        "peak_memory_bytes": telemetry::peak_memory_bytes(),
        "nonfinite_steps": summary.recovery.nonfinite,
        "skipped_steps": summary.recovery.rejected,
        "rollbacks": summary.recovery.rollbacks,
        "grad_clipped_share": summary.clipped_share,
        "weights_digest": summary.weights_digest.to_string(),
        "checkpoint": summary.checkpoint,
        "environment": environment(),
        "stages": stages(outcome),
        "rounds": outcome.rounds,
    })
}

/// Version of the program and description of the machine.
fn environment() -> Value {
    let mut environment = json!({"version": env!("CARGO_PKG_VERSION")});
    let machine = json!(telemetry::describe_machine());
    for (name, value) in machine.as_object().into_iter().flatten() {
        environment[name] = value.clone();
    }
    environment
}

fn stages(outcome: &RunOutcome) -> Value {
    let mut stages = Map::new();
    for (stage, snapshot) in &outcome.stages {
        let mut value = json!(snapshot);
        value["conserved"] = json!(snapshot.is_conserved());
        stages.insert(stage.name().to_owned(), value);
    }
    Value::Object(stages)
}

/// The summary for people: `report.md`.
pub(super) fn to_markdown(
    settings: &Settings,
    inputs: &RunInputs,
    outcome: &RunOutcome,
    bandit: Option<&ArmProbabilities>,
) -> Result<String, fmt::Error> {
    let summary = &outcome.summary;
    let mut text = format!("# {}\n\n", settings.run.name);
    match summary.evaluations.last() {
        Some(last) => conclusion::write(&mut text, settings, summary, last)?,
        None => conclusion::write_unevaluated(&mut text, settings, summary)?,
    }
    writeln!(
        text,
        "\n{} steps on {} pairs{} in {:.0} s ({:.1} pairs/s){}.",
        summary.steps,
        summary.pairs,
        match summary.file_pairs {
            0 => String::new(),
            count => format!(", {count} of them from files,"),
        },
        summary.wall_seconds,
        summary.pairs as f64 / summary.wall_seconds.max(1e-9),
        inputs.model.base_seconds.map_or(String::new(), |s| format!(
            ", after {s:.0} s for the base policy"
        )),
    )?;
    if let Some(share) = summary.clipped_share.filter(|&share| share > 0.0) {
        writeln!(
            text,
            "The gradient was clipped in {:.0} % of the steps (at a norm of {}).",
            100.0 * share,
            settings.learner.optimizer().max_grad_norm
        )?;
    }
    write_evaluations(&mut text, &summary.evaluations)?;
    if let Some(arms) = bandit {
        writeln!(
            text,
            "\n| arm | reference | policy | mixture |\n|---|---|---|---|"
        )?;
        for arm in 0..arms.policy.len() {
            let [r, p, m] = [&arms.reference, &arms.policy, &arms.mixture].map(|v| v[arm]);
            writeln!(text, "| {arm} | {r:.4} | {p:.4} | {m:.4} |")?;
        }
    } else if let Some(last) = summary.evaluations.last() {
        write_examples(&mut text, last)?;
    }
    write_rounds(&mut text, &outcome.rounds)?;
    write_stages(&mut text, outcome)?;
    let format = match settings.model.lora_rank {
        0 => "a Hugging Face folder",
        _ => "a PEFT adapter folder; `agon export --merge` makes a model of it",
    };
    writeln!(
        text,
        "\nPolicy: `{}` ({format}). Weights: `{}`.",
        summary.checkpoint.display(),
        summary.weights_digest
    )?;
    Ok(text)
}

fn write_evaluations(text: &mut String, evaluations: &[Evaluation]) -> fmt::Result {
    if evaluations.len() < 2 {
        return Ok(());
    }
    let others = other_win_rates(evaluations);
    let heads: String = others
        .iter()
        .map(|other| format!(" {} |", other.name))
        .collect();
    writeln!(
        text,
        "\n| step | win rate | interval | length-controlled | gold |{heads} KL | length | truncated | entropy |\n\
         |---|---|---|---|---|{}---|---|---|---|",
        "---|".repeat(others.len())
    )?;
    for e in evaluations {
        let rate = |rate: Option<f64>| rate.map_or("–".into(), |rate| format!("{rate:.3}"));
        let (gold, lc) = (rate(e.gold_win_rate.map(|g| g.mean)), rate(e.win_rate_lc));
        let others: String = others
            .iter()
            .map(|other| format!(" {} |", rate((other.of)(e))))
            .collect();
        let cut_off = rate(e.truncation_rate);
        writeln!(
            text,
            "| {} | {:.3} | {:.3}–{:.3} | {lc} | {gold} |{others} {:.2} | {:.1} | {cut_off} | {:.3} |",
            e.step,
            e.win_rate.mean,
            e.win_rate.low,
            e.win_rate.high,
            e.kl,
            e.response_length,
            e.entropy
        )?;
    }
    writeln!(text, "\n![win rate]({WIN_RATE_CHART})")
}

/// A win rate of an evaluation; `None` if it has none.
type WinRateOf<'a> = dyn Fn(&Evaluation) -> Option<f64> + 'a;

/// A column of win rates beside the policy's against the reference of the start under the run's judge.
struct OtherWinRate<'a> {
    name: String,
    of: Box<WinRateOf<'a>>,
}

/// The win rates of the moving average, against a reference that has moved, and under evaluation judges, as far as an
/// evaluation has them.
fn other_win_rates(evaluations: &[Evaluation]) -> Vec<OtherWinRate<'_>> {
    let average = |e: &Evaluation| e.average.as_ref().map(|average| average.win_rate.mean);
    let current = |e: &Evaluation| {
        e.current_reference
            .as_ref()
            .map(|other| other.win_rate.mean)
    };
    let models: [OtherWinRate<'_>; 2] = [
        OtherWinRate {
            name: "average".to_owned(),
            of: Box::new(average),
        },
        OtherWinRate {
            name: "against the current reference".to_owned(),
            of: Box::new(current),
        },
    ];
    let judges = judge_names(evaluations)
        .into_iter()
        .map(|judge| OtherWinRate {
            name: judge.to_owned(),
            of: Box::new(move |e| e.under(judge)?.win_rate.map(|rate| rate.mean)),
        });
    let has_any = |other: &OtherWinRate<'_>| evaluations.iter().any(|e| (other.of)(e).is_some());
    models.into_iter().filter(has_any).chain(judges).collect()
}

/// Rounds of adversarial preference optimisation: quality of the preference model before and after each.
fn write_rounds(text: &mut String, rounds: &[RoundReport]) -> fmt::Result {
    if rounds.is_empty() {
        return Ok(());
    }
    writeln!(text, "\n## APO rounds of the preference model\n")?;
    writeln!(
        text,
        "| round | step | golden answer wins | accuracy, ECE on annotated pairs | on the policy's samples: initial | before | after | |"
    )?;
    writeln!(text, "|---|---|---|---|---|---|---|---|")?;
    for r in rounds {
        let quality = |q: &Quality| format!("{:.3}, {:.3}", q.accuracy, q.ece);
        let on_samples = |of: &dyn Fn(&PolicySampleQuality) -> Quality| {
            r.policy.as_ref().map_or("–".into(), |p| quality(&of(p)))
        };
        writeln!(
            text,
            "| {} | {} | {:.3} → {:.3} | {} → {} | {} | {} | {} | {} |",
            r.round,
            r.step,
            r.golden_wins.before,
            r.golden_wins.after,
            quality(&r.held_out.before),
            quality(&r.held_out.after),
            on_samples(&|p| p.initial),
            on_samples(&|p| p.before),
            on_samples(&|p| p.after),
            r.rejected.as_deref().unwrap_or("accepted"),
        )?;
    }
    Ok(())
}

fn write_examples(text: &mut String, last: &Evaluation) -> fmt::Result {
    writeln!(text, "\n## Side by side")?;
    for example in &last.examples {
        writeln!(text, "\n> {}\n", one_line(&example.prompt))?;
        writeln!(text, "- reference: {}", one_line(&example.reference))?;
        writeln!(text, "- policy: {}", one_line(&example.policy))?;
        writeln!(text, "- preferred: {}", preferred(example.p))?;
    }
    Ok(())
}

/// The preferred side at probability `p` that the policy's answer is preferred.
fn preferred(p: f64) -> String {
    let side = if p > 0.5 {
        "the policy's"
    } else if p < 0.5 {
        "the reference's"
    } else {
        "neither"
    };
    format!("{side} (p = {p:.2})")
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn write_stages(text: &mut String, outcome: &RunOutcome) -> fmt::Result {
    writeln!(
        text,
        "\n| stage | received | emitted | dropped | in flight |\n|---|---|---|---|---|"
    )?;
    for (stage, s) in &outcome.stages {
        let reasons: Vec<String> = s
            .dropped
            .iter()
            .map(|(reason, n)| format!("{n} {}", reason.name()))
            .collect();
        let dropped = if reasons.is_empty() {
            "0".into()
        } else {
            reasons.join(", ")
        };
        writeln!(
            text,
            "| {} | {} | {} | {dropped} | {} |",
            stage.name(),
            s.received,
            s.emitted,
            s.in_flight
        )?;
    }
    Ok(())
}
