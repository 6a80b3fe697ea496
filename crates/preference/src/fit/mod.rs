//! How a preference model is made: from a trunk, annotated pairs and, in a round of the adversarial game,
//! golden answers against the policy's own samples.
//!
//! The same settings, data and seed give the same model. Where pairs come from, and who is judged by the
//! model afterwards, is not known here.

mod loss;
mod order;

use messages::Seed;
use model::{
    AdamWSettings, Adapter, Gradients, LanguageModel, LoraConfig, Optimizer, Pooling, RewardConfig,
    RewardKind, RewardModel, Schedule, Sequence, Tensor,
};
use settings::{ApoSettings, FitSettings, Head, PoolingSetting};

use self::order::{Order, StepRows};
use crate::{Calibration, Judged, PreferenceError, distinct::Distinct};

/// The streams of a fresh adapter's numbers and of its dropout, among those of a fit's seed.
const ADAPTER: u64 = 0x107a;
const DROPOUT: u64 = 0xd209;
/// Pairs that are measured in one pass.
const JUDGED_AT_ONCE: usize = 64;

/// Two responses to a prompt and an annotator's word, as tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Example {
    /// What was asked.
    pub prompt: Vec<u32>,
    /// A response, end-of-text included.
    pub first: Vec<u32>,
    /// Another.
    pub second: Vec<u32>,
    /// The probability that the first is preferred, or 0 or 1.
    pub label: f32,
}

/// A golden answer and what the policy says instead, as tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Contest {
    /// What was asked.
    pub prompt: Vec<u32>,
    /// The golden answer, end-of-text included.
    pub golden: Vec<u32>,
    /// The policy's samples: k of them.
    pub samples: Vec<Vec<u32>>,
}

/// What a model is fitted to.
#[derive(Debug, Clone, Copy)]
pub struct Material<'a> {
    /// Annotated pairs.
    pub examples: &'a [Example],
    /// The policy's samples against golden answers, in a round of the game.
    pub contests: &'a [Contest],
    /// How much these count; only read when there are contests.
    pub apo: &'a ApoSettings,
}

/// One step of fitting, for whoever watches.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FitStep {
    /// Its number, from 1.
    pub step: u64,
    /// Steps in all.
    pub steps: u64,
    /// The annotated pairs' loss, in nats; `None` where they take no part.
    pub annotated: Option<f64>,
    /// The golden answers' loss; `None` outside the game.
    pub golden: Option<f64>,
    /// The gradient's norm before clipping.
    pub grad_norm: f64,
}

/// Fits a model with a fresh head on `trunk`, which stays as it is: a copy of it is trained or, where the
/// settings want one, an adapter beside it. `watch` is told of every step and answers whether to go on.
///
/// # Errors
/// When there is nothing to fit to, a pair does not fit the trunk, the loss is not finite, or `watch` says
/// to stop.
pub fn fit(
    trunk: &LanguageModel,
    settings: &FitSettings,
    material: Material<'_>,
    seed: Seed,
    mut watch: impl FnMut(FitStep) -> bool,
) -> Result<RewardModel, PreferenceError> {
    let trunk = match adapter(settings) {
        None => trunk.without_adapter(),
        Some(adapter) => {
            let seed = seed.derive(ADAPTER);
            trunk.with_adapter(Adapter::fresh(
                adapter,
                trunk.config(),
                seed,
                trunk.device(),
            )?)?
        }
    };
    let model = RewardModel::from_trunk(&trunk, reward_config(settings), seed)?;
    let (model, vars) = model.trainable()?;
    let mut optimizer = Optimizer::new(vars, adamw(settings))?;
    let order = Order::new(settings, material, seed)?;
    let schedule = schedule(settings, order.steps());
    for step in 0..order.steps() {
        let rows = order.step(step);
        let mut told = FitStep {
            step: step + 1,
            steps: order.steps(),
            annotated: None,
            golden: None,
            grad_norm: 0.0,
        };
        let running = model.dropping(seed.derive(DROPOUT).derive(step));
        let loss = Batch::new(&rows, settings, material.apo).loss(&running, &mut told)?;
        let mut gradients = Gradients::default();
        gradients.add(&loss).map_err(model::ModelError::from)?;
        told.grad_norm = optimizer.norm(&gradients)?;
        let losses = [told.annotated, told.golden, Some(told.grad_norm)];
        if losses
            .into_iter()
            .flatten()
            .any(|number| !number.is_finite())
        {
            return Err(PreferenceError::FitDiverged { step: step + 1 });
        }
        optimizer.step(&gradients, told.grad_norm, schedule.at(step))?;
        if !watch(told) {
            return Err(PreferenceError::FitStopped);
        }
    }
    Ok(model)
}

