//! Merging an adapter into the base weights.

use candle_core::DType;

use crate::lora::config;
use crate::{error::ModelError, transformer::LanguageModel, weights::Weights};

impl LanguageModel {
    /// All weights in f32 with the adapter merged in: `W + s·B·A`. The sum is f32, since small updates would vanish in
    /// half precision.
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
            let tensor = merged
                .tensors
                .get_mut(&config::base_name(&module.layer.name));
            let tensor = tensor.expect("an adapter that fits names modules of the model");
            let update = (low_rank.b.matmul(&low_rank.a)? * low_rank.scale)?;
            *tensor = (&*tensor + update)?;
        }
        Ok(merged)
    }
}
