//! Optimiser steps of the policy: log-probabilities, loss, gradients, update.
//!
//! Promises that a step whose loss or gradient is not finite, or beyond its limits, changes nothing. Does not know where
//! pairs come from or what follows a step.

use std::{path::Path, sync::Arc, time::Instant};

use messages::{LabelledPair, Seed};
use model::{
    AdamWSettings, Gradients, LanguageModel, ModelError, ModelFolder, Optimizer, Schedule, Tensor,
    TokenLogprobs,
};
use settings::{LearnerSettings, LogpReduction, ObjectiveSettings, RpoNll};
use telemetry::Measurements;

pub use crate::trainer::{metrics::PolicySamples, reference_logprobs::ReferenceLogprobs};
use crate::{
    error::LearnerError,
    ganpo::regulariser::{GanpoRegulariser, GanpoStep, pass_features},
    objective::{
        Baseline, Batch, Dpo, Ipo, Labelling, NashMdPg, Objective, Rpo, RpoBaseline, Slic,
        reduction,
    },
    run_scale::StepLimits,
    trainer::{
        batch::{BatchSplit, MicroBatch},
        metrics::{PassOutput, StepSums},
        reference::{Reference, ReferencePass},
    },
};

pub(crate) mod batch;
mod metrics;
mod reference;
mod reference_logprobs;
pub(crate) mod thread;

/// RNG stream id for LoRA dropout.
const DROPOUT_STREAM: u64 = 0xd709;

/// The policy in training and its optimiser.
pub struct Trainer {
    folder: Arc<ModelFolder>,
    model: LanguageModel,
    /// Fixed reference, evaluated on the same batch with the same kernels in the same precision as the policy, so that
    /// log π − log ref is exactly 0 for equal weights, whatever the actors computed.
    reference: Reference,
    optimizer: Optimizer,
    objective: Box<dyn Objective>,
    /// τ or β: the factor from log-ratios to rewards.
    temperature: f64,
    labelling: Labelling,
    reduction: LogpReduction,
    schedule: Schedule,
    split: BatchSplit,
    dropout: Seed,
    ganpo: Option<GanpoRegulariser>,
}

/// Token log-probabilities of one pass: the policy's with gradient, and the reference's.
struct PassLogprobs {
    policy: TokenLogprobs,
    reference: ReferencePass,
}

/// Outcome of a step.
pub enum StepOutcome {
    /// The update was applied: its metrics, and the policy's own samples in the batch.
    Applied(Measurements, PolicySamples),
    /// The loss or the gradient was not finite or beyond its limit; nothing has changed.
    Rejected(Measurements),
}

