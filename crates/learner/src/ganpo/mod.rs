//! GANPO: a latent-space regulariser beside any pair objective.
//!
//! Two discriminators read the final hidden states of responses, one of chosen and one of rejected ones, and learn to
//! distinguish the policy's from the reference's. The generator loss rewards hidden states that the discriminators
//! attribute to the reference. Hidden states are those from which response tokens are predicted; prompts and padding
//! are not read. Promises: the discriminators' step leaves no gradient in the policy, and the policy's none in them; a
//! non-finite step of the learner undoes the discriminators' step too; and the saved state restores training bit by
//! bit. Does not know the objective that it regularises.

mod discriminator;
mod features;
mod loss;
pub(crate) mod regulariser;
mod spectral;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use messages::Seed;
use model::{AdamWSettings, Device, Gradients, Optimizer, Weights};
use settings::GanpoSettings;

use crate::{error::LearnerError, micro_batch::MicroBatch};
use discriminator::{Discriminator, DiscriminatorShape, SPECTRAL};
use features::{Features, PreferenceRows, Stream};
use loss::Streams;
use spectral::SpectralNorm;

/// Maximum width of a discriminator, that of the paper.
const MAX_WIDTH: usize = 512;
/// Minimum width, unless the policy is narrower.
const MIN_WIDTH: usize = 32;
/// Names of the two discriminators, in the order of everything that is per side.
const SIDES: [&str; 2] = ["chosen", "rejected"];
/// Name of the running means among the saved tensors.
const MEANS: &str = "means";

/// Both discriminators and their optimiser.
pub(crate) struct Ganpo {
    settings: GanpoSettings,
    shape: DiscriminatorShape,
    weights: Weights,
    optimizer: Optimizer,
    spectral: SpectralNorm,
    /// Running means of each discriminator's scores; `None` before the first batch.
    means: Option<[Streams<f32>; 2]>,
    /// State before the discriminators' last step.
    before: Option<GanpoState>,
}

/// State of the discriminators, as two safetensors files.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct GanpoState {
    /// Weights, singular vectors and running means.
    pub(crate) discriminators: Vec<u8>,
    /// State of the optimiser.
    pub(crate) optimizer: Vec<u8>,
}

/// Hidden states of a pass, of policy and reference, and its preferences.
pub(crate) struct PassFeatures {
    policy: Features,
    reference: Features,
    rows: PreferenceRows,
    completions: usize,
}

/// Metrics of a step of the discriminators.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct DiscriminatorMetrics {
    /// Mean loss of both.
    pub(crate) loss: f64,
    /// Accuracy before the step.
    pub(crate) accuracy: f64,
}

impl PassFeatures {
    /// From hidden states `[R, d]` of the completions of `micro`, in order.
    pub(crate) fn new(
        micro: &MicroBatch<'_>,
        policy: &Tensor,
        reference: &Tensor,
    ) -> Result<Self, LearnerError> {
        Ok(Self {
            policy: Features::new(&policy.detach(), &micro.lengths)?,
            reference: Features::new(&reference.detach(), &micro.lengths)?,
            rows: PreferenceRows::of(micro),
            completions: micro.lengths.len(),
        })
    }
}

impl Ganpo {
    /// Freshly initialised discriminators for hidden states of this width, trained with `adamw`.
    pub(crate) fn new(
        settings: &GanpoSettings,
        features: usize,
        adamw: AdamWSettings,
        seed: Seed,
        device: &Device,
    ) -> Result<Self, LearnerError> {
        let shape = DiscriminatorShape {
            features,
            width: width(settings, features),
            heads: settings.heads,
            layers: settings.layers,
            length: settings.max_length,
        };
        let mut fresh = BTreeMap::new();
        for (side, name) in (0..).zip(SIDES) {
            for (part, tensor) in shape.initialise(seed.derive(side), device)? {
                fresh.insert(format!("{name}.{part}"), tensor);
            }
        }
        let mut spectral = SpectralNorm::default();
        for name in normalised_weights() {
            spectral.add(&name, &fresh[&name])?;
        }
        let (weights, vars) = Weights::of(fresh).trainable()?;
        Ok(Self {
            settings: settings.clone(),
            shape,
            weights,
            optimizer: Optimizer::new(vars, adamw)?,
            spectral,
            means: None,
            before: None,
        })
    }

    /// Whether the discriminators are trained at this step, counted from 0.
    pub(crate) fn trains_discriminators(&self, step: u64) -> bool {
        let is_due =
            step < self.settings.warmup_steps || step.is_multiple_of(self.settings.train_every);
        is_due && (self.settings.freeze_after == 0 || step < self.settings.freeze_after)
    }

    /// Whether the generator loss applies to the policy at this step.
    pub(crate) fn applies(&self, step: u64) -> bool {
        step >= self.settings.warmup_steps
    }

    /// λ.
    pub(crate) fn lambda(&self) -> f64 {
        self.settings.lambda
    }

