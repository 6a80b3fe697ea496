//! Low-rank adapters (LoRA, Hu et al. 2021, eq. 3): `W·x + s·B·A·x` with frozen base weights `W`.
//!
//! An adapter is a set of small tensors under PEFT's names, which are trained, published, digested and saved instead of
//! the full weights, in PEFT's folder layout. A model without its adapter is its base and shares the same weights; an
//! adapter whose B is zero leaves every bit of the output unchanged. Does not know objectives or optimisers.

mod base_model;
mod config;
mod folder;
mod low_rank;
mod merge;
mod pattern;
mod targets;
mod tokenizer_files;

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor, Var};
use messages::Seed;
use rand::Rng;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};

pub use base_model::BaseModel;
use config::AdaptedModule;
pub use config::LoraConfig;
pub use folder::{AdapterFolder, open_policy, save_policy};
pub(crate) use folder::{ClassifierHead, save_adapter};
pub(crate) use low_rank::LowRank;

use crate::{config::ModelConfig, error::ModelError, transformer::LanguageModel, weights::Weights};

/// A LoRA adapter. Clones share the tensors, which are f32 whatever the dtype of the model.
#[derive(Debug, Clone)]
pub struct Adapter {
    config: LoraConfig,
    weights: Weights,
}

impl Adapter {
    /// A newly initialised adapter for models of this configuration, as in PEFT: A uniform in ±1/√in (Kaiming uniform
    /// with a = √5), determined by `seed`, and B zero, so that the output is unchanged.
    ///
    /// # Errors
    /// When a target module does not exist in the model, or the device cannot hold the adapter.
    pub fn fresh(
        config: LoraConfig,
        base: &ModelConfig,
        seed: Seed,
        device: &Device,
    ) -> Result<Self, ModelError> {
        config.check_targets(base)?;
        let mut tensors = BTreeMap::new();
        for (index, (name, shape)) in config.tensors(base)?.into_iter().enumerate() {
            let (rows, width) = (shape[0], shape[1]);
            let mut random = ChaCha8Rng::seed_from_u64(seed.derive(index as u64).0);
            let bound = 1.0 / (width as f32).sqrt();
            let values: Vec<f32> = if name.ends_with(config::A) {
                (0..rows * width)
                    .map(|_| bound * (2.0 * random.random::<f32>() - 1.0))
                    .collect()
            } else {
                vec![0.0; rows * width]
            };
            tensors.insert(name, Tensor::from_vec(values, (rows, width), device)?);
        }
        Ok(Self {
            config,
            weights: Weights::of(tensors),
        })
    }

    /// LoRA configuration.
    #[must_use]
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// Tensors by their names in PEFT.
    #[must_use]
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Sets the name of the base model that is saved with the adapter.
    #[must_use]
    pub fn with_base_model(mut self, base_model: BaseModel) -> Self {
        self.config.base_model = base_model;
        self
    }

    /// Sets the dropout rate in training.
    #[must_use]
    pub fn with_dropout(mut self, rate: f64) -> Self {
        self.config.dropout = rate;
        self
    }

    /// The adapter with tensors from a blob of [`Weights::to_blob`].
    fn with_blob(
        &self,
        blob: &[u8],
        base: &ModelConfig,
        device: &Device,
    ) -> Result<Self, ModelError> {
        let expected = self.config.tensors(base)?;
        Ok(Self {
            config: self.config.clone(),
            weights: Weights::from_blob_with_shapes(blob, expected, DType::F32, device)?,
        })
    }

    /// The low-rank update of one module.
    fn low_rank(&self, module: &AdaptedModule) -> Result<LowRank, ModelError> {
        let tensor = |factor: &str| {
            let name = config::tensor_name(&module.layer.name, factor);
            self.weights.get(&name)
        };
        Ok(LowRank::new(
            tensor(config::A)?,
            tensor(config::B)?,
            module.scale,
        ))
    }
}

