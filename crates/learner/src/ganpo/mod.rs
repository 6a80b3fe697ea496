//! GANPO: a latent-space regulariser beside any pair objective.
//!
//! Two discriminators read the final hidden states of responses, one of the chosen and one of the
//! rejected, and learn to tell the policy's from the reference's. The policy is paid for passing as its
//! reference. Hidden states are those that response tokens are predicted from; prompts and padding are
//! never seen. Promises: the discriminators' step leaves no gradient in the policy, the policy's none in
//! them; a step of the learner that is refused takes the discriminators back too; and what is saved
//! restores the game to the last bit. Which objective it stands beside it does not know.

mod discriminator;
mod features;
mod loss;
mod spectral;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};
use messages::Seed;
use model::{AdamWSettings, Device, Gradients, Optimizer, Weights};
use settings::GanpoSettings;

use crate::{LearnerError, batch::MicroBatch};
use discriminator::{Discriminator, SPECTRAL, Shape};
use features::{Features, Rows, Stream};
use loss::Streams;
use spectral::Spectral;

/// The widest discriminator, that of the paper.
const WIDEST: usize = 512;
/// The narrowest, beside a policy that is not narrower still.
const NARROWEST: usize = 32;
/// The two discriminators, in the order of everything that is per side.
const SIDES: [&str; 2] = ["chosen", "rejected"];
/// Where the running means lie among the saved tensors.
const MEANS: &str = "means";

/// Both discriminators and everything that moves them.
pub(crate) struct Ganpo {
    settings: GanpoSettings,
    shape: Shape,
    weights: Weights,
    optimizer: Optimizer,
    spectral: Spectral,
    /// The running means of each discriminator's scores; `None` before the first batch.
    means: Option<[Streams<f32>; 2]>,
    /// What was saved before the discriminators' last step.
    before: Option<Saved>,
}

/// The state of the game, as two safetensors files.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Saved {
    /// Weights, singular vectors and means.
    pub(crate) players: Vec<u8>,
    /// Adam's state.
    pub(crate) optimizer: Vec<u8>,
}

/// The hidden states of a pass, of policy and reference, and what was preferred to what.
pub(crate) struct Observed {
    policy: Features,
    reference: Features,
    rows: Rows,
    completions: usize,
}

/// What the discriminators' step was.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Told {
    /// Their loss, the mean of both.
    pub(crate) loss: f64,
    /// The share of responses they told rightly before the step.
    pub(crate) accuracy: f64,
}

impl Observed {
    /// Of hidden states `[R, d]` of the completions of `micro`, in their order.
    pub(crate) fn new(
        micro: &MicroBatch<'_>,
        policy: &Tensor,
        reference: &Tensor,
    ) -> Result<Self, LearnerError> {
        Ok(Self {
            policy: Features::new(&policy.detach(), &micro.lengths)?,
            reference: Features::new(&reference.detach(), &micro.lengths)?,
            rows: Rows::of(micro),
            completions: micro.lengths.len(),
        })
    }
}

