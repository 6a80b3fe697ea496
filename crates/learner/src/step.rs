//! One optimiser step: score, compare, differentiate, look for what is not finite, move.

use std::{path::Path, sync::Arc};

use messages::{LabelledPair, Seed};
use model::{
    AdamWSettings, Gradients, LanguageModel, ModelError, ModelFolder, Optimizer, Schedule, Scores,
    Tensor,
};
use settings::{self, LearnerSettings, ObjectiveSettings};
use telemetry::Measurements;

use crate::{
    LearnerError,
    batch::{Cut, MicroBatch},
    objective::{self, Baseline, Batch, LabelKind, Labelling, LogpReduction, Objective},
};
pub(crate) use game::Game;

mod game;

/// The stream of an adapter's dropout, among those of the run's seed.
const DROPOUT: u64 = 0xd709;

/// The policy in training, with everything that moves it.
pub struct Trainer {
    folder: Arc<ModelFolder>,
    model: LanguageModel,
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

/// What became of a step.
pub enum StepOutcome {
    /// It was taken.
    Taken(Measurements),
    /// The loss or the gradient was not finite; nothing has changed.
    Refused(Measurements),
}

/// Sums over the passes of a step.
#[derive(Default)]
struct Sums {
    /// Of everything that is minimised.
    loss: f64,
    /// Of the objective alone.
    objective: f64,
    tokens: Vec<f32>,
    actor_tokens: Vec<f32>,
    entropy: Vec<f32>,
    logp: Vec<f64>,
    ref_logp: Vec<f64>,
    rows: Vec<(usize, usize, f64)>,
    lengths: Vec<usize>,
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
        let model = model.with_checkpointing(settings.gradient_checkpointing);
        let adamw = AdamWSettings {
            beta1: settings.adam_beta1,
            beta2: settings.adam_beta2,
            epsilon: settings.adam_epsilon,
            weight_decay: settings.weight_decay,
            max_grad_norm: settings.max_grad_norm,
        };
        let (objective, temperature) = objective(&settings.objective);
        let game = Game::new(settings, policy, adamw, seed)?;
        Ok(Self {
            folder,
            model,
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
            let scores = match round.scores.take() {
                Some(scores) => scores,
                None => self.score(micro, (step, pass))?,
            };
            let loss = self.loss(micro, &scores, pairs.len(), &mut sums)?;
            let loss = self.regularised(loss, micro, &scores, &mut round)?;
            sums.loss += f64::from(loss.to_scalar::<f32>()?);
            let before = clock.elapsed().as_secs_f64();
            gradients.add(&loss)?;
            backward_seconds += clock.elapsed().as_secs_f64() - before;
        }
        let forward_seconds = clock.elapsed().as_secs_f64() - backward_seconds;
        let norm = self.optimizer.norm(&gradients)?;
        let learning_rate = self.schedule.at(step);
        let mut measurements = self.measure(&sums, pairs, step);
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
        Ok(StepOutcome::Taken(measurements))
    }

    /// What the policy in training says of a pass: its completions, then its golden answers.
    fn score(
        &self,
        micro: &MicroBatch<'_>,
        (step, pass): (u64, u64),
    ) -> Result<Scores, LearnerError> {
        let mut sequences = micro.completions();
        if self.objective.needs_baseline() {
            sequences.extend(micro.golden(self.objective.name())?);
        }
        let model = self.model.dropping(self.dropout.derive(step).derive(pass));
        Ok(model.score(&sequences)?)
    }

    /// The pass's share of the batch's mean loss, a scalar with gradient.
    fn loss(
        &self,
        micro: &MicroBatch<'_>,
        scores: &Scores,
        batch_size: usize,
        sums: &mut Sums,
    ) -> Result<Tensor, LearnerError> {
        let completions = micro.lengths.len();
        let response: usize = micro.lengths.iter().sum();
        let device = self.model.device();
        let token_logp = scores.logp.narrow(0, 0, response)?;
        let token_ref_logp = micro.token_ref_logp(device)?;
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
        sums.add(
            micro,
            &token_logp,
            &scores.entropy.narrow(0, 0, response)?,
            &loss,
        )?;
        Ok(loss)
    }

