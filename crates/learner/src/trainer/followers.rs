//! Models that follow the policy in training: its reference and its moving average.
//!
//! Promises that they change only after an applied step, and that checkpoints hold them whole. A reference has a
//! version: the learner's step after which it last changed. Does not know who samples from them.

use std::{fs, path::Path};

use model::{
    LanguageModel, ModelError, MovingAverage, Optimizer, Precision, PublishedForm, PublishedWeights,
};
use serde::{Deserialize, Serialize};
use settings::ReferenceSettings;
use telemetry::Measurements;

use crate::error::LearnerError;

/// File of a moved reference's trained weights in a checkpoint.
const REFERENCE: &str = "reference.safetensors";
/// File of the trained weights of the reference before it became a copy of the checkpoint's policy.
const EARLIER_REFERENCE: &str = "earlier_reference.safetensors";
/// File of the references' versions.
const REFERENCE_STATE: &str = "reference.json";
/// File of the moving average in a checkpoint.
const AVERAGE: &str = "average.safetensors";

/// Purpose for which weights are published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Publication {
    /// To sample training pairs: the policy, and the reference once it has moved.
    Training,
    /// To be evaluated too: with the moving average, if there is one.
    Evaluation,
}

/// The reference and the moving average of a policy in training.
pub(crate) struct Followers {
    reference: Reference,
    average: Option<MovingAverage>,
}

/// The reference, evaluated on the same batch with the same kernels in the same precision as the policy, so that
/// log π − log ref is exactly 0 for equal weights, whatever the actors computed.
struct Reference {
    model: LanguageModel,
    /// The reference at the start of the run.
    start: LanguageModel,
    rule: ReferenceRule,
    precision: Precision,
    state: ReferenceState,
    /// The reference before it became a copy of the policy, with which the last step's pairs were compared and an
    /// evaluation after that step is; `None` if the last step did not copy.
    earlier: Option<EarlierReference>,
    /// First step whose published weights are certain to have come with this reference; `None`: the next step.
    since: Option<u64>,
}

/// A reference that was replaced by a copy of the policy.
struct EarlierReference {
    /// `None`: the reference of the start.
    model: Option<LanguageModel>,
    /// Learner's step after which it had last changed; 0: it is the one of the start.
    version: u64,
}

/// Update rule of the reference.
enum ReferenceRule {
    Fixed,
    /// A copy of the policy, at this interval in applied steps.
    Every(u64),
    Ema(Box<MovingAverage>),
}

/// State of a reference in a checkpoint, besides its weights.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
struct ReferenceState {
    /// Learner's step after which it last changed; 0: it is the one of the start.
    version: u64,
    /// Version of the reference before it, if it is a copy of the checkpoint's policy.
    #[serde(default)]
    earlier: Option<u64>,
}

