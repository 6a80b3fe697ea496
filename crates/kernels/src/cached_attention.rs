//! Attention of one new token per sequence to that sequence's cached keys and values, composed of candle's operations
//! for any device: rows gathered into a padded batch, masked, softmax in f32. The CPU decoder uses `kv_cache.rs`.

use candle_core::{DType, Device, Result, Tensor, bail};

use crate::attention::AttentionParams;

/// Cached rows of n sequences: slot after slot, `capacity` rows per slot.
#[derive(Clone, Debug)]
pub struct CacheRows {
    /// Slot of each sequence, `[n]`.
    pub slots: Vec<usize>,
    /// Filled rows of each sequence's slot, including the new token's, `[n]`.
    pub lengths: Vec<usize>,
    /// Rows per slot.
    pub capacity: usize,
}

impl CacheRows {
    /// Rows that sequence `index` attends to, given the window.
    fn visible(&self, index: usize, window: Option<usize>) -> std::ops::Range<usize> {
        let (start, length) = (self.slots[index] * self.capacity, self.lengths[index]);
        let hidden = window.map_or(0, |window| length.saturating_sub(window));
        start + hidden..start + length
    }
}

/// `softmax(scale · q kᵀ) v`, each sequence over its own cached rows.
///
/// `q` `[n, heads, head_dim]`; `keys` and `values` `[slots · capacity, kv_heads, head_dim]`; the result is
/// `[n, heads, head_dim]`. A sequence's result does not depend on the others. Not differentiable.
///
/// # Errors
/// If the shapes do not match.
pub fn cached_attention(
    q: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    rows: &CacheRows,
    params: AttentionParams,
) -> Result<Tensor> {
    let (n, heads, head_dim) = q.dims3()?;
    let (total, kv_heads, width) = keys.dims3()?;
    let fits = n == rows.slots.len() && n == rows.lengths.len() && width == head_dim;
    let in_bounds =
        (0..n).all(|i| rows.visible(i, None).end <= total && rows.lengths[i] <= rows.capacity);
    if !fits || !in_bounds || keys.dims() != values.dims() || !heads.is_multiple_of(kv_heads) {
        bail!(
            "cached attention: queries {:?} do not fit keys {:?}",
            q.dims(),
            keys.dims()
        );
    }
    let longest = rows.lengths.iter().copied().max().unwrap_or(0);
    let (mut index, mut mask) = (Vec::new(), Vec::new());
    for i in 0..n {
        let visible = rows.visible(i, params.window);
        for step in 0..longest {
            let row = visible.start + step;
            index.push(if row < visible.end {
                row as u32
            } else {
                visible.start as u32
            });
            mask.push(if row < visible.end {
                0f32
            } else {
                f32::NEG_INFINITY
            });
        }
    }
    let device: &Device = q.device();
    let index = Tensor::from_vec(index, n * longest, device)?;
    let mask = Tensor::from_vec(mask, (n, 1, 1, longest), device)?;
    let gather = |cache: &Tensor| {
        let rows = cache
            .index_select(&index, 0)?
            .reshape((n, longest, kv_heads, head_dim))?;
        rows.transpose(1, 2)?.contiguous()
    };
    let q = q.reshape((n, kv_heads, heads / kv_heads, head_dim))?;
    let scores = (q.matmul(&gather(keys)?.t()?)?.to_dtype(DType::F32)? * f64::from(params.scale))?;
    let weights = candle_nn::ops::softmax_last_dim(&scores.broadcast_add(&mask)?)?;
    let mixed = weights.to_dtype(values.dtype())?.matmul(&gather(values)?)?;
    mixed.reshape((n, heads, head_dim))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn noise(shape: (usize, usize, usize), seed: f32) -> Tensor {
        let count = shape.0 * shape.1 * shape.2;
        let values: Vec<f32> = (0..count)
            .map(|i| ((i as f32 + seed) * 12.9898).sin())
            .collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    #[test]
    fn a_sequence_attends_to_its_own_rows_only() {
        let rows = CacheRows {
            slots: vec![3, 0, 2],
            lengths: vec![7, 1, 5],
            capacity: 8,
        };
        let (q, keys, values) = (
            noise((3, 4, 6), 0.),
            noise((32, 2, 6), 1.),
            noise((32, 2, 6), 2.),
        );
        for window in [None, Some(3)] {
            let params = AttentionParams { scale: 0.4, window };
            let together = cached_attention(&q, &keys, &values, &rows, params).unwrap();
            let alone = CacheRows {
                slots: vec![2],
                lengths: vec![5],
                capacity: 8,
            };
            let q = q.narrow(0, 2, 1).unwrap();
            let alone = cached_attention(&q, &keys, &values, &alone, params).unwrap();
            let gap = (together.narrow(0, 2, 1).unwrap() - alone).unwrap();
            let gap = gap.abs().unwrap().max_all().unwrap();
            assert!(gap.to_scalar::<f32>().unwrap() < 1e-6);
        }
    }

    #[test]
    fn one_cached_row_gives_its_value_and_rows_out_of_bounds_are_rejected() {
        let (q, keys, values) = (
            noise((1, 1, 4), 0.),
            noise((4, 1, 4), 1.),
            noise((4, 1, 4), 2.),
        );
        let params = AttentionParams {
            scale: 1.0,
            window: None,
        };
        let mut rows = CacheRows {
            slots: vec![1],
            lengths: vec![1],
            capacity: 2,
        };
        let out = cached_attention(&q, &keys, &values, &rows, params).unwrap();
        assert_eq!(
            out.to_vec3::<f32>().unwrap()[0],
            values.to_vec3::<f32>().unwrap()[2]
        );
        rows.lengths[0] = 3;
        assert!(cached_attention(&q, &keys, &values, &rows, params).is_err());
    }
}
