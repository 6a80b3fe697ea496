//! Reports steps and evaluations: to the journal, to Prometheus, to the sample log and to the terminal.
//!
//! Promises one journal line per step and per evaluation. Does not change the course of a run.

use std::{sync::Arc, time::Duration};

use messages::{LabelledPair, Prompt, PromptText, Purpose, WeightsVersion};
use model::Tokenizer;
use settings::{LearnerSettings, TelemetrySettings};
use telemetry::{Journal, Measurements, Progress, RunDirectory, SampleLog, SampleTexts};

use crate::{
    error::LearnerError,
    evaluation::Evaluation,
    pair_buffer,
    pair_source::BatchWaitMetrics,
    progress::{RunTotals, count_from_files, label_count},
    recovery::RecoveryCounts,
    step_metrics,
    trainer::PolicySamples,
};

/// Share of prompts with identical completions above which the policy counts as collapsed.
const COLLAPSED: f64 = 0.9;

/// Distribution that actors sample training completions from, given their `mixture_coef`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sampling {
    /// The policy's own, in f32 at temperature 1 without truncation: samples estimate expectations under the policy.
    Exact,
    /// Tempered or truncated, or with weights that are quantised or rounded in transport.
    Altered,
}

/// Reports of a run.
pub(crate) struct Reporter {
    settings: LearnerSettings,
    telemetry: TelemetrySettings,
    sampling: Sampling,
    directory: Arc<RunDirectory>,
    journal: Journal,
    samples: SampleLog,
    tokenizer: Tokenizer,
    terminal: Progress,
    /// Whether the last step's policy counted as collapsed.
    has_collapsed: bool,
    /// Fraction of the run's steps with a clipped gradient, as of the last step.
    clipped_share: Option<f64>,
}

/// Inputs of a [`Reporter`].
pub(crate) struct ReporterParts {
    pub(crate) settings: LearnerSettings,
    pub(crate) telemetry: TelemetrySettings,
    pub(crate) sampling: Sampling,
    pub(crate) directory: Arc<RunDirectory>,
    pub(crate) tokenizer: Tokenizer,
}

/// An optimiser step that was applied.
pub(crate) struct AppliedStep<'a> {
    /// Pairs of the step.
    pub(crate) pairs: &'a [LabelledPair],
    /// The policy's own samples among them.
    pub(crate) samples: PolicySamples,
    /// Metrics of the trainer.
    pub(crate) measurements: Measurements,
    /// Drops, waits and outstanding prompts since the step before.
    pub(crate) waits: BatchWaitMetrics,
    /// Duration of the step, without the wait for its batch.
    pub(crate) busy: Duration,
}

/// State of the run after a step.
pub(crate) struct StepContext<'a> {
    pub(crate) totals: RunTotals,
    /// Last published version.
    pub(crate) version: WeightsVersion,
    pub(crate) recovery: RecoveryCounts,
    pub(crate) last_evaluation: Option<&'a Evaluation>,
}

impl Reporter {
    /// Opens the run directory's journal and sample log.
    ///
    /// # Errors
    /// If they cannot be opened.
    pub(crate) fn open(parts: ReporterParts) -> Result<Self, LearnerError> {
        Ok(Self {
            journal: Journal::open(&parts.directory.metrics())?,
            samples: SampleLog::open(&parts.directory.samples())?,
            terminal: Progress::new("aligning", parts.settings.steps),
            settings: parts.settings,
            telemetry: parts.telemetry,
            sampling: parts.sampling,
            directory: parts.directory,
            tokenizer: parts.tokenizer,
            has_collapsed: false,
            clipped_share: None,
        })
    }

    /// Removes what was logged after `step`, from where the run continues.
    ///
    /// # Errors
    /// If a log cannot be written.
    pub(crate) fn continue_from(&mut self, step: u64) -> Result<(), LearnerError> {
        self.journal.truncate_after(step)?;
        self.samples.truncate_after(step)?;
        if self.telemetry.tensorboard {
            let folder = self.directory.tensorboard();
            self.journal.enable_tensorboard(&folder, step)?;
        }
        Ok(())
    }