/// The adapter that is trained beside the trunk, where it is not the trunk itself; who saves it names its base.
#[must_use]
pub fn adapter(settings: &FitSettings) -> Option<LoraConfig> {
    (settings.lora_rank > 0).then(|| LoraConfig {
        rank: settings.lora_rank,
        alpha: settings.lora_alpha,
        dropout: settings.lora_dropout,
        target_modules: settings.target_modules.clone(),
        rank_stabilised: false,
        base_model: String::new(),
    })
}

/// How a model does on annotated pairs; `None` when there are none.
///
/// # Errors
/// When a pair does not fit the model, or its numbers are not finite.
pub fn calibrate(
    model: &RewardModel,
    examples: &[Example],
) -> Result<Option<Calibration>, PreferenceError> {
    Ok(Calibration::of(&judge(model, examples)?))
}

/// What a model says of these pairs. A response that stands in several pairs that follow one another is
/// read once.
///
/// # Errors
/// When a pair does not fit the model, or its numbers are not finite.
pub(crate) fn judge(
    model: &RewardModel,
    examples: &[Example],
) -> Result<Vec<Judged>, PreferenceError> {
    let mut judged = Vec::with_capacity(examples.len());
    for part in examples.chunks(JUDGED_AT_ONCE) {
        let mut read = Distinct::default();
        let places: Vec<_> = part
            .iter()
            .map(|example| responses(example).map(|response| read.place(response)))
            .collect();
        let sequences: Vec<_> = read
            .items()
            .iter()
            .map(|&(prompt, completion)| Sequence { prompt, completion })
            .collect();
        let rows = features(model, &sequences)?;
        for (example, [first, second]) in part.iter().zip(places) {
            judged.push(Judged {
                p: probability(model, &rows[first], &rows[second])?,
                label: f64::from(example.label),
                longer: example.first.len() as i64 - example.second.len() as i64,
            });
        }
    }
    Ok(judged)
}

/// An example's two responses, each after its prompt.
fn responses(example: &Example) -> [(&[u32], &[u32]); 2] {
    [&example.first, &example.second].map(|response| (&*example.prompt, &**response))
}

/// A model's numbers for every sequence: the rows of [`RewardModel::score`].
///
/// # Errors
/// When a sequence does not fit the model.
pub(crate) fn features(
    model: &RewardModel,
    sequences: &[Sequence<'_>],
) -> Result<Vec<Vec<f32>>, PreferenceError> {
    let rows = model.score(sequences)?;
    Ok(rows.to_vec2().map_err(model::ModelError::from)?)
}

/// p(a ≻ b) of two rows of [`features`].
///
/// # Errors
/// When the model's numbers are not finite.
pub(crate) fn probability(
    model: &RewardModel,
    a: &[f32],
    b: &[f32],
) -> Result<f64, PreferenceError> {
    let p = model.config().kind.probability(a, b);
    p.map(|p| f64::from(p.get()))
        .map_err(|_| PreferenceError::NotFinite)
}

/// One step's rows: every response once, and which two of them make a margin.
struct Batch<'a> {
    sequences: Vec<Sequence<'a>>,
    first: Vec<u32>,
    second: Vec<u32>,
    labels: Vec<f32>,
    apo: &'a ApoSettings,
    golden_weight: f64,
}

