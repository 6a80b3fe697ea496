//! Models that a sampler samples from: which policy, and which reference.
//!
//! Training, and evaluations of a run whose reference has not moved, all use the same two. Does not know when a sampler
//! may change its models.

use messages::Purpose;
use model::{LanguageModel, ModelError, Published, PublishedWeights};

/// A policy and a reference among the models that an actor holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ModelSelection {
    /// The policy and the current reference.
    Current,
    /// The policy and the reference with which the run began.
    AgainstStart,
    /// The policy and the reference before it became a copy of this policy; the current one if it did not.
    AgainstEarlier,
    /// The moving average of the policy and the reference with which the run began.
    AverageAgainstStart,
}

impl ModelSelection {
    /// The models that answer prompts of this purpose, where the reference has moved since the start of the run or not.
    pub(crate) fn of(purpose: Purpose, reference_has_moved: bool) -> Self {
        match purpose {
            Purpose::EvaluateAverage => Self::AverageAgainstStart,
            Purpose::Evaluate if reference_has_moved => Self::AgainstStart,
            Purpose::EvaluateReference => Self::AgainstEarlier,
            _ => Self::Current,
        }
    }
}

/// Models of an actor: those of the loaded weights, and the reference with which the run began.
#[derive(Debug)]
pub(crate) struct LoadedModels {
    published: Published<LanguageModel>,
    start: LanguageModel,
}

impl LoadedModels {
    /// The models of a run's start: the policy, whose reference is the same without an adapter.
    pub(crate) fn at_start(policy: LanguageModel) -> Self {
        let start = policy.without_adapter();
        let published = Published::alone(policy);
        Self { published, start }
    }

    /// Replaces the models by those of published weights.
    ///
    /// # Errors
    /// If the weights do not match the model.
    pub(crate) fn load(&mut self, weights: &PublishedWeights) -> Result<(), ModelError> {
        self.published = self.published.policy.with_published(weights)?;
        Ok(())
    }

    /// Whether the reference has moved since the start of the run.
    pub(crate) fn reference_has_moved(&self) -> bool {
        self.published.reference.is_some()
    }

    /// The policy of a selection; `None` if it was not published with the loaded weights.
    pub(crate) fn policy(&self, selection: ModelSelection) -> Option<&LanguageModel> {
        match selection {
            ModelSelection::AverageAgainstStart => self.published.average.as_ref(),
            ModelSelection::Current
            | ModelSelection::AgainstStart
            | ModelSelection::AgainstEarlier => Some(&self.published.policy),
        }
    }

    /// The reference of a selection; `None` for that of the start.
    pub(crate) fn moved_reference(&self, selection: ModelSelection) -> Option<&LanguageModel> {
        let reference = self.published.reference.as_ref();
        match selection {
            ModelSelection::Current => reference,
            ModelSelection::AgainstEarlier => {
                self.published.earlier_reference.as_ref().or(reference)
            }
            ModelSelection::AgainstStart | ModelSelection::AverageAgainstStart => None,
        }
    }

    /// The reference with which the run began.
    pub(crate) fn start(&self) -> &LanguageModel {
        &self.start
    }
}