    /// Trains both discriminators on all passes of a batch, at their share of the policy's learning rate. `None` if
    /// there is no label, or if loss or gradient are not finite; nothing has changed then.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub(crate) fn train(
        &mut self,
        passes: &[PassFeatures],
        learning_rate: f64,
    ) -> Result<Option<DiscriminatorMetrics>, LearnerError> {
        self.before = None;
        let mut rows = PreferenceRows::default();
        let mut completions = 0;
        for pass in passes {
            rows.extend(&pass.rows, completions);
            completions += pass.completions;
        }
        if rows.total() <= 0.0 {
            return Ok(None);
        }
        let before = self.save()?;
        // The policy's hidden states of all completions, then the reference's.
        let policy = passes.iter().map(|pass| &pass.policy);
        let features = Features::joined(policy.chain(passes.iter().map(|pass| &pass.reference)))?;
        for name in normalised_weights() {
            let weight = self.weights.get(&name)?;
            self.spectral.update(&name, &weight)?;
        }
        let metrics = self.step(&features, &rows, learning_rate)?;
        if metrics.is_none() {
            self.restore(&before)?;
        } else {
            self.before = Some(before);
        }
        Ok(metrics)
    }

    fn step(
        &mut self,
        features: &Features,
        rows: &PreferenceRows,
        learning_rate: f64,
    ) -> Result<Option<DiscriminatorMetrics>, LearnerError> {
        let weights = rows.shares(rows.total(), &self.weights.get("chosen.positions")?)?;
        let mut means = [Streams::default(); 2];
        let mut losses = Vec::new();
        let mut accuracy = 0.0;
        for (side, mean) in means.iter_mut().enumerate() {
            let scores = self.scores(side, features, rows)?;
            *mean = self.updated_means(side, &scores, &weights)?;
            losses.push(loss::discriminator(&scores, mean.wide(), &weights)?);
            accuracy += loss::accuracy(&scores, mean.wide(), &weights)? / 2.0;
        }
        let both = (&losses[0] + &losses[1])?;
        let loss = f64::from(both.to_scalar::<f32>()?) / 2.0;
        let mut gradients = Gradients::default();
        gradients.backward(&both)?;
        let norm = self.optimizer.norm(&gradients)?;
        if !loss.is_finite() || !norm.is_finite() {
            return Ok(None);
        }
        let learning_rate = learning_rate * self.settings.lr_ratio;
        self.optimizer.step(&gradients, norm, learning_rate)?;
        self.means = Some(means);
        Ok(Some(DiscriminatorMetrics { loss, accuracy }))
    }

    /// Scores of one discriminator for its three streams, in one batch. `features` holds the policy's hidden states of
    /// all completions, then the reference's.
    fn scores(
        &self,
        side: usize,
        features: &Features,
        rows: &PreferenceRows,
    ) -> Result<Streams<Tensor>, LearnerError> {
        let (own, opposite) = match side {
            0 => (&rows.chosen, &rows.rejected),
            _ => (&rows.rejected, &rows.chosen),
        };
        let offset = features.completions() / 2;
        let of_reference = |indices: &[usize]| -> Vec<usize> {
            indices.iter().map(|index| index + offset).collect()
        };
        let completions = [own.clone(), of_reference(own), of_reference(opposite)].concat();
        let stream = features.stream(&completions, self.settings.max_length)?;
        let scores = self.discriminator(side, &self.weights).score(&stream)?;
        let stream = |index: usize| scores.narrow(0, index * own.len(), own.len());
        Ok(Streams {
            policy: stream(0)?,
            reference: stream(1)?,
            opposite: stream(2)?,
        })
    }

    /// Running means after this batch; after the first they are its means.
    fn updated_means(
        &self,
        side: usize,
        scores: &Streams<Tensor>,
        weights: &Tensor,
    ) -> Result<Streams<f32>, LearnerError> {
        let momentum = self.settings.momentum as f32;
        let updated = |scores: &Tensor, before: fn(&Streams<f32>) -> f32| {
            let mean = (scores.detach() * weights)?.sum_all()?.to_scalar::<f32>()?;
            let before = self
                .means
                .as_ref()
                .map_or(mean, |means| before(&means[side]));
            Ok::<_, candle_core::Error>(momentum * before + (1.0 - momentum) * mean)
        };
        Ok(Streams {
            policy: updated(&scores.policy, |m| m.policy)?,
            reference: updated(&scores.reference, |m| m.reference)?,
            opposite: updated(&scores.opposite, |m| m.opposite)?,
        })
    }

    /// Contribution of a pass to the generator loss `L_adv = ½[BCE(D_c(π_c) − m(ref_c), 1) + BCE(D_r(π_r) − m(ref_r),
    /// 1)]`, a scalar with gradient in `hidden`, `[R, d]`, only. `total_weight` is the sum of the weights of all rows
    /// of the batch. `None` if the pass has no row, or before the discriminators' first step.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub(crate) fn generator_loss(
        &self,
        micro: &MicroBatch<'_>,
        hidden: &Tensor,
        total_weight: f64,
    ) -> Result<Option<Tensor>, LearnerError> {
        let rows = PreferenceRows::of(micro);
        let (Some(means), false) = (&self.means, rows.weights.is_empty()) else {
            return Ok(None);
        };
        let features = Features::new(hidden, &micro.lengths)?;
        let frozen = self.weights.detached();
        let weights = rows.shares(total_weight, &frozen.get("chosen.positions")?)?;
        let of = |side: usize, completions: &[usize]| -> Result<Tensor, LearnerError> {
            let stream: Stream = features.stream(completions, self.settings.max_length)?;
            let scores = self.discriminator(side, &frozen).score(&stream)?;
            let mean = f64::from(means[side].reference);
            Ok(loss::generator(&scores, mean, &weights)?)
        };
        let both = (of(0, &rows.chosen)? + of(1, &rows.rejected)?)?;
        Ok(Some((both * 0.5)?))
    }

    fn discriminator<'a>(&'a self, side: usize, weights: &'a Weights) -> Discriminator<'a> {
        Discriminator {
            name: SIDES[side],
            shape: self.shape,
            weights,
            spectral: &self.spectral,
        }
    }

    /// Undoes the discriminators' last step, because the policy's was not finite.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub(crate) fn undo(&mut self) -> Result<(), LearnerError> {
        match self.before.take() {
            Some(before) => self.restore(&before),
            None => Ok(()),
        }
    }

    /// Current state.
    ///
    /// # Errors
    /// If copying from the device fails.
    pub(crate) fn save(&self) -> Result<GanpoState, LearnerError> {
        let mut tensors = BTreeMap::new();
        for (name, _) in self.tensors() {
            tensors.insert(name.clone(), self.weights.get(&name)?);
        }
        tensors.extend(self.spectral.tensors());
        let device = tensors["chosen.positions"].device().clone();
        // NaN before the first batch.
        let unset = [Streams::<f32>::unset(); 2];
        let means = self.means.unwrap_or(unset).map(Streams::to_array).concat();
        tensors.insert(MEANS.into(), Tensor::new(means, &device)?);
        Ok(GanpoState {
            discriminators: Weights::of(tensors).to_blob()?,
            optimizer: self.optimizer.to_blob()?,
        })
    }

    /// Restores a state from [`Self::save`].
    ///
    /// # Errors
    /// If it is truncated or belongs to other discriminators.
    pub(crate) fn restore(&mut self, saved: &GanpoState) -> Result<(), LearnerError> {
        let mut expected = self.tensors();
        let vectors = self.spectral.tensors();
        expected.extend(vectors.map(|(name, tensor)| (name, tensor.dims().to_vec())));
        expected.push((MEANS.into(), vec![6]));
        let device = self.weights.get("chosen.positions")?.device().clone();
        let read =
            Weights::from_blob_with_shapes(&saved.discriminators, expected, DType::F32, &device)?;
        self.optimizer.restore(&saved.optimizer)?;
        self.optimizer.assign(&read)?;
        self.spectral.restore(|name| read.get(name))?;
        let values = read.get(MEANS)?.to_vec1::<f32>()?;
        let means = [
            Streams::from_slice(&values[..3]),
            Streams::from_slice(&values[3..]),
        ];
        self.means = values.iter().all(|mean| mean.is_finite()).then_some(means);
        Ok(())
    }

    /// Tensors of both discriminators: names and shapes.
    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let of_side = |side: &'static str| {
            let named = move |(name, shape)| (format!("{side}.{name}"), shape);
            self.shape.tensors().into_iter().map(named)
        };
        SIDES.into_iter().flat_map(of_side).collect()
    }
}

