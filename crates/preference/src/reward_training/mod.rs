//! Training of preference models on annotated pairs and, in an APO round, on golden answers against the policy's
//! samples.
//!
//! Promises: the same settings, data and seed give the same model.
//! Does not know where pairs come from, or what the model judges.

mod epoch_order;
mod loss;

use messages::Seed;
use model::{
    AdamWSettings, Adapter, Gradients, LanguageModel, LoraConfig, Optimizer, Pooling, RewardConfig,
    RewardKind, RewardModel, Schedule, Sequence, Tensor, within_tokens,
};
use settings::{ApoSettings, FitSettings, Head, PoolingSetting};

use crate::calibration::{Calibration, Prediction};
use crate::dedup::Deduplicated;
use crate::error::PreferenceError;
use crate::reward_training::epoch_order::{EpochOrder, StepRows};

/// RNG stream ids of the adapter's initial values and of its dropout.
const ADAPTER: u64 = 0x107a;
const DROPOUT: u64 = 0xd209;
/// Maximum number of tokens, prompts and responses, per forward pass of an evaluation.
const EVALUATION_TOKENS: usize = 8192;

/// Two responses to a prompt with an annotator's label, as token ids.
#[derive(Debug, Clone, PartialEq)]
pub struct PreferenceExample {
    /// The prompt.
    pub prompt: Vec<u32>,
    /// First response, with end-of-text.
    pub first: Vec<u32>,
    /// Second response, with end-of-text.
    pub second: Vec<u32>,
    /// Probability that the first response is preferred: 0, 1, or soft.
    pub label: f32,
}

impl PreferenceExample {
    /// Number of tokens, the prompt's counted once.
    fn tokens(&self) -> usize {
        self.prompt.len() + self.first.len() + self.second.len()
    }
}

/// A golden answer and the policy's samples for the same prompt, as token ids.
#[derive(Debug, Clone, PartialEq)]
pub struct AdversarialExample {
    /// The prompt.
    pub prompt: Vec<u32>,
    /// Golden answer, with end-of-text.
    pub golden: Vec<u32>,
    /// k samples of the policy.
    pub samples: Vec<Vec<u32>>,
}

/// Training data of a preference model.
#[derive(Debug, Clone, Copy)]
pub struct TrainingData<'a> {
    /// Annotated pairs.
    pub examples: &'a [PreferenceExample],
    /// Golden answers against the policy's samples; empty outside APO.
    pub adversarial: &'a [AdversarialExample],
    /// Weight and form of the adversarial loss; unused without `adversarial`.
    pub apo: &'a ApoSettings,
}

/// Metrics of a training step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepMetrics {
    /// Number of the step, from 1.
    pub step: u64,
    /// Total number of steps.
    pub steps: u64,
    /// Loss on annotated pairs, in nats; `None` when they are not trained on.
    pub annotated: Option<f64>,
    /// Adversarial loss; `None` outside APO.
    pub golden: Option<f64>,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
}

/// Trains a model with a fresh head on `backbone`. `backbone` itself is not changed: a copy is trained or, if
/// configured, a LoRA adapter. `on_step` gets the metrics of every step and returns whether to continue.
///
/// # Errors
/// When there is no data, a pair exceeds the context of the backbone, the loss is not finite, or `on_step` returns
/// false.
pub fn fit(
    backbone: &LanguageModel,
    settings: &FitSettings,
    data: TrainingData<'_>,
    seed: Seed,
    on_step: impl FnMut(StepMetrics) -> bool,
) -> Result<RewardModel, PreferenceError> {
    let backbone = trained_backbone(backbone, settings, seed)?;
    let model = RewardModel::from_backbone(&backbone, reward_config(settings), seed)?;
    fit_further(&model, settings, data, seed, on_step)
}

