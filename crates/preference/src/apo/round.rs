//! One round: fit, measure, accept or refuse, write down.

use std::{
    fs::{self, OpenOptions},
    io::Write as _,
    path::Path,
    sync::Arc,
    time::Instant,
};

use messages::WeightsVersion;
use model::RewardModel;
use serde::{Deserialize, Serialize};
use telemetry::{Measurements, publish};

use super::{
    Fixed, Outcome,
    history::{ROUNDS, folder},
};
use crate::fit::{Contest, Example, FitStep, Material, calibrate, fit, judge};
use crate::{Calibration, PreferenceError};

/// A round's material and the model it starts against.
pub(super) struct Round {
    pub(super) number: u64,
    pub(super) version: WeightsVersion,
    pub(super) contests: Vec<Contest>,
    /// Every two samples of a prompt, where the true preference is known.
    pub(super) known: Vec<Example>,
    pub(super) without_golden: usize,
    pub(super) before: RewardModel,
    pub(super) fixed: Arc<Fixed>,
}

/// What a round found: one line of `rounds.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RoundReport {
    /// Its number, from 1.
    pub round: u64,
    /// The session of the run in which it was played.
    pub session: u64,
    /// The learner step whose policy gave the samples.
    pub step: u64,
    /// Golden answers against samples: the rows of the game's term.
    pub pairs: usize,
    /// Prompts that had no golden answer.
    pub without_golden: usize,
    /// The annotated pairs' loss at the last step; `None` where they took no part.
    pub annotated_loss: Option<f64>,
    /// The golden answers' loss at the last step.
    pub golden_loss: Option<f64>,
    /// Accuracy and calibration on held-out annotated pairs, before and after.
    pub held_out: Share<Quality>,
    /// How often the golden answer is preferred to the policy's sample, before and after.
    pub golden_wins: Share<f64>,
    /// The mean |p after − p before| on the held-out pairs.
    pub drift: f64,
    /// On two samples of the policy, against the true preference, where a world has one.
    pub policy: Option<PolicySamples>,
    /// Why the model was refused; `None` when it judges from now on.
    pub refused: Option<String>,
    /// Seconds the round took.
    pub seconds: f64,
}

/// A number of the model that judged before and of the new one.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Share<T> {
    /// Of the model that judged until now.
    pub before: T,
    /// Of the new one.
    pub after: T,
}

/// Two numbers of a [`Calibration`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Quality {
    /// Its accuracy.
    pub accuracy: f64,
    /// Its calibration error.
    pub ece: f64,
    /// Its Brier score.
    pub brier: f64,
}

/// How three models do on the current policy's samples.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PolicySamples {
    /// The model of the start, which was never fitted again.
    pub initial: Quality,
    /// The model that judged until now.
    pub before: Quality,
    /// The new one.
    pub after: Quality,
}

impl Round {
    /// Plays the round; ends early when `stopped` turns true.
    pub(super) fn play(self, stopped: &dyn Fn() -> bool) -> Result<Outcome, PreferenceError> {
        let before = Instant::now();
        let Fixed {
            settings, fit: how, ..
        } = &*self.fixed;
        let material = Material {
            examples: &self.fixed.annotated,
            contests: &self.contests,
            apo: settings,
        };
        let mut last = None;
        // Every round has an order of its own and the same head to start from.
        let model = fit(&self.fixed.trunk, how, material, self.fixed.seed, |step| {
            last = Some(step);
            !stopped()
        })?;
        let mut report = self.report(&model, last)?;
        report.seconds = before.elapsed().as_secs_f64();
        self.write(&model, &report)?;
        self.tell(&report);
        let model = report.refused.is_none().then_some(model);
        Ok(Outcome { report, model })
    }

    fn report(
        &self,
        model: &RewardModel,
        last: Option<FitStep>,
    ) -> Result<RoundReport, PreferenceError> {
        let held_out = &self.fixed.held_out;
        let of = |model: &RewardModel, examples: &[Example]| {
            Ok::<_, PreferenceError>(Quality::of(calibrate(model, examples)?))
        };
        let held_out_quality = Share {
            before: of(&self.before, held_out)?,
            after: of(model, held_out)?,
        };
        let policy = if self.known.is_empty() {
            None
        } else {
            Some(PolicySamples {
                initial: of(&self.fixed.initial, &self.known)?,
                before: of(&self.before, &self.known)?,
                after: of(model, &self.known)?,
            })
        };
        Ok(RoundReport {
            round: self.number,
            session: self.version.session,
            step: self.version.step,
            pairs: self.contests.iter().map(|c| c.samples.len()).sum(),
            without_golden: self.without_golden,
            annotated_loss: last.and_then(|step| step.annotated),
            golden_loss: last.and_then(|step| step.golden),
            golden_wins: Share {
                before: golden_wins(&self.before, &self.contests)?,
                after: golden_wins(model, &self.contests)?,
            },
            drift: drift(&self.before, model, held_out)?,
            refused: self.refusal(held_out_quality.after),
            held_out: held_out_quality,
            policy,
            seconds: 0.0,
        })
    }

