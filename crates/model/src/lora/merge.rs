//! An adapter laid into the weights it stands beside.

use candle_core::DType;

use super::config;
use crate::{LanguageModel, ModelError, Weights};

impl LanguageModel {
    /// All weights in f32, the adapter's products added to those it stands beside: `W + s·B·A`. The sum
    /// is taken in f32, for a small update vanishes in half precision.
    ///
    /// # Errors
    /// When the device cannot hold them.
    pub fn merged(&self) -> Result<Weights, ModelError> {
        let mut merged = self.weights().to_dtype(DType::F32)?;
        let Some(adapter) = self.adapter() else {
            return Ok(merged);
        };
        for module in adapter.config().modules(self.config())? {
            let low_rank = adapter.low_rank(&module)?;
            let tensor = merged.tensors.get_mut(&config::base_name(&module.map.name));
            let tensor = tensor.expect("an adapter that fits names modules of the model");
            let update = (low_rank.b.matmul(&low_rank.a)? * low_rank.scale)?;
            *tensor = (&*tensor + update)?;
        }
        Ok(merged)
    }
}
