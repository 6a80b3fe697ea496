//! Incremental decoding with a KV cache: many sequences, extended by one token each per step.
//!
//! On the CPU, weights are packed once per version and plain slices go through this workspace's kernels (`cpu`); on
//! other devices the same steps use tensor operations (`device`).

mod cpu;
mod device;
mod mixture;
mod updates;

use std::ops::Range;

use crate::{error::ModelError, ragged::check_tokens, transformer::LanguageModel};
pub use kernels::Precision;
pub(crate) use mixture::{MixtureDecoder, MixtureLogits, NextToken, SlotLimits};

/// A prompt to process once and store in several slots.
#[derive(Debug, Clone, Copy)]
pub struct Prefill<'a> {
    /// Token ids of the prompt.
    pub ids: &'a [u32],
    /// Slots of the completions that share the prompt.
    pub slots: &'a [usize],
}

/// A model with the KV caches of a fixed number of slots.
pub struct Decoder {
    /// The model, or two that share their weights and the slots: each has the same number of them, the first model the
    /// first ones.
    models: Vec<LanguageModel>,
    precision: Precision,
    capacity: usize,
    /// Number of tokens in each slot.
    lengths: Vec<usize>,
    backend: DecodeBackend,
}

enum DecodeBackend {
    Cpu(Box<cpu::CpuDecoder>),
    Device(device::TensorKvCache),
}

/// A token to append to a slot.
#[derive(Debug, Clone, Copy)]
struct SlotToken {
    slot: usize,
    /// Position in the slot's sequence.
    position: usize,
    token: u32,
}

/// Rows of logits, f32.
#[derive(Debug, Clone, Default)]
pub struct Logits {
    values: Vec<f32>,
    vocab_size: usize,
}

impl Logits {
    /// Logits of row `index`, one per token of the vocabulary.
    #[must_use]
    pub fn row(&self, index: usize) -> &[f32] {
        &self.values[self.range(index)]
    }

    /// Vocabulary size.
    #[must_use]
    pub fn width(&self) -> usize {
        self.vocab_size
    }

    fn range(&self, index: usize) -> Range<usize> {
        index * self.vocab_size..(index + 1) * self.vocab_size
    }
}

impl Decoder {
    /// Creates a decoder with empty slots, each with room for `capacity` tokens, at most the model's positions. On the
    /// CPU the weights are stored in `precision`, the caches in bf16 below f32, and an adapter is applied beside them;
    /// on other devices weights and adapter are used unchanged.
    ///
    /// # Errors
    /// When the device cannot hold it.
    pub fn new(
        model: LanguageModel,
        precision: Precision,
        slots: usize,
        capacity: usize,
    ) -> Result<Self, ModelError> {
        Self::of(vec![model], precision, slots, capacity)
    }

    /// Creates a decoder of two models on the CPU that share their weights and differ by their adapters: slots below
    /// `slots` are the first model's, as many from there on the second's. What both need is stored and computed once.
    ///
    /// # Errors
    /// When the device cannot hold it.
    pub(crate) fn shared(
        models: [LanguageModel; 2],
        precision: Precision,
        slots: usize,
        capacity: usize,
    ) -> Result<Self, ModelError> {
        Self::of(models.into(), precision, 2 * slots, capacity)
    }

    fn of(
        models: Vec<LanguageModel>,
        precision: Precision,
        slots: usize,
        capacity: usize,
    ) -> Result<Self, ModelError> {
        let model = &models[0];
        let capacity = capacity.min(model.config().max_positions);
        let backend = if model.device().is_cpu() {
            let backend = cpu::CpuDecoder::new(&models, precision, slots, capacity)?;
            DecodeBackend::Cpu(Box::new(backend))
        } else {
            DecodeBackend::Device(device::TensorKvCache::new(model, slots, capacity)?)
        };
        Ok(Self {
            models,
            precision,
            capacity,
            lengths: vec![0; slots],
            backend,
        })
    }

    /// Creates a decoder with empty slots that shares the weights. Each slot has room for `capacity` tokens, at most as
    /// many as the slots of this one.
    ///
    /// # Errors
    /// When the device cannot hold it.
    pub fn with_slots(&self, slots: usize, capacity: usize) -> Result<Self, ModelError> {
        let capacity = capacity.min(self.capacity);
        let backend = match &self.backend {
            DecodeBackend::Cpu(backend) => DecodeBackend::Cpu(Box::new(backend.with_slots(slots))),
            DecodeBackend::Device(_) => {
                DecodeBackend::Device(device::TensorKvCache::new(self.model(), slots, capacity)?)
            }
        };
        Ok(Self {
            models: self.models.clone(),
            precision: self.precision,
            capacity,
            lengths: vec![0; slots],
            backend,
        })
    }