    /// Reports an applied step.
    ///
    /// # Errors
    /// If a log cannot be written.
    pub(crate) fn log_step(
        &mut self,
        step: AppliedStep<'_>,
        run: &StepContext<'_>,
    ) -> Result<(), LearnerError> {
        let flow = self.flow_metrics(&step, run);
        let AppliedStep {
            pairs,
            samples,
            mut measurements,
            waits,
            ..
        } = step;
        if let Some(kl) = self.kl(pairs, samples, waits) {
            measurements.set("objective/kl", kl);
        }
        self.clipped_share = measurements.get("grad_clipped_share");
        let step = run.totals.step;
        let sampled = pairs.len() - count_from_files(pairs);
        let identical = self.identical_ratio(waits.drops.identical, sampled, step);
        measurements.set("completions/identical_ratio", identical);
        let no_signal = waits.drops.no_signal as f64;
        let judged = (no_signal + pairs.len() as f64).max(1.0);
        measurements.set("completions/no_signal_ratio", no_signal / judged);
        measurements.merge(flow);
        self.journal
            .append(step, run.totals.wall_seconds, &measurements)?;
        telemetry::publish(&measurements, &[("role", "learner")]);
        let texts = SampleTexts {
            tokens: &|prompt, ids| self.tokenizer.token_texts(prompt, ids),
            encoded_prompt: &|prompt| encoded_prompt(&self.tokenizer, prompt),
        };
        for labelled in pairs.iter().take(self.telemetry.samples_per_step) {
            self.samples.append_with_tokens(step, labelled, texts)?;
        }
        let interval = self.telemetry.logging_steps;
        let is_due = interval > 0 && step.is_multiple_of(interval);
        if is_due || step == self.settings.steps {
            let line = step_metrics::progress_line(&measurements, run.last_evaluation);
            self.terminal.advance_to(step, &line);
        }
        Ok(())
    }

    /// Reports a step that was not applied.
    ///
    /// # Errors
    /// If the journal cannot be written.
    pub(crate) fn log_rejected(
        &mut self,
        totals: &RunTotals,
        measurements: &Measurements,
    ) -> Result<(), LearnerError> {
        self.journal
            .append(totals.step, totals.wall_seconds, measurements)?;
        Ok(())
    }

    /// Reports an evaluation.
    ///
    /// # Errors
    /// If the journal cannot be written.
    pub(crate) fn log_evaluation(
        &mut self,
        evaluation: &Evaluation,
        wall_seconds: f64,
    ) -> Result<(), LearnerError> {
        let measurements = evaluation.measurements();
        let conditions = serde_json::json!(evaluation.conditions);
        self.journal
            .append_evaluation(evaluation.step, wall_seconds, &measurements, conditions)?;
        telemetry::publish(&measurements, &[("role", "learner")]);
        tracing::info!(
            step = evaluation.step,
            win_rate = format!("{:.3}", evaluation.win_rate.mean),
            prompts = evaluation.prompts,
            unjudged = evaluation.unjudged,
            kl = format!("{:.3}", evaluation.kl),
            length = format!("{:.1}", evaluation.response_length),
            "evaluated"
        );
        Ok(())
    }

    /// Fraction of the run's steps with a clipped gradient; `None` before the first step of this session.
    pub(crate) fn clipped_share(&self) -> Option<f64> {
        self.clipped_share
    }

    /// Ends the progress display at `step`.
    pub(crate) fn finish(self, step: u64, note: &str) {
        self.terminal.finish_at(step, note);
    }

