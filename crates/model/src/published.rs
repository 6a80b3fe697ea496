//! Weights that a learner publishes as one blob: the policy's, and those of the models that it moves with the policy.
//!
//! One blob has one version and one digest, so that a policy is never paired with the reference of another version.
//! Without further models the blob is that of the policy alone.

use std::collections::HashMap;

use candle_core::{DType, Tensor};

use crate::{
    error::ModelError,
    transformer::LanguageModel,
    weights::{Weights, not_safetensors},
};

/// Beginning of the names of a reference's tensors; names of models have no slash.
const REFERENCE: &str = "reference/";
/// Beginning of the names of an earlier reference's tensors.
const EARLIER_REFERENCE: &str = "earlier_reference/";
/// Beginning of the names of an average's tensors.
const AVERAGE: &str = "average/";

/// Trained weights of the models that are published together; all have the same names and shapes.
#[derive(Debug)]
pub struct PublishedWeights<'a> {
    /// Policy.
    pub policy: &'a Weights,
    /// Reference; `None` as long as it is the one with which the run began.
    pub reference: Option<&'a Weights>,
    /// Reference before it became a copy of this policy, where the policy is to be evaluated against it.
    pub earlier_reference: Option<&'a Weights>,
    /// Moving average of the policy, where it is to be evaluated.
    pub average: Option<&'a Weights>,
}

/// Models of a blob.
#[derive(Debug, Clone)]
pub struct PublishedModels {
    /// Policy.
    pub policy: LanguageModel,
    /// Reference; `None` as long as it is the one with which the run began.
    pub reference: Option<LanguageModel>,
    /// Reference before it became a copy of the policy, if it was published.
    pub earlier_reference: Option<LanguageModel>,
    /// Moving average of the policy, if it was published.
    pub average: Option<LanguageModel>,
}

impl PublishedWeights<'_> {
    /// Serialises all weights in `dtype` as one safetensors file. Equal weights give equal bytes.
    ///
    /// # Errors
    /// When a tensor cannot be read from its device.
    pub fn to_blob(&self, dtype: DType) -> Result<Vec<u8>, ModelError> {
        let mut all = self.policy.clone();
        for (prefix, weights) in [
            (REFERENCE, self.reference),
            (EARLIER_REFERENCE, self.earlier_reference),
            (AVERAGE, self.average),
        ] {
            let tensors = weights.into_iter().flat_map(|weights| &weights.tensors);
            let tensors = tensors.map(|(name, tensor)| (format!("{prefix}{name}"), tensor.clone()));
            all.tensors.extend(tensors);
        }
        all.to_dtype(dtype)?.to_blob()
    }
}

impl LanguageModel {
    /// The models of a blob that [`PublishedWeights::to_blob`] made of models like this one. Frozen weights are shared.
    ///
    /// # Errors
    /// When the blob is truncated or does not match the model.
    pub fn read_published(&self, blob: &[u8]) -> Result<PublishedModels, ModelError> {
        let tensors =
            candle_core::safetensors::load_buffer(blob, self.device()).map_err(|error| {
                ModelError::Weights {
                    reason: not_safetensors(&error),
                }
            })?;
        let (reference, tensors) = with_prefix(REFERENCE, tensors);
        let (earlier_reference, tensors) = with_prefix(EARLIER_REFERENCE, tensors);
        let (average, policy) = with_prefix(AVERAGE, tensors);
        let further = |tensors: HashMap<String, Tensor>| match tensors.is_empty() {
            true => Ok(None),
            false => self.published(tensors).map(Some),
        };
        Ok(PublishedModels {
            policy: self.published(policy)?,
            reference: further(reference)?,
            earlier_reference: further(earlier_reference)?,
            average: further(average)?,
        })
    }

    fn published(&self, tensors: HashMap<String, Tensor>) -> Result<Self, ModelError> {
        let shapes = self.trained().shapes().into_iter().collect();
        self.with_trained(Weights::checked(tensors, shapes, self.trained_dtype())?)
    }
}

