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
    /// Rows of their own, if there are any, and which of them belongs to each of the policy's rows.
    Own(Option<Logits>, RowMap),
    /// Rows below the policy's, and which of all rows belongs to each of the policy's.
    Below(RowMap),
}

/// Row of the reference for each row of the policy; `None` for those that only the policy computed.
type RowMap = Vec<Option<usize>>;

/// The next token of a slot.
#[derive(Clone, Copy)]
pub(crate) struct NextToken {
    /// The slot.
    pub(crate) slot: usize,
    /// Token that is appended.
    pub(crate) token: u32,
    /// Whether the reference reads it too.
    pub(crate) is_scored: bool,
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

    /// The reference's logits of row `index`; the same slice where the policy is its own reference, `None` where the
    /// reference did not compute it.
    pub(crate) fn reference(&self, index: usize) -> Option<&[f32]> {
        match &self.reference {
            ReferenceLogits::Policy => Some(self.policy.row(index)),
            ReferenceLogits::Own(logits, rows) => Some(logits.as_ref()?.row(rows[index]?)),
            ReferenceLogits::Below(rows) => Some(self.policy.row(rows[index]?)),
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

    /// [`Decoder::prefill`] of the policy, and of the reference for those prompts that are `scored`.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn prefill(
        &mut self,
        prompts: &[Prefill<'_>],
        scored: &[bool],
    ) -> Result<MixtureLogits, ModelError> {
        let of_reference: Vec<Prefill<'_>> = of_scored(prompts, scored);
        let shared = |both: &mut Decoder, slots: usize| {
            let moved = |prompt: &Prefill<'_>| -> Vec<usize> {
                prompt.slots.iter().map(|slot| slots + slot).collect()
            };
            let below: Vec<Vec<usize>> = of_reference.iter().map(moved).collect();
            let below = of_reference.iter().zip(&below);
            let below = below.map(|(prompt, slots)| Prefill {
                ids: prompt.ids,
                slots,
            });
            let all: Vec<Prefill<'_>> = prompts.iter().copied().chain(below).collect();
            both.prefill(&all)
        };
        let work = MixtureWork {
            policy: |decoder: &mut Decoder| decoder.prefill(prompts),
            reference: |decoder: &mut Decoder| decoder.prefill(&of_reference),
            shared,
        };
        self.forward(work, scored)
    }

    /// [`Decoder::extend`] of the policy, and of the reference for those tokens that are scored. Slots that are not must
    /// not have been prefilled as scored.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn extend(&mut self, next: &[NextToken]) -> Result<MixtureLogits, ModelError> {
        let scored: Vec<bool> = next.iter().map(|next| next.is_scored).collect();
        let split = |next: &[NextToken]| -> (Vec<usize>, Vec<u32>) {
            next.iter().map(|next| (next.slot, next.token)).unzip()
        };
        let (slots, tokens) = split(next);
        let (scored_slots, scored_tokens) = split(&of_scored(next, &scored));
        let shared = |both: &mut Decoder, first: usize| {
            let below = scored_slots.iter().map(|slot| first + slot);
            let all: Vec<usize> = slots.iter().copied().chain(below).collect();
            both.extend(&all, &[&tokens[..], &scored_tokens].concat())
        };
        let work = MixtureWork {
            policy: |decoder: &mut Decoder| decoder.extend(&slots, &tokens),
            reference: |decoder: &mut Decoder| decoder.extend(&scored_slots, &scored_tokens),
            shared,
        };
        self.forward(work, &scored)
    }

    /// Computes the policy's rows and those of the reference, where it has a decoder of its own concurrently, so that
    /// one uses the threads that the other's sequential parts leave idle.
    fn forward<P, R, S>(
        &mut self,
        work: MixtureWork<P, R, S>,
        scored: &[bool],
    ) -> Result<MixtureLogits, ModelError>
    where
        P: Fn(&mut Decoder) -> Result<Logits, ModelError> + Sync,
        R: Fn(&mut Decoder) -> Result<Logits, ModelError> + Sync,
        S: FnOnce(&mut Decoder, usize) -> Result<Logits, ModelError>,
    {
        let (policy, reference) = match self {
            Self::Alone(policy) => ((work.policy)(policy)?, ReferenceLogits::Policy),
            Self::Separate { policy, reference } if scored.contains(&true) => {
                let (policy, reference) =
                    rayon::join(|| (work.policy)(policy), || (work.reference)(reference));
                let rows = row_map(scored, 0);
                (policy?, ReferenceLogits::Own(Some(reference?), rows))
            }
            Self::Separate { policy, .. } => {
                let rows = row_map(scored, 0);
                ((work.policy)(policy)?, ReferenceLogits::Own(None, rows))
            }
            Self::Shared { both, slots } => {
                let rows = row_map(scored, scored.len());
                ((work.shared)(both, *slots)?, ReferenceLogits::Below(rows))
            }
        };
        Ok(MixtureLogits { policy, reference })
    }
}

/// A forward pass: on the policy's decoder, on the reference's, and on that of both, given its number of slots, which
/// returns the policy's rows and, below, those of the reference.
struct MixtureWork<P, R, S> {
    policy: P,
    reference: R,
    shared: S,
}

/// Those of `all` that are scored.
fn of_scored<T: Copy>(all: &[T], scored: &[bool]) -> Vec<T> {
    let both = all.iter().zip(scored);
    both.filter(|(_, scored)| **scored)
        .map(|(one, _)| *one)
        .collect()
}

/// Rows of the reference from `first` on, for the scored rows in order.
fn row_map(scored: &[bool], first: usize) -> RowMap {
    let mut rows = first..;
    let row = |&scored: &bool| if scored { rows.next() } else { None };
    scored.iter().map(row).collect()
}
