//! Weights that a learner publishes together: the policy's, and those of the models that it moves with the policy.
//!
//! They have one version, so that a policy is never paired with the reference of another version. Readers in the same
//! process share the tensors; between processes they travel as one blob, which without further models is that of the
//! policy alone.

use std::{collections::BTreeMap, sync::Arc};

use candle_core::{DType, Device, Tensor};
use kernels::Precision;
use messages::StoredWeights;

use crate::{
    error::ModelError,
    transformer::LanguageModel,
    weights::{HeadForm, Weights, not_safetensors},
};

/// Beginning of the names of a reference's tensors; names of models have no slash.
const REFERENCE: &str = "reference/";
/// Beginning of the names of an earlier reference's tensors.
const EARLIER_REFERENCE: &str = "earlier_reference/";
/// Beginning of the names of an average's tensors.
const AVERAGE: &str = "average/";

/// Form in which trained weights are published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PublishedForm {
    /// Tensors of this dtype.
    Tensors(DType),
    /// Packed in this precision, as decoders of the same process read them; an adapter's weights are tensors in f32.
    Packed(Precision),
}

/// What is published together, of each model: its trained weights, or for a reader the model itself.
#[derive(Debug, Clone)]
pub struct Published<T> {
    /// Policy.
    pub policy: T,
    /// Reference; `None` as long as it is the one with which the run began.
    pub reference: Option<T>,
    /// Reference before it became a copy of this policy, where the policy is to be evaluated against it.
    pub earlier_reference: Option<T>,
    /// Moving average of the policy, where it is to be evaluated.
    pub average: Option<T>,
}

/// Trained weights of the models that are published together; all have the same names and shapes.
pub type PublishedWeights = Published<Weights>;

impl<T> Published<T> {
    /// A policy without further models.
    pub const fn alone(policy: T) -> Self {
        Self {
            policy,
            reference: None,
            earlier_reference: None,
            average: None,
        }
    }

    /// The same models in another form.
    fn try_map<U, E>(&self, form: impl Fn(&T) -> Result<U, E>) -> Result<Published<U>, E> {
        let further = |model: &Option<T>| model.as_ref().map(&form).transpose();
        Ok(Published {
            policy: form(&self.policy)?,
            reference: further(&self.reference)?,
            earlier_reference: further(&self.earlier_reference)?,
            average: further(&self.average)?,
        })
    }
}

impl PublishedWeights {
    /// Size of all tensors in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let further = self
            .further()
            .into_iter()
            .filter_map(|(_, weights)| weights);
        let all = std::iter::once(&self.policy).chain(further);
        all.map(Weights::bytes).sum()
    }

    fn further(&self) -> [(&'static str, Option<&Weights>); 3] {
        [
            (REFERENCE, self.reference.as_ref()),
            (EARLIER_REFERENCE, self.earlier_reference.as_ref()),
            (AVERAGE, self.average.as_ref()),
        ]
    }
}

/// One safetensors file of all models.
impl StoredWeights for PublishedWeights {
    fn into_blob(self: Arc<Self>) -> Result<Vec<u8>, String> {
        let mut all = self.policy.clone();
        for (prefix, weights) in self.further() {
            for entry in weights.into_iter().flat_map(Weights::entries) {
                let (name, tensor) = entry.map_err(|error| error.to_string())?;
                all.tensors.insert(format!("{prefix}{name}"), tensor);
            }
        }
        all.to_blob().map_err(|error| error.to_string())
    }

    fn from_blob(blob: Arc<Vec<u8>>) -> Result<Self, String> {
        let tensors = candle_core::safetensors::load_buffer(&blob, &Device::Cpu);
        let mut rest: BTreeMap<String, Tensor> = tensors
            .map_err(|error| not_safetensors(&error))?
            .into_iter()
            .collect();
        let [reference, earlier_reference, average] =
            [REFERENCE, EARLIER_REFERENCE, AVERAGE].map(|prefix| take_prefixed(prefix, &mut rest));
        Ok(Self {
            policy: Weights::of(rest),
            reference,
            earlier_reference,
            average,
        })
    }
}