/// The tensors whose names begin with `prefix`, by the rest of their names; and the others.
fn with_prefix(
    prefix: &str,
    tensors: HashMap<String, Tensor>,
) -> (HashMap<String, Tensor>, HashMap<String, Tensor>) {
    let (with, without): (HashMap<_, _>, _) = tensors
        .into_iter()
        .partition(|(name, _)| name.starts_with(prefix));
    let with = with.into_iter();
    let with = with.map(|(name, tensor)| (name[prefix.len()..].to_owned(), tensor));
    (with.collect(), without)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use messages::Seed;

    use super::*;
    use crate::{
        fixtures::tiny_model,
        lora::{Adapter, LoraConfig},
    };

    fn digest(model: &LanguageModel) -> String {
        model.trained().digest().unwrap().to_string()
    }

    fn adapted(base: &LanguageModel, seed: u64) -> LanguageModel {
        let config = LoraConfig::new(2, 4.0, 0.0, &["all-linear".into()]);
        let adapter = Adapter::fresh(config, base.config(), Seed(seed), &Device::Cpu).unwrap();
        base.with_adapter(adapter).unwrap()
    }

    #[test]
    fn every_part_of_a_blob_is_read_back() {
        let base = tiny_model(7, 9);
        let whole = [1, 2, 3].map(|seed| tiny_model(7, seed));
        let adapters = [1, 2, 3].map(|seed| adapted(&base, seed));
        for (models, reader) in [(whole, tiny_model(7, 4)), (adapters, adapted(&base, 4))] {
            let [policy, reference, average] = &models;
            for (with_reference, with_average) in
                [(false, false), (true, false), (false, true), (true, true)]
            {
                let weights = PublishedWeights {
                    policy: policy.trained(),
                    reference: with_reference.then(|| reference.trained()),
                    earlier_reference: with_reference.then(|| average.trained()),
                    average: with_average.then(|| average.trained()),
                };
                let read = reader
                    .read_published(&weights.to_blob(DType::F32).unwrap())
                    .unwrap();
                assert_eq!(digest(&read.policy), digest(policy));
                let expected = with_reference.then(|| digest(reference));
                assert_eq!(read.reference.as_ref().map(digest), expected);
                let expected = with_reference.then(|| digest(average));
                assert_eq!(read.earlier_reference.as_ref().map(digest), expected);
                let expected = with_average.then(|| digest(average));
                assert_eq!(read.average.as_ref().map(digest), expected);
            }
        }
    }

    #[test]
    fn a_policy_alone_is_published_as_before() {
        let policy = tiny_model(7, 1);
        let alone = PublishedWeights {
            policy: policy.trained(),
            reference: None,
            earlier_reference: None,
            average: None,
        };
        let blob = alone.to_blob(DType::F32).unwrap();
        assert_eq!(blob, policy.weights().to_blob().unwrap());
        let half = alone.to_blob(DType::BF16).unwrap();
        let rounded = policy.weights().to_dtype(DType::BF16).unwrap();
        assert_eq!(half, rounded.to_blob().unwrap());
    }

    #[test]
    fn incomplete_and_unknown_parts_are_refused() {
        let policy = tiny_model(7, 1);
        let refused = |blob: &[u8]| policy.read_published(blob).unwrap_err().to_string();
        let mut fewer = policy.weights().clone();
        fewer.tensors.remove("model.norm.weight");
        let blob = |reference: &Weights| {
            let weights = PublishedWeights {
                policy: policy.trained(),
                reference: Some(reference),
                earlier_reference: None,
                average: None,
            };
            weights.to_blob(DType::F32).unwrap()
        };
        assert!(refused(&blob(&fewer)).contains("model.norm.weight of shape [16] is missing"));
        let whole = blob(policy.weights());
        assert!(refused(&whole[..whole.len() - 4]).contains("truncated"));
        let mut unknown = policy.weights().clone();
        let tensor = unknown.get("model.norm.weight").unwrap();
        unknown
            .tensors
            .insert("other/model.norm.weight".into(), tensor);
        assert!(refused(&unknown.to_blob().unwrap()).contains("unexpected tensor other/"));
    }
}
