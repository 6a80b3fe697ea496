//! Attention composed of candle's operations, for any device and dtype.

use candle_core::{D, Result, Tensor};

use super::{AttentionParams, Segments};
use crate::autograd::storage::accumulation_dtype;

/// [`causal_attention`](super::causal_attention()) with every sequence padded to the longest, and a copy of a shared
/// prefix for each of its sequences.
pub(crate) fn composed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    segments: &Segments,
    params: AttentionParams,
) -> Result<Tensor> {
    let (_, heads, width) = q.dims3()?;
    if segments.total() == 0 {
        return q.zeros_like();
    }
    let padded = PaddedBatch::of(segments, q)?;
    let (count, longest) = (padded.count, padded.longest);
    // [N, heads, hd] to [B, H, T, hd], a key head repeated for each of its queries.
    let pad = |x: &Tensor| -> Result<Tensor> {
        let own = x.dim(1)?;
        let shape = (count, own, heads / own, longest, width);
        x.contiguous()?
            .index_select(&padded.packed_rows, 0)?
            .reshape((count, longest, own, width))?
            .transpose(1, 2)?
            .unsqueeze(2)?
            .broadcast_as(shape)?
            .contiguous()?
            .reshape((count, heads, longest, width))
    };
    let scores = pad(q)?.matmul(&pad(k)?.t()?)?;
    let scores = (scores.to_dtype(accumulation_dtype(q.dtype()))? * f64::from(params.scale))?;
    let scores = scores.broadcast_add(&causal_mask(longest, params, &scores)?)?;
    let weights = candle_nn::ops::softmax(&scores, D::Minus1)?.to_dtype(q.dtype())?;
    weights
        .matmul(&pad(v)?)?
        .transpose(1, 2)?
        .contiguous()?
        .reshape((count * longest, heads, width))?
        .index_select(&padded.padded_positions, 0)
}

/// Additive mask `[T, T]`: 0 for keys that the query attends to, -∞ for others, in the dtype of `like`.
fn causal_mask(longest: usize, params: AttentionParams, like: &Tensor) -> Result<Tensor> {
    let window = params.window.unwrap_or(longest);
    let mask: Vec<f32> = (0..longest * longest)
        .map(|at| (at / longest, at % longest))
        .map(|(t, j)| j <= t && t - j < window)
        .map(|visible| if visible { 0.0 } else { f32::NEG_INFINITY })
        .collect();
    Tensor::from_vec(mask, (longest, longest), like.device())?.to_dtype(like.dtype())
}

/// Index maps between packed rows and a batch padded to the longest sequence.
struct PaddedBatch {
    /// Sequences, each with its prefix.
    count: usize,
    /// Tokens in the longest.
    longest: usize,
    /// Packed row of each position of the padded batch; 0 for padding.
    packed_rows: Tensor,
    /// A position in the padded batch for each packed row; any copy of a prefix serves.
    padded_positions: Tensor,
}

impl PaddedBatch {
    fn of(segments: &Segments, like: &Tensor) -> Result<Self> {
        let paths: Vec<Vec<usize>> = segments
            .iter()
            .flat_map(|segment| segment.paths().map(Iterator::collect))
            .collect();
        let longest = paths.iter().map(Vec::len).max().unwrap_or(0);
        let mut packed_rows = vec![0u32; paths.len() * longest];
        let mut padded_positions = vec![0u32; segments.total()];
        for (index, rows) in paths.iter().enumerate() {
            for (t, &row) in rows.iter().enumerate() {
                packed_rows[index * longest + t] = row as u32;
                padded_positions[row] = (index * longest + t) as u32;
            }
        }
        let device = like.device();
        Ok(Self {
            count: paths.len(),
            longest,
            packed_rows: Tensor::new(packed_rows, device)?,
            padded_positions: Tensor::new(padded_positions, device)?,
        })
    }
}
