//! One APO round: train, measure, accept or reject, write.

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

use crate::apo::history::{ROUNDS, folder};
use crate::apo::{ApoContext, RoundOutcome};
use crate::calibration::Calibration;
use crate::error::PreferenceError;
use crate::reward_training::{
    AdversarialExample, PreferenceExample, StepMetrics, TrainingData, calibrate, fit, fit_further,
    predict,
};

/// Data of a round and the model that it competes with.
pub(super) struct ApoRound {
    pub(super) number: u64,
    pub(super) version: WeightsVersion,
    pub(super) adversarial: Vec<AdversarialExample>,
    /// Every two samples of a prompt with their gold label; empty where it is not known.
    pub(super) gold_examples: Vec<PreferenceExample>,
    pub(super) without_golden: usize,
    /// The judge so far.
    pub(super) current: RewardModel,
    pub(super) context: Arc<ApoContext>,
}

/// Measurements of a round: one line of `rounds.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RoundReport {
    /// Number of the round, from 1.
    pub round: u64,
    /// Session of the run that ran the round.
    pub session: u64,
    /// Learner step whose policy gave the samples.
    pub step: u64,
    /// Golden answer against sample: rows of the adversarial loss.
    pub pairs: usize,
    /// Prompts without a golden answer.
    pub without_golden: usize,
    /// Pairs of people's verdicts that were trained on besides the annotated ones.
    pub human_verdicts: usize,
    /// Loss on annotated pairs at the last step; `None` when they are not trained on.
    pub annotated_loss: Option<f64>,
    /// Adversarial loss at the last step.
    pub golden_loss: Option<f64>,
    /// Accuracy and calibration on held-out annotated pairs, before and after.
    pub held_out: BeforeAfter<Quality>,
    /// Rate at which the golden answer is preferred to the policy's sample, before and after.
    pub golden_wins: BeforeAfter<f64>,
    /// Mean |p after − p before| on the held-out pairs.
    pub drift: f64,
    /// Quality on pairs of the policy's samples against the gold preference, where it is known.
    pub policy: Option<PolicySampleQuality>,
    /// Reason the model was rejected; `None` when it becomes the judge.
    pub rejected: Option<String>,
    /// Duration of the round, in seconds.
    pub seconds: f64,
}

/// A measurement of the previous judge and of the new model.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct BeforeAfter<T> {
    /// Of the previous judge.
    pub before: T,
    /// Of the new model.
    pub after: T,
}

/// Summary of a [`Calibration`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Quality {
    /// Accuracy.
    pub accuracy: f64,
    /// Expected calibration error.
    pub ece: f64,
    /// Brier score.
    pub brier: f64,
}

/// Quality of three models on the current policy's samples.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PolicySampleQuality {
    /// The first judge of the run.
    pub initial: Quality,
    /// The previous judge.
    pub before: Quality,
    /// The new model.
    pub after: Quality,
}

impl ApoRound {
    /// Runs the round; ends early when `cancelled` turns true.
    pub(super) fn run(self, cancelled: &dyn Fn() -> bool) -> Result<RoundOutcome, PreferenceError> {
        let start = Instant::now();
        let context = &self.context;
        let pairs = &context.pairs;
        let human_verdicts = match context.settings.annotated {
            true => (pairs.human_verdicts)(),
            false => Vec::new(),
        };
        let examples = [pairs.annotated.as_slice(), &human_verdicts].concat();
        let data = TrainingData {
            examples: &examples,
            adversarial: &self.adversarial,
            apo: &context.settings,
        };
        let mut last = None;
        let on_step = |step| {
            last = Some(step);
            !cancelled()
        };
        // All rounds share the seed: the same initial head and the same order of annotated pairs.
        let (fit_settings, seed) = (&context.fit, context.seed);
        let model = match context.settings.warm_start {
            true => fit_further(&self.current, fit_settings, data, seed, on_step),
            false => fit(&context.backbone, fit_settings, data, seed, on_step),
        }?;
        let mut report = self.report(&model, last)?;
        report.human_verdicts = human_verdicts.len();
        report.seconds = start.elapsed().as_secs_f64();
        self.write(&model, &report)?;
        self.publish(&report);
        let model = report.rejected.is_none().then_some(model);
        Ok(RoundOutcome { report, model })
    }

