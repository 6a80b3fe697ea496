//! Optimiser steps of the policy: log-probabilities, loss, gradients, update.
//!
//! Promises that a step whose loss or gradient is not finite, or beyond its limits, changes nothing. Does not know where
//! pairs come from or what follows a step.

use std::{path::Path, sync::Arc, time::Instant};

use messages::{LabelledPair, Seed};
use model::{
    AdamWSettings, Gradients, LanguageModel, MixtureInputs, ModelError, ModelFolder, Optimizer,
    PublishedForm, PublishedWeights, Schedule, Sequence, Tensor, TokenLogprobs,
};
use settings::{LearnerSettings, ReferenceSettings};
use telemetry::Measurements;

pub use crate::trainer::{metrics::PolicySamples, reference_logprobs::ReferenceLogprobs};
use crate::{
    error::LearnerError,
    file_pairs::{index_of, is_from_file},
    ganpo::regulariser::{GanpoRegulariser, GanpoStep, pass_features},
    micro_batch::{self, BatchSplit, MicroBatch},
    objective::{Baseline, Batch, Labelling, reduction},
    run_scale::StepLimits,
    trainer::{
        followers::{Followers, Publication},
        metrics::{PassOutput, StepSums},
        off_policy::{MixedTokens, TargetLogprobs},
        pair_loss::PairLoss,
        reference_logprobs::ReferenceCache,
        regularisers::StepRegularisers,
    },
};

pub(crate) mod followers;
mod metrics;
pub(crate) mod off_policy;
mod pair_loss;
mod reference_logprobs;
mod regularisers;
pub(crate) mod thread;

/// RNG stream id for LoRA dropout.
const DROPOUT_STREAM: u64 = 0xd709;

/// The policy in training and its optimiser.
pub struct Trainer {
    folder: Arc<ModelFolder>,
    model: LanguageModel,
    /// Reference and moving average of the policy.
    followers: Followers,
    optimizer: Optimizer,
    loss: PairLoss,
    labelling: Labelling,
    schedule: Schedule,
    split: BatchSplit,
    dropout: Seed,
    ganpo: Option<GanpoRegulariser>,
    /// The reference's log-probabilities of pairs from files; `None`: they are computed in every step.
    reference_cache: Option<ReferenceCache>,
}

/// Token log-probabilities of one pass: the policy's with gradient, and the reference's.
struct PassLogprobs {
    policy: TokenLogprobs,
    reference: ReferencePass,
}

/// Outputs of the reference in one pass.
enum ReferencePass {
    /// All of it, computed now.
    Computed(TokenLogprobs),
    /// log ref of the completions' tokens `[R]`, some of it kept from earlier passes.
    Logp(Tensor),
}

