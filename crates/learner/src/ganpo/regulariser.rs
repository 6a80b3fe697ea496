//! GANPO within an optimiser step: trains the discriminators, then adds the generator loss to the policy's loss.

use std::{fs, path::Path};

use messages::Seed;
use model::{AdamWSettings, LanguageModel, Tensor, TokenLogprobs};
use settings::{LearnerSettings, MaxGradNorm};
use telemetry::Measurements;

use crate::{
    error::LearnerError,
    ganpo::{self, DiscriminatorMetrics, Ganpo, GanpoState, PassFeatures},
    micro_batch::MicroBatch,
};

/// RNG stream id for the discriminators' initial weights.
const INIT_STREAM: u64 = 0x9a9;
/// Gradient-norm clip of the discriminators unless the settings give one: the slope of a binary cross-entropy is
/// at most 1, whatever the policy's objective.
const CROSS_ENTROPY_CLIP: f64 = 1.0;
/// Files of a checkpoint.
const DISCRIMINATORS: &str = "ganpo.safetensors";
const OPTIMIZER: &str = "ganpo_optimizer.safetensors";

/// Adversarial regulariser of a run: two discriminators, and the generator loss.
pub(crate) struct GanpoRegulariser {
    ganpo: Ganpo,
}

/// State of the regulariser within one optimiser step.
#[derive(Default)]
pub(crate) struct GanpoStep {
    discriminators: Option<DiscriminatorMetrics>,
    /// Sum of the weights of all rows of the batch.
    total_weight: f64,
    /// Whether the generator loss applies to the policy in this step.
    applies: bool,
    /// Generator loss L_adv, summed over the passes so far.
    generator_loss: f64,
    lambda: f64,
}

impl GanpoRegulariser {
    /// The regulariser of the settings for this policy; `None` if λ is 0.
    pub(crate) fn new(
        settings: &LearnerSettings,
        policy: &LanguageModel,
        adamw: AdamWSettings,
        seed: Seed,
    ) -> Result<Option<Self>, LearnerError> {
        if settings.ganpo.lambda <= 0.0 {
            return Ok(None);
        }
        let adamw = match settings.max_grad_norm {
            MaxGradNorm::Norm(_) => adamw,
            MaxGradNorm::Objective => AdamWSettings {
                max_grad_norm: CROSS_ENTROPY_CLIP,
                ..adamw
            },
        };
        let (width, device) = (policy.config().hidden_size, policy.device());
        let seed = seed.derive(INIT_STREAM);
        Ok(Some(Self {
            ganpo: Ganpo::new(&settings.ganpo, width, adamw, seed, device)?,
        }))
    }

    /// State for optimiser step `step` on this batch.
    pub(crate) fn begin(&self, micros: &[MicroBatch<'_>], step: u64) -> GanpoStep {
        GanpoStep {
            total_weight: ganpo::total_weight(micros),
            applies: self.ganpo.applies(step),
            lambda: self.ganpo.lambda(),
            ..GanpoStep::default()
        }
    }

    /// Whether the discriminators are trained in step `step`.
    pub(crate) fn trains(&self, step: u64) -> bool {
        self.ganpo.trains_discriminators(step)
    }

    /// Trains the discriminators on the hidden states of a batch.
    pub(crate) fn train(
        &mut self,
        passes: &[PassFeatures],
        learning_rate: f64,
        state: &mut GanpoStep,
    ) -> Result<(), LearnerError> {
        state.discriminators = self.ganpo.train(passes, learning_rate)?;
        Ok(())
    }

    /// Pair loss + λ·L_adv of a pass.
    pub(crate) fn regularise(
        &self,
        loss: Tensor,
        micro: &MicroBatch<'_>,
        logprobs: &TokenLogprobs,
        state: &mut GanpoStep,
    ) -> Result<Tensor, LearnerError> {
        if !state.applies {
            return Ok(loss);
        }
        let hidden = response_states(micro, logprobs)?;
        let generator_loss = self
            .ganpo
            .generator_loss(micro, &hidden, state.total_weight)?;
        let Some(generator_loss) = generator_loss else {
            return Ok(loss);
        };
        state.generator_loss += f64::from(generator_loss.to_scalar::<f32>()?);
        Ok((loss + (generator_loss * state.lambda)?)?)
    }

    /// Undoes the discriminators' last step, because the policy's was not finite.
    pub(crate) fn undo(&mut self) -> Result<(), LearnerError> {
        self.ganpo.undo()
    }

    /// Files of a checkpoint: names and contents.
    pub(crate) fn files(&self) -> Result<Vec<(&'static str, Vec<u8>)>, LearnerError> {
        let GanpoState {
            discriminators,
            optimizer,
        } = self.ganpo.save()?;
        Ok(vec![
            (DISCRIMINATORS, discriminators),
            (OPTIMIZER, optimizer),
        ])
    }

    /// Restores the state of a checkpoint.
    pub(crate) fn read(&mut self, checkpoint: &Path) -> Result<(), LearnerError> {
        let broken = |reason: String| LearnerError::Checkpoint {
            path: checkpoint.to_owned(),
            reason,
        };
        let file = |name: &str| {
            fs::read(checkpoint.join(name)).map_err(|error| {
                broken(format!(
                    "{name}: {error}; a run that began without learner.ganpo.lambda must be resumed without it"
                ))
            })
        };
        let saved = GanpoState {
            discriminators: file(DISCRIMINATORS)?,
            optimizer: file(OPTIMIZER)?,
        };
        let restored = self.ganpo.restore(&saved);
        restored.map_err(|error| broken(format!("{DISCRIMINATORS}: {error}")))
    }
}

impl GanpoStep {
    /// Adds the metrics of the step.
    pub(crate) fn add_metrics(&self, m: &mut Measurements) {
        if let Some(discriminators) = self.discriminators {
            m.set("ganpo/d_loss", discriminators.loss);
            m.set("ganpo/d_accuracy", discriminators.accuracy);
        }
        if self.applies {
            m.set("ganpo/g_loss", self.generator_loss);
            m.set("loss/ganpo", self.lambda * self.generator_loss);
        }
    }
}

/// Hidden states of a pass that the discriminators read: of the policy and of its reference.
pub(crate) fn pass_features(
    micro: &MicroBatch<'_>,
    policy: &TokenLogprobs,
    reference: &TokenLogprobs,
) -> Result<PassFeatures, LearnerError> {
    PassFeatures::new(
        micro,
        &response_states(micro, policy)?,
        &response_states(micro, reference)?,
    )
}

/// Hidden states of the completions, without those of golden answers.
fn response_states(
    micro: &MicroBatch<'_>,
    logprobs: &TokenLogprobs,
) -> Result<Tensor, LearnerError> {
    let tokens = micro.lengths.iter().sum();
    Ok(logprobs.hidden.narrow(0, 0, tokens)?)
}