    fn report(
        &self,
        model: &RewardModel,
        last: Option<StepMetrics>,
    ) -> Result<RoundReport, PreferenceError> {
        let held_out = &self.context.pairs.held_out;
        let quality = |model: &RewardModel, examples: &[PreferenceExample]| {
            Ok::<_, PreferenceError>(Quality::of(calibrate(model, examples)?))
        };
        let held_out_quality = BeforeAfter {
            before: quality(&self.current, held_out)?,
            after: quality(model, held_out)?,
        };
        let policy = if self.gold_examples.is_empty() {
            None
        } else {
            Some(PolicySampleQuality {
                initial: quality(&self.context.initial, &self.gold_examples)?,
                before: quality(&self.current, &self.gold_examples)?,
                after: quality(model, &self.gold_examples)?,
            })
        };
        Ok(RoundReport {
            round: self.number,
            session: self.version.session,
            step: self.version.step,
            pairs: self.adversarial.iter().map(|c| c.samples.len()).sum(),
            without_golden: self.without_golden,
            human_verdicts: 0,
            annotated_loss: last.and_then(|step| step.annotated),
            golden_loss: last.and_then(|step| step.golden),
            golden_wins: BeforeAfter {
                before: golden_wins(&self.current, &self.adversarial)?,
                after: golden_wins(model, &self.adversarial)?,
            },
            drift: drift(&self.current, model, held_out)?,
            rejected: self.rejection(held_out_quality.after),
            held_out: held_out_quality,
            policy,
            seconds: 0.0,
        })
    }

    fn rejection(&self, quality: Quality) -> Option<String> {
        let settings = &self.context.settings;
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

    /// Writes the model to `round_N/`, atomically, and appends the report to `rounds.jsonl`.
    fn write(&self, model: &RewardModel, report: &RoundReport) -> Result<(), PreferenceError> {
        let directory = &self.context.directory;
        let path = folder(directory, self.number);
        let tmp_path = directory.join(format!(".round_{}", self.number));
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| PreferenceError::Unwritable { path, source }
        };
        for old in [&tmp_path, &path] {
            if old.exists() {
                fs::remove_dir_all(old).map_err(failed(old))?;
            }
        }
        fs::create_dir_all(&tmp_path).map_err(failed(&tmp_path))?;
        model.save(&tmp_path, &self.context.folder)?;
        fs::rename(&tmp_path, &path).map_err(failed(&path))?;
        let reports = directory.join(ROUNDS);
        let line = report.line();
        let file = OpenOptions::new().create(true).append(true).open(&reports);
        file.and_then(|mut file| writeln!(file, "{line}"))
            .map_err(failed(&reports))
    }

    fn publish(&self, report: &RoundReport) {
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
            human_verdicts = report.human_verdicts,
            accuracy = format!("{:.3}", report.held_out.after.accuracy),
            ece = format!("{:.3}", report.held_out.after.ece),
            golden_wins = format!(
                "{:.3} -> {:.3}",
                report.golden_wins.before, report.golden_wins.after
            ),
            seconds = format!("{:.1}", report.seconds),
            rejected = report.rejected.as_deref().unwrap_or("no"),
            "APO round finished"
        );
    }
}

impl RoundReport {
    /// Weights of the policy that gave the samples.
    pub(crate) fn version(&self) -> WeightsVersion {
        WeightsVersion {
            session: self.session,
            step: self.step,
        }
    }

    /// The report as a line of `rounds.jsonl`, without the newline.
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
        calibration.map_or(none, |calibration| Self {
            accuracy: calibration.accuracy,
            ece: calibration.ece,
            brier: calibration.brier,
        })
    }
}

/// Rate at which golden answers are preferred to samples; ties count one half.
fn golden_wins(
    model: &RewardModel,
    adversarial: &[AdversarialExample],
) -> Result<f64, PreferenceError> {
    let comparisons = |adversarial: &AdversarialExample| {
        let example = |sample: &Vec<u32>| PreferenceExample {
            prompt: adversarial.prompt.clone(),
            first: adversarial.golden.clone(),
            second: sample.clone(),
            label: 1.0,
        };
        adversarial.samples.iter().map(example).collect::<Vec<_>>()
    };
    let examples: Vec<_> = adversarial.iter().flat_map(comparisons).collect();
    let calibration = calibrate(model, &examples)?;
    Ok(calibration.map_or(0.5, |calibration| calibration.accuracy))
}

/// Mean absolute difference of two models' p.
fn drift(
    one: &RewardModel,
    other: &RewardModel,
    examples: &[PreferenceExample],
) -> Result<f64, PreferenceError> {
    let (one, other) = (predict(one, examples)?, predict(other, examples)?);
    let differences = one.iter().zip(&other).map(|(a, b)| (a.p - b.p).abs());
    Ok(differences.sum::<f64>() / examples.len().max(1) as f64)
}