impl LanguageModel {
    /// A copy of the trained weights in this form, which changes with no step that changes these weights in place.
    ///
    /// # Errors
    /// When the device cannot hold it.
    pub fn copied(&self, form: PublishedForm) -> Result<Weights, ModelError> {
        match (form, self.adapter()) {
            (PublishedForm::Tensors(dtype), _) => self.trained().copied(dtype),
            (PublishedForm::Packed(_), Some(_)) => self.trained().copied(DType::F32),
            (PublishedForm::Packed(precision), None) => {
                let weights = self.weights().clone();
                let mut weights = weights.packed_in(self.config(), precision, HeadForm::Packed)?;
                for tensor in weights.tensors.values_mut() {
                    *tensor = tensor.copy()?;
                }
                Ok(weights)
            }
        }
    }

    /// The models of weights that were published of models like this one. Frozen weights and, on the same device and in the
    /// same dtype, the published ones are shared.
    ///
    /// # Errors
    /// When the weights do not match the model.
    pub fn with_published(
        &self,
        weights: &PublishedWeights,
    ) -> Result<Published<Self>, ModelError> {
        weights.try_map(|weights| self.published(weights))
    }

    fn published(&self, weights: &Weights) -> Result<Self, ModelError> {
        let shapes = self.trained().shapes().into_iter().collect();
        if weights.packed_precision().is_some() {
            return self.with_trained(weights.subset(shapes)?);
        }
        let tensors = weights.tensors.iter();
        let tensors = tensors
            .map(|(name, tensor)| Ok((name.clone(), tensor.to_device(self.device())?)))
            .collect::<Result<_, candle_core::Error>>()?;
        self.with_trained(Weights::checked(tensors, shapes, self.trained_dtype())?)
    }
}

/// Takes out the tensors whose names begin with `prefix`, by the rest of their names; `None` if there are none.
fn take_prefixed(prefix: &str, tensors: &mut BTreeMap<String, Tensor>) -> Option<Weights> {
    let prefixed = tensors.extract_if(.., |name, _| name.starts_with(prefix));
    let taken: BTreeMap<String, Tensor> = prefixed
        .map(|(name, tensor)| (name[prefix.len()..].to_owned(), tensor))
        .collect();
    (!taken.is_empty()).then(|| Weights::of(taken))
}

#[cfg(test)]
mod tests {
    use messages::Seed;

    use super::*;
    use crate::{
        fixtures::tiny_model,
        lora::{Adapter, LoraConfig},
        ragged::Sequence,
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
                    policy: policy.trained().clone(),
                    reference: with_reference.then(|| reference.trained().clone()),
                    earlier_reference: with_reference.then(|| average.trained().clone()),
                    average: with_average.then(|| average.trained().clone()),
                };
                let sent = PublishedWeights::from_blob(Arc::new(blob(&weights))).unwrap();
                assert_eq!(sent.bytes(), weights.bytes());
                for weights in [&weights, &sent] {
                    let read = reader.with_published(weights).unwrap();
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
    }

    fn blob(weights: &PublishedWeights) -> Vec<u8> {
        Arc::new(weights.clone()).into_blob().unwrap()
    }

    #[test]
    fn the_blob_of_a_policy_alone_is_that_of_its_weights() {
        let policy = tiny_model(7, 1);
        let blob = blob(&Published::alone(policy.weights().clone()));
        assert_eq!(blob, policy.weights().to_blob().unwrap());
    }

    /// A model of published weights reads the published tensors themselves.
    #[test]
    fn models_share_the_published_weights() {
        let (published, reader) = (tiny_model(7, 1), tiny_model(7, 2));
        let models = reader.with_published(&Published::alone(published.weights().clone()));
        assert!(
            models
                .unwrap()
                .policy
                .weights()
                .are_shared_with(published.weights())
        );
    }

