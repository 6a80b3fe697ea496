//! Reports of a run and of a fit: `report.json`, `report.md` and `win_rate.svg` at its end, and an HTML page on request.

pub(crate) mod charts;
pub(crate) mod conclusion;
pub(crate) mod fit;
pub(crate) mod html;
pub(crate) mod markup;
mod summary;

use learner::Evaluation;
use model::LanguageModel;
use model::decode::{Decoder, Precision, Prefill};
use serde_json::Value;
use settings::{PromptsSettings, Settings};
use telemetry::{RunDirectory, printable, printable_json, write_atomically};

use crate::{assembly::RunInputs, run::RunOutcome};

/// File name of the chart of win rates.
const WIN_RATE_CHART: &str = "win_rate.svg";

/// The report of a finished or interrupted run.
pub(crate) struct Report {
    json: Value,
    markdown: String,
    evaluations: Vec<Evaluation>,
}

impl Report {
    pub(crate) fn new(
        settings: &Settings,
        inputs: &RunInputs,
        outcome: &RunOutcome,
    ) -> anyhow::Result<Self> {
        let bandit = match settings.prompts {
            PromptsSettings::Bandit {} => Some(ArmProbabilities::new(settings, inputs, outcome)?),
            _ => None,
        };
        let json = summary::to_json(settings, inputs, outcome, bandit.as_ref());
        let markdown = summary::to_markdown(settings, inputs, outcome, bandit.as_ref())?;
        Ok(Self {
            json,
            markdown,
            evaluations: outcome.summary.evaluations.clone(),
        })
    }

    /// Writes all files to the run directory and the Markdown to standard output.
    pub(crate) fn write(&self, directory: &RunDirectory) -> anyhow::Result<()> {
        if self.evaluations.len() > 1 {
            charts::write_win_rates(&directory.root().join(WIN_RATE_CHART), &self.evaluations)?;
        }
        write(directory, &self.json, &self.markdown)
    }
}

/// Writes report.json and report.md to a run directory, and the text to standard output.
///
/// # Errors
/// When a file cannot be written.
fn write(directory: &RunDirectory, json: &Value, markdown: &str) -> anyhow::Result<()> {
    let json = serde_json::to_string_pretty(json)?;
    let json = format!("{}\n", printable_json(&json));
    let markdown = printable(markdown);
    write_atomically(&directory.report_json(), json.as_bytes())?;
    write_atomically(&directory.report_markdown(), markdown.as_bytes())?;
    let path = directory.report_markdown();
    let printed = out!("{markdown}").and_then(|()| out!("Report: {}", path.display()));
    if let Err(error) = printed {
        // The work is done and its report written: a failed write to standard output does not fail the command.
        tracing::warn!(%error, path = %path.display(), "the report could not be printed");
    }
    Ok(())
}

/// Probabilities of a bandit's arms.
struct ArmProbabilities {
    /// The current reference.
    reference: Vec<f64>,
    policy: Vec<f64>,
    /// The mixture of these two.
    mixture: Vec<f64>,
    /// The moving average of the policy's weights, if the run has one.
    average: Option<Vec<f64>>,
}

impl ArmProbabilities {
    fn new(settings: &Settings, inputs: &RunInputs, outcome: &RunOutcome) -> anyhow::Result<Self> {
        let initial = inputs.policy_to_train(settings)?;
        let checkpoint = &outcome.summary.checkpoint;
        let policy = initial.with_saved_weights(checkpoint)?;
        let policy = next_token_probabilities(&policy, &[0])?;
        let reference = learner::checkpoint_reference(checkpoint, &initial)?
            .unwrap_or_else(|| initial.without_adapter());
        let reference = next_token_probabilities(&reference, &[0])?;
        let average = learner::checkpoint_average(checkpoint, &initial)?;
        let average = average.map(|average| next_token_probabilities(&average, &[0]));
        let mixture = playground::mixture(&policy, &reference, settings.actor.mixture_coef);
        Ok(Self {
            reference,
            policy,
            mixture,
            average: average.transpose()?,
        })
    }
}

/// Distribution of the token after `ids`.
fn next_token_probabilities(model: &LanguageModel, ids: &[u32]) -> anyhow::Result<Vec<f64>> {
    let mut decoder = Decoder::new(model.clone(), Precision::F32, 1, ids.len())?;
    let logits = decoder.prefill(&[Prefill { ids, slots: &[0] }])?;
    let logits = logits.row(0);
    let max_logit = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f64> = logits
        .iter()
        .map(|&z| f64::from(z - max_logit).exp())
        .collect();
    let total: f64 = weights.iter().sum();
    Ok(weights.into_iter().map(|w| w / total).collect())
}
