//! Decoding on the CPU: weights packed for products with few rows, keys and values laid out for queries that
//! come alone, nothing between them but slices.

use std::sync::Arc;

use rayon::prelude::*;

use super::{Prefill, Step};
use crate::{
    LanguageModel, ModelConfig, ModelError,
    ops::{
        Attention, Fixed, Heads, KeyValues, PackedMatrix, Precision, rms_norm_rows, rotate,
        swiglu_rows,
    },
};

/// Tokens of prompts that go through the network together, unless one prompt has more.
const TOKENS: usize = 512;

/// Weights up to so many bytes stay in a core's own cache: then every thread takes some sequences through
/// the whole network, and no product is divided.
const SMALL: usize = 8 << 20;

/// Sequences that are worth a thread.
const SEQUENCES: usize = 4;

/// Packed weights, and the keys and values of all slots.
pub(super) struct Engine {
    weights: Arc<Weights>,
    slots: Vec<Slot>,
}

/// The keys and values of one sequence, layer by layer.
#[derive(Default)]
struct Slot(Vec<KeyValues>);

/// A sequence in the making.
struct Sequence<'a> {
    slot: Slot,
    /// How many tokens the slot holds.
    start: usize,
    /// What is appended.
    tokens: &'a [u32],
}

struct Weights {
    config: ModelConfig,
    /// `[vocab_size, hidden_size]`.
    embedding: Fixed,
    blocks: Vec<Block>,
    final_norm: Vec<f32>,
    head: PackedMatrix,
    /// cos and sin of every place, `head_dim / 2` each.
    angles: (Vec<f32>, Vec<f32>),
    /// Whether they stay in a core's own cache.
    small: bool,
}

struct Block {
    heads: Heads,
    attention_norm: Vec<f32>,
    /// Queries, keys and values, one below the other.
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

impl Engine {
    pub fn new(
        model: &LanguageModel,
        precision: Precision,
        slots: usize,
        capacity: usize,
    ) -> Result<Self, ModelError> {
        let weights = Weights::new(model, precision, capacity)?;
        Ok(Self::of(Arc::new(weights), slots))
    }

    /// The same weights, not copied, and empty slots of its own.
    pub fn with_slots(&self, slots: usize) -> Self {
        Self::of(Arc::clone(&self.weights), slots)
    }

    fn of(weights: Arc<Weights>, slots: usize) -> Self {
        let empty = || (0..weights.config.layers).map(|_| KeyValues::default());
        let slots = (0..slots).map(|_| Slot(empty().collect())).collect();
        Self { weights, slots }
    }

    /// Takes the weights of another model of the same shape.
    pub fn pack(
        &mut self,
        model: &LanguageModel,
        precision: Precision,
        capacity: usize,
    ) -> Result<(), ModelError> {
        self.weights = Arc::new(Weights::new(model, precision, capacity)?);
        Ok(())
    }

    pub fn prefill(&mut self, prompts: &[Prefill<'_>]) -> Vec<f32> {
        let mut logits = Vec::new();
        let mut rest = prompts;
        while !rest.is_empty() {
            let mut tokens = 0;
            let fits = |prompt: &&Prefill<'_>| {
                tokens += prompt.ids.len();
                tokens <= TOKENS
            };
            let count = rest.iter().take_while(fits).count().max(1);
            let (now, later) = rest.split_at(count);
            logits.extend(self.read(now));
            rest = later;
        }
        logits
    }

