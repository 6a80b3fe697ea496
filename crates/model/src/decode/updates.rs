//! Low-rank updates of an adapter, packed for the CPU decoder.
//!
//! The modules of a block that read the same rows have one pair of products: their A side by side, their scaled B on the
//! diagonal.

use std::{ops::Range, sync::Arc};

use kernels::{CpuTensor, PackedMatrix, Precision};

use crate::{error::ModelError, lora::LowRank, transformer::LanguageModel};

/// Updates of all blocks.
pub(super) struct PackedAdapter {
    blocks: Vec<BlockUpdates>,
}

/// Updates of one block; `None` where no module is adapted.
pub(super) struct BlockUpdates {
    /// Of the stacked query, key and value projections.
    pub(super) projections: Option<PackedUpdate>,
    pub(super) output: Option<PackedUpdate>,
    pub(super) gate_and_up: Option<PackedUpdate>,
    pub(super) down: Option<PackedUpdate>,
}

/// `s·B·A` of the modules that read the same rows.
pub(super) struct PackedUpdate {
    /// `[in, rank]`, of all modules side by side.
    a: PackedMatrix,
    /// `[rank, out]`, scaled.
    b: PackedMatrix,
}

/// Consecutive rows of a forward pass with the same adapter.
pub(super) struct AdaptedRows {
    rows: Range<usize>,
    /// Number of rows of the pass.
    count: usize,
    adapter: Arc<PackedAdapter>,
}

/// A module's update and the number of its outputs.
struct Module<'a> {
    update: Option<&'a LowRank>,
    out: usize,
}

impl PackedAdapter {
    /// The updates of `model`; `None` without an adapter. Weights in int8 have updates in bf16.
    pub(super) fn of(
        model: &LanguageModel,
        precision: Precision,
    ) -> Result<Option<Arc<Self>>, ModelError> {
        if model.adapter().is_none() {
            return Ok(None);
        }
        let precision = match precision {
            Precision::Int8 => Precision::Bf16,
            precision => precision,
        };
        let config = model.config();
        let (width, inner) = (config.hidden_size, config.intermediate_size);
        let (queries, keys) = (
            config.heads * config.head_dim,
            config.kv_heads * config.head_dim,
        );
        let blocks = (0..config.layers).map(|layer| {
            let [query, key, value, output, gate, up, down] = model.low_rank_updates(layer);
            let packed = |modules: &[(Option<&LowRank>, usize)], width: usize| {
                let modules = modules.iter().map(|&(update, out)| Module { update, out });
                PackedUpdate::of(&modules.collect::<Vec<_>>(), width, precision)
            };
            Ok(BlockUpdates {
                projections: packed(&[(query, queries), (key, keys), (value, keys)], width)?,
                output: packed(&[(output, width)], queries)?,
                gate_and_up: packed(&[(gate, inner), (up, inner)], width)?,
                down: packed(&[(down, width)], inner)?,
            })
        });
        let blocks = blocks.collect::<Result<_, ModelError>>()?;
        Ok(Some(Arc::new(Self { blocks })))
    }
}

impl PackedUpdate {
    /// The updates of modules that read rows of `width` values; `None` if none has one.
    fn of(
        modules: &[Module<'_>],
        width: usize,
        precision: Precision,
    ) -> Result<Option<Self>, ModelError> {
        let ranks = modules
            .iter()
            .filter_map(|module| Some(module.update?.a.dims2()));
        let ranks: Vec<usize> = ranks
            .map(|dims| Ok(dims?.0))
            .collect::<candle_core::Result<_>>()?;
        let rank: usize = ranks.iter().sum();
        if rank == 0 {
            return Ok(None);
        }
        let out: usize = modules.iter().map(|module| module.out).sum();
        let (mut a, mut b) = (Vec::with_capacity(rank * width), vec![0.0; out * rank]);
        let (mut row, mut column) = (0, 0);
        for module in modules {
            if let Some(update) = module.update {
                a.extend_from_slice(&CpuTensor::of(&update.a)?.values());
                let values = CpuTensor::of(&update.b)?;
                let own = update.b.dim(1)?;
                let scale = update.scale as f32;
                for (index, values) in values.values().chunks_exact(own).enumerate() {
                    let place = (row + index) * rank + column;
                    for (b, value) in b[place..place + own].iter_mut().zip(values) {
                        *b = scale * value;
                    }
                }
                column += own;
            }
            row += module.out;
        }
        Ok(Some(Self {
            a: PackedMatrix::stacked(&[&a], width, precision),
            b: PackedMatrix::stacked(&[&b], rank, precision),
        }))
    }
}

impl AdaptedRows {
    /// The rows with an adapter, given the number of rows and the adapter of every sequence of a forward pass.
    pub(super) fn of<'a>(
        sequences: impl Iterator<Item = (usize, Option<&'a Arc<PackedAdapter>>)>,
    ) -> Vec<Self> {
        let mut groups: Vec<Self> = Vec::new();
        let mut end = 0;
        for (count, adapter) in sequences {
            let start = end;
            end += count;
            let Some(adapter) = adapter else { continue };
            let last = groups.last_mut();
            match last.filter(|last| last.rows.end == start && Arc::ptr_eq(&last.adapter, adapter))
            {
                Some(last) => last.rows.end = end,
                None => groups.push(Self {
                    rows: start..end,
                    count: 0,
                    adapter: Arc::clone(adapter),
                }),
            }
        }
        for group in &mut groups {
            group.count = end;
        }
        groups
    }

    /// Adds the update that `of` selects of a block to these rows of `y`, from the same rows of `x`.
    pub(super) fn add(
        &self,
        layer: usize,
        of: fn(&BlockUpdates) -> Option<&PackedUpdate>,
        x: &[f32],
        y: &mut [f32],
    ) {
        let Some(update) = of(&self.adapter.blocks[layer]) else {
            return;
        };
        let part = |length: usize| {
            let width = length / self.count;
            self.rows.start * width..self.rows.end * width
        };
        let low = update.a.multiply(&x[part(x.len())]);
        let part = part(y.len());
        update.b.multiply_add(&low, &mut y[part]);
    }
}
