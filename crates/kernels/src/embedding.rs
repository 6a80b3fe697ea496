//! Embedding lookup.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use crate::autograd::gradients::accumulate_sparse;
use crate::autograd::storage::{argument, fusible, read_f32, result};

/// Rows per task.
const ROWS: usize = 64;

/// Rows of `table` `[V, D]` by `indices` `[N]`, of `u32`: `[N, D]`. Differentiable in the table.
///
/// # Errors
/// If an index is out of bounds.
pub fn embedding(table: &Tensor, indices: &Tensor) -> Result<Tensor> {
    if !fusible(&[table]) {
        return table.index_select(indices, 0);
    }
    let indices: Vec<u32> = indices.to_vec1()?;
    let rows = table.dims2()?.0;
    if let Some(index) = indices.iter().find(|&&index| index as usize >= rows) {
        bail!("embedding: index {index} is out of bounds for {rows} rows");
    }
    table.contiguous()?.apply_op1(EmbeddingOp { indices })
}

struct EmbeddingOp {
    indices: Vec<u32>,
}

impl CustomOp1 for EmbeddingOp {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn cpu_fwd(&self, table: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let table = argument(table, layout)?;
        let width = layout.shape().dims2()?.1;
        let mut out = vec![0.0; self.indices.len() * width];
        out.par_chunks_mut((ROWS * width).max(1))
            .zip(self.indices.par_chunks(ROWS))
            .for_each(|(out, indices)| {
                for (out, &index) in out.chunks_exact_mut(width).zip(indices) {
                    out.copy_from_slice(&table[index as usize * width..][..width]);
                }
            });
        Ok(result(out, &Shape::from((self.indices.len(), width))))
    }

    fn bwd(&self, table: &Tensor, _: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        let width = table.dims2()?.1;
        let gradient = gradient.contiguous()?;
        let gradient = read_f32(&gradient)?;
        accumulate_sparse(table, |sum| {
            for (gradient, &index) in gradient.chunks_exact(width).zip(&self.indices) {
                let sum = &mut sum[index as usize * width..][..width];
                for (sum, term) in sum.iter_mut().zip(gradient) {
                    *sum += term;
                }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::autograd::gradients::backward;
    use crate::check::{assert_differentiates, assert_same, bits, noise};

    #[test]
    fn agrees_with_index_select_and_differentiates() -> Result<()> {
        for (rows, width, count) in [(1, 1, 1), (9, 5, 200), (300, 40, 3)] {
            let indices: Vec<u32> = (0..count).map(|i| i * 7 % rows).collect();
            let indices = Tensor::new(indices, &Device::Cpu)?;
            let table = noise((rows as usize, width), 1);
            assert_same(
                std::slice::from_ref(&table),
                |t| embedding(&t[0], &indices),
                |t| t[0].index_select(&indices, 0),
            );
        }
        let indices = Tensor::new(&[2u32, 0, 2], &Device::Cpu)?;
        assert_differentiates(&[noise((3, 2), 1)], |t| embedding(&t[0], &indices));
        Ok(())
    }

    #[test]
    fn accumulates_the_gradient_that_candle_computes() -> Result<()> {
        let table = Var::from_tensor(&noise((4, 3), 1))?;
        let indices = Tensor::new(&[3u32, 1, 3], &Device::Cpu)?;
        let loss = embedding(&table, &indices)?.sqr()?.sum_all()?;
        let (found, expected) = (backward(&loss)?, loss.backward()?);
        let found = bits(found.get(&table).unwrap());
        assert_eq!(found, bits(expected.get(&table).unwrap()));
        Ok(())
    }

    #[test]
    fn indices_out_of_bounds_are_rejected() -> Result<()> {
        let indices = Tensor::new(&[0u32, 4], &Device::Cpu)?;
        let error = embedding(&noise((4, 3), 1), &indices).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("index 4 is out of bounds for 4 rows")
        );
        Ok(())
    }
}
