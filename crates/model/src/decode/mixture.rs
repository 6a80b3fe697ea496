//! Policy and reference, decoded side by side.
//!
//! On the CPU, a policy that is its reference with an adapter shares one decoder with it: every product with the frozen
//! weights is computed once for the rows of both, so that the weights are read once in a step.

use crate::{
    decode::{Decoder, Logits, Precision, Prefill},
    error::ModelError,
    transformer::LanguageModel,
};

/// Decoders of a policy and of its reference.
pub(crate) enum MixtureDecoder {
    /// The policy is its own reference.
    Alone(Decoder),
    /// Models with weights of their own.
    Separate { policy: Decoder, reference: Decoder },
    /// Models that share their weights: slots of the policy, then as many of the reference.
    Shared { both: Decoder, slots: usize },
}

/// Rows of next-token logits of the policy and the reference.
pub(crate) struct MixtureLogits {
    policy: Logits,
    reference: ReferenceLogits,
}

/// The reference's rows.
enum ReferenceLogits {
    /// Those of the policy.
    Policy,
    /// Rows of their own.
    Own(Logits),
    /// Rows from this one on, below the policy's.
    From(usize),
}

/// Slots and capacity of a decoder for two models.
#[derive(Clone, Copy)]
pub(crate) struct SlotLimits {
    /// Number of slots of each model.
    pub(crate) slots: usize,
    /// Tokens in a slot.
    pub(crate) capacity: usize,
}

impl MixtureLogits {
    /// The policy's logits of row `index`, one per token of the vocabulary.
    pub(crate) fn policy(&self, index: usize) -> &[f32] {
        self.policy.row(index)
    }

    /// The reference's logits of row `index`; the same slice where the policy is its own reference.
    pub(crate) fn reference(&self, index: usize) -> &[f32] {
        match &self.reference {
            ReferenceLogits::Policy => self.policy.row(index),
            ReferenceLogits::Own(logits) => logits.row(index),
            ReferenceLogits::From(first) => self.policy.row(first + index),
        }
    }

    /// Vocabulary size.
    pub(crate) fn width(&self) -> usize {
        self.policy.width()
    }
}

impl MixtureDecoder {
    /// Decoders with empty slots; without a reference the policy is its own.
    ///
    /// # Errors
    /// When the device cannot hold them.
    pub(crate) fn new(
        policy: LanguageModel,
        reference: Option<LanguageModel>,
        precision: Precision,
        SlotLimits { slots, capacity }: SlotLimits,
    ) -> Result<Self, ModelError> {
        let decoder = |model| Decoder::new(model, precision, slots, capacity);
        Ok(match reference {
            None => Self::Alone(decoder(policy)?),
            Some(reference) if policy.shares_weights(&reference) => {
                let both = Decoder::shared([policy, reference], precision, slots, capacity)?;
                Self::Shared { both, slots }
            }
            Some(reference) => Self::Separate {
                policy: decoder(policy)?,
                reference: decoder(reference)?,
            },
        })
    }

    /// The policy.
    pub(crate) fn policy(&self) -> &LanguageModel {
        match self {
            Self::Alone(policy) | Self::Separate { policy, .. } => policy.model(),
            Self::Shared { both, .. } => both.model(),
        }
    }

    /// The reference; `None` where the policy is its own.
    fn reference(&self) -> Option<&LanguageModel> {
        match self {
            Self::Alone(_) => None,
            Self::Separate { reference, .. } => Some(reference.model()),
            Self::Shared { both, .. } => both.models.get(1),
        }
    }

    /// Replaces the policy, stores both models in `precision` and empties all slots.
    ///
    /// # Errors
    /// When the device cannot hold them.
    pub(crate) fn set_policy(
        &mut self,
        policy: LanguageModel,
        precision: Precision,
    ) -> Result<(), ModelError> {
        let reference = self.reference().cloned();
        self.set_models(policy, reference, precision)
    }

    /// Replaces the reference, stores both models in `precision` and empties all slots.
    ///
    /// # Errors
    /// When the policy is its own reference, or the device cannot hold them.
    pub(crate) fn set_reference(
        &mut self,
        reference: LanguageModel,
        precision: Precision,
    ) -> Result<(), ModelError> {
        if self.reference().is_none() {
            let reason = "replace the reference: the policy is its own";
            return Err(ModelError::Engine(reason.into()));
        }
        self.set_models(self.policy().clone(), Some(reference), precision)
    }