impl<'a> Batch<'a> {
    fn new(rows: &StepRows<'a>, settings: &FitSettings, apo: &'a ApoSettings) -> Self {
        let mut batch = Self {
            sequences: Vec::new(),
            first: Vec::new(),
            second: Vec::new(),
            labels: Vec::new(),
            apo,
            golden_weight: rows.golden_weight,
        };
        let smooth = settings.label_smoothing as f32;
        for example in &rows.examples {
            let first = batch.add(&example.prompt, &example.first);
            let second = batch.add(&example.prompt, &example.second);
            batch.row(first, second);
            batch
                .labels
                .push(example.label + smooth * (0.5 - example.label));
        }
        for contest in &rows.contests {
            let golden = batch.add(&contest.prompt, &contest.golden);
            for sample in &contest.samples {
                let sample = batch.add(&contest.prompt, sample);
                batch.row(golden, sample);
            }
        }
        batch
    }

    fn add(&mut self, prompt: &'a [u32], completion: &'a [u32]) -> u32 {
        self.sequences.push(Sequence { prompt, completion });
        self.sequences.len() as u32 - 1
    }

    fn row(&mut self, first: u32, second: u32) {
        self.first.push(first);
        self.second.push(second);
    }

    /// The step's loss, a scalar with gradient; its parts go into `told`.
    fn loss(&self, model: &RewardModel, told: &mut FitStep) -> Result<Tensor, PreferenceError> {
        let margins = model.margins(&model.score(&self.sequences)?, &self.first, &self.second)?;
        self.terms(&margins, told).map_err(PreferenceError::Model)
    }

    fn terms(&self, margins: &Tensor, told: &mut FitStep) -> Result<Tensor, model::ModelError> {
        let (annotated, all) = (self.labels.len(), self.first.len());
        let number =
            |loss: &Tensor| Ok::<_, model::ModelError>(f64::from(loss.to_scalar::<f32>()?));
        let mut total = None;
        if annotated > 0 {
            let loss = loss::annotated(&margins.narrow(0, 0, annotated)?, &self.labels)?;
            told.annotated = Some(number(&loss)?);
            total = Some(loss);
        }
        if all > annotated {
            let loss = loss::golden(
                &margins.narrow(0, annotated, all - annotated)?,
                self.apo.form,
            )?;
            told.golden = Some(number(&loss)?);
            let weighted = (loss * (self.apo.coef * self.golden_weight))?;
            total = Some(match total {
                Some(total) => (total + weighted)?,
                None => weighted,
            });
        }
        Ok(total.expect("a step has rows of at least one kind"))
    }
}

fn reward_config(settings: &FitSettings) -> RewardConfig {
    RewardConfig {
        kind: match settings.head {
            Head::BradleyTerry => RewardKind::BradleyTerry,
            Head::Pairwise => RewardKind::Pairwise {
                planes: settings.planes,
            },
        },
        pooling: match settings.pooling {
            PoolingSetting::Last => Pooling::Last,
            PoolingSetting::Mean => Pooling::Mean,
            PoolingSetting::Sum => Pooling::Sum,
        },
        likelihood: settings.likelihood,
    }
}

fn adamw(settings: &FitSettings) -> AdamWSettings {
    AdamWSettings {
        beta1: settings.adam_beta1,
        beta2: settings.adam_beta2,
        epsilon: 1e-8,
        weight_decay: settings.weight_decay,
        max_grad_norm: settings.max_grad_norm,
    }
}

fn schedule(settings: &FitSettings, steps: u64) -> Schedule {
    Schedule {
        learning_rate: settings.learning_rate,
        kind: settings.lr_scheduler_type,
        warmup_ratio: settings.warmup_ratio,
        min_lr_ratio: settings.min_lr_ratio,
        steps,
    }
}

#[cfg(test)]
pub(crate) mod tests;