    /// Converts the weights to `precision` and empties all slots; does nothing if the precision is unchanged.
    ///
    /// # Errors
    /// When the device cannot hold it.
    pub fn set_precision(&mut self, precision: Precision) -> Result<(), ModelError> {
        match precision == self.precision {
            true => Ok(()),
            false => self.set_models(self.models.clone(), precision),
        }
    }

    /// The decoded model, the first of two.
    #[must_use]
    pub fn model(&self) -> &LanguageModel {
        &self.models[0]
    }

    /// Replaces the model by one of the same shape, stored in `precision`, and empties all slots. The one before is released
    /// first: after an error there is neither.
    ///
    /// # Errors
    /// When the device cannot hold it.
    pub fn set_model(
        &mut self,
        model: LanguageModel,
        precision: Precision,
    ) -> Result<(), ModelError> {
        self.set_models(vec![model], precision)
    }

    /// Replaces the models by as many of the same shape, stored in `precision`, and empties all slots.
    fn set_models(
        &mut self,
        models: Vec<LanguageModel>,
        precision: Precision,
    ) -> Result<(), ModelError> {
        // Those before are released first.
        self.models = models;
        self.lengths.fill(0);
        if let DecodeBackend::Cpu(backend) = &mut self.backend {
            backend.pack(&self.models, precision, self.capacity)?;
        }
        self.precision = precision;
        Ok(())
    }

    /// Number of tokens in a slot.
    #[must_use]
    pub fn length(&self, slot: usize) -> usize {
        self.lengths[slot]
    }

    /// Processes prompts and stores them in their slots, replacing previous content. Returns the logits after each
    /// prompt.
    ///
    /// # Errors
    /// When a prompt is empty, too long for a slot or holds an unknown token.
    pub fn prefill(&mut self, prompts: &[Prefill<'_>]) -> Result<Logits, ModelError> {
        for prompt in prompts {
            if prompt.ids.is_empty() || prompt.slots.is_empty() {
                let reason = "a prompt needs at least one token, and one slot".into();
                return Err(ModelError::Tokens { reason });
            }
            check_tokens(prompt.ids, self.model().config())?;
            self.check_capacity(0, prompt.ids.len())?;
        }
        let values = match &mut self.backend {
            DecodeBackend::Cpu(backend) => backend.prefill(prompts),
            DecodeBackend::Device(cache) => cache.prefill(&self.models[0], prompts)?,
        };
        for prompt in prompts {
            for &slot in prompt.slots {
                self.lengths[slot] = prompt.ids.len();
            }
        }
        Ok(self.logits(values))
    }

    /// Appends one token to each of these slots, which must be distinct. Returns the logits after each token.
    ///
    /// # Errors
    /// When a slot is full or a token is unknown.
    pub fn extend(&mut self, slots: &[usize], tokens: &[u32]) -> Result<Logits, ModelError> {
        check_tokens(tokens, self.model().config())?;
        let mut steps = Vec::with_capacity(slots.len());
        for (&slot, &token) in slots.iter().zip(tokens) {
            let position = self.lengths[slot];
            self.check_capacity(position, 1)?;
            self.lengths[slot] += 1;
            steps.push(SlotToken {
                slot,
                position,
                token,
            });
        }
        let values = match &mut self.backend {
            DecodeBackend::Cpu(backend) => backend.extend(&steps),
            DecodeBackend::Device(cache) => cache.extend(&self.models[0], &steps)?,
        };
        Ok(self.logits(values))
    }

    fn logits(&self, values: Vec<f32>) -> Logits {
        let vocab_size = self.model().config().vocab_size;
        Logits { values, vocab_size }
    }

    fn check_capacity(&self, held: usize, tokens: usize) -> Result<(), ModelError> {
        if held + tokens <= self.capacity {
            return Ok(());
        }
        let reason = format!(
            "a slot with room for {} tokens cannot take {tokens} more",
            self.capacity
        );
        Err(ModelError::Tokens { reason })
    }
}

#[cfg(test)]
mod tests;
