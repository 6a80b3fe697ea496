//! The part of a step that belongs to GANPO: the discriminators first, then their term in the loss.

use std::{fs, path::Path};

use messages::Seed;
use model::{AdamWSettings, LanguageModel, Scores, Tensor};
use settings::{LearnerSettings, MaxGradNorm};
use telemetry::Measurements;

use super::{Scored, Trainer};
use crate::{
    LearnerError,
    batch::MicroBatch,
    ganpo::{self, Ganpo, Observed, Saved, Told},
};

/// The stream of the discriminators' first numbers, among those of the run's seed.
const FRESH: u64 = 0x9a9;
/// Where the discriminators' gradient is clipped unless the settings say a number: the slope of a binary
/// cross-entropy is at most 1, whatever the policy's objective.
const CROSS_ENTROPYS_CLIP: f64 = 1.0;
/// Where the game lies in a checkpoint.
const PLAYERS: &str = "ganpo.safetensors";
const OPTIMIZER: &str = "ganpo_optimizer.safetensors";

/// The discriminators.
pub(crate) struct Game {
    ganpo: Ganpo,
}

/// What a step knows of the game.
#[derive(Default)]
pub(super) struct Round {
    /// The scores of the batch, when it is all one pass and was scored already.
    pub(super) scored: Option<Scored>,
    told: Option<Told>,
    /// What all rows of the batch count together.
    total: f64,
    /// Whether the policy feels the game.
    felt: bool,
    /// L_adv so far.
    term: f64,
    lambda: f64,
}

impl Game {
    /// The game of the settings beside this policy, if they want one.
    pub(super) fn new(
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
                max_grad_norm: CROSS_ENTROPYS_CLIP,
                ..adamw
            },
        };
        let (width, device) = (policy.config().hidden_size, policy.device());
        let fresh = (seed.derive(FRESH), device);
        Ok(Some(Self {
            ganpo: Ganpo::new(&settings.ganpo, width, adamw, fresh)?,
        }))
    }

    pub(super) fn files(&self) -> Result<Vec<(&'static str, Vec<u8>)>, LearnerError> {
        let Saved { players, optimizer } = self.ganpo.save()?;
        Ok(vec![(PLAYERS, players), (OPTIMIZER, optimizer)])
    }

    pub(super) fn read(&mut self, checkpoint: &Path) -> Result<(), LearnerError> {
        let broken = |reason: String| LearnerError::Checkpoint {
            path: checkpoint.to_owned(),
            reason,
        };
        let file = |name: &str| {
            fs::read(checkpoint.join(name)).map_err(|error| {
                broken(format!(
                    "{name}: {error}; a run that began without learner.ganpo.lambda goes on without it"
                ))
            })
        };
        let saved = Saved {
            players: file(PLAYERS)?,
            optimizer: file(OPTIMIZER)?,
        };
        let restored = self.ganpo.restore(&saved);
        restored.map_err(|error| broken(format!("{PLAYERS}: {error}")))
    }
}

impl Round {
    pub(super) fn measure(&self, m: &mut Measurements) {
        if let Some(told) = self.told {
            m.set("ganpo/d_loss", told.loss);
            m.set("ganpo/d_accuracy", told.accuracy);
        }
        if self.felt {
            m.set("ganpo/g_loss", self.term);
            m.set("loss/ganpo", self.lambda * self.term);
        }
    }
}

impl Trainer {
    /// The discriminators' step on this batch, where there are discriminators that learn.
    pub(super) fn play(
        &mut self,
        micros: &[MicroBatch<'_>],
        step: u64,
    ) -> Result<Round, LearnerError> {
        let Some(game) = &self.game else {
            return Ok(Round::default());
        };
        let mut round = Round {
            total: ganpo::total(micros),
            felt: game.ganpo.is_felt(step),
            lambda: game.ganpo.lambda(),
            ..Round::default()
        };
        if !game.ganpo.learns(step) {
            return Ok(round);
        }
        let mut observed = Vec::with_capacity(micros.len());
        for (pass, micro) in (0..).zip(micros) {
            let scored = self.score(micro, (step, pass))?;
            observed.push(Observed::new(
                micro,
                &response(micro, &scored.policy)?,
                &response(micro, &scored.reference)?,
            )?);
            round.scored = (micros.len() == 1).then_some(scored);
        }
        let learning_rate = self.schedule.at(step);
        if let Some(game) = &mut self.game {
            round.told = game.ganpo.learn(&observed, learning_rate)?;
        }
        Ok(round)
    }

    /// The loss with the game's share of the pass: pair loss + λ·L_adv.
    pub(super) fn regularised(
        &self,
        loss: Tensor,
        micro: &MicroBatch<'_>,
        scores: &Scores,
        round: &mut Round,
    ) -> Result<Tensor, LearnerError> {
        let Some(game) = self.game.as_ref().filter(|_| round.felt) else {
            return Ok(loss);
        };
        let hidden = response(micro, scores)?;
        let Some(term) = game.ganpo.term(micro, &hidden, round.total)? else {
            return Ok(loss);
        };
        round.term += f64::from(term.to_scalar::<f32>()?);
        Ok((loss + (term * round.lambda)?)?)
    }

    /// The step was refused: the discriminators' is, too.
    pub(super) fn take_back(&mut self) -> Result<(), LearnerError> {
        self.game.as_mut().map_or(Ok(()), |game| game.ganpo.undo())
    }
}

/// The hidden states of the completions alone, without those of golden answers.
fn response(micro: &MicroBatch<'_>, scores: &Scores) -> Result<Tensor, LearnerError> {
    let tokens = micro.lengths.iter().sum();
    Ok(scores.hidden.narrow(0, 0, tokens)?)
}