impl LanguageModel {
    /// The same weights, not copied, with this adapter in place of any other.
    ///
    /// # Errors
    /// When the adapter does not match the model.
    pub fn with_adapter(&self, adapter: Adapter) -> Result<Self, ModelError> {
        config::check_shapes(
            &adapter.weights.shapes(),
            &adapter.config.tensors(self.config())?,
        )?;
        let modules = adapter.config.modules(self.config())?;
        let mut adapted = self.clone();
        for (name, linear) in adapted.linears_mut() {
            let module = modules.iter().find(|module| module.layer.name == name);
            linear.low_rank = module.map(|module| adapter.low_rank(module)).transpose()?;
        }
        adapted.adapter = Some(adapter);
        Ok(adapted)
    }

    /// The same weights, not copied, without an adapter.
    #[must_use]
    pub fn without_adapter(&self) -> Self {
        let mut base = self.clone();
        for (_, linear) in base.linears_mut() {
            linear.low_rank = None;
        }
        base.adapter = None;
        base
    }

    /// The model with its adapter's B set to zero, with which the adapter changes nothing. Without an adapter the model is
    /// unchanged.
    ///
    /// # Errors
    /// When the device cannot hold it.
    pub fn with_neutral_adapter(&self) -> Result<Self, ModelError> {
        let Some(adapter) = &self.adapter else {
            return Ok(self.clone());
        };
        let neutral = |(name, tensor): (&String, &Tensor)| {
            let tensor = match name.ends_with(config::B) {
                true => tensor.zeros_like()?,
                false => tensor.detach(),
            };
            Ok((name.clone(), tensor))
        };
        let tensors = adapter.weights.tensors.iter().map(neutral);
        self.with_trained(Weights::of(
            tensors.collect::<Result<_, candle_core::Error>>()?,
        ))
    }

    /// The model in training mode: the adapter's dropout masks, one per module, are drawn from `seed`. Without dropout
    /// the model is unchanged.
    #[must_use]
    pub fn with_dropout_seed(&self, seed: Seed) -> Self {
        let mut model = self.clone();
        let Some(rate) = self.adapter.as_ref().map(|adapter| adapter.config.dropout) else {
            return model;
        };
        for (index, (_, linear)) in model.linears_mut().into_iter().enumerate() {
            if let Some(low_rank) = &mut linear.low_rank {
                low_rank.set_dropout(rate, seed.derive(index as u64));
            }
        }
        model
    }

    /// The adapter, if any.
    #[must_use]
    pub fn adapter(&self) -> Option<&Adapter> {
        self.adapter.as_ref()
    }

    /// The trained and published tensors: the adapter's if there is one, otherwise all weights.
    #[must_use]
    pub fn trained(&self) -> &Weights {
        match &self.adapter {
            Some(adapter) => &adapter.weights,
            None => self.weights(),
        }
    }

    /// The model with a copy of [`Self::trained`] as variables, and these variables by name for an
    /// [`crate::Optimizer`]. Frozen weights are shared.
    ///
    /// # Errors
    /// When the device cannot hold them.
    pub fn trainable(&self) -> Result<(Self, BTreeMap<String, Var>), ModelError> {
        let (weights, vars) = self.trained().trainable()?;
        Ok((self.with_trained(weights)?, vars))
    }

    /// The model with trained tensors from a blob that [`Weights::to_blob`] made of [`Self::trained`].
    ///
    /// # Errors
    /// When the blob is truncated or does not match the model.
    pub fn with_blob(&self, blob: &[u8]) -> Result<Self, ModelError> {
        let (config, device) = (self.config(), self.device());
        match &self.adapter {
            Some(adapter) => self.with_adapter(adapter.with_blob(blob, config, device)?),
            None => {
                let weights = Weights::from_blob(blob, config, self.dtype(), device)?;
                Self::new(config.clone(), weights)
            }
        }
    }

    /// The model with these trained tensors.
    pub(crate) fn with_trained(&self, weights: Weights) -> Result<Self, ModelError> {
        match &self.adapter {
            Some(adapter) => self.with_adapter(Adapter {
                config: adapter.config.clone(),
                weights,
            }),
            None => Self::new(self.config().clone(), weights),
        }
    }
}

#[cfg(test)]
mod tests;