    /// Staleness, waiting time, throughput and health of a step.
    fn flow_metrics(&self, step: &AppliedStep<'_>, run: &StepContext<'_>) -> Measurements {
        let AppliedStep { pairs, waits, .. } = step;
        // The weights that the step started from.
        let before = run.totals.step - 1;
        let staleness: Vec<u64> = pairs
            .iter()
            .filter(|labelled| labelled.pair.prompt.purpose != Purpose::File)
            .map(|labelled| pair_buffer::staleness(labelled, before))
            .collect();
        let waited = waits.waited.as_secs_f64();
        let seconds = waited + step.busy.as_secs_f64();
        let completions = pairs.iter().flat_map(|l| &l.pair.completions);
        let tokens: usize = completions.map(|c| c.ids.len()).sum();
        let mut m = staleness_metrics(&staleness);
        m.set("staleness/dropped", waits.stale as f64);
        m.set("staleness/outstanding", waits.outstanding as f64);
        m.set("policy_version", run.version.step as f64);
        m.set("time/step", seconds);
        m.set("time/wait_for_batch", waited);
        m.set("idle_ratio", waited / seconds.max(1e-9));
        m.set(
            "perf/pairs_per_second",
            label_count(pairs) as f64 / seconds.max(1e-9),
        );
        m.set("perf/tokens_per_second", tokens as f64 / seconds.max(1e-9));
        if let Some(bytes) = telemetry::peak_memory_bytes() {
            m.set("perf/peak_memory_bytes", bytes as f64);
        }
        m.set("num_tokens", run.totals.tokens as f64);
        if let Some(passes) = waits.passes {
            m.set("epoch", passes);
            m.set("pairs/from_files", count_from_files(pairs) as f64);
        }
        m.merge(step_metrics::settings_metrics(
            &self.settings.objective,
            pairs,
        ));
        step_metrics::publish_staleness(&staleness);
        if let Some(bytes) = telemetry::free_bytes(self.directory.root()) {
            m.set("disk/free_bytes", bytes as f64);
        }
        m.set("health/nonfinite_steps", run.recovery.nonfinite as f64);
        m.set("health/skipped_steps", run.recovery.rejected as f64);
        m.set("health/rollbacks", run.recovery.rollbacks as f64);
        m
    }

    /// KL(π ‖ ref) per completion in nats, if the step's samples can estimate it: all are of the current weights,
    /// sampled from the policy's own distribution, and only identical ones were dropped, whose log-ratios are known.
    /// Otherwise `None`; the evaluations' `eval/kl` is the estimate then.
    fn kl(
        &self,
        pairs: &[LabelledPair],
        samples: PolicySamples,
        waits: BatchWaitMetrics,
    ) -> Option<f64> {
        let is_current = self.settings.max_staleness == 0 && self.sampling == Sampling::Exact;
        let completions = pairs.first().map_or(0, |l| l.pair.completions.len());
        let mean = waits.drops.mean_log_ratio(samples, completions);
        mean.filter(|_| is_current)
    }

    /// Share of the prompts since the last step that were dropped because their completions were identical. The more
    /// a policy collapses onto single answers, the longer a batch takes.
    fn identical_ratio(&mut self, identical: u64, pairs: usize, step: u64) -> f64 {
        let identical = identical as f64;
        let ratio = identical / (identical + pairs as f64).max(1.0);
        let has_collapsed = ratio > COLLAPSED;
        if has_collapsed && !self.has_collapsed {
            tracing::warn!(
                step,
                "{:.0} % of the prompts got identical completions: the policy has all but collapsed onto single \
                 answers, and pairs to learn from are rare; raise tau or beta, actor.mixture_coef or \
                 actor.temperature, or lower learner.learning_rate",
                100.0 * ratio
            );
        }
        self.has_collapsed = has_collapsed;
        ratio
    }
}

/// Mean and maximum of the staleness of a step's pairs, in learner steps.
fn staleness_metrics(staleness: &[u64]) -> Measurements {
    let (sum, max) = (staleness.iter().sum::<u64>(), staleness.iter().max());
    let mut m = Measurements::new();
    m.set("staleness/mean", sum as f64 / staleness.len().max(1) as f64);
    m.set("staleness/max", max.map_or(0.0, |&s| s as f64));
    m
}

/// The text of a prompt's tokens, special ones included, if its own text is encoded otherwise, as on the playground.
fn encoded_prompt(tokenizer: &Tokenizer, prompt: &Prompt) -> Option<String> {
    if prompt.dialogue.is_some() {
        return None;
    }
    let encoded = tokenizer.encode_prompt(&PromptText::Text(prompt.text.clone()));
    match encoded {
        Ok(ids) if ids == prompt.ids => None,
        _ => Some(tokenizer.decode_all(&prompt.ids)),
    }
}