    fn read<'a>(&mut self, prompts: &[Prefill<'a>]) -> Vec<f32> {
        let sequence = |prompt: &Prefill<'a>| self.take(prompt.slots[0], 0, prompt.ids);
        let mut sequences: Vec<Sequence<'a>> = prompts.iter().map(sequence).collect();
        let logits = self.weights.advance(&mut sequences);
        for (prompt, sequence) in prompts.iter().zip(sequences) {
            for &slot in &prompt.slots[1..] {
                let caches = self.slots[slot].0.iter_mut().zip(&sequence.slot.0);
                for ((cache, read), block) in caches.zip(&self.weights.blocks) {
                    cache.begin_as(read, block.heads, prompt.ids.len());
                }
            }
            self.slots[prompt.slots[0]] = sequence.slot;
        }
        logits
    }

    /// Takes a slot away for as long as something is appended to it.
    fn take<'a>(&mut self, slot: usize, start: usize, tokens: &'a [u32]) -> Sequence<'a> {
        Sequence {
            slot: std::mem::take(&mut self.slots[slot]),
            start,
            tokens,
        }
    }

    pub fn extend(&mut self, steps: &[Step]) -> Vec<f32> {
        let mut sequences: Vec<Sequence<'_>> = steps
            .iter()
            .map(|step| self.take(step.slot, step.place, std::slice::from_ref(&step.token)))
            .collect();
        let logits = self.weights.advance(&mut sequences);
        for (step, sequence) in steps.iter().zip(sequences) {
            self.slots[step.slot] = sequence.slot;
        }
        logits
    }
}

impl Weights {
    fn new(
        model: &LanguageModel,
        precision: Precision,
        capacity: usize,
    ) -> Result<Self, ModelError> {
        let config = model.config().clone();
        let weights = model.merged()?;
        let numbers =
            |name: &str| -> Result<Fixed, ModelError> { Ok(Fixed::of(&weights.get(name)?)?) };
        let blocks = (0..config.layers)
            .map(|layer| {
                let attention = model.attention_in(layer);
                Block::new((layer, attention), &config, precision, &numbers)
            })
            .collect::<Result<_, _>>()?;
        let embedding = numbers("model.embed_tokens.weight")?;
        let untied = (!config.tied_head).then(|| numbers("lm_head.weight"));
        let untied = untied.transpose()?;
        let head = untied.as_ref().unwrap_or(&embedding);
        let head = PackedMatrix::stacked(&[&head.numbers()], config.hidden_size, precision);
        Ok(Self {
            blocks,
            head,
            embedding,
            final_norm: numbers("model.norm.weight")?.numbers().to_vec(),
            angles: model.rope.rows(capacity)?,
            small: 4 * weights.parameter_count() <= SMALL,
            config,
        })
    }

