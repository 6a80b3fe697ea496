//! CPU decoder: weights packed for matmuls with few rows, a KV cache laid out for single queries, plain slices instead
//! of tensors. Models that differ by an adapter share the packed weights, and a forward pass of their sequences computes
//! every product with these weights once.

use std::sync::Arc;

use rayon::prelude::*;

use crate::decode::updates::{AdaptedRows, BlockUpdates, PackedAdapter, PackedUpdate};
use crate::decode::{Prefill, SlotToken};
use crate::{
    config::ModelConfig, error::ModelError, panels::BlockStacks, transformer::LanguageModel,
    weights::Weights,
};
use kernels::{
    CpuTensor, Heads, KvCache, PackedMatrix, Precision, rms_norm_rows, rotate, swiglu_rows,
};

/// Maximum number of prompt tokens per forward pass; a longer prompt is alone in one.
const PREFILL_TOKENS: usize = 512;

/// Size in bytes up to which weights fit a core's private cache. Such models are parallelised over sequences, without
/// parallel matmuls.
const CACHE_RESIDENT_BYTES: usize = 8 << 20;

/// Minimum number of sequences per thread.
const MIN_SEQUENCES: usize = 4;

/// Number of sequences per thread from which on threads compute sequences of their own, where multiplications take longer
/// than reading the weights: the parts between two products are parallel too then.
const OWN_SEQUENCES: usize = 8;

/// Packed weights, which decoders may share, and the KV caches of all slots.
pub(crate) struct CpuDecoder {
    weights: Arc<PackedWeights>,
    /// The adapter of every model. The first share of the slots is the first model's, and so on.
    adapters: Vec<Option<Arc<PackedAdapter>>>,
    slots: Vec<SlotCache>,
}

/// KV cache of one sequence, by layer.
#[derive(Default)]
struct SlotCache(Vec<KvCache>);

/// New tokens for one slot in a forward pass.
struct ActiveSequence<'a> {
    cache: SlotCache,
    /// Number of tokens already in the slot.
    start: usize,
    /// Tokens to append.
    tokens: &'a [u32],
    adapter: Option<Arc<PackedAdapter>>,
}

/// Model weights packed for the CPU kernels.
struct PackedWeights {
    config: ModelConfig,
    /// The weights that were packed, and how; `None` of weights that were being replaced when that failed.
    source: Option<Weights>,
    precision: Precision,
    /// `[vocab_size, hidden_size]`.
    embedding: CpuTensor,
    blocks: Vec<PackedBlock>,
    final_norm: Vec<f32>,
    head: PackedMatrix,
    /// cos and sin of every position, `head_dim / 2` values each.
    angles: (Vec<f32>, Vec<f32>),
    /// Whether the weights fit a core's private cache.
    cache_resident: bool,
}

struct PackedBlock {
    heads: Heads,
    attention_norm: Vec<f32>,
    /// Query, key and value projections, stacked by rows.
    projections: PackedMatrix,
    projections_bias: Option<Vec<f32>>,
    query_norm: Option<Vec<f32>>,
    key_norm: Option<Vec<f32>>,
    output: PackedMatrix,
    output_bias: Option<Vec<f32>>,
    feed_forward_norm: Vec<f32>,
    gate_and_up: PackedMatrix,
    down: PackedMatrix,
}

impl CpuDecoder {
    /// A decoder of `models`, which share their weights, with this number of slots in all.
    pub fn new(
        models: &[LanguageModel],
        precision: Precision,
        slots: usize,
        capacity: usize,
    ) -> Result<Self, ModelError> {
        let weights = Arc::new(PackedWeights::new(&models[0], precision, capacity)?);
        let adapters = packed_adapters(models, precision)?;
        Ok(Self::of(weights, adapters, slots))
    }

    /// Creates a decoder with empty slots that shares the weights.
    pub fn with_slots(&self, slots: usize) -> Self {
        Self::of(Arc::clone(&self.weights), self.adapters.clone(), slots)
    }

    fn of(
        weights: Arc<PackedWeights>,
        adapters: Vec<Option<Arc<PackedAdapter>>>,
        slots: usize,
    ) -> Self {
        Self {
            slots: weights.empty_slots(slots),
            weights,
            adapters,
        }
    }

    /// Replaces the models by as many of the same shape. Frozen weights that are packed already stay.
    pub fn pack(
        &mut self,
        models: &[LanguageModel],
        precision: Precision,
        capacity: usize,
    ) -> Result<(), ModelError> {
        if !self.weights.are_of(models, precision) {
            let before = self.weights.precision;
            match Arc::get_mut(&mut self.weights) {
                Some(weights) => weights.repack(&models[0], precision, capacity)?,
                None => {
                    self.weights = Arc::new(PackedWeights::new(&models[0], precision, capacity)?);
                }
            }
            if before != precision {
                self.slots = self.weights.empty_slots(self.slots.len());
            }
        }
        self.adapters = packed_adapters(models, precision)?;
        Ok(())
    }