impl Followers {
    /// The followers of `policy` before its first step: a fixed reference, the policy without its adapter; and an
    /// average with this decay, unless that is 0.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub(crate) fn new(
        policy: &LanguageModel,
        precision: Precision,
        ema_decay: f64,
    ) -> Result<Self, LearnerError> {
        let start = policy.without_adapter().with_precision(precision);
        let average = (ema_decay > 0.0).then(|| MovingAverage::new(policy, ema_decay));
        Ok(Self {
            reference: Reference {
                model: start.clone(),
                start,
                rule: ReferenceRule::Fixed,
                precision,
                state: ReferenceState::default(),
                earlier: None,
                since: Some(0),
            },
            average: average.transpose()?,
        })
    }

    /// Takes `start` as the reference at the start of the run, before the rule of its updates is set.
    pub(crate) fn set_start(&mut self, start: &LanguageModel) {
        let start = start.with_precision(self.reference.precision);
        self.reference.model = start.clone();
        self.reference.start = start;
    }

    /// Lets the reference move as the settings say.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub(crate) fn set_rule(
        &mut self,
        settings: ReferenceSettings,
        policy: &LanguageModel,
    ) -> Result<(), LearnerError> {
        self.reference.rule = match settings {
            ReferenceSettings::Fixed {} => ReferenceRule::Fixed,
            ReferenceSettings::Every { every_steps } => ReferenceRule::Every(every_steps),
            ReferenceSettings::Ema { decay } => {
                let initial = self.reference.initial(policy)?;
                ReferenceRule::Ema(Box::new(MovingAverage::new(&initial, decay)?))
            }
        };
        Ok(())
    }

    /// Whether the reference follows the policy.
    pub(crate) fn moves(&self) -> bool {
        !matches!(self.reference.rule, ReferenceRule::Fixed)
    }

    /// The current reference.
    pub(crate) fn reference(&self) -> &LanguageModel {
        &self.reference.model
    }

    /// First step of the weights under whose reference, the current one, the actors recorded log-probabilities, as step
    /// `step` begins. Those of older weights may be of another reference.
    pub(crate) fn recorded_since(&mut self, step: u64) -> u64 {
        *self.reference.since.get_or_insert(step)
    }

    /// Follows the policy after an applied step, with which the learner's step is `step`.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub(crate) fn follow(
        &mut self,
        policy: &LanguageModel,
        optimizer: &Optimizer,
        step: u64,
    ) -> Result<(), LearnerError> {
        if let Some(average) = &mut self.average {
            average.update(optimizer)?;
        }
        if self.reference.follow(policy, optimizer)? {
            self.reference.state.version = step;
            self.reference.since = Some(step);
        }
        Ok(())
    }

    /// The weights to publish, in this form: the policy's, and those that go with them. Those that change in place are
    /// copied.
    ///
    /// # Errors
    /// If copying fails.
    pub(crate) fn publish(
        &self,
        policy: &LanguageModel,
        form: PublishedForm,
        publication: Publication,
    ) -> Result<PublishedWeights, LearnerError> {
        let reference = &self.reference;
        let is_evaluated = publication == Publication::Evaluation;
        let average = self.average.as_ref().filter(|_| is_evaluated);
        let earlier = reference.earlier.as_ref().filter(|_| is_evaluated);
        let earlier = earlier.and_then(|earlier| earlier.model.as_ref());
        let as_it_is = |model: &LanguageModel| match form {
            PublishedForm::Tensors(dtype) => model.trained().to_dtype(dtype),
            PublishedForm::Packed(_) => model.copied(form),
        };
        let moved = reference.has_moved().then_some(&reference.model);
        let moved = moved.map(|model| match reference.rule {
            ReferenceRule::Ema(_) => model.copied(form),
            ReferenceRule::Fixed | ReferenceRule::Every(_) => as_it_is(model),
        });
        Ok(PublishedWeights {
            policy: policy.copied(form)?,
            reference: moved.transpose()?,
            earlier_reference: earlier.map(as_it_is).transpose()?,
            average: average
                .map(|average| average.model().copied(form))
                .transpose()?,
        })
    }

    /// Version of the reference that an evaluation compares with, that of the last step's pairs; `None` if it is the one of
    /// the start.
    pub(crate) fn evaluated_reference(&self) -> Option<u64> {
        match &self.reference.earlier {
            Some(earlier) => Some(earlier.version).filter(|&version| version > 0),
            None => self.moved_at(),
        }
    }

    /// Version of the reference; `None` if it is the one of the start.
    pub(crate) fn moved_at(&self) -> Option<u64> {
        let version = self.reference.state.version;
        self.reference.has_moved().then_some(version)
    }

    /// Whether there is a moving average of the policy.
    pub(crate) fn has_average(&self) -> bool {
        self.average.is_some()
    }

    /// The version of a reference that moves.
    pub(crate) fn add_metrics(&self, m: &mut Measurements) {
        if !matches!(self.reference.rule, ReferenceRule::Fixed) {
            m.set("reference/version", self.reference.state.version as f64);
        }
    }

    /// Files of a checkpoint: names and contents.
    ///
    /// # Errors
    /// If copying fails.
    pub(crate) fn files(&self) -> Result<Vec<(&'static str, Vec<u8>)>, LearnerError> {
        let mut files = Vec::new();
        if self.reference.has_moved() {
            files.push((REFERENCE, self.reference.to_blob()?));
            let earlier = self.reference.earlier.as_ref();
            let state = ReferenceState {
                earlier: earlier.map(|earlier| earlier.version),
                ..self.reference.state
            };
            let state = serde_json::json!(state).to_string();
            files.push((REFERENCE_STATE, state.into_bytes()));
            if let Some(model) = earlier.and_then(|earlier| earlier.model.as_ref()) {
                files.push((EARLIER_REFERENCE, model.trained().to_blob()?));
            }
        }
        if let Some(average) = &self.average {
            files.push((AVERAGE, average.to_blob()?));
        }
        Ok(files)
    }

    /// Restores the files of a checkpoint, after the weights of `policy`. A checkpoint without them is of a run that
    /// had no average, or whose reference had not moved: the average begins at the policy's weights, the reference at
    /// the start.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub(crate) fn restore(
        &mut self,
        checkpoint: &Path,
        policy: &LanguageModel,
    ) -> Result<(), LearnerError> {
        self.reference.restore(checkpoint, policy)?;
        let Some(average) = &mut self.average else {
            return Ok(());
        };
        match read(checkpoint, AVERAGE)? {
            Some(blob) => average
                .restore(&blob)
                .map_err(|error| broken(checkpoint, AVERAGE, &error)),
            None => {
                tracing::info!(
                    "learner.ema_decay: the average begins at the weights of this checkpoint"
                );
                Ok(average.restart(policy)?)
            }
        }
    }
}

impl Reference {
    fn has_moved(&self) -> bool {
        self.state.version > 0
    }

    /// The reference of the start as a model with the trained weights of `policy`: an adapter that changes nothing, or
    /// the start itself.
    fn initial(&self, policy: &LanguageModel) -> Result<LanguageModel, LearnerError> {
        match policy.adapter() {
            Some(_) => Ok(policy.with_neutral_adapter()?),
            None => Ok(self.start.clone()),
        }
    }