/// Sum of the weights of the rows of all passes.
pub(crate) fn total_weight<'a>(micros: impl IntoIterator<Item = &'a MicroBatch<'a>>) -> f64 {
    micros
        .into_iter()
        .map(|micro| PreferenceRows::of(micro).total())
        .sum()
}

impl Streams<f32> {
    fn unset() -> Self {
        Self::from_slice(&[f32::NAN; 3])
    }

    fn from_slice(values: &[f32]) -> Self {
        Self {
            policy: values[0],
            reference: values[1],
            opposite: values[2],
        }
    }

    fn to_array(self) -> [f32; 3] {
        [self.policy, self.reference, self.opposite]
    }

    fn wide(self) -> Streams<f64> {
        Streams {
            policy: f64::from(self.policy),
            reference: f64::from(self.reference),
            opposite: f64::from(self.opposite),
        }
    }
}

/// Names of the weights with spectral normalisation.
fn normalised_weights() -> impl Iterator<Item = String> {
    let of_side = |side: &'static str| {
        SPECTRAL
            .into_iter()
            .map(move |part| format!("{side}.{part}"))
    };
    SIDES.into_iter().flat_map(of_side)
}

/// Width of the discriminators: that of the settings, or a quarter of the policy's within bounds, as a multiple of the
/// number of heads. The paper's 512 is about a quarter of its smaller policy's width.
fn width(settings: &GanpoSettings, features: usize) -> usize {
    if settings.hidden_size > 0 {
        return settings.hidden_size;
    }
    let heads = settings.heads;
    let scaled = (features / 4).clamp(MIN_WIDTH.min(features), MAX_WIDTH);
    (scaled / heads).max(1) * heads
}