    /// Steps in place change the policy and not what was copied from it, in any form.
    #[test]
    fn a_copy_shares_nothing_with_weights_in_training() {
        for form in [
            PublishedForm::Tensors(DType::F32),
            PublishedForm::Tensors(DType::BF16),
            PublishedForm::Packed(Precision::F32),
            PublishedForm::Packed(Precision::Bf16),
        ] {
            let (trained, vars) = tiny_model(7, 1).trainable().unwrap();
            let copy = trained.copied(form).unwrap();
            let digest = copy.digest().unwrap();
            if let PublishedForm::Tensors(dtype) = form {
                let count = trained.weights().parameter_count();
                assert_eq!(copy.bytes(), (count * dtype.size_in_bytes()) as u64);
            }
            for var in vars.values() {
                var.set(&var.zeros_like().unwrap()).unwrap();
            }
            assert!(copy.tensors.values().all(|tensor| !tensor.track_op()));
            assert_eq!(copy.digest().unwrap(), digest, "{form:?}");
        }
    }

    /// A reader of packed weights computes what a reader of the tensors computes in that precision, from the same panels.
    #[test]
    fn packed_weights_are_read_as_they_are() {
        let (policy, reader) = (tiny_model(7, 1), tiny_model(7, 2));
        let sequence = Sequence {
            prompt: &[0, 3, 4],
            completion: &[2, 6, 1],
        };
        let logp = |model: &LanguageModel| -> Vec<f32> {
            model.logprobs(&[sequence]).unwrap().logp.to_vec1().unwrap()
        };
        for precision in [Precision::F32, Precision::Bf16] {
            let weights = policy.copied(PublishedForm::Packed(precision)).unwrap();
            let read = reader.with_published(&Published::alone(weights.clone()));
            let read = read.unwrap().policy;
            assert_eq!(logp(&read), logp(&policy.with_precision(precision)));
            assert!(read.weights().are_shared_with(&weights));
            // A blob has all of it, also of further models, as it was rounded.
            let mut both = Published::alone(weights.clone());
            both.reference = Some(weights.clone());
            let sent = PublishedWeights::from_blob(Arc::new(blob(&both))).unwrap();
            for sent in [Some(&sent.policy), sent.reference.as_ref()] {
                assert_eq!(sent.unwrap().digest().unwrap(), weights.digest().unwrap());
            }
            let adapter = adapted(&policy, 4);
            let weights = adapter.copied(PublishedForm::Packed(precision)).unwrap();
            assert_eq!(weights.digest().unwrap().to_string(), digest(&adapter));
        }
    }

    #[test]
    fn incomplete_and_unknown_parts_are_refused() {
        let policy = tiny_model(7, 1);
        let refused = |weights: &PublishedWeights| {
            let refused = policy.with_published(weights);
            refused.unwrap_err().to_string()
        };
        let mut weights = Published::alone(policy.weights().clone());
        let mut fewer = policy.weights().clone();
        fewer.tensors.remove("model.norm.weight");
        weights.reference = Some(fewer);
        assert!(refused(&weights).contains("model.norm.weight of shape [16] is missing"));
        let mut unknown = policy.weights().clone();
        let tensor = unknown.get("model.norm.weight").unwrap();
        unknown
            .tensors
            .insert("other/model.norm.weight".into(), tensor);
        let sent = PublishedWeights::from_blob(Arc::new(unknown.to_blob().unwrap())).unwrap();
        assert!(refused(&sent).contains("unexpected tensor other/"));
        let whole = blob(&weights);
        let truncated = PublishedWeights::from_blob(Arc::new(whole[..whole.len() - 4].to_vec()));
        assert!(truncated.unwrap_err().contains("truncated"));
    }
}
