//! The low-rank update of one linear layer.

use candle_core::{DType, Tensor};
use kernels::Precision;
use messages::Seed;
use rand::Rng;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};

/// `s·B·A·x`, computed as two small matmuls.
#[derive(Debug, Clone)]
pub(crate) struct LowRank {
    /// `[r, in]`.
    pub(crate) a: Tensor,
    /// `[out, r]`.
    pub(crate) b: Tensor,
    pub(crate) scale: f64,
    dropout: Option<Dropout>,
}

/// Dropout on the inputs in training.
#[derive(Debug, Clone, Copy)]
struct Dropout {
    rate: f64,
    seed: Seed,
}

impl LowRank {
    pub(super) fn new(a: Tensor, b: Tensor, scale: f64) -> Self {
        Self {
            a,
            b,
            scale,
            dropout: None,
        }
    }

    /// Enables input dropout with masks determined by the seed.
    pub(super) fn set_dropout(&mut self, rate: f64, seed: Seed) {
        self.dropout = (rate > 0.0).then_some(Dropout { rate, seed });
    }

    /// Whether inputs are dropped out.
    pub(crate) fn has_dropout(&self) -> bool {
        self.dropout.is_some()
    }

    /// Factors and scale of the adapter, without dropout.
    pub(crate) fn params(&self) -> kernels::LowRankParams {
        kernels::LowRankParams {
            a: self.a.clone(),
            b: self.b.clone(),
            scale: self.scale as f32,
        }
    }

    /// The update for rows `x` `[N, in]`: `[N, out]`, in the dtype of `x`; products are in this precision.
    pub(crate) fn forward(&self, x: &Tensor, precision: Precision) -> candle_core::Result<Tensor> {
        let dtype = x.dtype();
        let mut x = x.to_dtype(self.a.dtype())?;
        if let Some(dropout) = &self.dropout {
            x = (&x * dropout.mask(&x)?)?;
        }
        let low = (kernels::linear(&x, &self.a, precision)? * self.scale)?;
        kernels::linear(&low, &self.b, precision)?.to_dtype(dtype)
    }
}

impl Dropout {
    /// Inverted-dropout mask: zeros at the dropout rate, 1 / (1 − rate) elsewhere.
    fn mask(&self, like: &Tensor) -> candle_core::Result<Tensor> {
        let mut random = ChaCha8Rng::seed_from_u64(self.seed.0);
        let scale = (1.0 / (1.0 - self.rate)) as f32;
        let mask: Vec<f32> = (0..like.elem_count())
            .map(|_| {
                if random.random::<f64>() < self.rate {
                    0.0
                } else {
                    scale
                }
            })
            .collect();
        debug_assert_eq!(like.dtype(), DType::F32, "adapters are f32");
        Tensor::from_vec(mask, like.shape(), like.device())
    }
}