    /// Replaces both models. Decoders of another kind are made where the models begin or cease to share their weights.
    fn set_models(
        &mut self,
        policy: LanguageModel,
        reference: Option<LanguageModel>,
        precision: Precision,
    ) -> Result<(), ModelError> {
        let limits = self.limits();
        match (&mut *self, reference) {
            (Self::Alone(decoder), None) => decoder.set_model(policy, precision),
            (Self::Shared { both, .. }, Some(reference)) if policy.shares_weights(&reference) => {
                both.set_models(vec![policy, reference], precision)
            }
            (
                Self::Separate {
                    policy: own,
                    reference: other,
                },
                Some(reference),
            ) if !policy.shares_weights(&reference) => {
                own.set_model(policy, precision)?;
                let is_same = other.model().weights().are_shared_with(reference.weights());
                match is_same && reference.adapter().is_none() && other.model().adapter().is_none()
                {
                    true => other.set_precision(precision),
                    false => other.set_model(reference, precision),
                }
            }
            (_, reference) => {
                *self = Self::new(policy, reference, precision, limits)?;
                Ok(())
            }
        }
    }

    fn limits(&self) -> SlotLimits {
        let (decoder, slots) = match self {
            Self::Alone(policy) | Self::Separate { policy, .. } => (policy, policy.lengths.len()),
            Self::Shared { both, slots } => (both, *slots),
        };
        SlotLimits {
            slots,
            capacity: decoder.capacity,
        }
    }

    /// [`Decoder::prefill`] of both models.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn prefill(&mut self, prompts: &[Prefill<'_>]) -> Result<MixtureLogits, ModelError> {
        if let Self::Shared { both, slots } = self {
            let slots_of = |first: usize| {
                let moved = move |prompt: &Prefill<'_>| -> Vec<usize> {
                    prompt.slots.iter().map(|slot| first + slot).collect()
                };
                prompts.iter().map(moved)
            };
            let all: Vec<Vec<usize>> = slots_of(0).chain(slots_of(*slots)).collect();
            let twice = prompts.iter().chain(prompts).zip(&all);
            let twice: Vec<Prefill<'_>> = twice
                .map(|(prompt, slots)| Prefill {
                    ids: prompt.ids,
                    slots,
                })
                .collect();
            return Ok(MixtureLogits::stacked(both.prefill(&twice)?, prompts.len()));
        }
        self.each(|decoder| decoder.prefill(prompts))
    }

    /// [`Decoder::extend`] of both models.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn extend(
        &mut self,
        slots: &[usize],
        tokens: &[u32],
    ) -> Result<MixtureLogits, ModelError> {
        if let Self::Shared { both, slots: first } = self {
            let below = slots.iter().map(|slot| *first + slot);
            let all: Vec<usize> = slots.iter().copied().chain(below).collect();
            let logits = both.extend(&all, &[tokens, tokens].concat())?;
            return Ok(MixtureLogits::stacked(logits, slots.len()));
        }
        self.each(|decoder| decoder.extend(slots, tokens))
    }

    /// Runs `forward` on the policy and, if it has a decoder of its own, the reference, concurrently, so that one uses
    /// the threads that the other's sequential parts leave idle.
    fn each(
        &mut self,
        forward: impl Fn(&mut Decoder) -> Result<Logits, ModelError> + Sync,
    ) -> Result<MixtureLogits, ModelError> {
        match self {
            Self::Alone(policy) | Self::Shared { both: policy, .. } => Ok(MixtureLogits {
                policy: forward(policy)?,
                reference: ReferenceLogits::Policy,
            }),
            Self::Separate { policy, reference } => {
                let (policy, reference) = rayon::join(|| forward(policy), || forward(reference));
                Ok(MixtureLogits {
                    policy: policy?,
                    reference: ReferenceLogits::Own(reference?),
                })
            }
        }
    }
}

impl MixtureLogits {
    /// Logits of `count` rows of the policy and, below, as many of the reference.
    fn stacked(policy: Logits, count: usize) -> Self {
        Self {
            policy,
            reference: ReferenceLogits::From(count),
        }
    }
}
