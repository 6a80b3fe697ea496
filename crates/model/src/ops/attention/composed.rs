//! Attention from candle's operations, for any device and type.

use candle_core::{D, Result, Tensor};

use super::super::storage::wide;
use super::{Attention, Segments};

/// The same from candle's operations, every sequence padded to the longest: those that share a prefix
/// each have a copy of it.
pub(crate) fn composed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    segments: &Segments,
    options: Attention,
) -> Result<Tensor> {
    let (_, heads, width) = q.dims3()?;
    if segments.total() == 0 {
        return q.zeros_like();
    }
    let places = Places::of(segments, q)?;
    let (count, longest) = (places.count, places.longest);
    // [N, heads, hd] to [B, H, T, hd], a key head repeated for each of its queries.
    let spread = |x: &Tensor| -> Result<Tensor> {
        let own = x.dim(1)?;
        let shape = (count, own, heads / own, longest, width);
        x.contiguous()?
            .index_select(&places.packed, 0)?
            .reshape((count, longest, own, width))?
            .transpose(1, 2)?
            .unsqueeze(2)?
            .broadcast_as(shape)?
            .contiguous()?
            .reshape((count, heads, longest, width))
    };
    let scores = spread(q)?.matmul(&spread(k)?.t()?)?;
    let scores = (scores.to_dtype(wide(q.dtype()))? * f64::from(options.scale))?;
    let scores = scores.broadcast_add(&mask(longest, options, &scores)?)?;
    let weights = candle_nn::ops::softmax(&scores, D::Minus1)?.to_dtype(q.dtype())?;
    weights
        .matmul(&spread(v)?)?
        .transpose(1, 2)?
        .contiguous()?
        .reshape((count * longest, heads, width))?
        .index_select(&places.padded, 0)
}

/// 0 where a query may look and -∞ where it may not, `[T, T]`, in the type of `like`.
fn mask(longest: usize, options: Attention, like: &Tensor) -> Result<Tensor> {
    let window = options.window.unwrap_or(longest);
    let mask: Vec<f32> = (0..longest * longest)
        .map(|at| (at / longest, at % longest))
        .map(|(t, j)| j <= t && t - j < window)
        .map(|seen| if seen { 0.0 } else { f32::NEG_INFINITY })
        .collect();
    Tensor::from_vec(mask, (longest, longest), like.device())?.to_dtype(like.dtype())
}

/// Where tokens go when sequences are padded to the longest, and where they come back from.
struct Places {
    /// Sequences, prefixes included.
    count: usize,
    /// Tokens in the longest.
    longest: usize,
    /// For each place of the rectangle its packed row; row 0 where there is none.
    packed: Tensor,
    /// For each packed row a place in the rectangle: copies of a prefix see the same.
    padded: Tensor,
}

impl Places {
    fn of(segments: &Segments, like: &Tensor) -> Result<Self> {
        let paths: Vec<Vec<usize>> = segments
            .iter()
            .flat_map(|segment| segment.paths().map(Iterator::collect))
            .collect();
        let longest = paths.iter().map(Vec::len).max().unwrap_or(0);
        let mut packed = vec![0u32; paths.len() * longest];
        let mut padded = vec![0u32; segments.total()];
        for (index, rows) in paths.iter().enumerate() {
            for (t, &row) in rows.iter().enumerate() {
                packed[index * longest + t] = row as u32;
                padded[row] = (index * longest + t) as u32;
            }
        }
        let device = like.device();
        Ok(Self {
            count: paths.len(),
            longest,
            packed: Tensor::new(packed, device)?,
            padded: Tensor::new(padded, device)?,
        })
    }
}