    /// The adapter of the model that a slot is of.
    fn adapter(&self, slot: usize) -> Option<Arc<PackedAdapter>> {
        let each = self.slots.len() / self.adapters.len();
        self.adapters[slot / each.max(1)].clone()
    }

    pub fn prefill(&mut self, prompts: &[Prefill<'_>]) -> Vec<f32> {
        let mut logits = Vec::new();
        let mut rest = prompts;
        while !rest.is_empty() {
            let mut tokens = 0;
            let fits = |prompt: &&Prefill<'_>| {
                tokens += prompt.ids.len();
                tokens <= PREFILL_TOKENS
            };
            let count = rest.iter().take_while(fits).count().max(1);
            let (chunk, remaining) = rest.split_at(count);
            logits.extend(self.prefill_chunk(chunk));
            rest = remaining;
        }
        logits
    }

    fn prefill_chunk<'a>(&mut self, prompts: &[Prefill<'a>]) -> Vec<f32> {
        let sequence = |prompt: &Prefill<'a>| self.take_slot(prompt.slots[0], 0, prompt.ids);
        let mut sequences: Vec<ActiveSequence<'a>> = prompts.iter().map(sequence).collect();
        let logits = self.weights.advance(&mut sequences);
        for (prompt, sequence) in prompts.iter().zip(sequences) {
            for &slot in &prompt.slots[1..] {
                let caches = self.slots[slot].0.iter_mut().zip(&sequence.cache.0);
                for ((cache, source), block) in caches.zip(&self.weights.blocks) {
                    cache.copy_prefix(source, block.heads, prompt.ids.len());
                }
            }
            self.slots[prompt.slots[0]] = sequence.cache;
        }
        logits
    }

    /// Takes a slot's cache out for a forward pass that appends `tokens`.
    fn take_slot<'a>(
        &mut self,
        slot: usize,
        start: usize,
        tokens: &'a [u32],
    ) -> ActiveSequence<'a> {
        ActiveSequence {
            cache: std::mem::take(&mut self.slots[slot]),
            start,
            tokens,
            adapter: self.adapter(slot),
        }
    }

    pub fn extend(&mut self, steps: &[SlotToken]) -> Vec<f32> {
        let mut sequences: Vec<ActiveSequence<'_>> = steps
            .iter()
            .map(|step| self.take_slot(step.slot, step.position, std::slice::from_ref(&step.token)))
            .collect();
        let logits = self.weights.advance(&mut sequences);
        for (step, sequence) in steps.iter().zip(sequences) {
            self.slots[step.slot] = sequence.cache;
        }
        logits
    }
}

/// The adapters of models, packed.
fn packed_adapters(
    models: &[LanguageModel],
    precision: Precision,
) -> Result<Vec<Option<Arc<PackedAdapter>>>, ModelError> {
    let packed = models
        .iter()
        .map(|model| PackedAdapter::of(model, precision));
    packed.collect()
}

impl PackedWeights {
    /// Whether these are the frozen weights of `models` in this precision: weights below an adapter are not trained.
    fn are_of(&self, models: &[LanguageModel], precision: Precision) -> bool {
        precision == self.precision
            && models.iter().any(|model| model.adapter().is_some())
            && self
                .source
                .as_ref()
                .is_some_and(|source| models[0].weights().are_shared_with(source))
    }

    /// The weights of `model` without its adapter.
    fn new(
        model: &LanguageModel,
        precision: Precision,
        capacity: usize,
    ) -> Result<Self, ModelError> {
        let config = model.config().clone();
        let blocks = (0..config.layers).map(|layer| PackedBlock::of(model, layer, precision));
        Ok(Self {
            blocks: blocks.collect::<Result<_, _>>()?,
            head: packed_head(model, precision)?,
            embedding: embedding(model)?,
            final_norm: final_norm(model)?,
            angles: model.rope.rows(capacity)?,
            cache_resident: 4 * model.weights().parameter_count() <= CACHE_RESIDENT_BYTES,
            source: Some(model.weights().clone()),
            precision,
            config,
        })
    }