/// As [`fit`], from the weights of `model`, of which a copy is trained.
///
/// # Errors
/// As [`fit`].
pub(crate) fn fit_further(
    model: &RewardModel,
    settings: &FitSettings,
    data: TrainingData<'_>,
    seed: Seed,
    mut on_step: impl FnMut(StepMetrics) -> bool,
) -> Result<RewardModel, PreferenceError> {
    let (trained, vars) = model.trainable()?;
    let precision = model::training_precision(settings.precision);
    // Below an adapter nothing is trained.
    let model = match trained.backbone().adapter() {
        Some(_) => trained.packed(precision)?,
        None => trained.with_precision(precision),
    };
    let mut optimizer = Optimizer::new(vars, AdamWSettings::from(&settings.optimizer()))?;
    let order = EpochOrder::new(settings, data, seed)?;
    let schedule = Schedule::new(&settings.optimizer(), order.steps());
    for step in 0..order.steps() {
        let rows = order.step(step);
        let mut metrics = StepMetrics {
            step: step + 1,
            steps: order.steps(),
            annotated: None,
            golden: None,
            grad_norm: 0.0,
        };
        let mut gradients = Gradients::default();
        let totals = [rows.examples.len(), rows.golden_rows()];
        let passes = rows.passes(settings.max_tokens_per_micro_batch);
        for (pass, rows) in (0..).zip(&passes) {
            let dropout = seed.derive(DROPOUT).derive(step).derive(pass);
            let running = model.with_dropout_seed(dropout);
            let batch = MarginBatch::new(rows, totals, settings, data.apo);
            let loss = batch.loss(&running, &mut metrics)?;
            gradients.backward(&loss).map_err(model::ModelError::from)?;
        }
        metrics.grad_norm = optimizer.norm(&gradients)?;
        let losses = [metrics.annotated, metrics.golden, Some(metrics.grad_norm)];
        if losses.into_iter().flatten().any(|value| !value.is_finite()) {
            return Err(PreferenceError::FitDiverged { step: step + 1 });
        }
        optimizer.step(&gradients, metrics.grad_norm, schedule.at(step))?;
        if !on_step(metrics) {
            return Err(PreferenceError::FitStopped);
        }
    }
    if !trained.trained().is_finite()? {
        let step = order.steps();
        return Err(PreferenceError::FitDiverged { step });
    }
    Ok(trained.detached()?)
}

/// The backbone without the policy's adapter, with a fresh one where the settings train an adapter.
fn trained_backbone(
    backbone: &LanguageModel,
    settings: &FitSettings,
    seed: Seed,
) -> Result<LanguageModel, PreferenceError> {
    let Some(adapter) = adapter(settings) else {
        return Ok(backbone.without_adapter());
    };
    let (config, device) = (backbone.config(), backbone.device());
    let adapter = Adapter::fresh(adapter, config, seed.derive(ADAPTER), device)?;
    Ok(backbone.with_adapter(adapter)?)
}

/// LoRA configuration of the settings; `None` when the backbone itself is trained. The name of the base model is set
/// when the adapter is saved.
#[must_use]
pub fn adapter(settings: &FitSettings) -> Option<LoraConfig> {
    let (rank, alpha) = (settings.lora_rank, settings.lora_alpha);
    (rank > 0)
        .then(|| LoraConfig::new(rank, alpha, settings.lora_dropout, &settings.target_modules))
}

/// Calibration of a model on annotated pairs; `None` when there are none.
///
/// # Errors
/// When a pair exceeds the context of the model, or its rewards are not finite.
pub fn calibrate(
    model: &RewardModel,
    examples: &[PreferenceExample],
) -> Result<Option<Calibration>, PreferenceError> {
    Ok(Calibration::of(&predict(model, examples)?))
}

/// Predictions of a model on these pairs. A response that is part of several pairs of a batch is evaluated once.
///
/// # Errors
/// When a pair exceeds the context of the model, or its rewards are not finite.
pub(crate) fn predict(
    model: &RewardModel,
    examples: &[PreferenceExample],
) -> Result<Vec<Prediction>, PreferenceError> {
    let mut predictions = Vec::with_capacity(examples.len());
    for batch in within_tokens(examples, EVALUATION_TOKENS, PreferenceExample::tokens) {
        let mut distinct = Deduplicated::default();
        let indices: Vec<_> = batch
            .iter()
            .map(|example| responses(example).map(|response| distinct.insert(response)))
            .collect();
        let sequences: Vec<_> = distinct
            .items()
            .iter()
            .map(|&(prompt, completion)| Sequence { prompt, completion })
            .collect();
        let rows = rewards(model, &sequences)?;
        for (example, [first, second]) in batch.iter().zip(indices) {
            predictions.push(Prediction {
                p: probability(model, &rows[first], &rows[second])?,
                label: f64::from(example.label),
                length_difference: example.first.len() as i64 - example.second.len() as i64,
            });
        }
    }
    Ok(predictions)
}

