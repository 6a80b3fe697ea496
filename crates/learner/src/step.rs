//! One optimiser step: score, compare, differentiate, look for what is not finite, move.

use std::{path::Path, sync::Arc};

use messages::{LabelledPair, Seed};
use model::{
    AdamWSettings, Gradients, LanguageModel, ModelError, ModelFolder, Optimizer, Schedule, Scores,
    Tensor,
};
use settings::{self, LearnerSettings, MaxGradNorm, ObjectiveSettings};
use telemetry::Measurements;

pub use self::sums::PolicySamples;
use crate::{
    LearnerError,
    batch::{Cut, MicroBatch},
    objective::{self, Baseline, Batch, LabelKind, Labelling, LogpReduction, Objective},
};
pub(crate) use game::Game;
use sums::{Pass, Sums};

mod game;
mod sums;

/// The stream of an adapter's dropout, among those of the run's seed.
const DROPOUT: u64 = 0xd709;

/// The policy in training, with everything that moves it.
pub struct Trainer {
    folder: Arc<ModelFolder>,
    model: LanguageModel,
    /// The fixed reference, which is scored beside the policy: same batch, same kernels, same precision. So
    /// log π − log ref is exactly 0 where the weights are equal, whatever the actors computed.
    reference: LanguageModel,
    optimizer: Optimizer,
    objective: Box<dyn Objective>,
    /// τ or β: what turns log-ratios into rewards.
    temperature: f64,
    labelling: Labelling,
    reduction: LogpReduction,
    schedule: Schedule,
    cut: Cut,
    dropout: Seed,
    game: Option<Game>,
}

/// What a pass was given by the policy, with gradient, and by its reference.
struct Scored {
    policy: Scores,
    reference: Scores,
}

/// What became of a step.
pub enum StepOutcome {
    /// It was taken: what was measured, and the policy's own samples in it.
    Taken(Measurements, PolicySamples),
    /// The loss or the gradient was not finite; nothing has changed.
    Refused(Measurements),
}

impl Trainer {
    /// A trainer of a copy of `policy`, which has taken no step. `folder` is what its checkpoints are made of.
    ///
    /// # Errors
    /// When the device cannot hold it.
    pub fn new(
        folder: Arc<ModelFolder>,
        policy: &LanguageModel,
        settings: &LearnerSettings,
        seed: Seed,
    ) -> Result<Self, LearnerError> {
        let (model, vars) = policy.trainable()?;
        let model = model.with_products_in(settings.precision.into());
        let reference = policy
            .without_adapter()
            .with_products_in(settings.precision.into());
        let model = model.with_checkpointing(settings.gradient_checkpointing);
        let adamw = AdamWSettings {
            beta1: settings.adam_beta1,
            beta2: settings.adam_beta2,
            epsilon: settings.adam_epsilon,
            weight_decay: settings.weight_decay,
            max_grad_norm: match settings.max_grad_norm {
                MaxGradNorm::Norm(norm) => norm,
                MaxGradNorm::Objective => settings.objective.max_grad_norm(),
            },
        };
        let (objective, temperature) = objective(&settings.objective);
        let game = Game::new(settings, policy, adamw, seed)?;
        Ok(Self {
            folder,
            model,
            reference,
            optimizer: Optimizer::new(vars, adamw)?,
            objective,
            temperature,
            labelling: labelling(settings, seed),
            reduction: match settings.logp_reduction {
                settings::LogpReduction::Sum => LogpReduction::Sum,
                settings::LogpReduction::Mean => LogpReduction::Mean,
            },
            schedule: Schedule {
                learning_rate: settings.learning_rate,
                kind: settings.lr_scheduler_type,
                warmup_ratio: settings.warmup_ratio,
                min_lr_ratio: settings.min_lr_ratio,
                steps: settings.steps,
            },
            cut: Cut {
                passes: settings.gradient_accumulation_steps,
                max_tokens: settings.max_tokens_per_pass,
            },
            dropout: seed.derive(DROPOUT),
            game,
        })
    }