    fn refusal(&self, quality: Quality) -> Option<String> {
        let settings = &self.fixed.settings;
        if quality.accuracy < settings.min_accuracy {
            return Some(format!(
                "its accuracy on held-out pairs is {:.3}, below preference.apo.min_accuracy = {}",
                quality.accuracy, settings.min_accuracy
            ));
        }
        (quality.ece > settings.max_ece).then(|| {
            format!(
                "its calibration error on held-out pairs is {:.3}, above preference.apo.max_ece = {}",
                quality.ece, settings.max_ece
            )
        })
    }

    /// Leaves `round_N/`, the model as a folder, whole or not at all, and a line in `rounds.jsonl`.
    fn write(&self, model: &RewardModel, report: &RoundReport) -> Result<(), PreferenceError> {
        let directory = &self.fixed.directory;
        let to = folder(directory, self.number);
        let aside = directory.join(format!(".round_{}", self.number));
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| PreferenceError::Unwritable { path, source }
        };
        for old in [&aside, &to] {
            if old.exists() {
                fs::remove_dir_all(old).map_err(failed(old))?;
            }
        }
        fs::create_dir_all(&aside).map_err(failed(&aside))?;
        model.save(&aside, &self.fixed.folder)?;
        fs::rename(&aside, &to).map_err(failed(&to))?;
        let lines = directory.join(ROUNDS);
        let line = report.line();
        let file = OpenOptions::new().create(true).append(true).open(&lines);
        file.and_then(|mut file| writeln!(file, "{line}"))
            .map_err(failed(&lines))
    }

    fn tell(&self, report: &RoundReport) {
        let mut m = Measurements::new();
        m.set("apo/round", report.round as f64);
        m.set("apo/pairs", report.pairs as f64);
        m.set("apo/loss", report.golden_loss.unwrap_or(f64::NAN));
        m.set("preference/accuracy", report.held_out.after.accuracy);
        m.set("preference/ece", report.held_out.after.ece);
        m.set("preference/brier", report.held_out.after.brier);
        m.set("preference/drift", report.drift);
        publish(&m, &[("role", "preference")]);
        tracing::info!(
            round = report.round,
            step = report.step,
            accuracy = format!("{:.3}", report.held_out.after.accuracy),
            ece = format!("{:.3}", report.held_out.after.ece),
            golden_wins = format!(
                "{:.3} -> {:.3}",
                report.golden_wins.before, report.golden_wins.after
            ),
            seconds = format!("{:.1}", report.seconds),
            refused = report.refused.as_deref().unwrap_or("no"),
            "a round of the game"
        );
    }
}

impl RoundReport {
    /// The weights whose samples it was played on.
    pub(crate) fn version(&self) -> WeightsVersion {
        WeightsVersion {
            session: self.session,
            step: self.step,
        }
    }

    /// The report as a line of `rounds.jsonl`, without its end.
    pub(super) fn line(&self) -> String {
        serde_json::to_string(self).expect("a report is a tree of plain values")
    }
}

impl Quality {
    fn of(calibration: Option<Calibration>) -> Self {
        let none = Self {
            accuracy: 0.5,
            ece: 0.0,
            brier: 0.25,
        };
        calibration.map_or(none, |found| Self {
            accuracy: found.accuracy,
            ece: found.ece,
            brier: found.brier,
        })
    }
}

/// How often golden answers are preferred to samples; ties count one half.
fn golden_wins(model: &RewardModel, contests: &[Contest]) -> Result<f64, PreferenceError> {
    let against = |contest: &Contest| {
        let example = |sample: &Vec<u32>| Example {
            prompt: contest.prompt.clone(),
            first: contest.golden.clone(),
            second: sample.clone(),
            label: 1.0,
        };
        contest.samples.iter().map(example).collect::<Vec<_>>()
    };
    let examples: Vec<_> = contests.iter().flat_map(against).collect();
    let calibration = calibrate(model, &examples)?;
    Ok(calibration.map_or(0.5, |found| found.accuracy))
}

/// How far two models are apart.
fn drift(
    one: &RewardModel,
    other: &RewardModel,
    examples: &[Example],
) -> Result<f64, PreferenceError> {
    let (one, other) = (judge(one, examples)?, judge(other, examples)?);
    let apart = one.iter().zip(&other).map(|(a, b)| (a.p - b.p).abs());
    Ok(apart.sum::<f64>() / examples.len().max(1) as f64)
}
