//! What a run leaves behind: `report.json` for programs, `report.md` and a few lines for people.

pub(crate) mod verdict;

use std::fmt::Write as _;

use learner::{Ending, Evaluation};
use model::LanguageModel;
use model::decode::{Decoder, Precision, Prefill};
use preference::apo::{PolicySamples, Quality, RoundReport};
use serde_json::{Map, Value, json};
use settings::{PromptsSettings, Settings};
use telemetry::{RunDirectory, printable, write_atomically};

use crate::{plot, roles::Outcome, world::World};

/// A finished or interrupted run, ready to be told.
pub(crate) struct Report {
    json: Value,
    text: String,
    evaluations: Vec<Evaluation>,
}

/// The picture of the run's win rates.
const PICTURE: &str = "win_rate.svg";

impl Report {
    pub(crate) fn new(
        settings: &Settings,
        world: &World,
        outcome: &Outcome,
    ) -> anyhow::Result<Self> {
        let bandit = match settings.prompts {
            PromptsSettings::Bandit {} => Some(arms(settings, world, outcome)?),
            _ => None,
        };
        let json = in_json(settings, world, outcome, bandit.as_ref());
        let text = in_words(settings, world, outcome, bandit.as_ref())?;
        Ok(Self {
            json,
            text: printable(&text).into_owned(),
            evaluations: outcome.summary.evaluations.clone(),
        })
    }

    /// Writes both forms into the run directory and the words to standard output.
    pub(crate) fn tell(&self, directory: &RunDirectory) -> anyhow::Result<()> {
        let mut json = serde_json::to_vec_pretty(&self.json)?;
        json.push(b'\n');
        write_atomically(&directory.report_json(), &json)?;
        write_atomically(&directory.report_markdown(), self.text.as_bytes())?;
        if self.evaluations.len() > 1 {
            plot::win_rates(&directory.root().join(PICTURE), &self.evaluations)?;
        }
        out!("{}", self.text)?;
        out!("Report: {}", directory.report_markdown().display())?;
        Ok(())
    }
}

/// A bandit's probabilities over its arms.
struct Arms {
    reference: Vec<f64>,
    policy: Vec<f64>,
    mixture: Vec<f64>,
}

fn arms(settings: &Settings, world: &World, outcome: &Outcome) -> anyhow::Result<Arms> {
    let beginning = world.policy()?;
    let policy = beginning.as_saved(&outcome.summary.checkpoint)?;
    let policy = probabilities(&policy, &[0])?;
    let reference = probabilities(&beginning.without_adapter(), &[0])?;
    let mixture = playground::mixture(&policy, &reference, settings.actor.mixture_coef);
    Ok(Arms {
        reference,
        policy,
        mixture,
    })
}

/// The distribution of the token that follows these.
fn probabilities(model: &LanguageModel, ids: &[u32]) -> anyhow::Result<Vec<f64>> {
    let mut decoder = Decoder::new(model.clone(), Precision::F32, 1, ids.len())?;
    let logits = decoder.prefill(&[Prefill { ids, slots: &[0] }])?;
    let logits = logits.row(0);
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f64> = logits.iter().map(|&z| f64::from(z - most).exp()).collect();
    let total: f64 = weights.iter().sum();
    Ok(weights.into_iter().map(|w| w / total).collect())
}

fn in_json(settings: &Settings, world: &World, outcome: &Outcome, bandit: Option<&Arms>) -> Value {
    let summary = &outcome.summary;
    let last = summary.evaluations.last();
    let of = |f: &dyn Fn(&Evaluation) -> f64| last.map_or(Value::Null, |e| json!(f(e)));
    let gold = last.and_then(|e| e.gold_win_rate);
    let mut report = json!({
        "finished": summary.ending == Ending::Finished,
        "objective": settings.learner.objective,
        "judge": settings.preference.judge,
        "win_rate": of(&|e| e.win_rate.mean),
        "win_rate_ci_low": of(&|e| e.win_rate.low),
        "win_rate_ci_high": of(&|e| e.win_rate.high),
        "soft_win_rate": of(&|e| e.soft_win_rate),
        "gold_win_rate": gold.map(|g| g.mean),
        "gold_win_rate_ci_low": gold.map(|g| g.low),
        "gold_win_rate_ci_high": gold.map(|g| g.high),
        "kl": of(&|e| e.kl),
        "entropy": of(&|e| e.entropy),
        "response_length": of(&|e| e.response_length),
        "reference_length": of(&|e| e.reference_length),
        "eval_prompts": last.map(|e| e.prompts),
        "eval_unjudged": last.map(|e| e.unjudged),
        "evaluated_at_step": last.map(|e| e.step),
        "truncation_rate": last.and_then(|e| e.truncation_rate),
        "reference_truncation_rate": last.and_then(|e| e.reference_truncation_rate),
        "evaluation_conditions": last.and_then(|e| e.conditions.as_ref()),
        "steps": summary.steps,
        "pairs": summary.pairs,
        "tokens": summary.tokens,
        "pairs_per_second": summary.pairs as f64 / summary.wall_seconds.max(1e-9),
        "wall_seconds": summary.wall_seconds,
        "base_seconds": world.base.as_ref().and_then(|base| base.seconds),
        "peak_memory_bytes": telemetry::peak_memory_bytes(),
        "nonfinite_steps": summary.nonfinite,
        "rollbacks": summary.rollbacks,
        "weights_digest": summary.weights_digest.to_string(),
        "checkpoint": summary.checkpoint,
        "environment": environment(),
        "stations": stations(outcome),
        "evaluations": summary.evaluations,
        "rounds": outcome.rounds,
    });
    if let Some(arms) = bandit {
        report["reference"] = json!(arms.reference);
        report["policy"] = json!(arms.policy);
        report["mixture"] = json!(arms.mixture);
    }
    report
}