    /// Step `step`, counted from 0, on these pairs.
    ///
    /// # Errors
    /// When a pair cannot be scored, or the device cannot hold what that takes.
    pub fn step(&mut self, pairs: &[LabelledPair], step: u64) -> Result<StepOutcome, LearnerError> {
        let mut gradients = Gradients::default();
        let mut sums = Sums::default();
        let clock = std::time::Instant::now();
        let mut backward_seconds = 0.0;
        let passes = self.cut.passes(pairs);
        let micros: Vec<MicroBatch<'_>> = passes
            .into_iter()
            .map(|part| MicroBatch::new(part, &self.labelling))
            .collect();
        let mut round = self.play(&micros, step)?;
        for (pass, micro) in (0..).zip(&micros) {
            let scored = match round.scored.take() {
                Some(scored) => scored,
                None => self.score(micro, (step, pass))?,
            };
            let loss = self.loss(micro, &scored, pairs.len(), &mut sums)?;
            let loss = self.regularised(loss, micro, &scored.policy, &mut round)?;
            sums.loss += f64::from(loss.to_scalar::<f32>()?);
            let before = clock.elapsed().as_secs_f64();
            gradients.add(&loss)?;
            backward_seconds += clock.elapsed().as_secs_f64() - before;
        }
        let forward_seconds = clock.elapsed().as_secs_f64() - backward_seconds;
        let norm = self.optimizer.norm(&gradients)?;
        let learning_rate = self.schedule.at(step);
        let mut measurements = self.measure(&sums, pairs);
        round.measure(&mut measurements);
        measurements.set("grad_norm", norm);
        measurements.set("learning_rate", learning_rate);
        measurements.set("time/forward", forward_seconds);
        measurements.set("time/backward", backward_seconds);
        if !sums.loss.is_finite() || !norm.is_finite() {
            self.take_back()?;
            return Ok(StepOutcome::Refused(measurements));
        }
        let before = clock.elapsed().as_secs_f64();
        self.optimizer.step(&gradients, norm, learning_rate)?;
        measurements.set("time/optimizer", clock.elapsed().as_secs_f64() - before);
        measurements.set("grad_clipped_share", self.optimizer.clipped_share());
        Ok(StepOutcome::Taken(measurements, sums.policy_samples()))
    }

    /// Scores a pass by the policy in training and by its reference: the completions, then the golden
    /// answers.
    fn score(
        &self,
        micro: &MicroBatch<'_>,
        (step, pass): (u64, u64),
    ) -> Result<Scored, LearnerError> {
        let mut sequences = micro.completions();
        if self.objective.needs_baseline() {
            sequences.extend(micro.golden(self.objective.name())?);
        }
        // First, while the policy's pass holds no memory yet.
        let reference = self.reference.score(&sequences)?;
        let model = self.model.dropping(self.dropout.derive(step).derive(pass));
        let policy = model.score(&sequences)?;
        Ok(Scored { policy, reference })
    }