    fn measure(&self, sums: &Sums, pairs: &[LabelledPair], step: u64) -> Measurements {
        let mut m = Measurements::new();
        m.set("loss", sums.loss);
        m.set(
            format!("loss/{}", self.objective.name().replace('-', "_")),
            sums.objective,
        );
        sums.rewards(self.temperature, &mut m);
        sums.completions(pairs, &mut m);
        // At the same version both sides computed the same numbers; what differs is the arithmetic.
        if pairs
            .iter()
            .all(|labelled| labelled.pair.version.step == step)
        {
            sums.mismatch(&mut m);
        }
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
        self.optimizer.restore(&blob).map_err(torn)?;
        self.optimizer.assign(&weights).map_err(broken)?;
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

impl Sums {
    fn add(
        &mut self,
        micro: &MicroBatch<'_>,
        token_logp: &Tensor,
        entropy: &Tensor,
        loss: &Tensor,
    ) -> Result<(), LearnerError> {
        let tokens: Vec<f32> = token_logp.to_vec1()?;
        let base = self.logp.len();
        let reference: Vec<f32> = micro.token_ref_logp(token_logp.device())?.to_vec1()?;
        let mut start = 0;
        for &length in &micro.lengths {
            let sum = |l: &[f32]| {
                l[start..start + length]
                    .iter()
                    .map(|&x| f64::from(x))
                    .sum::<f64>()
            };
            self.logp.push(sum(&tokens));
            self.ref_logp.push(sum(&reference));
            start += length;
        }
        let rows = micro.first.iter().zip(&micro.second).zip(&micro.p);
        self.rows.extend(
            rows.map(|((&a, &b), &p)| (base + a as usize, base + b as usize, f64::from(p))),
        );
        self.lengths.extend(&micro.lengths);
        self.actor_tokens.extend(micro.actor_logp());
        self.entropy.extend(entropy.to_vec1::<f32>()?);
        self.tokens.extend(tokens);
        self.objective += f64::from(loss.to_scalar::<f32>()?);
        Ok(())
    }

    /// Implicit rewards, temperature · log π/ref, of the likelier and the less likely completion.
    fn rewards(&self, temperature: f64, m: &mut Measurements) {
        let reward = |c: usize| temperature * (self.logp[c] - self.ref_logp[c]);
        let decided: Vec<(usize, usize)> = self
            .rows
            .iter()
            .filter(|(_, _, p)| *p != 0.5)
            .map(|&(a, b, p)| if p > 0.5 { (a, b) } else { (b, a) })
            .collect();
        let mean = |f: &dyn Fn(&(usize, usize)) -> f64| {
            decided.iter().map(f).sum::<f64>() / decided.len().max(1) as f64
        };
        m.set("rewards/chosen", mean(&|&(chosen, _)| reward(chosen)));
        m.set("rewards/rejected", mean(&|&(_, rejected)| reward(rejected)));
        m.set(
            "rewards/margins",
            mean(&|&(chosen, rejected)| reward(chosen) - reward(rejected)),
        );
        let right = |&(chosen, rejected): &(usize, usize)| {
            f64::from(u8::from(reward(chosen) > reward(rejected)))
        };
        m.set("rewards/accuracies", mean(&right));
        m.set("logps/chosen", mean(&|&(chosen, _)| self.logp[chosen]));
        m.set(
            "logps/rejected",
            mean(&|&(_, rejected)| self.logp[rejected]),
        );
        let rows = self.rows.len().max(1) as f64;
        m.set(
            "objective/scores",
            self.rows.iter().map(|r| r.2).sum::<f64>() / rows,
        );
        m.set(
            "objective/scores_margin",
            self.rows
                .iter()
                .map(|r| (2.0 * r.2 - 1.0).abs())
                .sum::<f64>()
                / rows,
        );
    }

    fn completions(&self, pairs: &[LabelledPair], m: &mut Measurements) {
        let count = self.lengths.len().max(1) as f64;
        let kl: f64 = self
            .logp
            .iter()
            .zip(&self.ref_logp)
            .map(|(p, r)| p - r)
            .sum();
        m.set("objective/kl", kl / count);
        let entropy: f64 = self.entropy.iter().map(|&e| f64::from(e)).sum();
        m.set(
            "objective/entropy",
            entropy / self.entropy.len().max(1) as f64,
        );
        m.set(
            "completions/mean_length",
            self.lengths.iter().sum::<usize>() as f64 / count,
        );
        m.set(
            "completions/min_length",
            self.lengths.iter().min().map_or(0.0, |&l| l as f64),
        );
        m.set(
            "completions/max_length",
            self.lengths.iter().max().map_or(0.0, |&l| l as f64),
        );
        let completions = pairs.iter().flat_map(|labelled| &labelled.pair.completions);
        let clipped = completions
            .filter(|c| c.finish == messages::Finish::Length)
            .count() as f64;
        m.set("completions/clipped_ratio", clipped / count);
        m.set("val/contain_eos_token", 1.0 - clipped / count);
    }

    /// How far the actors' log-probabilities are from the learner's for the same tokens.
    fn mismatch(&self, m: &mut Measurements) {
        let gaps = || {
            self.tokens
                .iter()
                .zip(&self.actor_tokens)
                .map(|(&l, &a)| f64::from(l) - f64::from(a))
        };
        let n = self.tokens.len().max(1) as f64;
        m.set(
            "mismatch/logp_abs_diff",
            gaps().map(f64::abs).sum::<f64>() / n,
        );
        m.set("mismatch/kl", gaps().map(|gap| -gap).sum::<f64>() / n);
        m.set(
            "mismatch/k3_kl",
            gaps().map(|gap| gap.exp() - 1.0 - gap).sum::<f64>() / n,
        );
        let gaps: Vec<f64> = gaps().collect();
        let mut start = 0;
        let weights: Vec<f64> = self
            .lengths
            .iter()
            .map(|&length| {
                start += length;
                gaps[start - length..start].iter().sum::<f64>().exp()
            })
            .collect();
        let (sum, squares) = weights
            .iter()
            .fold((0.0, 0.0), |(s, q), w| (s + w, q + w * w));
        m.set(
            "mismatch/ess",
            sum * sum / (squares * weights.len().max(1) as f64),
        );
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