/// Prompt and response of both responses of an example.
fn responses(example: &PreferenceExample) -> [(&[u32], &[u32]); 2] {
    [&example.first, &example.second].map(|response| (&*example.prompt, &**response))
}

/// Rewards of every sequence, `[N][rewards per response]`; see [`RewardModel::rewards`].
///
/// # Errors
/// When a sequence exceeds the context of the model.
pub(crate) fn rewards(
    model: &RewardModel,
    sequences: &[Sequence<'_>],
) -> Result<Vec<Vec<f32>>, PreferenceError> {
    let rows = model.rewards(sequences)?;
    Ok(rows.to_vec2().map_err(model::ModelError::from)?)
}

/// p(a ≻ b) of two rows of [`rewards`].
///
/// # Errors
/// When the rewards are not finite.
pub(crate) fn probability(
    model: &RewardModel,
    a: &[f32],
    b: &[f32],
) -> Result<f64, PreferenceError> {
    let p = model.config().kind.probability(a, b);
    p.map(|p| f64::from(p.get()))
        .map_err(|_| PreferenceError::NotFinite)
}

/// Sequences of one pass of a step, and the rows as indices of their first and second sequence.
struct MarginBatch<'a> {
    sequences: Vec<Sequence<'a>>,
    first: Vec<u32>,
    second: Vec<u32>,
    labels: Vec<f32>,
    apo: &'a ApoSettings,
    golden_weight: f64,
    /// Annotated pairs and golden comparisons of the step.
    totals: [usize; 2],
}

impl<'a> MarginBatch<'a> {
    fn new(
        rows: &StepRows<'a>,
        totals: [usize; 2],
        settings: &FitSettings,
        apo: &'a ApoSettings,
    ) -> Self {
        let mut batch = Self {
            sequences: Vec::new(),
            first: Vec::new(),
            second: Vec::new(),
            labels: Vec::new(),
            apo,
            golden_weight: rows.golden_weight,
            totals,
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
        for example in &rows.adversarial {
            let golden = batch.add(&example.prompt, &example.golden);
            for sample in &example.samples {
                let sample = batch.add(&example.prompt, sample);
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

    /// Contribution of the pass to the loss of the step, a scalar with gradient; adds its terms to `metrics`.
    fn loss(
        &self,
        model: &RewardModel,
        metrics: &mut StepMetrics,
    ) -> Result<Tensor, PreferenceError> {
        let margins = model.margins(&model.rewards(&self.sequences)?, &self.first, &self.second)?;
        self.terms(&margins, metrics)
            .map_err(PreferenceError::Model)
    }

    fn terms(
        &self,
        margins: &Tensor,
        metrics: &mut StepMetrics,
    ) -> Result<Tensor, model::ModelError> {
        let (annotated, all) = (self.labels.len(), self.first.len());
        // Means over the step, of which this pass has a share.
        let share = |rows: usize, total: usize| rows as f64 / total as f64;
        let add = |sum: &mut Option<f64>, loss: &Tensor| -> Result<(), model::ModelError> {
            *sum = Some(sum.unwrap_or(0.0) + f64::from(loss.to_scalar::<f32>()?));
            Ok(())
        };
        let mut total = None;
        if annotated > 0 {
            let mean = loss::annotated(&margins.narrow(0, 0, annotated)?, &self.labels)?;
            let loss = (mean * share(annotated, self.totals[0]))?;
            add(&mut metrics.annotated, &loss)?;
            total = Some(loss);
        }
        if all > annotated {
            let rows = all - annotated;
            let mean = loss::golden(&margins.narrow(0, annotated, rows)?, self.apo.form)?;
            let loss = (mean * share(rows, self.totals[1]))?;
            add(&mut metrics.golden, &loss)?;
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

#[cfg(test)]
pub(crate) mod tests;