impl Trainer {
    /// A trainer of a copy of `policy`, before its first step. Checkpoints are written like `folder`.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub fn new(
        folder: Arc<ModelFolder>,
        policy: &LanguageModel,
        settings: &LearnerSettings,
        seed: Seed,
    ) -> Result<Self, LearnerError> {
        let precision = model::training_precision(settings.precision);
        let (model, vars) = policy.trainable()?;
        let model = model.with_precision(precision);
        let reference = Reference::new(policy.without_adapter().with_precision(precision));
        let model = model.with_checkpointing(settings.gradient_checkpointing);
        let adamw = AdamWSettings::from(&settings.optimizer());
        let (objective, temperature) = objective(&settings.objective);
        let ganpo = GanpoRegulariser::new(settings, policy, adamw, seed)?;
        Ok(Self {
            folder,
            model,
            reference,
            optimizer: Optimizer::new(vars, adamw)?,
            objective,
            temperature,
            labelling: Labelling {
                kind: settings.label,
                flip: settings.label_flip,
                smoothing: settings.label_smoothing,
                seed,
            },
            reduction: settings.logp_reduction,
            schedule: Schedule::new(&settings.optimizer(), settings.steps),
            split: BatchSplit {
                passes: settings.gradient_accumulation_steps,
                max_tokens: settings.max_tokens_per_pass,
            },
            dropout: seed.derive(DROPOUT_STREAM),
            ganpo,
        })
    }

    /// Keeps the reference's log-probabilities of pairs from files. Without effect with GANPO, which reads the reference's
    /// hidden states.
    pub fn keep_reference_logprobs(&mut self, kept: ReferenceLogprobs) {
        if self.ganpo.is_none() {
            self.reference.keep(kept);
        }
    }

    /// Saves the kept log-probabilities.
    pub(crate) fn save_reference_logprobs(&self) {
        self.reference.save();
    }

    /// Takes step `step`, counted from 0, on these pairs.
    ///
    /// # Errors
    /// If a pair does not fit the model, or the device is out of memory.
    pub fn step(&mut self, pairs: &[LabelledPair], step: u64) -> Result<StepOutcome, LearnerError> {
        self.step_within(pairs, step, StepLimits::FINITE)
    }

    /// As [`Self::step`], if its loss and gradient norm are within `limits`.
    ///
    /// # Errors
    /// As [`Self::step`].
    pub(crate) fn step_within(
        &mut self,
        pairs: &[LabelledPair],
        step: u64,
        limits: StepLimits,
    ) -> Result<StepOutcome, LearnerError> {
        let mut gradients = Gradients::default();
        let mut sums = StepSums::default();
        let clock = Instant::now();
        let mut backward_seconds = 0.0;
        let passes = self.split.passes(pairs);
        let micros: Vec<MicroBatch<'_>> = passes
            .into_iter()
            .map(|pairs| MicroBatch::new(pairs, &self.labelling))
            .collect();
        let (mut ganpo_step, mut cached) = self.train_discriminators(&micros, step)?;
        for (pass, micro) in (0..).zip(&micros) {
            let logprobs = match cached.take() {
                Some(logprobs) => logprobs,
                None => self.logprobs(micro, step, pass)?,
            };
            let loss = self.loss(micro, &logprobs, pairs.len(), &mut sums)?;
            let loss = match &self.ganpo {
                Some(ganpo) => ganpo.regularise(loss, micro, &logprobs.policy, &mut ganpo_step)?,
                None => loss,
            };
            sums.loss += f64::from(loss.to_scalar::<f32>()?);
            let before = clock.elapsed().as_secs_f64();
            gradients.backward(&loss)?;
            backward_seconds += clock.elapsed().as_secs_f64() - before;
        }
        let forward_seconds = clock.elapsed().as_secs_f64() - backward_seconds;
        let norm = self.optimizer.norm(&gradients)?;
        let learning_rate = self.schedule.at(step);
        let mut measurements = self.metrics(&sums, pairs);
        ganpo_step.add_metrics(&mut measurements);
        measurements.set("grad_norm", norm);
        measurements.set("learning_rate", learning_rate);
        measurements.set("time/forward", forward_seconds);
        measurements.set("time/backward", backward_seconds);
        if !limits.accept(sums.loss, norm) {
            self.ganpo.as_mut().map_or(Ok(()), GanpoRegulariser::undo)?;
            return Ok(StepOutcome::Rejected(measurements));
        }
        let before = clock.elapsed().as_secs_f64();
        self.optimizer.step(&gradients, norm, learning_rate)?;
        measurements.set("time/optimizer", clock.elapsed().as_secs_f64() - before);
        measurements.set("grad_clipped_share", self.optimizer.clipped_share());
        Ok(StepOutcome::Applied(measurements, sums.policy_samples()))
    }

    /// Trains the discriminators on this batch, if they are trained at this step. The log-probabilities of a batch of
    /// one pass are returned, so that they are computed once.
    fn train_discriminators(
        &mut self,
        micros: &[MicroBatch<'_>],
        step: u64,
    ) -> Result<(GanpoStep, Option<PassLogprobs>), LearnerError> {
        let Some(ganpo) = &self.ganpo else {
            return Ok((GanpoStep::default(), None));
        };
        let mut state = ganpo.begin(micros, step);
        if !ganpo.trains(step) {
            return Ok((state, None));
        }
        let mut cached = None;
        let mut passes = Vec::with_capacity(micros.len());
        for (pass, micro) in (0..).zip(micros) {
            let logprobs = self.logprobs(micro, step, pass)?;
            if let ReferencePass::Computed(reference) = &logprobs.reference {
                passes.push(pass_features(micro, &logprobs.policy, reference)?);
            }
            cached = (micros.len() == 1).then_some(logprobs);
        }
        let learning_rate = self.schedule.at(step);
        if let Some(ganpo) = &mut self.ganpo {
            ganpo.train(&passes, learning_rate, &mut state)?;
        }
        Ok((state, cached))
    }

    /// Log-probabilities of a pass under the policy in training and its reference: of the completions, then of the
    /// golden answers.
    fn logprobs(
        &mut self,
        micro: &MicroBatch<'_>,
        step: u64,
        pass: u64,
    ) -> Result<PassLogprobs, LearnerError> {
        let mut sequences = micro.completions();
        if self.objective.needs_baseline() {
            sequences.extend(micro.golden(self.objective.name())?);
        }
        // The reference first, before the policy's graph takes memory.
        let reference = self.reference.pass(micro, &sequences)?;
        let model = self
            .model
            .with_dropout_seed(self.dropout.derive(step).derive(pass));
        let policy = model.logprobs(&sequences)?;
        Ok(PassLogprobs { policy, reference })
    }

    /// Contribution of a pass to the batch's mean loss, a scalar with gradient.
    fn loss(
        &self,
        micro: &MicroBatch<'_>,
        logprobs: &PassLogprobs,
        batch_size: usize,
        sums: &mut StepSums,
    ) -> Result<Tensor, LearnerError> {
        let completions = micro.lengths.len();
        let response: usize = micro.lengths.iter().sum();
        let device = self.model.device();
        let policy = &logprobs.policy;
        let token_logp = policy.logp.narrow(0, 0, response)?;
        let token_ref_logp = logprobs.reference.logp(response)?;
        let logp = reduction::reduce(self.reduction, &token_logp, &micro.lengths)?;
        let ref_logp = reduction::reduce(self.reduction, &token_ref_logp, &micro.lengths)?;
        let golden = policy
            .logp
            .narrow(0, response, policy.logp.dim(0)? - response)?;
        let baseline = self.objective.needs_baseline().then_some(Baseline {
            token_logp: &golden,
            lengths: &policy.lengths[completions..],
        });
        let batch = Batch {
            token_logp: &token_logp,
            token_ref_logp: &token_ref_logp,
            lengths: &micro.lengths,
            logp: &logp,
            ref_logp: &ref_logp,
            first: &micro.first,
            second: &micro.second,
            p: &Tensor::new(micro.p.as_slice(), device)?,
            pair_weight: &Tensor::new(micro.pair_weight.as_slice(), device)?,
            baseline,
        };
        let loss = (self.objective.loss(&batch)? / batch_size as f64)?;
        sums.add(&PassOutput {
            micro,
            token_logp: &token_logp,
            token_ref_logp: &token_ref_logp,
            entropy: &policy.entropy.narrow(0, 0, response)?,
            loss: &loss,
        })?;
        Ok(loss)
    }

    fn metrics(&self, sums: &StepSums, pairs: &[LabelledPair]) -> Measurements {
        let mut m = Measurements::new();
        m.set("loss", sums.loss);
        m.set(
            format!("loss/{}", self.objective.name().replace('-', "_")),
            sums.objective(),
        );
        sums.rewards(self.temperature, &mut m);
        sums.completions(pairs, &mut m);
        metrics::judge_scores(pairs, &mut m);
        sums.mismatch(&mut m);
        m
    }

    /// Current policy.
    pub(crate) fn policy(&self) -> &LanguageModel {
        &self.model
    }

    /// State of the optimiser.
    pub(crate) fn optimizer_blob(&self) -> Result<Vec<u8>, LearnerError> {
        Ok(self.optimizer.to_blob()?)
    }

    /// Restores weights, optimiser and discriminators from a checkpoint.
    ///
    /// # Errors
    /// If the checkpoint cannot be read, or its weights are not finite.
    pub(crate) fn restore(&mut self, checkpoint: &Path) -> Result<(), LearnerError> {
        let broken = |error: ModelError| LearnerError::Checkpoint {
            path: checkpoint.to_owned(),
            reason: error.to_string(),
        };
        let broken_optimizer = |error: ModelError| LearnerError::Checkpoint {
            path: checkpoint.join("optimizer.safetensors"),
            reason: error.to_string(),
        };
        let weights = self.model.read_saved_weights(checkpoint).map_err(broken)?;
        if !weights.is_finite()? {
            return Err(LearnerError::Checkpoint {
                path: checkpoint.to_owned(),
                reason: "its weights are not finite; resume an earlier one: --resume=FOLDER".into(),
            });
        }
        let path = checkpoint.join("optimizer.safetensors");
        let blob =
            std::fs::read(&path).map_err(|source| LearnerError::Unreadable { path, source })?;
        self.optimizer.assign(&weights).map_err(broken)?;
        self.optimizer.restore(&blob).map_err(broken_optimizer)?;
        match &mut self.ganpo {
            Some(ganpo) => ganpo.read(checkpoint),
            None => Ok(()),
        }
    }

    /// Further files of a checkpoint: names and contents.
    pub(crate) fn extra_files(&self) -> Result<Vec<(&'static str, Vec<u8>)>, LearnerError> {
        self.ganpo
            .as_ref()
            .map_or(Ok(Vec::new()), GanpoRegulariser::files)
    }

    /// Model folder of the reference.
    pub(crate) fn folder(&self) -> &ModelFolder {
        &self.folder
    }
}

/// The objective of the settings, and its temperature τ or β.
fn objective(settings: &ObjectiveSettings) -> (Box<dyn Objective>, f64) {
    match *settings {
        ObjectiveSettings::Ipo { tau, scale } => (Box::new(Ipo { tau, scale }), tau),
        ObjectiveSettings::Dpo { beta } => (Box::new(Dpo { beta }), beta),
        ObjectiveSettings::Slic { beta } => (Box::new(Slic { beta }), beta),
        ObjectiveSettings::Rpo {
            beta,
            eta,
            nll,
            nll_coef: coefficient,
        } => {
            let nll = match nll {
                RpoNll::Sum => RpoBaseline::Sum,
                RpoNll::Mean => RpoBaseline::Mean { coefficient },
            };
            (Box::new(Rpo { beta, eta, nll }), beta)
        }
        ObjectiveSettings::NashMdPg { tau } => (Box::new(NashMdPg { tau }), tau),
    }
}

#[cfg(test)]
pub(crate) mod tests;