    /// Replaces the weights by those of a model of the same shape, block by block: never are two models held, of the
    /// packed weights or of those that they were packed from. After an error they are of neither model.
    fn repack(
        &mut self,
        model: &LanguageModel,
        precision: Precision,
        capacity: usize,
    ) -> Result<(), ModelError> {
        self.source = None;
        self.config = model.config().clone();
        self.angles = model.rope.rows(capacity)?;
        self.embedding = embedding(model)?;
        self.final_norm = final_norm(model)?;
        for (layer, block) in self.blocks.iter_mut().enumerate() {
            *block = PackedBlock::of(model, layer, precision)?;
        }
        self.head = packed_head(model, precision)?;
        self.precision = precision;
        self.source = Some(model.weights().clone());
        Ok(())
    }

    fn empty_slots(&self, count: usize) -> Vec<SlotCache> {
        let empty = || (0..self.config.layers).map(|_| KvCache::new(self.precision));
        (0..count).map(|_| SlotCache(empty().collect())).collect()
    }

    /// Runs the new tokens of each sequence, which extend its slot. Returns the logits after the last token of each,
    /// `[sequences, vocab_size]`, row-major.
    fn advance(&self, sequences: &mut [ActiveSequence<'_>]) -> Vec<f32> {
        let threads = rayon::current_num_threads();
        let computes =
            sequences.len() >= OWN_SEQUENCES * threads && !kernels::uses_tiles(self.precision);
        if !self.cache_resident && !computes {
            return self.forward(sequences);
        }
        let per_thread = sequences.len().div_ceil(threads).max(MIN_SEQUENCES);
        let logits: Vec<Vec<f32>> = sequences
            .par_chunks_mut(per_thread)
            .map(|sequences| self.forward(sequences))
            .collect();
        logits.concat()
    }

    fn forward(&self, sequences: &mut [ActiveSequence<'_>]) -> Vec<f32> {
        let (width, eps) = (self.config.hidden_size, self.config.rms_norm_eps as f32);
        let mut x = Vec::new();
        let embedding = self.embedding.values();
        for sequence in &*sequences {
            for &token in sequence.tokens {
                x.extend_from_slice(&embedding[token as usize * width..][..width]);
            }
        }
        drop(embedding);
        let adapters = sequences.iter();
        let adapters = adapters.map(|sequence| (sequence.tokens.len(), sequence.adapter.as_ref()));
        let adapted = AdaptedRows::of(adapters);
        let multiply = |layer: usize, weight: &PackedMatrix, of: SelectUpdate, x: &[f32]| {
            let mut rows = weight.multiply(x);
            for group in &adapted {
                group.add(layer, of, x, &mut rows);
            }
            rows
        };
        for (layer, block) in self.blocks.iter().enumerate() {
            let normed = rms_norm_rows(&x, &block.attention_norm, eps);
            let of: SelectUpdate = |updates| updates.projections.as_ref();
            let mut projected = multiply(layer, &block.projections, of, &normed);
            add_to_rows(&mut projected, block.projections_bias.as_deref());
            let attended = self.attend(layer, block, sequences, &mut projected);
            let of: SelectUpdate = |updates| updates.output.as_ref();
            let mut rows = multiply(layer, &block.output, of, &attended);
            add_to_rows(&mut rows, block.output_bias.as_deref());
            add(&mut x, &rows);
            let normed = rms_norm_rows(&x, &block.feed_forward_norm, eps);
            let of: SelectUpdate = |updates| updates.gate_and_up.as_ref();
            let gated = multiply(layer, &block.gate_and_up, of, &normed);
            let gated = swiglu_rows(&gated, self.config.intermediate_size);
            let of: SelectUpdate = |updates| updates.down.as_ref();
            add(&mut x, &multiply(layer, &block.down, of, &gated));
        }
        let mut last = Vec::with_capacity(sequences.len() * width);
        let mut end = 0;
        for sequence in &*sequences {
            end += sequence.tokens.len();
            last.extend_from_slice(&x[(end - 1) * width..end * width]);
        }
        self.head
            .multiply(&rms_norm_rows(&last, &self.final_norm, eps))
    }

    /// Attention over rows of projected queries, keys and values, which are appended to the slots: `[rows, heads ·
    /// head_dim]`.
    fn attend(
        &self,
        layer: usize,
        block: &PackedBlock,
        sequences: &mut [ActiveSequence<'_>],
        projected: &mut [f32],
    ) -> Vec<f32> {
        let Heads {
            queries,
            keys,
            width,
            ..
        } = block.heads;
        let (query_width, row_width) = (queries * width, (queries + 2 * keys) * width);
        let mut out = vec![0.0; projected.len() / row_width * query_width];
        let (mut rest, mut rest_out) = (projected, out.as_mut_slice());
        let mut parts = Vec::with_capacity(sequences.len());
        for sequence in sequences {
            let count = sequence.tokens.len();
            let rows = rest.split_off_mut(..count * row_width).unwrap_or_default();
            let out = rest_out
                .split_off_mut(..count * query_width)
                .unwrap_or_default();
            parts.push((sequence, rows, out));
        }
        parts
            .into_par_iter()
            .with_min_len(MIN_SEQUENCES)
            .for_each(|(sequence, rows, out)| {
                let rows = rows.chunks_exact_mut(row_width);
                let cache = &mut sequence.cache.0[layer];
                for (i, (row, out)) in rows.zip(out.chunks_exact_mut(query_width)).enumerate() {
                    let position = sequence.start + i;
                    let query = self.rotate_and_append(block, cache, position, row);
                    cache.attend(block.heads, position, query, out);
                }
            });
        out
    }

    /// Normalises and rotates the query and key of a projected row in place, and appends key and value to the cache.
    /// Returns the query.
    fn rotate_and_append<'r>(
        &self,
        block: &PackedBlock,
        cache: &mut KvCache,
        position: usize,
        row: &'r mut [f32],
    ) -> &'r [f32] {
        let Heads {
            queries,
            keys,
            width,
            ..
        } = block.heads;
        let eps = self.config.rms_norm_eps as f32;
        let (query, rest) = row.split_at_mut(queries * width);
        let (key, value) = rest.split_at_mut(keys * width);
        for (heads, norm) in [
            (&mut *query, &block.query_norm),
            (&mut *key, &block.key_norm),
        ] {
            if let Some(norm) = norm {
                let normed = rms_norm_rows(heads, norm, eps);
                heads.copy_from_slice(&normed);
            }
            let half = width / 2;
            let angles = position * half..(position + 1) * half;
            rotate(
                heads,
                &self.angles.0[angles.clone()],
                &self.angles.1[angles],
            );
        }
        cache.write(block.heads, position, key, value);
        query
    }
}

fn embedding(model: &LanguageModel) -> Result<CpuTensor, ModelError> {
    Ok(CpuTensor::of(
        &model.weights().get("model.embed_tokens.weight")?,
    )?)
}

fn final_norm(model: &LanguageModel) -> Result<Vec<f32>, ModelError> {
    Ok(CpuTensor::of(&model.weights().get("model.norm.weight")?)?
        .values()
        .to_vec())
}

fn packed_head(model: &LanguageModel, precision: Precision) -> Result<PackedMatrix, ModelError> {
    let name = model.config().head_name().to_owned();
    model.weights().stacked(&[name], precision)
}

/// Selects the update of one product of a block.
type SelectUpdate = fn(&BlockUpdates) -> Option<&PackedUpdate>;

impl PackedBlock {
    fn of(model: &LanguageModel, layer: usize, precision: Precision) -> Result<Self, ModelError> {
        let (config, weights) = (model.config(), model.weights());
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let row = |part: &str| -> Result<Vec<f32>, ModelError> {
            Ok(CpuTensor::of(&weights.get(&name(part))?)?.values().to_vec())
        };
        let rows = |parts: &[&str]| -> Result<Vec<f32>, ModelError> {
            let rows: Result<Vec<_>, _> = parts.iter().map(|part| row(part)).collect();
            Ok(rows?.concat())
        };
        let biases = [
            "self_attn.q_proj.bias",
            "self_attn.k_proj.bias",
            "self_attn.v_proj.bias",
        ];
        let packed = |names: &[String]| weights.stacked(names, precision);
        let stacks = BlockStacks::of(layer);
        let head_norm = |part: &str| config.qk_norm.then(|| row(part)).transpose();
        Ok(Self {
            heads: Heads {
                queries: config.heads,
                keys: config.kv_heads,
                width: config.head_dim,
                attention: model.attention_params(layer),
            },
            attention_norm: row("input_layernorm.weight")?,
            projections: packed(&stacks.projections)?,
            projections_bias: config.qkv_bias.then(|| rows(&biases)).transpose()?,
            query_norm: head_norm("self_attn.q_norm.weight")?,
            key_norm: head_norm("self_attn.k_norm.weight")?,
            output: packed(&stacks.output)?,
            output_bias: config
                .output_bias
                .then(|| row("self_attn.o_proj.bias"))
                .transpose()?,
            feed_forward_norm: row("post_attention_layernorm.weight")?,
            gate_and_up: packed(&stacks.gate_and_up)?,
            down: packed(&stacks.down)?,
        })
    }
}

fn add(x: &mut [f32], rows: &[f32]) {
    for (x, row) in x.iter_mut().zip(rows) {
        *x += row;
    }
}

fn add_to_rows(rows: &mut [f32], bias: Option<&[f32]>) {
    if let Some(bias) = bias {
        for row in rows.chunks_exact_mut(bias.len()) {
            add(row, bias);
        }
    }
}
