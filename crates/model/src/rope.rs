//! The tables of rotary position embedding (Su et al., RoFormer, arXiv 2104.09864).

use candle_core::{DType, Device, Tensor};

use crate::{ModelConfig, ModelError};

/// cos and sin for every position and frequency, both `[max_positions, head_dim / 2]`.
#[derive(Debug, Clone)]
pub(crate) struct RopeTable {
    cos: Tensor,
    sin: Tensor,
}

impl RopeTable {
    pub(crate) fn new(
        config: &ModelConfig,
        dtype: DType,
        device: &Device,
    ) -> Result<Self, ModelError> {
        let frequencies = frequencies(config);
        let shape = (config.max_positions, frequencies.len());
        let angles: Vec<f64> = (0..config.max_positions)
            .flat_map(|position| frequencies.iter().map(move |f| position as f64 * f))
            .collect();
        let table = |f: fn(f64) -> f64| -> Result<Tensor, ModelError> {
            let values: Vec<f64> = angles.iter().map(|&a| f(a)).collect();
            Ok(Tensor::from_vec(values, shape, &Device::Cpu)?
                .to_dtype(dtype)?
                .to_device(device)?)
        };
        Ok(Self {
            cos: table(f64::cos)?,
            sin: table(f64::sin)?,
        })
    }

    /// The rows of the first `count` positions, or of all there are: cos and sin, `head_dim / 2` numbers a
    /// position.
    pub(crate) fn rows(&self, count: usize) -> candle_core::Result<(Vec<f32>, Vec<f32>)> {
        let count = count.min(self.cos.dim(0)?);
        let rows = |table: &Tensor| {
            let rows = table.narrow(0, 0, count)?.to_dtype(DType::F32)?;
            rows.flatten_all()?.to_vec1()
        };
        Ok((rows(&self.cos)?, rows(&self.sin)?))
    }

    /// The rows of these positions: cos and sin, both `[N, head_dim / 2]`.
    pub(crate) fn at(&self, positions: &Tensor) -> candle_core::Result<(Tensor, Tensor)> {
        Ok((
            self.cos.index_select(positions, 0)?,
            self.sin.index_select(positions, 0)?,
        ))
    }
}

/// Radians per position of every pair of dimensions; with Llama 3's scaling, long wavelengths are
/// stretched by `factor`, short ones kept, those between blended.
fn frequencies(config: &ModelConfig) -> Vec<f64> {
    let dim = config.head_dim as f64;
    let plain = (0..config.head_dim)
        .step_by(2)
        .map(|i| config.rope_theta.powf(-(i as f64) / dim));
    let Some(scaling) = &config.rope_scaling else {
        return plain.collect();
    };
    let factor = f64::from(scaling.factor);
    let (low, high) = (
        f64::from(scaling.low_freq_factor),
        f64::from(scaling.high_freq_factor),
    );
    let original = scaling.original_max_position_embeddings as f64;
    plain
        .map(|f| {
            let turns = original * f / std::f64::consts::TAU;
            if turns > high {
                f
            } else if turns < low {
                f / factor
            } else {
                let smooth = (turns - low) / (high - low);
                (1.0 - smooth) * f / factor + smooth * f
            }
        })
        .collect()
}
