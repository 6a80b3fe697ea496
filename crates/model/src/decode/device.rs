//! Tensor-based decoder for any device.

use candle_core::Tensor;

use crate::decode::{Prefill, SlotToken};
use crate::{
    error::ModelError,
    ragged::RaggedBatch,
    rope::Positions,
    transformer::{Attend, LanguageModel, LayerAttention},
};
use kernels::{self, CacheRows};

/// KV cache of a fixed number of slots, each with room for `capacity` tokens.
#[derive(Debug)]
pub(crate) struct TensorKvCache {
    /// Keys and values of each layer, both `[slots · capacity, kv_heads, head_dim]`.
    layers: Vec<(Tensor, Tensor)>,
    capacity: usize,
}

impl TensorKvCache {
    pub fn new(model: &LanguageModel, slots: usize, capacity: usize) -> Result<Self, ModelError> {
        let config = model.config();
        let shape = (slots * capacity, config.kv_heads, config.head_dim);
        let empty = || Tensor::zeros(shape, model.dtype(), model.device());
        let layers = (0..config.layers)
            .map(|_| Ok((empty()?, empty()?)))
            .collect::<Result<_, candle_core::Error>>()?;
        Ok(Self { layers, capacity })
    }

    /// Logits after each prompt, `[prompts, vocab_size]`, row-major.
    pub fn prefill(
        &self,
        model: &LanguageModel,
        prompts: &[Prefill<'_>],
    ) -> Result<Vec<f32>, ModelError> {
        let ids: Vec<Vec<u32>> = prompts.iter().map(|p| p.ids.to_vec()).collect();
        let batch = RaggedBatch::new(&ids, model.config(), model.device())?;
        let (mut from, mut to) = (Vec::new(), Vec::new());
        for (index, prompt) in prompts.iter().enumerate() {
            for &slot in prompt.slots {
                let start = slot * self.capacity;
                from.extend(batch.segments.range(index).map(|row| row as u32));
                to.extend((start..start + prompt.ids.len()).map(|row| row as u32));
            }
        }
        let last: Vec<u32> = (0..prompts.len())
            .map(|i| batch.segments.range(i).end as u32 - 1)
            .collect();
        let mut attention = PrefillAttention {
            batch: &batch,
            cache: self,
            from: Tensor::new(from, model.device())?,
            to: CacheRowIndex::new(&to, model)?,
        };
        let hidden = model.forward(&batch.ids, &batch.positions, &mut attention)?;
        let last = Tensor::new(last, model.device())?;
        let logits = model.logits(&hidden.index_select(&last, 0)?)?;
        Ok(logits.flatten_all()?.to_vec1()?)
    }

    /// Logits after each token, `[steps, vocab_size]`, row-major.
    pub fn extend(
        &self,
        model: &LanguageModel,
        steps: &[SlotToken],
    ) -> Result<Vec<f32>, ModelError> {
        let rows = CacheRows {
            slots: steps.iter().map(|step| step.slot).collect(),
            lengths: steps.iter().map(|step| step.position + 1).collect(),
            capacity: self.capacity,
        };
        let row = |step: &SlotToken| (step.slot * self.capacity + step.position) as u32;
        let to: Vec<u32> = steps.iter().map(row).collect();
        let ids: Vec<u32> = steps.iter().map(|step| step.token).collect();
        let positions: Vec<u32> = steps.iter().map(|step| step.position as u32).collect();
        let mut attention = CachedAttention {
            cache: self,
            rows,
            to: CacheRowIndex::new(&to, model)?,
        };
        let ids = Tensor::new(ids, model.device())?;
        let positions = Positions::new(positions, model.device())?;
        let hidden = model.forward(&ids, &positions, &mut attention)?;
        Ok(model.logits(&hidden)?.flatten_all()?.to_vec1()?)
    }
}

/// Destination rows of new keys and values in the cache, as an element-wise index for `scatter_set`.
struct CacheRowIndex {
    index: Tensor,
    width: usize,
}

impl CacheRowIndex {
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

struct PrefillAttention<'a> {
    batch: &'a RaggedBatch,
    cache: &'a TensorKvCache,
    from: Tensor,
    to: CacheRowIndex,
}

impl Attend for PrefillAttention<'_> {
    fn attend(
        &mut self,
        layer: LayerAttention,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> candle_core::Result<Tensor> {
        let (keys, values) = &self.cache.layers[layer.index];
        self.to.write(keys, &k.index_select(&self.from, 0)?)?;
        self.to.write(values, &v.index_select(&self.from, 0)?)?;
        kernels::causal_attention(q, k, v, &self.batch.segments, layer.params)
    }
}

struct CachedAttention<'a> {
    cache: &'a TensorKvCache,
    rows: CacheRows,
    to: CacheRowIndex,
}

impl Attend for CachedAttention<'_> {
    fn attend(
        &mut self,
        layer: LayerAttention,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> candle_core::Result<Tensor> {
        let (keys, values) = &self.cache.layers[layer.index];
        self.to.write(keys, k)?;
        self.to.write(values, v)?;
        kernels::cached_attention(q, keys, values, &self.rows, layer.params)
    }
}