    /// Takes tokens through the network, each sequence behind what its slot holds. Returns the logits after
    /// the last token of each, `[sequences, vocab_size]`.
    fn advance(&self, sequences: &mut [Sequence<'_>]) -> Vec<f32> {
        if !self.small {
            return self.pass(sequences);
        }
        let threads = rayon::current_num_threads();
        let each = sequences.len().div_ceil(threads).max(SEQUENCES);
        let parts: Vec<Vec<f32>> = sequences
            .par_chunks_mut(each)
            .map(|sequences| self.pass(sequences))
            .collect();
        parts.concat()
    }

    fn pass(&self, sequences: &mut [Sequence<'_>]) -> Vec<f32> {
        let (width, eps) = (self.config.hidden_size, self.config.rms_norm_eps as f32);
        let mut x = Vec::new();
        let embedding = self.embedding.numbers();
        for sequence in &*sequences {
            for &token in sequence.tokens {
                x.extend_from_slice(&embedding[token as usize * width..][..width]);
            }
        }
        drop(embedding);
        for (layer, block) in self.blocks.iter().enumerate() {
            let normed = rms_norm_rows(&x, &block.attention_norm, eps);
            let mut projected = block.projections.multiply(&normed);
            add_to_rows(&mut projected, block.projections_bias.as_deref());
            let mixed = self.attend(layer, block, sequences, &mut projected);
            let mut rows = block.output.multiply(&mixed);
            add_to_rows(&mut rows, block.output_bias.as_deref());
            add(&mut x, &rows);
            let normed = rms_norm_rows(&x, &block.feed_forward_norm, eps);
            let gated = block.gate_and_up.multiply(&normed);
            let gated = swiglu_rows(&gated, self.config.intermediate_size);
            add(&mut x, &block.down.multiply(&gated));
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

    /// Of rows of queries, keys and values: what each query finds, `[rows, heads · head_dim]`. Keys and
    /// values go into the slots.
    fn attend(
        &self,
        layer: usize,
        block: &Block,
        sequences: &mut [Sequence<'_>],
        projected: &mut [f32],
    ) -> Vec<f32> {
        let Heads {
            queries,
            keys,
            width,
            ..
        } = block.heads;
        let (of_queries, of_all) = (queries * width, (queries + 2 * keys) * width);
        let mut out = vec![0.0; projected.len() / of_all * of_queries];
        let (mut rest, mut rest_out) = (projected, out.as_mut_slice());
        let mut parts = Vec::with_capacity(sequences.len());
        for sequence in sequences {
            let count = sequence.tokens.len();
            let rows = rest.split_off_mut(..count * of_all).unwrap_or_default();
            let out = rest_out
                .split_off_mut(..count * of_queries)
                .unwrap_or_default();
            parts.push((sequence, rows, out));
        }
        parts
            .into_par_iter()
            .with_min_len(SEQUENCES)
            .for_each(|(sequence, rows, out)| {
                let rows = rows.chunks_exact_mut(of_all);
                let cache = &mut sequence.slot.0[layer];
                for (i, (row, out)) in rows.zip(out.chunks_exact_mut(of_queries)).enumerate() {
                    self.attend_one(block, cache, sequence.start + i, (row, out));
                }
            });
        out
    }

    fn attend_one(
        &self,
        block: &Block,
        cache: &mut KeyValues,
        place: usize,
        (row, out): (&mut [f32], &mut [f32]),
    ) {
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
            let angles = place * half..(place + 1) * half;
            rotate(
                heads,
                (&self.angles.0[angles.clone()], &self.angles.1[angles]),
            );
        }
        cache.write(block.heads, place, key, value);
        cache.attend(block.heads, place, query, out);
    }
}

type Numbers<'a> = dyn Fn(&str) -> Result<Fixed, ModelError> + 'a;

impl Block {
    fn new(
        (layer, options): (usize, Attention),
        config: &ModelConfig,
        precision: Precision,
        numbers: &Numbers<'_>,
    ) -> Result<Self, ModelError> {
        let of = |part: &str| numbers(&format!("model.layers.{layer}.{part}"));
        let (width, inner) = (config.hidden_size, config.intermediate_size);
        let row = |part: &str| -> Result<Vec<f32>, ModelError> { Ok(of(part)?.numbers().to_vec()) };
        let packed = |parts: &[&str], width: usize| -> Result<PackedMatrix, ModelError> {
            let weights: Result<Vec<Fixed>, _> = parts.iter().map(|part| of(part)).collect();
            let weights = weights?;
            let weights: Vec<_> = weights.iter().map(Fixed::numbers).collect();
            let weights: Vec<&[f32]> = weights.iter().map(|numbers| &**numbers).collect();
            Ok(PackedMatrix::stacked(&weights, width, precision))
        };
        let rows = |parts: &[&str]| -> Result<Vec<f32>, ModelError> {
            let rows: Result<Vec<_>, _> = parts.iter().map(|part| row(part)).collect();
            Ok(rows?.concat())
        };
        let weights = [
            "self_attn.q_proj.weight",
            "self_attn.k_proj.weight",
            "self_attn.v_proj.weight",
        ];
        let of_bias = [
            "self_attn.q_proj.bias",
            "self_attn.k_proj.bias",
            "self_attn.v_proj.bias",
        ];
        let head_norm = |part: &str| config.qk_norm.then(|| row(part)).transpose();
        Ok(Self {
            heads: Heads {
                queries: config.heads,
                keys: config.kv_heads,
                width: config.head_dim,
                options,
            },
            attention_norm: row("input_layernorm.weight")?,
            projections: packed(&weights, width)?,
            projections_bias: config.qkv_bias.then(|| rows(&of_bias)).transpose()?,
            query_norm: head_norm("self_attn.q_norm.weight")?,
            key_norm: head_norm("self_attn.k_norm.weight")?,
            output: packed(&["self_attn.o_proj.weight"], config.heads * config.head_dim)?,
            output_bias: config
                .output_bias
                .then(|| row("self_attn.o_proj.bias"))
                .transpose()?,
            feed_forward_norm: row("post_attention_layernorm.weight")?,
            gate_and_up: packed(&["mlp.gate_proj.weight", "mlp.up_proj.weight"], width)?,
            down: packed(&["mlp.down_proj.weight"], inner)?,
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