impl ReferencePass {
    /// log ref of the first `count` response tokens `[count]`, without gradient.
    fn logp(&self, count: usize) -> Result<Tensor, LearnerError> {
        let logp = match self {
            Self::Computed(reference) => &reference.logp,
            Self::Logp(logp) => logp,
        };
        Ok(logp.narrow(0, 0, count)?.detach())
    }
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
        let followers = Followers::new(policy, precision, settings.ema_decay)?;
        let model = model.with_checkpointing(settings.gradient_checkpointing);
        let adamw = AdamWSettings::from(&settings.optimizer());
        let ganpo = GanpoRegulariser::new(settings, policy, adamw, seed)?;
        Ok(Self {
            folder,
            model,
            followers,
            optimizer: Optimizer::new(vars, adamw)?,
            loss: PairLoss::new(settings),
            labelling: Labelling {
                kind: settings.label,
                flip: settings.label_flip,
                smoothing: settings.label_smoothing,
                seed,
            },
            schedule: Schedule::new(&settings.optimizer(), settings.steps),
            split: BatchSplit {
                passes: settings.gradient_accumulation_steps,
                max_tokens: settings.max_tokens_per_micro_batch,
            },
            dropout: seed.derive(DROPOUT_STREAM),
            ganpo,
            reference_cache: None,
        })
    }

    /// The trainer, before its first step, with this model in place of the policy without its adapter, of which it is a copy.
    #[must_use]
    pub fn with_start(mut self, start: &LanguageModel) -> Self {
        self.followers.set_start(start);
        self
    }

    /// The trainer, before its first step, with a reference that moves as the settings say. Without it the reference is
    /// fixed.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub fn with_reference(mut self, settings: ReferenceSettings) -> Result<Self, LearnerError> {
        self.followers.set_rule(settings, &self.model)?;
        Ok(self)
    }

    /// Keeps the reference's log-probabilities of pairs from files. Without effect with the regularisers of hidden states and
    /// with importance weights, which read the reference's hidden states, and with a reference that moves.
    pub fn keep_reference_logprobs(&mut self, kept: ReferenceLogprobs) {
        let needs_states = self.ganpo.is_some() || self.loss.needs_reference_states();
        if !needs_states && !self.followers.moves() {
            self.reference_cache = Some(ReferenceCache::open(kept));
        }
    }

    /// Saves the kept log-probabilities.
    pub(crate) fn save_reference_logprobs(&self) {
        if let Some(cache) = &self.reference_cache {
            cache.save();
        }
    }

    /// Takes step `step`, counted from 0, on these pairs.
    ///
    /// # Errors
    /// If a pair does not fit the model, or the device is out of memory.
    pub fn step(&mut self, pairs: &[LabelledPair], step: u64) -> Result<StepOutcome, LearnerError> {
        Ok(self.scored_step(pairs, step, StepLimits::FINITE)?.0)
    }

    /// As [`Self::step`], if its loss and gradient norm are within `limits`. Compared completions whose log ref no actor
    /// recorded get the learner's.
    ///
    /// # Errors
    /// As [`Self::step`].
    pub(crate) fn step_within(
        &mut self,
        pairs: &mut [LabelledPair],
        step: u64,
        limits: StepLimits,
    ) -> Result<StepOutcome, LearnerError> {
        let (outcome, ref_logp) = self.scored_step(pairs, step, limits)?;
        micro_batch::record_ref_logp(pairs, &ref_logp);
        Ok(outcome)
    }

    /// A step, and log ref of every token of the compared completions that actors recorded, in order.
    fn scored_step(
        &mut self,
        pairs: &[LabelledPair],
        step: u64,
        limits: StepLimits,
    ) -> Result<(StepOutcome, Vec<f32>), LearnerError> {
        let mut gradients = Gradients::default();
        let mut sums = StepSums::recorded_since(self.followers.recorded_since(step));
        let clock = Instant::now();
        let mut backward_seconds = 0.0;
        let passes = self.split.passes(pairs);
        let micros: Vec<MicroBatch<'_>> = passes
            .into_iter()
            .map(|pairs| MicroBatch::new(pairs, &self.labelling))
            .collect();
        let (ganpo, mut cached) = self.train_discriminators(&micros, step)?;
        let mut regularisers = StepRegularisers::new(ganpo, self.loss.hidden_l2, &micros);
        for (pass, micro) in (0..).zip(&micros) {
            let logprobs = match cached.take() {
                Some(logprobs) => logprobs,
                None => self.logprobs(micro, step, pass)?,
            };
            let loss = self.loss(micro, &logprobs, pairs.len(), &mut sums)?;
            let loss = self.regularised(loss, micro, &logprobs, &mut regularisers)?;
            sums.loss += f64::from(loss.to_scalar::<f32>()?);
            let before = clock.elapsed().as_secs_f64();
            gradients.backward(&loss)?;
            // Elsewhere than on the CPU the operations are only queued.
            self.model.device().synchronize()?;
            backward_seconds += clock.elapsed().as_secs_f64() - before;
        }
        let forward_seconds = clock.elapsed().as_secs_f64() - backward_seconds;
        let norm = self.optimizer.norm(&gradients)?;
        let learning_rate = self.schedule.at(step);
        let mut measurements = self.metrics(&sums, pairs);
        regularisers.add_metrics(&mut measurements);
        measurements.set("grad_norm", norm);
        measurements.set("learning_rate", learning_rate);
        measurements.set("time/forward", forward_seconds);
        measurements.set("time/backward", backward_seconds);
        if !limits.accept(sums.loss, norm) {
            self.ganpo.as_mut().map_or(Ok(()), GanpoRegulariser::undo)?;
            return Ok((StepOutcome::Rejected(measurements), sums.into_ref_logp()));
        }
        let before = clock.elapsed().as_secs_f64();
        self.optimizer.step(&gradients, norm, learning_rate)?;
        self.followers
            .follow(&self.model, &self.optimizer, step + 1)?;
        self.model.device().synchronize()?;
        measurements.set("time/optimizer", clock.elapsed().as_secs_f64() - before);
        measurements.set("grad_clipped_share", self.optimizer.clipped_share());
        let samples = sums.policy_samples(pairs);
        let outcome = StepOutcome::Applied(measurements, samples);
        Ok((outcome, sums.into_ref_logp()))
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
        if self.loss.objective.needs_baseline() {
            sequences.extend(micro.golden(self.loss.objective.name())?);
        }
        // The reference first, before the policy's graph takes memory.
        let reference = self.followers.reference();
        let reference = match &mut self.reference_cache {
            Some(cache) => ReferencePass::Logp(kept_logp(reference, cache, micro)?),
            None => ReferencePass::Computed(reference.logprobs(&sequences)?),
        };
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
        let logp = reduction::reduce(self.loss.reduction, &token_logp, &micro.lengths)?;
        let ref_logp = reduction::reduce(self.loss.reduction, &token_ref_logp, &micro.lengths)?;
        let golden = policy
            .logp
            .narrow(0, response, policy.logp.dim(0)? - response)?;
        let baseline = self.loss.objective.needs_baseline().then_some(Baseline {
            token_logp: &golden,
            lengths: &policy.lengths[completions..],
        });
        let log_weights = self.log_weights(micro, logprobs)?;
        let weights = self.loss.correction.row_weights(micro, &log_weights);
        let batch = Batch {
            token_logp: &token_logp,
            token_ref_logp: &token_ref_logp,
            lengths: &micro.lengths,
            logp: &logp,
            ref_logp: &ref_logp,
            first: &micro.first,
            second: &micro.second,
            p: &Tensor::new(micro.p.as_slice(), device)?,
            pair_weight: &Tensor::new(weights, device)?,
            baseline,
        };
        let loss = (self.loss.objective.loss(&batch)? / batch_size as f64)?;
        sums.add(&PassOutput {
            micro,
            token_logp: &token_logp,
            token_ref_logp: &token_ref_logp,
            entropy: &policy.entropy.narrow(0, 0, response)?,
            loss: &loss,
            log_weights: &log_weights,
        })?;
        Ok(loss)
    }

    /// Loss of a pass with the regularisers of hidden states.
    fn regularised(
        &self,
        loss: Tensor,
        micro: &MicroBatch<'_>,
        logprobs: &PassLogprobs,
        regularisers: &mut StepRegularisers,
    ) -> Result<Tensor, LearnerError> {
        let policy = &logprobs.policy;
        let loss = match &self.ganpo {
            Some(ganpo) => ganpo.regularise(loss, micro, policy, &mut regularisers.ganpo)?,
            None => loss,
        };
        match &logprobs.reference {
            ReferencePass::Computed(reference) => {
                regularisers.add_distance(loss, micro, policy, reference)
            }
            ReferencePass::Logp(_) => Ok(loss),
        }
    }

    /// log of the importance weight of every label of a pass, where it has one. That of the mixture is computed only
    /// if labels are weighted, since it costs two products with the head.
    fn log_weights(
        &self,
        micro: &MicroBatch<'_>,
        logprobs: &PassLogprobs,
    ) -> Result<Vec<Option<f64>>, LearnerError> {
        let response: usize = micro.lengths.iter().sum();
        let mut tokens: Vec<f32> = logprobs.policy.logp.narrow(0, 0, response)?.to_vec1()?;
        let has_mixture = match &logprobs.reference {
            ReferencePass::Computed(reference) if self.loss.correction.is_on(micro) => {
                self.mix(micro, &logprobs.policy, reference, &mut tokens)?;
                true
            }
            _ => false,
        };
        let target = TargetLogprobs {
            tokens,
            has_mixture,
        };
        Ok(target.log_weights(micro))
    }

    /// Replaces log π of the tokens of mixture samples by the mixture's.
    fn mix(
        &self,
        micro: &MicroBatch<'_>,
        policy: &TokenLogprobs,
        reference: &TokenLogprobs,
        tokens: &mut [f32],
    ) -> Result<(), LearnerError> {
        let mixed = MixedTokens::of(micro);
        if mixed.rows.is_empty() {
            return Ok(());
        }
        let rows = Tensor::new(mixed.rows.as_slice(), self.model.device())?;
        let logp = self.model.mixture_logprobs(&MixtureInputs {
            reference: self.followers.reference(),
            hidden: &policy.hidden.index_select(&rows, 0)?,
            ref_hidden: &reference.hidden.index_select(&rows, 0)?,
            mixture_coefs: &mixed.mixture_coefs,
            targets: &mixed.targets,
        })?;
        for (row, logp) in mixed.rows.iter().zip(logp.to_vec1::<f32>()?) {
            tokens[*row as usize] = logp;
        }
        Ok(())
    }

    fn metrics(&self, sums: &StepSums, pairs: &[LabelledPair]) -> Measurements {
        let mut m = Measurements::new();
        m.set("loss", sums.loss);
        m.set(
            format!("loss/{}", self.loss.objective.name().replace('-', "_")),
            sums.objective(),
        );
        sums.rewards(self.loss.temperature, &mut m);
        sums.completions(pairs, &mut m);
        metrics::judge_scores(pairs, &mut m);
        sums.mismatch(&mut m);
        self.followers.add_metrics(&mut m);
        sums.off_policy(&self.loss.correction, &mut m);
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

    /// The weights to publish, in this form, which no later step changes.
    pub(crate) fn publish(
        &self,
        form: PublishedForm,
        publication: Publication,
    ) -> Result<PublishedWeights, LearnerError> {
        self.followers.publish(&self.model, form, publication)
    }

    /// The models that follow the policy.
    pub(crate) fn followers(&self) -> &Followers {
        &self.followers
    }

    /// Restores weights, optimiser, reference, average and discriminators from a checkpoint.
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
        self.followers.restore(checkpoint, &self.model)?;
        match &mut self.ganpo {
            Some(ganpo) => ganpo.read(checkpoint),
            None => Ok(()),
        }
    }

    /// Further files of a checkpoint: names and contents.
    pub(crate) fn extra_files(&self) -> Result<Vec<(&'static str, Vec<u8>)>, LearnerError> {
        let mut files = self.followers.files()?;
        if let Some(ganpo) = &self.ganpo {
            files.extend(ganpo.files()?);
        }
        Ok(files)
    }

    /// Model folder of the reference.
    pub(crate) fn folder(&self) -> &ModelFolder {
        &self.folder
    }
}