    /// The pass's share of the batch's mean loss, a scalar with gradient.
    fn loss(
        &self,
        micro: &MicroBatch<'_>,
        scored: &Scored,
        batch_size: usize,
        sums: &mut Sums,
    ) -> Result<Tensor, LearnerError> {
        let completions = micro.lengths.len();
        let response: usize = micro.lengths.iter().sum();
        let device = self.model.device();
        let scores = &scored.policy;
        let token_logp = scores.logp.narrow(0, 0, response)?;
        let token_ref_logp = scored.reference.logp.narrow(0, 0, response)?.detach();
        let logp = self.reduction.reduce(&token_logp, &micro.lengths)?;
        let ref_logp = self.reduction.reduce(&token_ref_logp, &micro.lengths)?;
        let golden = scores
            .logp
            .narrow(0, response, scores.logp.dim(0)? - response)?;
        let baseline = self.objective.needs_baseline().then_some(Baseline {
            token_logp: &golden,
            lengths: &scores.lengths[completions..],
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
        sums.add(&Pass {
            micro,
            token_logp: &token_logp,
            token_ref_logp: &token_ref_logp,
            entropy: &scores.entropy.narrow(0, 0, response)?,
            loss: &loss,
        })?;
        Ok(loss)
    }

    fn measure(&self, sums: &Sums, pairs: &[LabelledPair]) -> Measurements {
        let mut m = Measurements::new();
        m.set("loss", sums.loss);
        m.set(
            format!("loss/{}", self.objective.name().replace('-', "_")),
            sums.objective,
        );
        sums.rewards(self.temperature, &mut m);
        sums.completions(pairs, &mut m);
        Sums::scores(pairs, &mut m);
        sums.mismatch(&mut m);
        m
    }

    /// The policy as it is now.
    pub(crate) fn policy(&self) -> &LanguageModel {
        &self.model
    }

    /// The optimiser's state.
    pub(crate) fn optimizer_blob(&self) -> Result<Vec<u8>, LearnerError> {
        Ok(self.optimizer.to_blob()?)
    }

    /// Goes back to the weights and the optimiser of a checkpoint.
    pub(crate) fn restore(&mut self, checkpoint: &Path) -> Result<(), LearnerError> {
        let broken = |error: ModelError| LearnerError::Checkpoint {
            path: checkpoint.to_owned(),
            reason: error.to_string(),
        };
        let torn = |error: ModelError| LearnerError::Checkpoint {
            path: checkpoint.join("optimizer.safetensors"),
            reason: error.to_string(),
        };
        let weights = self.model.read_trained(checkpoint).map_err(broken)?;
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
        self.optimizer.restore(&blob).map_err(torn)?;
        match &mut self.game {
            Some(game) => game.read(checkpoint),
            None => Ok(()),
        }
    }

    /// What else the checkpoint holds: names of files and their bytes.
    pub(crate) fn more_files(&self) -> Result<Vec<(&'static str, Vec<u8>)>, LearnerError> {
        self.game.as_ref().map_or(Ok(Vec::new()), Game::files)
    }

    /// The folder that the policy came from.
    pub(crate) fn folder(&self) -> &ModelFolder {
        &self.folder
    }
}

/// The objective of the settings, and its temperature.
fn objective(settings: &ObjectiveSettings) -> (Box<dyn Objective>, f64) {
    match *settings {
        ObjectiveSettings::Ipo { tau, scale } => {
            let scale = match scale {
                settings::IpoScale::Square => objective::IpoScale::Square,
                settings::IpoScale::Scaled => objective::IpoScale::Scaled,
            };
            (Box::new(objective::Ipo { tau, scale }), tau)
        }
        ObjectiveSettings::Dpo { beta } => (Box::new(objective::Dpo { beta }), beta),
        ObjectiveSettings::Slic { beta } => (Box::new(objective::Slic { beta }), beta),
        ObjectiveSettings::Rpo {
            beta,
            eta,
            nll,
            nll_coef,
        } => {
            let nll = match nll {
                settings::RpoNll::Sum => objective::RpoBaseline::Sum,
                settings::RpoNll::Mean => objective::RpoBaseline::Mean {
                    coefficient: nll_coef,
                },
            };
            (Box::new(objective::Rpo { beta, eta, nll }), beta)
        }
        ObjectiveSettings::NashMdPg { tau } => (Box::new(objective::NashMdPg { tau }), tau),
    }
}

fn labelling(settings: &LearnerSettings, seed: Seed) -> Labelling {
    let kind = match settings.label {
        settings::LabelKind::Soft => LabelKind::Soft,
        settings::LabelKind::Sampled => LabelKind::Sampled,
        settings::LabelKind::Hard => LabelKind::Hard,
    };
    Labelling {
        kind,
        flip: settings.label_flip,
        smoothing: settings.label_smoothing,
        seed,
    }
}

#[cfg(test)]
mod tests;
