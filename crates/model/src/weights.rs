//! Named tensors: read from a folder or a blob, checked against a configuration, written again.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
};

use candle_core::{DType, Device, Tensor, Var};
use messages::{Digest, Seed};
use rand::Rng;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};

use crate::{
    ModelConfig, ModelError,
    shards::{Shards, Wanted},
};

/// The tensors of a model under their names in the folder, in the order of the names.
#[derive(Debug, Clone)]
pub struct Weights {
    pub(crate) tensors: BTreeMap<String, Tensor>,
}

impl Weights {
    /// The shapes of all tensors, by their names.
    pub(crate) fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        let tensors = self.tensors.iter();
        tensors
            .map(|(name, tensor)| (name.clone(), tensor.dims().to_vec()))
            .collect()
    }

    /// Reads the single or sharded safetensors of `folder` as `dtype`.
    ///
    /// # Errors
    /// When a file is missing or torn, the weights are quantised, a tensor is missing or of another shape, or there
    /// is one that the model has no place for.
    pub fn load(
        folder: &Path,
        config: &ModelConfig,
        dtype: DType,
        device: &Device,
    ) -> Result<Self, ModelError> {
        Self::load_wanted(folder, &config.wanted(), dtype, device)
    }

    /// As [`Self::load`], the tensors that are wanted.
    pub(crate) fn load_wanted(
        folder: &Path,
        wanted: &Wanted,
        dtype: DType,
        device: &Device,
    ) -> Result<Self, ModelError> {
        let tensors = Shards::open(folder)?.read(wanted, dtype, device)?;
        Ok(Self { tensors })
    }

    /// Reads what [`Self::to_blob`] wrote.
    ///
    /// # Errors
    /// When the blob is torn or belongs to another configuration.
    pub fn from_blob(
        blob: &[u8],
        config: &ModelConfig,
        dtype: DType,
        device: &Device,
    ) -> Result<Self, ModelError> {
        Self::from_blob_of(blob, config.tensors(), dtype, device)
    }

    /// Tensors under these names, whatever they belong to.
    #[must_use]
    pub fn of(tensors: BTreeMap<String, Tensor>) -> Self {
        Self { tensors }
    }

    /// As [`Self::from_blob`], the tensors of these names and shapes.
    ///
    /// # Errors
    /// When the blob is torn, a tensor is missing or of another shape, or there is another one.
    pub fn from_blob_of(
        blob: &[u8],
        expected: Vec<(String, Vec<usize>)>,
        dtype: DType,
        device: &Device,
    ) -> Result<Self, ModelError> {
        let found = candle_core::safetensors::load_buffer(blob, device).map_err(|error| {
            ModelError::Weights {
                reason: torn(&error),
            }
        })?;
        Self::checked(found, expected, dtype)
    }

    /// Random weights for a model that is to be trained from nothing: normal with deviation
    /// 0.7/√fan-in for projections and 0.02 for the embedding, ones for norms, zeros for biases.
    ///
    /// # Errors
    /// When the device cannot hold them.
    pub fn initialise(
        config: &ModelConfig,
        seed: Seed,
        dtype: DType,
        device: &Device,
    ) -> Result<Self, ModelError> {
        let mut tensors = BTreeMap::new();
        for (index, (name, shape)) in config.tensors().into_iter().enumerate() {
            let mut random = ChaCha8Rng::seed_from_u64(seed.derive(index as u64).0);
            let count: usize = shape.iter().product();
            let values: Vec<f32> = match shape.as_slice() {
                [_] if name.ends_with("bias") => vec![0.0; count],
                [_] => vec![1.0; count],
                [_, fan_in] => {
                    let embedding = name == "model.embed_tokens.weight";
                    let deviation = if embedding {
                        0.02
                    } else {
                        0.7 / (*fan_in as f64).sqrt()
                    };
                    (0..count)
                        .map(|_| (normal(&mut random) * deviation) as f32)
                        .collect()
                }
                _ => unreachable!("a decoder's tensors have one or two dimensions"),
            };
            let tensor = Tensor::from_vec(values, shape, &Device::Cpu)?;
            tensors.insert(name, tensor.to_dtype(dtype)?.to_device(device)?);
        }
        Ok(Self { tensors })
    }

    fn checked(
        mut found: HashMap<String, Tensor>,
        expected: Vec<(String, Vec<usize>)>,
        dtype: DType,
    ) -> Result<Self, ModelError> {
        let mut tensors = BTreeMap::new();
        for (name, shape) in expected {
            let tensor = found.remove(&name).ok_or_else(|| ModelError::Weights {
                reason: format!("the tensor {name} of shape {shape:?} is missing"),
            })?;
            of_shape(&name, &tensor, &shape)?;
            tensors.insert(name, tensor.to_dtype(dtype)?);
        }
        match found.into_keys().min() {
            None => Ok(Self { tensors }),
            Some(stranger) => Err(ModelError::Weights {
                reason: format!("the model has no place for the tensor {stranger}"),
            }),
        }
    }

    /// The same weights as variables, copied, to be differentiated and trained.
    ///
    /// # Errors
    /// When the device cannot hold them.
    pub fn trainable(&self) -> Result<(Self, BTreeMap<String, Var>), ModelError> {
        let mut vars = BTreeMap::new();
        let mut tensors = BTreeMap::new();
        for (name, tensor) in &self.tensors {
            let var = Var::from_tensor(&tensor.copy()?)?;
            tensors.insert(name.clone(), var.as_tensor().clone());
            vars.insert(name.clone(), var);
        }
        Ok((Self { tensors }, vars))
    }

    /// The same weights in other numbers.
    ///
    /// # Errors
    /// When the device cannot hold them.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self, ModelError> {
        let converted =
            |(name, tensor): (&String, &Tensor)| Ok((name.clone(), tensor.to_dtype(dtype)?));
        let tensors = self.tensors.iter().map(converted);
        Ok(Self {
            tensors: tensors.collect::<Result<_, candle_core::Error>>()?,
        })
    }

    /// How many numbers they are.
    #[must_use]
    pub fn parameter_count(&self) -> usize {
        self.tensors.values().map(Tensor::elem_count).sum()
    }

    /// The weights as the bytes of one safetensors file. Equal weights give equal bytes.
    ///
    /// # Errors
    /// When a tensor cannot be read from its device.
    pub fn to_blob(&self) -> Result<Vec<u8>, ModelError> {
        self.to_blob_saying(&[])
    }

    /// As [`Self::to_blob`], with these words in the file's metadata, in this order.
    pub(crate) fn to_blob_saying(&self, words: &[(&str, String)]) -> Result<Vec<u8>, ModelError> {
        let on_cpu = self
            .tensors
            .iter()
            .map(|(name, tensor)| Ok((name.as_str(), tensor.to_device(&Device::Cpu)?)))
            .collect::<Result<Vec<_>, candle_core::Error>>()?;
        // One word: of several, the library's map would choose another order every time.
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let refused = |reason: String| ModelError::Weights { reason };
        let blob = safetensors::serialize(on_cpu, Some(metadata));
        let blob = blob.map_err(|error| refused(error.to_string()))?;
        if words.is_empty() {
            return Ok(blob);
        }
        with_words(&blob, words).ok_or_else(|| refused("its header is no JSON".into()))
    }

    /// The digest of [`Self::to_blob`].
    ///
    /// # Errors
    /// When a tensor cannot be read from its device.
    pub fn digest(&self) -> Result<Digest, ModelError> {
        Ok(Digest::of(&self.to_blob()?))
    }

    /// Whether every number is finite.
    ///
    /// # Errors
    /// When a tensor cannot be read from its device.
    pub fn is_finite(&self) -> Result<bool, ModelError> {
        for tensor in self.tensors.values() {
            if !crate::ops::squared_norm(tensor)?.is_finite() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The same tensors, not copied, as constants: nothing that is computed from them is differentiated
    /// in them.
    #[must_use]
    pub fn detached(&self) -> Self {
        let detached = |(name, tensor): (&String, &Tensor)| (name.clone(), tensor.detach());
        Self {
            tensors: self.tensors.iter().map(detached).collect(),
        }
    }

    /// The tensors of these names and shapes, not copied.
    ///
    /// # Errors
    /// When one is missing or of another shape.
    pub(crate) fn part(&self, expected: Vec<(String, Vec<usize>)>) -> Result<Self, ModelError> {
        let tensor = |(name, shape): (String, Vec<usize>)| {
            let tensor = self.get(&name)?;
            of_shape(&name, &tensor, &shape)?;
            Ok((name, tensor))
        };
        Ok(Self {
            tensors: expected
                .into_iter()
                .map(tensor)
                .collect::<Result<_, ModelError>>()?,
        })
    }

    /// These tensors and others, not copied.
    #[must_use]
    pub(crate) fn and(&self, others: &Self) -> Self {
        let mut both = self.clone();
        both.tensors.extend(others.tensors.clone());
        both
    }

    /// Whether they are of this type on this device.
    pub(crate) fn are(&self, dtype: DType, device: &Device) -> bool {
        let is = |tensor: &Tensor| tensor.dtype() == dtype && tensor.device().same_device(device);
        self.tensors.values().all(is)
    }

    /// The tensor of this name, not copied.
    ///
    /// # Errors
    /// When there is none.
    pub fn get(&self, name: &str) -> Result<Tensor, ModelError> {
        self.tensors
            .get(name)
            .cloned()
            .ok_or_else(|| ModelError::Weights {
                reason: format!("the tensor {name} is missing"),
            })
    }
}

fn of_shape(name: &str, tensor: &Tensor, shape: &[usize]) -> Result<(), ModelError> {
    if tensor.dims() == shape {
        return Ok(());
    }
    let found = tensor.dims();
    let reason = format!("{name} has shape {found:?}, the configuration says {shape:?}");
    Err(ModelError::Weights { reason })
}

/// One draw of the standard normal distribution (Box & Muller 1958).
pub(crate) fn normal(random: &mut ChaCha8Rng) -> f64 {
    let u: f64 = 1.0 - random.random::<f64>();
    let v: f64 = random.random();
    (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

pub(crate) fn torn(error: &candle_core::Error) -> String {
    format!("it is truncated or not a safetensors file ({error})")
}

#[cfg(test)]
impl Weights {
    /// The same weights with one tensor multiplied.
    pub(crate) fn scaled(mut self, name: &str, factor: f64) -> Self {
        if let Some(tensor) = self.tensors.get_mut(name) {
            *tensor = (&*tensor * factor).unwrap();
        }
        self
    }
}

/// The file with further words in its metadata: eight bytes with the header's length, the header in JSON,
/// padded to eight bytes, and the numbers.
fn with_words(blob: &[u8], words: &[(&str, String)]) -> Option<Vec<u8>> {
    let (length, rest) = blob.split_first_chunk::<8>()?;
    let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
    let (header, numbers) = rest.split_at_checked(length)?;
    let mut header: serde_json::Value = serde_json::from_slice(header).ok()?;
    for (key, word) in words {
        header["__metadata__"][*key] = word.as_str().into();
    }
    let mut header = serde_json::to_vec(&header).ok()?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend(numbers);
    Some(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::tiny_model;

    #[test]
    fn a_blob_gives_the_same_weights_back_and_equal_weights_the_same_digest() {
        let model = tiny_model(7, 1);
        let blob = model.weights().to_blob().unwrap();
        let again = Weights::from_blob(&blob, model.config(), DType::F32, &Device::Cpu).unwrap();
        assert_eq!(
            again.digest().unwrap(),
            tiny_model(7, 1).weights().digest().unwrap()
        );
        assert_ne!(
            again.digest().unwrap(),
            tiny_model(7, 2).weights().digest().unwrap()
        );
    }

    #[test]
    fn torn_foreign_and_incomplete_weights_are_refused_with_the_reason() {
        let model = tiny_model(7, 1);
        let blob = model.weights().to_blob().unwrap();
        let load = |blob: &[u8], config: &ModelConfig| {
            Weights::from_blob(blob, config, DType::F32, &Device::Cpu)
                .unwrap_err()
                .to_string()
        };
        assert!(load(&blob[..blob.len() - 4], model.config()).contains("truncated"));
        let other = load(&blob, tiny_model(8, 1).config());
        assert!(
            other.contains("[7, 16]") && other.contains("[8, 16]"),
            "{other}"
        );
        let mut fewer = model.weights().clone();
        fewer.tensors.remove("model.norm.weight");
        let missing = load(&fewer.to_blob().unwrap(), model.config());
        assert!(
            missing.contains("model.norm.weight of shape [16] is missing"),
            "{missing}"
        );
    }

    #[test]
    fn a_truncated_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let model = tiny_model(7, 1);
        let blob = model.weights().to_blob().unwrap();
        let path = folder.path().join("model.safetensors");
        std::fs::write(&path, &blob[..blob.len() / 2]).unwrap();
        let load = || Weights::load(folder.path(), model.config(), DType::F32, &Device::Cpu);
        let error = load().unwrap_err().to_string();
        assert!(
            error.contains("model.safetensors") && error.contains("truncated"),
            "{error}"
        );
        std::fs::remove_file(&path).unwrap();
        assert!(load().unwrap_err().to_string().contains("failed to read"));
    }

    #[test]
    fn shards_are_read_through_their_index() {
        let folder = tempfile::tempdir().unwrap();
        let model = tiny_model(7, 1);
        let mut map = serde_json::Map::new();
        for (index, name) in model.weights().tensors.keys().enumerate() {
            map.insert(
                name.clone(),
                format!("part-{}.safetensors", index % 2).into(),
            );
        }
        for part in 0..2 {
            let tensors = model.weights().tensors.iter().enumerate();
            let tensors = tensors
                .filter(|(i, _)| i % 2 == part)
                .map(|(_, (n, t))| (n.clone(), t.clone()));
            let half = Weights {
                tensors: tensors.collect(),
            };
            let path = folder.path().join(format!("part-{part}.safetensors"));
            std::fs::write(path, half.to_blob().unwrap()).unwrap();
        }
        let index = serde_json::json!({ "weight_map": map }).to_string();
        std::fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
        let whole = Weights::load(folder.path(), model.config(), DType::F32, &Device::Cpu).unwrap();
        assert_eq!(whole.digest().unwrap(), model.weights().digest().unwrap());
    }

    #[test]
    fn half_numbers_are_read_as_they_are_rounded() {
        // What torch makes of these numbers in f16 and in bf16.
        let numbers = [0.1f32, -1.0 / 3.0, std::f32::consts::PI, 1e-5, -10_000.0];
        let cases = [
            (
                DType::F16,
                [
                    0.099_975_586,
                    -0.333_251_95,
                    3.140_625,
                    1.001_358e-5,
                    -10_000.0,
                ],
            ),
            (
                DType::BF16,
                [
                    0.100_097_656,
                    -0.333_984_38,
                    3.140_625,
                    1.001_358e-5,
                    -9_984.0,
                ],
            ),
        ];
        let expected = vec![("x".to_owned(), vec![5])];
        for (dtype, rounded) in cases {
            let tensor = Tensor::new(&numbers, &Device::Cpu)
                .unwrap()
                .to_dtype(dtype)
                .unwrap();
            let half = Weights::of(BTreeMap::from([("x".to_owned(), tensor)]));
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(
                folder.path().join("model.safetensors"),
                half.to_blob().unwrap(),
            )
            .unwrap();
            let wanted = Wanted {
                tensors: expected.clone(),
                spare: Vec::new(),
                tied: false,
            };
            let read = Weights::load_wanted(folder.path(), &wanted, DType::F32, &Device::Cpu);
            let read = read.unwrap().get("x").unwrap();
            assert_eq!(read.to_vec1::<f32>().unwrap(), rounded, "{dtype:?}");
        }
    }

    #[test]
    fn a_blob_with_another_tensor_belongs_to_another_model() {
        let mut model = tiny_model(7, 1);
        let blob = model.weights().to_blob().unwrap();
        model.config.tied_head = true;
        let refused = Weights::from_blob(&blob, model.config(), DType::F32, &Device::Cpu);
        let refused = refused.unwrap_err().to_string();
        assert!(
            refused.contains("no place for the tensor lm_head.weight"),
            "{refused}"
        );
    }

    #[test]
    fn weights_with_a_nan_are_not_finite() {
        let model = tiny_model(5, 1);
        assert!(model.weights().is_finite().unwrap());
        let broken = model
            .weights()
            .clone()
            .scaled("model.norm.weight", f64::NAN);
        assert!(!broken.is_finite().unwrap());
    }
}