impl Ganpo {
    /// Fresh discriminators for hidden states of this width. They are trained with `adamw`.
    pub(crate) fn new(
        settings: &GanpoSettings,
        features: usize,
        adamw: AdamWSettings,
        (seed, device): (Seed, &Device),
    ) -> Result<Self, LearnerError> {
        let shape = Shape {
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
        let mut spectral = Spectral::default();
        for name in followed() {
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

    /// Whether the discriminators learn at this step, counted from 0.
    pub(crate) fn learns(&self, step: u64) -> bool {
        self.settings.freeze_after == 0 || step < self.settings.freeze_after
    }

    /// Whether the policy feels the game at this step.
    pub(crate) fn is_felt(&self, step: u64) -> bool {
        step >= self.settings.warmup_steps
    }

    /// λ.
    pub(crate) fn lambda(&self) -> f64 {
        self.settings.lambda
    }

    /// One step of both discriminators on all passes of a batch, at their share of the policy's learning
    /// rate. `None` when there is no label, or when loss or gradient are not finite; nothing has changed
    /// then.
    pub(crate) fn learn(
        &mut self,
        observed: &[Observed],
        learning_rate: f64,
    ) -> Result<Option<Told>, LearnerError> {
        self.before = None;
        let mut rows = Rows::default();
        let mut completions = 0;
        for pass in observed {
            rows.extend(&pass.rows, completions);
            completions += pass.completions;
        }
        if rows.total() <= 0.0 {
            return Ok(None);
        }
        let before = self.save()?;
        // The policy's completions, then the reference's hidden states of the same.
        let policy = observed.iter().map(|pass| &pass.policy);
        let seen = Features::joined(policy.chain(observed.iter().map(|pass| &pass.reference)))?;
        for name in followed() {
            let weight = self.weights.get(&name)?;
            self.spectral.follow(&name, &weight)?;
        }
        let told = self.step(&seen, &rows, learning_rate)?;
        if told.is_none() {
            self.restore(&before)?;
        } else {
            self.before = Some(before);
        }
        Ok(told)
    }

    fn step(
        &mut self,
        seen: &Features,
        rows: &Rows,
        learning_rate: f64,
    ) -> Result<Option<Told>, LearnerError> {
        let weights = rows.shares(rows.total(), &self.weights.get("chosen.positions")?)?;
        let mut means = [Streams::default(); 2];
        let mut losses = Vec::new();
        let mut accuracy = 0.0;
        for (side, mean) in means.iter_mut().enumerate() {
            let scores = self.scores(side, seen, rows)?;
            *mean = self.moved_means(side, &scores, &weights)?;
            losses.push(loss::discriminator(&scores, mean.wide(), &weights)?);
            accuracy += loss::accuracy(&scores, mean.wide(), &weights)? / 2.0;
        }
        let both = (&losses[0] + &losses[1])?;
        let loss = f64::from(both.to_scalar::<f32>()?) / 2.0;
        let mut gradients = Gradients::default();
        gradients.add(&both)?;
        let norm = self.optimizer.norm(&gradients)?;
        if !loss.is_finite() || !norm.is_finite() {
            return Ok(None);
        }
        let learning_rate = learning_rate * self.settings.lr_ratio;
        self.optimizer.step(&gradients, norm, learning_rate)?;
        self.means = Some(means);
        Ok(Some(Told { loss, accuracy }))
    }

    /// What one discriminator says of its three streams, all read together. `seen` holds the policy's
    /// hidden states of all completions, then the reference's.
    fn scores(
        &self,
        side: usize,
        seen: &Features,
        rows: &Rows,
    ) -> Result<Streams<Tensor>, LearnerError> {
        let (own, opposite) = match side {
            0 => (&rows.chosen, &rows.rejected),
            _ => (&rows.rejected, &rows.chosen),
        };
        let of_reference = seen.completions() / 2;
        let moved = |indices: &[usize]| -> Vec<usize> {
            indices.iter().map(|index| index + of_reference).collect()
        };
        let completions = [own.clone(), moved(own), moved(opposite)].concat();
        let stream = seen.stream(&completions, self.settings.max_length)?;
        let scores = self.discriminator(side, &self.weights).score(&stream)?;
        let part = |index: usize| scores.narrow(0, index * own.len(), own.len());
        Ok(Streams {
            policy: part(0)?,
            reference: part(1)?,
            opposite: part(2)?,
        })
    }

    /// The running means after this batch; the first batch's are its own.
    fn moved_means(
        &self,
        side: usize,
        scores: &Streams<Tensor>,
        weights: &Tensor,
    ) -> Result<Streams<f32>, LearnerError> {
        let momentum = self.settings.momentum as f32;
        let moved = |scores: &Tensor, before: fn(&Streams<f32>) -> f32| {
            let mean = (scores.detach() * weights)?.sum_all()?.to_scalar::<f32>()?;
            let before = self
                .means
                .as_ref()
                .map_or(mean, |means| before(&means[side]));
            Ok::<_, candle_core::Error>(momentum * before + (1.0 - momentum) * mean)
        };
        Ok(Streams {
            policy: moved(&scores.policy, |m| m.policy)?,
            reference: moved(&scores.reference, |m| m.reference)?,
            opposite: moved(&scores.opposite, |m| m.opposite)?,
        })
    }

    /// The pass's share of `L_adv = ½[BCE(D_c(π_c) − m(ref_c), 1) + BCE(D_r(π_r) − m(ref_r), 1)]`, a
    /// scalar with gradient in `hidden`, `[R, d]`, alone. `total` is what all rows of the batch count.
    /// `None` when the pass has no row, or the discriminators have seen nothing yet.
    pub(crate) fn term(
        &self,
        micro: &MicroBatch<'_>,
        hidden: &Tensor,
        total: f64,
    ) -> Result<Option<Tensor>, LearnerError> {
        let rows = Rows::of(micro);
        let (Some(means), false) = (&self.means, rows.weights.is_empty()) else {
            return Ok(None);
        };
        let features = Features::new(hidden, &micro.lengths)?;
        let frozen = self.weights.detached();
        let weights = rows.shares(total, &frozen.get("chosen.positions")?)?;
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

    /// Takes the discriminators back to before their last step, because the policy's was refused.
    pub(crate) fn undo(&mut self) -> Result<(), LearnerError> {
        match self.before.take() {
            Some(before) => self.restore(&before),
            None => Ok(()),
        }
    }

    /// The state of the game.
    pub(crate) fn save(&self) -> Result<Saved, LearnerError> {
        let mut tensors = BTreeMap::new();
        for (name, _) in self.tensors() {
            tensors.insert(name.clone(), self.weights.get(&name)?);
        }
        tensors.extend(self.spectral.tensors());
        let device = tensors["chosen.positions"].device().clone();
        // Not a number: no batch yet.
        let unset = [Streams::<f32>::unset(); 2];
        let means = self.means.unwrap_or(unset).map(Streams::numbers).concat();
        tensors.insert(MEANS.into(), Tensor::new(means, &device)?);
        Ok(Saved {
            players: Weights::of(tensors).to_blob()?,
            optimizer: self.optimizer.to_blob()?,
        })
    }

    /// Goes back to what [`Self::save`] gave.
    ///
    /// # Errors
    /// When it is torn or belongs to other discriminators.
    pub(crate) fn restore(&mut self, saved: &Saved) -> Result<(), LearnerError> {
        let mut expected = self.tensors();
        let vectors = self.spectral.tensors();
        expected.extend(vectors.map(|(name, tensor)| (name, tensor.dims().to_vec())));
        expected.push((MEANS.into(), vec![6]));
        let device = self.weights.get("chosen.positions")?.device().clone();
        let read = Weights::from_blob_of(&saved.players, expected, DType::F32, &device)?;
        self.optimizer.restore(&saved.optimizer)?;
        self.optimizer.assign(&read)?;
        self.spectral.restore(|name| read.get(name))?;
        let numbers = read.get(MEANS)?.to_vec1::<f32>()?;
        let means = [Streams::of(&numbers[..3]), Streams::of(&numbers[3..])];
        self.means = numbers.iter().all(|mean| mean.is_finite()).then_some(means);
        Ok(())
    }

    /// The tensors of both discriminators: names and shapes.
    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let of_side = |side: &'static str| {
            let named = move |(name, shape)| (format!("{side}.{name}"), shape);
            self.shape.tensors().into_iter().map(named)
        };
        SIDES.into_iter().flat_map(of_side).collect()
    }
}

/// What the rows of all passes count together.
pub(crate) fn total<'a>(micros: impl IntoIterator<Item = &'a MicroBatch<'a>>) -> f64 {
    micros
        .into_iter()
        .map(|micro| Rows::of(micro).total())
        .sum()
}

impl Streams<f32> {
    fn unset() -> Self {
        Self::of(&[f32::NAN; 3])
    }

    fn of(numbers: &[f32]) -> Self {
        Self {
            policy: numbers[0],
            reference: numbers[1],
            opposite: numbers[2],
        }
    }

    fn numbers(self) -> [f32; 3] {
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

/// The weights that are spectrally normed.
fn followed() -> impl Iterator<Item = String> {
    let of_side = |side: &'static str| {
        SPECTRAL
            .into_iter()
            .map(move |part| format!("{side}.{part}"))
    };
    SIDES.into_iter().flat_map(of_side)
}

/// The discriminators' width: that of the settings, or a quarter of the policy's, as the paper's 512 is
/// about a quarter of its smaller policy's, within bounds and a multiple of the heads.
fn width(settings: &GanpoSettings, features: usize) -> usize {
    if settings.hidden_size > 0 {
        return settings.hidden_size;
    }
    let heads = settings.heads;
    let scaled = (features / 4).clamp(NARROWEST.min(features), WIDEST);
    (scaled / heads).max(1) * heads
}