/// log ref of the compared completions' tokens `[R]`: of pairs from files as kept in `cache`, which gets those that it
/// lacks.
fn kept_logp(
    reference: &LanguageModel,
    cache: &mut ReferenceCache,
    micro: &MicroBatch<'_>,
) -> Result<Tensor, LearnerError> {
    let pairs = || micro.pairs().iter();
    let scored = |labelled| micro_batch::compared(labelled).map(|(_, completion)| completion);
    let tokens = |labelled| scored(labelled).map(|c| c.ids.len()).sum::<usize>();
    // Decided before any is added: at the end of a pass a pair may be in a batch twice.
    let kept: Vec<Option<Box<[f32]>>> = pairs()
        .map(|labelled| {
            let id = Some(labelled.pair.id()).filter(|&id| is_from_file(id))?;
            cache.get(index_of(id), tokens(labelled)).map(Box::from)
        })
        .collect();
    let missing = pairs().zip(&kept).filter(|(_, kept)| kept.is_none());
    let sequences: Vec<Sequence<'_>> = missing
        .flat_map(|(labelled, _)| {
            let prompt = labelled.pair.prompt.ids.as_slice();
            scored(labelled).map(move |c| Sequence {
                prompt,
                completion: &c.ids,
            })
        })
        .collect();
    let computed: Vec<f32> = match sequences.is_empty() {
        true => Vec::new(),
        false => reference.logprobs(&sequences)?.logp.to_vec1()?,
    };
    let (mut rest, mut logp) = (computed.as_slice(), Vec::new());
    for (labelled, kept) in pairs().zip(&kept) {
        let Some(kept) = kept else {
            let (own, after) = rest.split_at(tokens(labelled));
            let id = labelled.pair.id();
            if is_from_file(id) {
                cache.insert(index_of(id), own);
            }
            logp.extend_from_slice(own);
            rest = after;
            continue;
        };
        logp.extend_from_slice(kept);
    }
    Ok(Tensor::new(logp, reference.device())?)
}

#[cfg(test)]
pub(crate) mod tests;
