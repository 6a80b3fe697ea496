//! The cached path: keys and values of many sequences, extended by one token of each at a time.

use candle_core::Tensor;

use crate::{
    LanguageModel, ModelError, Packed,
    network::Attend,
    ops::{self, CacheRows},
};

/// Keys and values of a fixed number of slots, each with room for `capacity` tokens.
#[derive(Debug)]
pub struct Cache {
    /// Per layer, both `[slots · capacity, kv_heads, head_dim]`.
    layers: Vec<(Tensor, Tensor)>,
    capacity: usize,
    lengths: Vec<usize>,
}

impl Cache {
    /// An empty cache for `model`.
    ///
    /// # Errors
    /// When the device cannot hold it.
    pub fn new(model: &LanguageModel, slots: usize, capacity: usize) -> Result<Self, ModelError> {
        let config = model.config();
        let shape = (slots * capacity, config.kv_heads, config.head_dim);
        let empty = || Tensor::zeros(shape, model.dtype(), model.device());
        let layers = (0..config.layers)
            .map(|_| Ok((empty()?, empty()?)))
            .collect::<Result<_, candle_core::Error>>()?;
        Ok(Self {
            layers,
            capacity,
            lengths: vec![0; slots],
        })
    }

    /// How many tokens the slot holds.
    #[must_use]
    pub fn length(&self, slot: usize) -> usize {
        self.lengths[slot]
    }

    fn room(&self, slot: usize, tokens: usize) -> Result<(), ModelError> {
        if self.lengths[slot] + tokens <= self.capacity {
            return Ok(());
        }
        let reason = format!(
            "a slot with room for {} tokens cannot take {tokens} more",
            self.capacity
        );
        Err(ModelError::Tokens { reason })
    }
}

/// A prompt and the slots that are to hold it: read once, laid into each of them.
#[derive(Debug, Clone)]
pub struct Prefill<'a> {
    /// The prompt's tokens.
    pub ids: &'a [u32],
    /// The slots of the completions that share it.
    pub slots: &'a [usize],
}

impl LanguageModel {
    /// Reads prompts into the cache, replacing what their slots held. Returns the logits of the token
    /// that follows each prompt, `[P, vocab_size]`, f32.
    ///
    /// # Errors
    /// When a prompt is empty, too long for a slot or holds an unknown token.
    pub fn prefill(
        &self,
        cache: &mut Cache,
        prompts: &[Prefill<'_>],
    ) -> Result<Tensor, ModelError> {
        let ids: Vec<Vec<u32>> = prompts.iter().map(|p| p.ids.to_vec()).collect();
        let packed = Packed::new(&ids, self.config(), self.device())?;
        let (mut from, mut to) = (Vec::new(), Vec::new());
        for (index, prompt) in prompts.iter().enumerate() {
            for &slot in prompt.slots {
                cache.lengths[slot] = 0;
                cache.room(slot, prompt.ids.len())?;
                let start = slot * cache.capacity;
                from.extend(packed.segments.range(index).map(|row| row as u32));
                to.extend((start..start + prompt.ids.len()).map(|row| row as u32));
                cache.lengths[slot] = prompt.ids.len();
            }
        }
        let last: Vec<u32> = (0..prompts.len())
            .map(|i| packed.segments.range(i).end as u32 - 1)
            .collect();
        let from = Tensor::new(from, self.device())?;
        let to = Destination::new(&to, self)?;
        let options = self.attention_options();
        let mut attention = Prefilling {
            packed: &packed,
            cache,
            from,
            to,
            options,
        };
        let hidden = self.forward(&packed.ids, &packed.positions, &mut attention)?;
        let last = Tensor::new(last, self.device())?;
        Ok(self.logits(&hidden.index_select(&last, 0)?)?)
    }

    /// Appends one token to each of these slots, n of them, all different. Returns the logits of the
    /// tokens that follow, `[n, vocab_size]`, f32.
    ///
    /// # Errors
    /// When a slot is full or a token is unknown.
    pub fn extend(
        &self,
        cache: &mut Cache,
        slots: &[usize],
        tokens: &[u32],
    ) -> Result<Tensor, ModelError> {
        if let Some(id) = tokens
            .iter()
            .find(|&&id| id as usize >= self.config().vocab_size)
        {
            return Err(ModelError::Tokens {
                reason: format!("token {id} is not in the vocabulary"),
            });
        }
        let mut positions = Vec::with_capacity(slots.len());
        for &slot in slots {
            cache.room(slot, 1)?;
            positions.push(cache.lengths[slot] as u32);
            cache.lengths[slot] += 1;
        }
        let to: Vec<u32> = slots
            .iter()
            .zip(&positions)
            .map(|(&s, &p)| (s * cache.capacity) as u32 + p)
            .collect();
        let rows = CacheRows {
            slots: slots.to_vec(),
            lengths: slots.iter().map(|&slot| cache.lengths[slot]).collect(),
            capacity: cache.capacity,
        };
        let ids = Tensor::new(tokens, self.device())?;
        let positions = Tensor::new(positions, self.device())?;
        let to = Destination::new(&to, self)?;
        let mut attention = Extending {
            cache,
            rows,
            to,
            options: self.attention_options(),
        };
        let hidden = self.forward(&ids, &positions, &mut attention)?;
        Ok(self.logits(&hidden)?)
    }
}

/// Rows of the cache that new keys and values go to, spelled out per element as scatter wants them.
struct Destination {
    index: Tensor,
    width: usize,
}

impl Destination {
    fn new(rows: &[u32], model: &LanguageModel) -> Result<Self, ModelError> {
        let width = model.config().kv_heads * model.config().head_dim;
        let index = Tensor::new(rows, model.device())?.reshape((rows.len(), 1))?;
        Ok(Self {
            index: index.broadcast_as((rows.len(), width))?.contiguous()?,
            width,
        })
    }

    fn write(&self, cache: &Tensor, rows: &Tensor) -> candle_core::Result<()> {
        let flat = cache.reshape(((), self.width))?;
        flat.scatter_set(
            &self.index,
            &rows.reshape(((), self.width))?.contiguous()?,
            0,
        )
    }
}

struct Prefilling<'a> {
    packed: &'a Packed,
    cache: &'a mut Cache,
    from: Tensor,
    to: Destination,
    options: ops::Attention,
}

impl Attend for Prefilling<'_> {
    fn attend(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> candle_core::Result<Tensor> {
        let (keys, values) = &self.cache.layers[layer];
        self.to.write(keys, &k.index_select(&self.from, 0)?)?;
        self.to.write(values, &v.index_select(&self.from, 0)?)?;
        ops::causal_attention(q, k, v, &self.packed.segments, self.options)
    }
}

struct Extending<'a> {
    cache: &'a mut Cache,
    rows: CacheRows,
    to: Destination,
    options: ops::Attention,
}

impl Attend for Extending<'_> {
    fn attend(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> candle_core::Result<Tensor> {
        let (keys, values) = &self.cache.layers[layer];
        self.to.write(keys, k)?;
        self.to.write(values, v)?;
        ops::cached_attention(q, keys, values, &self.rows, self.options)
    }
}
