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
        match self {
            Self::Alone(decoder) => return decoder.set_model(policy, precision),
            Self::Separate {
                policy: own,
                reference,
            } if !policy.shares_weights(reference.model()) => {
                reference.set_precision(precision)?;
                return own.set_model(policy, precision);
            }
            Self::Separate { .. } | Self::Shared { .. } => {}
        }
        let reference = self.reference().cloned();
        self.set_models(policy, reference, precision)
    }

    /// Replaces the reference, stores it in `precision` and empties its slots.
    ///
    /// # Errors
    /// When the policy is its own reference, or the device cannot hold them.
    pub(crate) fn set_reference(
        &mut self,
        reference: LanguageModel,
        precision: Precision,
    ) -> Result<(), ModelError> {
        match self {
            Self::Alone(_) => {
                let reason = "replace the reference: the policy is its own";
                return Err(ModelError::Engine(reason.into()));
            }
            Self::Separate {
                policy,
                reference: own,
            } if !policy.model().shares_weights(&reference) => {
                return own.set_model(reference, precision);
            }
            Self::Separate { .. } | Self::Shared { .. } => {}
        }
        self.set_models(self.policy().clone(), Some(reference), precision)
    }

    /// Replaces both models, at least one of which shares or shared its weights with the other: in the shared decoder, or
    /// in decoders of another kind.
    fn set_models(
        &mut self,
        policy: LanguageModel,
        reference: Option<LanguageModel>,
        precision: Precision,
    ) -> Result<(), ModelError> {
        match (&mut *self, reference) {
            (Self::Shared { both, .. }, Some(reference)) if policy.shares_weights(&reference) => {
                both.set_models(vec![policy, reference], precision)
            }
            (_, reference) => {
                *self = Self::new(policy, reference, precision, self.limits())?;
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
        let shared = |both: &mut Decoder, slots: usize| {
            let slots_of = |first: usize| {
                let moved = move |prompt: &Prefill<'_>| -> Vec<usize> {
                    prompt.slots.iter().map(|slot| first + slot).collect()
                };
                prompts.iter().map(moved)
            };
            let all: Vec<Vec<usize>> = slots_of(0).chain(slots_of(slots)).collect();
            let twice = prompts.iter().chain(prompts).zip(&all);
            let twice: Vec<Prefill<'_>> = twice
                .map(|(prompt, slots)| Prefill {
                    ids: prompt.ids,
                    slots,
                })
                .collect();
            both.prefill(&twice)
        };
        self.forward(|decoder| decoder.prefill(prompts), shared, prompts.len())
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
        let shared = |both: &mut Decoder, first: usize| {
            let below = slots.iter().map(|slot| first + slot);
            let all: Vec<usize> = slots.iter().copied().chain(below).collect();
            both.extend(&all, &[tokens, tokens].concat())
        };
        self.forward(|decoder| decoder.extend(slots, tokens), shared, slots.len())
    }

    /// Runs `each` on the policy and, if it has a decoder of its own, the reference, concurrently, so that one uses the
    /// threads that the other's sequential parts leave idle; or `shared` on the decoder of both, given its number of slots,
    /// which returns `rows` rows of the policy and, below, as many of the reference.
    fn forward(
        &mut self,
        each: impl Fn(&mut Decoder) -> Result<Logits, ModelError> + Sync,
        shared: impl FnOnce(&mut Decoder, usize) -> Result<Logits, ModelError>,
        rows: usize,
    ) -> Result<MixtureLogits, ModelError> {
        let (policy, reference) = match self {
            Self::Alone(policy) => (each(policy)?, ReferenceLogits::Policy),
            Self::Separate { policy, reference } => {
                let (policy, reference) = rayon::join(|| each(policy), || each(reference));
                (policy?, ReferenceLogits::Own(reference?))
            }
            Self::Shared { both, slots } => (shared(both, *slots)?, ReferenceLogits::From(rows)),
        };
        Ok(MixtureLogits { policy, reference })
    }
}