/// What ran, and on what.
fn environment() -> Value {
    let mut environment = json!({"version": env!("CARGO_PKG_VERSION")});
    let machine = json!(telemetry::describe_machine());
    for (name, value) in machine.as_object().into_iter().flatten() {
        environment[name] = value.clone();
    }
    environment
}

fn stations(outcome: &Outcome) -> Value {
    let mut stations = Map::new();
    for (station, snapshot) in &outcome.stations {
        let mut value = json!(snapshot);
        value["conserved"] = json!(snapshot.is_conserved());
        stations.insert(station.name().to_owned(), value);
    }
    Value::Object(stations)
}

fn in_words(
    settings: &Settings,
    world: &World,
    outcome: &Outcome,
    bandit: Option<&Arms>,
) -> Result<String, std::fmt::Error> {
    let summary = &outcome.summary;
    let mut text = format!("# {}\n\n", settings.run.name);
    match summary.evaluations.last() {
        Some(last) => verdict::write(&mut text, settings, summary, last)?,
        None => verdict::write_unevaluated(&mut text, summary)?,
    }
    writeln!(
        text,
        "\n{} steps on {} pairs in {:.0} s ({:.1} pairs/s){}.",
        summary.steps,
        summary.pairs,
        summary.wall_seconds,
        summary.pairs as f64 / summary.wall_seconds.max(1e-9),
        world
            .base
            .as_ref()
            .and_then(|b| b.seconds)
            .map_or(String::new(), |s| format!(
                ", after {s:.0} s for the base policy"
            )),
    )?;
    course(&mut text, &summary.evaluations)?;
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
        examples(&mut text, last)?;
    }
    rounds(&mut text, &outcome.rounds)?;
    flow(&mut text, outcome)?;
    let kind = match settings.model.lora_rank {
        0 => "a Hugging Face folder",
        _ => "PEFT's folder of an adapter; `agon export --merge` makes a model of it",
    };
    writeln!(
        text,
        "\nPolicy: `{}` ({kind}). Weights: `{}`.",
        summary.checkpoint.display(),
        summary.weights_digest
    )?;
    Ok(text)
}

fn course(text: &mut String, evaluations: &[Evaluation]) -> std::fmt::Result {
    if evaluations.len() < 2 {
        return Ok(());
    }
    writeln!(
        text,
        "\n| step | win rate | interval | gold | KL | length | cut off | entropy |\n|---|---|---|---|---|---|---|---|"
    )?;
    for e in evaluations {
        let gold = e
            .gold_win_rate
            .map_or("–".into(), |g| format!("{:.3}", g.mean));
        let cut_off = e
            .truncation_rate
            .map_or("–".into(), |rate| format!("{rate:.3}"));
        writeln!(
            text,
            "| {} | {:.3} | {:.3}–{:.3} | {gold} | {:.2} | {:.1} | {cut_off} | {:.3} |",
            e.step,
            e.win_rate.mean,
            e.win_rate.low,
            e.win_rate.high,
            e.kl,
            e.response_length,
            e.entropy
        )?;
    }
    writeln!(text, "\n![win rate]({PICTURE})")
}

/// The rounds of the adversarial game: what the preference model was worth before and after each.
fn rounds(text: &mut String, rounds: &[RoundReport]) -> std::fmt::Result {
    if rounds.is_empty() {
        return Ok(());
    }
    writeln!(text, "\n## The preference model's rounds\n")?;
    writeln!(
        text,
        "| round | step | golden answer wins | accuracy, ECE on annotated pairs | on the policy's samples: initial | before | after | |"
    )?;
    writeln!(text, "|---|---|---|---|---|---|---|---|")?;
    for r in rounds {
        let quality = |q: &Quality| format!("{:.3}, {:.3}", q.accuracy, q.ece);
        let known = |of: &dyn Fn(&PolicySamples) -> Quality| {
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
            known(&|p| p.initial),
            known(&|p| p.before),
            known(&|p| p.after),
            r.refused.as_deref().unwrap_or("accepted"),
        )?;
    }
    Ok(())
}

fn examples(text: &mut String, last: &Evaluation) -> std::fmt::Result {
    writeln!(text, "\n## Side by side")?;
    for example in &last.examples {
        writeln!(text, "\n> {}\n", one_line(&example.prompt))?;
        writeln!(text, "- reference: {}", one_line(&example.reference))?;
        writeln!(text, "- policy: {}", one_line(&example.policy))?;
        writeln!(text, "- preferred: {}", preferred(example.p))?;
    }
    Ok(())
}

fn preferred(p: f64) -> String {
    let whose = if p > 0.5 {
        "the policy's"
    } else if p < 0.5 {
        "the reference's"
    } else {
        "neither"
    };
    format!("{whose} (p = {p:.2})")
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn flow(text: &mut String, outcome: &Outcome) -> std::fmt::Result {
    writeln!(
        text,
        "\n| station | taken | given | dropped | in hand |\n|---|---|---|---|---|"
    )?;
    for (station, s) in &outcome.stations {
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
            station.name(),
            s.taken,
            s.given,
            s.in_hand
        )?;
    }
    Ok(())
}
