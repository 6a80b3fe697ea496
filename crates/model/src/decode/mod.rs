//! The cached path: keys and values of many sequences, extended by one token of each at a time.
//!
//! On the CPU the weights are packed once per version, and plain slices go through kernels of our own
//! (`packed`); on other devices the same steps are made of tensors (`tensors`).

mod packed;
mod tensors;

use std::ops::Range;

pub use crate::ops::Precision;
use crate::{LanguageModel, ModelError, packed::check_tokens};

/// A prompt and the slots that are to hold it: read once, laid into each of them.
#[derive(Debug, Clone)]
pub struct Prefill<'a> {
    /// The prompt's tokens.
    pub ids: &'a [u32],
    /// The slots of the completions that share it.
    pub slots: &'a [usize],
}

/// A model that writes: its weights, and the keys and values of a fixed number of slots.
pub struct Decoder {
    model: LanguageModel,
    precision: Precision,
    capacity: usize,
    /// How many tokens each slot holds.
    lengths: Vec<usize>,
    engine: Engine,
}

enum Engine {
    Packed(Box<packed::Engine>),
    Tensors(tensors::Cache),
}

/// A token to be appended to a slot.
#[derive(Debug, Clone, Copy)]
struct Step {
    slot: usize,
    /// Its place in the slot's sequence.
    place: usize,
    token: u32,
}

/// Logits, row by row, f32.
#[derive(Debug, Clone, Default)]
pub struct Logits {
    numbers: Vec<f32>,
    vocab: usize,
}

impl Logits {
    /// The logits of row `index`, one a token of the vocabulary.
    #[must_use]
    pub fn row(&self, index: usize) -> &[f32] {
        &self.numbers[self.range(index)]
    }

    /// The size of the vocabulary.
    #[must_use]
    pub fn width(&self) -> usize {
        self.vocab
    }

    fn range(&self, index: usize) -> Range<usize> {
        index * self.vocab..(index + 1) * self.vocab
    }
}

impl Decoder {
    /// An empty decoder with so many slots, each with room for `capacity` tokens, or for as many as the model
    /// has positions. On the CPU it keeps the
    /// weights in `precision`, an adapter merged into them; elsewhere as they are.
    ///
    /// # Errors
    /// When the device cannot hold it.
    pub fn new(
        model: LanguageModel,
        precision: Precision,
        slots: usize,
        capacity: usize,
    ) -> Result<Self, ModelError> {
        let capacity = capacity.min(model.config().max_positions);
        let engine = if model.device().is_cpu() {
            let engine = packed::Engine::new(&model, precision, slots, capacity)?;
            Engine::Packed(Box::new(engine))
        } else {
            Engine::Tensors(tensors::Cache::new(&model, slots, capacity)?)
        };
        Ok(Self {
            model,
            precision,
            capacity,
            lengths: vec![0; slots],
            engine,
        })
    }

    /// The same weights, not copied, with empty slots of its own, each with room for `capacity` tokens, at
    /// most for as many as here.
    ///
    /// # Errors
    /// When the device cannot hold it.
    pub fn with_slots(&self, slots: usize, capacity: usize) -> Result<Self, ModelError> {
        let capacity = capacity.min(self.capacity);
        let engine = match &self.engine {
            Engine::Packed(engine) => Engine::Packed(Box::new(engine.with_slots(slots))),
            Engine::Tensors(_) => {
                Engine::Tensors(tensors::Cache::new(&self.model, slots, capacity)?)
            }
        };
        Ok(Self {
            model: self.model.clone(),
            precision: self.precision,
            capacity,
            lengths: vec![0; slots],
            engine,
        })
    }

    /// Keeps the same model in `precision` from now on, and empties all slots; nothing where it is already.
    ///
    /// # Errors
    /// When the device cannot hold it.
    pub fn set_precision(&mut self, precision: Precision) -> Result<(), ModelError> {
        match precision == self.precision {
            true => Ok(()),
            false => self.set_model(self.model.clone(), precision),
        }
    }

    /// The model that writes.
    #[must_use]
    pub fn model(&self) -> &LanguageModel {
        &self.model
    }

    /// Replaces the model by one of the same shape, kept in `precision` from now on, and empties all slots.
    ///
    /// # Errors
    /// When the device cannot hold it.
    pub fn set_model(
        &mut self,
        model: LanguageModel,
        precision: Precision,
    ) -> Result<(), ModelError> {
        if let Engine::Packed(engine) = &mut self.engine {
            engine.pack(&model, precision, self.capacity)?;
        }
        (self.model, self.precision) = (model, precision);
        self.lengths.fill(0);
        Ok(())
    }

    /// How many tokens the slot holds.
    #[must_use]
    pub fn length(&self, slot: usize) -> usize {
        self.lengths[slot]
    }

    /// Reads prompts into their slots, replacing what these held. Returns the logits of the token that
    /// follows each prompt.
    ///
    /// # Errors
    /// When a prompt is empty, too long for a slot or holds an unknown token.
    pub fn prefill(&mut self, prompts: &[Prefill<'_>]) -> Result<Logits, ModelError> {
        for prompt in prompts {
            if prompt.ids.is_empty() || prompt.slots.is_empty() {
                let reason = "a prompt needs at least one token, and one slot".into();
                return Err(ModelError::Tokens { reason });
            }
            check_tokens(prompt.ids, self.model.config())?;
            self.room(0, prompt.ids.len())?;
        }
        let numbers = match &mut self.engine {
            Engine::Packed(engine) => engine.prefill(prompts),
            Engine::Tensors(cache) => cache.prefill(&self.model, prompts)?,
        };
        for prompt in prompts {
            for &slot in prompt.slots {
                self.lengths[slot] = prompt.ids.len();
            }
        }
        Ok(self.logits(numbers))
    }

    /// Appends one token to each of these slots, all different. Returns the logits of the tokens that
    /// follow.
    ///
    /// # Errors
    /// When a slot is full or a token is unknown.
    pub fn extend(&mut self, slots: &[usize], tokens: &[u32]) -> Result<Logits, ModelError> {
        check_tokens(tokens, self.model.config())?;
        let mut steps = Vec::with_capacity(slots.len());
        for (&slot, &token) in slots.iter().zip(tokens) {
            let place = self.lengths[slot];
            self.room(place, 1)?;
            self.lengths[slot] += 1;
            steps.push(Step { slot, place, token });
        }
        let numbers = match &mut self.engine {
            Engine::Packed(engine) => engine.extend(&steps),
            Engine::Tensors(cache) => cache.extend(&self.model, &steps)?,
        };
        Ok(self.logits(numbers))
    }

    fn logits(&self, numbers: Vec<f32>) -> Logits {
        let vocab = self.model.config().vocab_size;
        Logits { numbers, vocab }
    }

    fn room(&self, held: usize, tokens: usize) -> Result<(), ModelError> {
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