    /// Follows the policy after an applied step; returns whether it has changed.
    fn follow(
        &mut self,
        policy: &LanguageModel,
        optimizer: &Optimizer,
    ) -> Result<bool, LearnerError> {
        self.earlier = None;
        let has_moved = self.has_moved();
        match &mut self.rule {
            ReferenceRule::Fixed => return Ok(false),
            ReferenceRule::Every(interval) => {
                if !optimizer.steps().is_multiple_of(*interval) {
                    return Ok(false);
                }
                let copy = policy.snapshot()?.with_precision(self.precision);
                let before = std::mem::replace(&mut self.model, copy);
                self.earlier = Some(EarlierReference {
                    model: has_moved.then_some(before),
                    version: self.state.version,
                });
            }
            ReferenceRule::Ema(average) => {
                average.update(optimizer)?;
                self.model = average.model().with_precision(self.precision);
            }
        }
        Ok(true)
    }

    /// Trained weights of a moved reference, as exactly as it is kept.
    fn to_blob(&self) -> Result<Vec<u8>, LearnerError> {
        Ok(match &self.rule {
            ReferenceRule::Ema(average) => average.to_blob()?,
            _ => self.model.trained().to_blob()?,
        })
    }

    fn restore(&mut self, checkpoint: &Path, policy: &LanguageModel) -> Result<(), LearnerError> {
        if matches!(self.rule, ReferenceRule::Fixed) {
            return Ok(());
        }
        let initial = self.initial(policy)?;
        let state = read(checkpoint, REFERENCE_STATE)?;
        let state = state
            .map(|bytes| serde_json::from_slice(&bytes))
            .transpose();
        self.state = state
            .map_err(|error| broken(checkpoint, REFERENCE_STATE, &error))?
            .unwrap_or_default();
        self.since = None;
        self.earlier = self.restored_earlier(checkpoint, policy)?;
        let blob = match self.has_moved() {
            true => read(checkpoint, REFERENCE)?,
            false => None,
        };
        let defect = |error: ModelError| broken(checkpoint, REFERENCE, &error);
        let Some(blob) = blob else {
            self.model = self.start.clone();
            self.state = ReferenceState::default();
            return match &mut self.rule {
                ReferenceRule::Ema(average) => Ok(average.restart(&initial)?),
                _ => Ok(()),
            };
        };
        let model = match &mut self.rule {
            ReferenceRule::Ema(average) => {
                average.restore(&blob).map_err(defect)?;
                average.model().clone()
            }
            _ => policy.with_blob(&blob).map_err(defect)?,
        };
        self.model = model.with_precision(self.precision);
        Ok(())
    }

    /// The reference before the current one, if the checkpoint has it.
    fn restored_earlier(
        &self,
        checkpoint: &Path,
        policy: &LanguageModel,
    ) -> Result<Option<EarlierReference>, LearnerError> {
        let Some(version) = self.state.earlier else {
            return Ok(None);
        };
        let model = match version {
            0 => None,
            _ => match read_model(checkpoint, EARLIER_REFERENCE, policy)? {
                None => return Err(broken(checkpoint, EARLIER_REFERENCE, &"it is missing")),
                found => found,
            },
        };
        let model = model.map(|model| model.with_precision(self.precision));
        Ok(Some(EarlierReference { model, version }))
    }
}

/// The moving average in a checkpoint, as a model like `policy`; `None` if the run had none.
///
/// # Errors
/// If it cannot be read or belongs to another model.
pub fn checkpoint_average(
    checkpoint: &Path,
    policy: &LanguageModel,
) -> Result<Option<LanguageModel>, LearnerError> {
    read_model(checkpoint, AVERAGE, policy)
}

/// The reference in a checkpoint, as a model like `policy`; `None` if it had not moved since the start of the run.
///
/// # Errors
/// If it cannot be read or belongs to another model.
pub fn checkpoint_reference(
    checkpoint: &Path,
    policy: &LanguageModel,
) -> Result<Option<LanguageModel>, LearnerError> {
    read_model(checkpoint, REFERENCE, policy)
}

fn read_model(
    checkpoint: &Path,
    name: &str,
    policy: &LanguageModel,
) -> Result<Option<LanguageModel>, LearnerError> {
    let blob = read(checkpoint, name)?;
    let model = blob.map(|blob| policy.with_blob(&blob));
    model
        .transpose()
        .map_err(|error| broken(checkpoint, name, &error))
}

/// Contents of a file of a checkpoint; `None` if it has none of that name.
fn read(checkpoint: &Path, name: &str) -> Result<Option<Vec<u8>>, LearnerError> {
    let path = checkpoint.join(name);
    match telemetry::wait_for_descriptor(|| fs::read(&path)) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(LearnerError::Unreadable { path, source }),
    }
}

fn broken(checkpoint: &Path, name: &str, reason: &dyn std::fmt::Display) -> LearnerError {
    LearnerError::Checkpoint {
        path: checkpoint.join(name),
        reason: reason.to_string(),
    }
}
