//! Low-rank adapters (LoRA, Hu et al. 2021, eq. 3): `W·x + s·B·A·x` beside weights that stay as they are.
//!
//! An adapter is a short list of small tensors under PEFT's names. It is what is trained, published,
//! digested and saved in place of the whole weights, and a folder of it is PEFT's. A model without its
//! adapter is its base, in the same copy of the weights; so is one whose B is zero, to the last bit.
//! Who trains it, and what against, it does not know.

mod base_model;
mod config;
mod folder;
mod low_rank;
mod merge;
mod pattern;
mod targets;

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

use crate::{LanguageModel, ModelConfig, ModelError, Weights};

/// An adapter of one model. Clones share the tensors, which are f32 whatever the model's are.
#[derive(Debug, Clone)]
pub struct Adapter {
    config: LoraConfig,
    weights: Weights,
}

impl Adapter {
    /// A fresh adapter for models of this shape, as PEFT begins: A uniform within 1/√in (Kaiming's with
    /// a = √5), from `seed` alone, and B zero, so that it changes nothing yet.
    ///
    /// # Errors
    /// When the model has no such modules, one that is named among others too, or the device cannot hold it.
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
            let numbers: Vec<f32> = if name.ends_with(config::A) {
                (0..rows * width)
                    .map(|_| bound * (2.0 * random.random::<f32>() - 1.0))
                    .collect()
            } else {
                vec![0.0; rows * width]
            };
            tensors.insert(name, Tensor::from_vec(numbers, (rows, width), device)?);
        }
        Ok(Self {
            config,
            weights: Weights { tensors },
        })
    }

    /// How it is shaped and scaled.
    #[must_use]
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// Its tensors under PEFT's names.
    #[must_use]
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// The same, saved with this name of its base.
    #[must_use]
    pub fn with_base_model(mut self, base_model: BaseModel) -> Self {
        self.config.base_model = base_model;
        self
    }

    /// The same with dropout at this rate in training.
    #[must_use]
    pub fn with_dropout(mut self, rate: f64) -> Self {
        self.config.dropout = rate;
        self
    }

    /// The same adapter with the tensors of a blob, as [`Weights::to_blob`] writes them.
    fn with_blob(
        &self,
        blob: &[u8],
        base: &ModelConfig,
        device: &Device,
    ) -> Result<Self, ModelError> {
        let expected = self.config.tensors(base)?;
        Ok(Self {
            config: self.config.clone(),
            weights: Weights::from_blob_of(blob, expected, DType::F32, device)?,
        })
    }

    /// What it adds to one of its modules.
    fn low_rank(&self, module: &AdaptedModule) -> Result<LowRank, ModelError> {
        let tensor = |part: &str| {
            let name = config::tensor_name(&module.map.name, part);
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
    /// The same weights, not copied, beside this adapter in place of any other.
    ///
    /// # Errors
    /// When the adapter is for models of another shape.
    pub fn with_adapter(&self, adapter: Adapter) -> Result<Self, ModelError> {
        config::fits(
            &adapter.weights.shapes(),
            &adapter.config.tensors(self.config())?,
        )?;
        let modules = adapter.config.modules(self.config())?;
        let mut adapted = self.clone();
        for (name, linear) in adapted.linears_mut() {
            let module = modules.iter().find(|module| module.map.name == name);
            linear.low_rank = module.map(|module| adapter.low_rank(module)).transpose()?;
        }
        adapted.adapter = Some(adapter);
        Ok(adapted)
    }

    /// The same weights, not copied, and no adapter.
    #[must_use]
    pub fn without_adapter(&self) -> Self {
        let mut base = self.clone();
        for (_, linear) in base.linears_mut() {
            linear.low_rank = None;
        }
        base.adapter = None;
        base
    }

    /// The same model as training runs it: the adapter's dropout is drawn from `seed`, a mask a module.
    /// Without dropout it is the model as it is.
    #[must_use]
    pub fn dropping(&self, seed: Seed) -> Self {
        let mut dropping = self.clone();
        let Some(rate) = self.adapter.as_ref().map(|adapter| adapter.config.dropout) else {
            return dropping;
        };
        for (index, (_, linear)) in dropping.linears_mut().into_iter().enumerate() {
            if let Some(low_rank) = &mut linear.low_rank {
                low_rank.drop_out(rate, seed.derive(index as u64));
            }
        }
        dropping
    }

    /// The adapter, where there is one.
    #[must_use]
    pub fn adapter(&self) -> Option<&Adapter> {
        self.adapter.as_ref()
    }

    /// The tensors that training moves, and that travel: the adapter's where there is one, else all.
    #[must_use]
    pub fn trained(&self) -> &Weights {
        match &self.adapter {
            Some(adapter) => &adapter.weights,
            None => self.weights(),
        }
    }

    /// The same model with [`Self::trained`] copied, to be differentiated and moved, and its variables
    /// for an [`crate::Optimizer`]. What is not trained is shared.
    ///
    /// # Errors
    /// When the device cannot hold them.
    pub fn trainable(&self) -> Result<(Self, BTreeMap<String, Var>), ModelError> {
        let (weights, vars) = self.trained().trainable()?;
        Ok((self.with_trained(weights)?, vars))
    }

    /// The same model with the tensors of a blob that [`Weights::to_blob`] wrote of [`Self::trained`].
    ///
    /// # Errors
    /// When the blob is torn or belongs to another model.
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
