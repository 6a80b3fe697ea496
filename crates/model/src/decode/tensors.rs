//! Decoding on any device, made of tensors.

use candle_core::Tensor;

use super::{Prefill, Step};
use crate::{
    LanguageModel, ModelError, Packed,
    network::Attend,
    ops::{self, CacheRows},
};

/// Keys and values of a fixed number of slots, each with room for `capacity` tokens.
#[derive(Debug)]
pub(super) struct Cache {
    /// Per layer, both `[slots · capacity, kv_heads, head_dim]`.
    layers: Vec<(Tensor, Tensor)>,
    capacity: usize,
}

impl Cache {
    pub fn new(model: &LanguageModel, slots: usize, capacity: usize) -> Result<Self, ModelError> {
        let config = model.config();
        let shape = (slots * capacity, config.kv_heads, config.head_dim);
        let empty = || Tensor::zeros(shape, model.dtype(), model.device());
        let layers = (0..config.layers)
            .map(|_| Ok((empty()?, empty()?)))
            .collect::<Result<_, candle_core::Error>>()?;
        Ok(Self { layers, capacity })
    }

    /// The logits after each prompt, `[prompts, vocab_size]`.
    pub fn prefill(
        &self,
        model: &LanguageModel,
        prompts: &[Prefill<'_>],
    ) -> Result<Vec<f32>, ModelError> {
        let ids: Vec<Vec<u32>> = prompts.iter().map(|p| p.ids.to_vec()).collect();
        let packed = Packed::new(&ids, model.config(), model.device())?;
        let (mut from, mut to) = (Vec::new(), Vec::new());
        for (index, prompt) in prompts.iter().enumerate() {
            for &slot in prompt.slots {
                let start = slot * self.capacity;
                from.extend(packed.segments.range(index).map(|row| row as u32));
                to.extend((start..start + prompt.ids.len()).map(|row| row as u32));
            }
        }
        let last: Vec<u32> = (0..prompts.len())
            .map(|i| packed.segments.range(i).end as u32 - 1)
            .collect();
        let mut attention = Prefilling {
            packed: &packed,
            cache: self,
            from: Tensor::new(from, model.device())?,
            to: Destination::new(&to, model)?,
        };
        let hidden = model.forward(&packed.ids, &packed.positions, &mut attention)?;
        let last = Tensor::new(last, model.device())?;
        let logits = model.logits(&hidden.index_select(&last, 0)?)?;
        Ok(logits.flatten_all()?.to_vec1()?)
    }

    /// The logits after each token, `[steps, vocab_size]`.
    pub fn extend(&self, model: &LanguageModel, steps: &[Step]) -> Result<Vec<f32>, ModelError> {
        let rows = CacheRows {
            slots: steps.iter().map(|step| step.slot).collect(),
            lengths: steps.iter().map(|step| step.place + 1).collect(),
            capacity: self.capacity,
        };
        let row = |step: &Step| (step.slot * self.capacity + step.place) as u32;
        let to: Vec<u32> = steps.iter().map(row).collect();
        let ids: Vec<u32> = steps.iter().map(|step| step.token).collect();
        let positions: Vec<u32> = steps.iter().map(|step| step.place as u32).collect();
        let mut attention = Extending {
            cache: self,
            rows,
            to: Destination::new(&to, model)?,
        };
        let ids = Tensor::new(ids, model.device())?;
        let positions = Tensor::new(positions, model.device())?;
        let hidden = model.forward(&ids, &positions, &mut attention)?;
        Ok(model.logits(&hidden)?.flatten_all()?.to_vec1()?)
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
    cache: &'a Cache,
    from: Tensor,
    to: Destination,
}

impl Attend for Prefilling<'_> {
    fn attend(
        &mut self,
        (layer, options): (usize, ops::Attention),
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> candle_core::Result<Tensor> {
        let (keys, values) = &self.cache.layers[layer];
        self.to.write(keys, &k.index_select(&self.from, 0)?)?;
        self.to.write(values, &v.index_select(&self.from, 0)?)?;
        ops::causal_attention(q, k, v, &self.packed.segments, options)
    }
}

struct Extending<'a> {
    cache: &'a Cache,
    rows: CacheRows,
    to: Destination,
}

impl Attend for Extending<'_> {
    fn attend(
        &mut self,
        (layer, options): (usize, ops::Attention),
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> candle_core::Result<Tensor> {
        let (keys, values) = &self.cache.layers[layer];
        self.to.write(keys, k)?;
        self.to.write(values, v)?;
        ops::cached_attention(q, keys, values, &self.rows, options)
    }
}
