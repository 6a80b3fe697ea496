//! Named model weights: loading from a folder or a blob, validation against a configuration, serialisation.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
};

use candle_core::{DType, Device, Tensor, Var};
use kernels::{PackedMatrix, Precision, WeightMatrix};
use messages::{Digest, Seed};
use rand::Rng;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};

use crate::{
    config::ModelConfig,
    error::ModelError,
    panels::{BlockStacks, is_embedding, pack},
    shards::{ExpectedTensors, Shards},
};

/// Form of a language-model head among packed weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadForm {
    /// Packed, for models that compute logits or log-probabilities.
    Packed,
    /// As it is: a reward model reads its hidden states alone.
    Tensor,
}

/// Tensors of a model by their names on disk, in alphabetical order. Clones share them.
#[derive(Debug, Clone)]
pub struct Weights {
    pub(crate) tensors: BTreeMap<String, Tensor>,
    /// Matrices that nothing trains and that are held packed, in place of a tensor of their name but for an embedding.
    pub(crate) packed: BTreeMap<String, PackedMatrix>,
}

impl Weights {
    /// Whether these are the same tensors, not equal ones, and none of them is trained in place.
    pub(crate) fn are_shared_with(&self, other: &Self) -> bool {
        let same = |((name, a), (other, b)): ((&String, &Tensor), (&String, &Tensor))| {
            name == other && a.id() == b.id() && !a.is_variable()
        };
        let tensors = self.tensors.len() == other.tensors.len()
            && self.tensors.iter().zip(&other.tensors).all(same);
        let mut packed = self.packed.iter().zip(&other.packed);
        tensors
            && self.packed.len() == other.packed.len()
            && packed.all(|((name, a), (other, b))| name == other && a.is_same(b))
    }

    /// Shapes of all tensors by name.
    pub(crate) fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        let tensors = self.tensors.iter();
        let tensors = tensors.map(|(name, tensor)| (name.clone(), tensor.dims().to_vec()));
        let packed = self.packed.iter();
        let packed = packed.map(|(name, packed)| (name.clone(), packed.weight_dims().to_vec()));
        tensors.chain(packed).collect()
    }

    /// All tensors in order, of those that are packed one at a time.
    pub(crate) fn entries(
        &self,
    ) -> impl Iterator<Item = Result<(String, Tensor), ModelError>> + use<'_> {
        let names = self.shapes().into_keys();
        names.map(|name| Ok((name.clone(), self.get(&name)?)))
    }

    /// Reads the single or sharded safetensors of `folder` as `dtype`.
    ///
    /// # Errors
    /// When a file is missing or truncated, the weights are quantised, a tensor is missing or of another shape, or
    /// there is an unexpected tensor.
    pub fn load(
        folder: &Path,
        config: &ModelConfig,
        dtype: DType,
        device: &Device,
    ) -> Result<Self, ModelError> {
        Self::load_expected(folder, &config.expected_tensors(), dtype, device)
    }

    /// As [`Self::load`], with an explicit list of expected tensors.
    pub(crate) fn load_expected(
        folder: &Path,
        expected: &ExpectedTensors,
        dtype: DType,
        device: &Device,
    ) -> Result<Self, ModelError> {
        let tensors = Shards::open(folder)?.read(expected, dtype, device)?;
        Ok(Self::of(tensors))
    }

    /// Deserialises a blob written by [`Self::to_blob`].
    ///
    /// # Errors
    /// When the blob is truncated or does not match the configuration.
    pub fn from_blob(
        blob: &[u8],
        config: &ModelConfig,
        dtype: DType,
        device: &Device,
    ) -> Result<Self, ModelError> {
        Self::from_blob_with_shapes(blob, config.tensors(), dtype, device)
    }

    /// Wraps named tensors without any check.
    #[must_use]
    pub fn of(tensors: BTreeMap<String, Tensor>) -> Self {
        Self {
            tensors,
            packed: BTreeMap::new(),
        }
    }

    /// As [`Self::from_blob`], for the tensors of these names and shapes.
    ///
    /// # Errors
    /// When the blob is truncated, a tensor is missing or of another shape, or there is an unexpected tensor.
    pub fn from_blob_with_shapes(
        blob: &[u8],
        expected: Vec<(String, Vec<usize>)>,
        dtype: DType,
        device: &Device,
    ) -> Result<Self, ModelError> {
        let found = candle_core::safetensors::load_buffer(blob, device).map_err(|error| {
            ModelError::Weights {
                reason: not_safetensors(&error),
            }
        })?;
        Self::checked(found, expected, dtype)
    }

    /// Random initial weights: normal with standard deviation 0.7/√fan-in for projections and 0.02 for the embedding,
    /// ones for norms, zeros for biases.
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
        Ok(Self::of(tensors))
    }

    /// Checks that tensors have these names and shapes, and converts them to `dtype`.
    pub(crate) fn checked(
        mut found: HashMap<String, Tensor>,
        expected: Vec<(String, Vec<usize>)>,
        dtype: DType,
    ) -> Result<Self, ModelError> {
        let mut tensors = BTreeMap::new();
        for (name, shape) in expected {
            let tensor = found.remove(&name).ok_or_else(|| ModelError::Weights {
                reason: format!("the tensor {name} of shape {shape:?} is missing"),
            })?;
            check_shape(&name, tensor.dims(), &shape)?;
            let stored = tensor.dtype();
            if ![DType::F64, DType::F32, DType::F16, DType::BF16].contains(&stored) {
                let reason = format!(
                    "{name} is {}, not of floating-point numbers",
                    stored.as_str()
                );
                return Err(ModelError::Weights { reason });
            }
            tensors.insert(name, tensor.to_dtype(dtype)?);
        }
        match found.into_keys().min() {
            None => Ok(Self::of(tensors)),
            Some(unexpected) => Err(ModelError::Weights {
                reason: format!("unexpected tensor {unexpected}"),
            }),
        }
    }

    /// A copy of the weights as trainable variables, with the variables by name.
    ///
    /// # Errors
    /// When the device cannot hold them.
    pub fn trainable(&self) -> Result<(Self, BTreeMap<String, Var>), ModelError> {
        let mut vars = BTreeMap::new();
        let mut tensors = BTreeMap::new();
        for entry in self.entries() {
            let (name, tensor) = entry?;
            let var = Var::from_tensor(&tensor.copy()?)?;
            tensors.insert(name.clone(), var.as_tensor().clone());
            vars.insert(name, var);
        }
        Ok((Self::of(tensors), vars))
    }

    /// The weights converted to `dtype`.
    ///
    /// # Errors
    /// When the device cannot hold them.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self, ModelError> {
        self.converted(|tensor| tensor.to_dtype(dtype))
    }

    /// A copy in `dtype`, which changes with no step that changes these weights in place.
    ///
    /// # Errors
    /// When the device cannot hold it.
    pub fn copied(&self, dtype: DType) -> Result<Self, ModelError> {
        self.converted(|tensor| match tensor.dtype() == dtype {
            true => tensor.detach().copy(),
            false => tensor.detach().to_dtype(dtype),
        })
    }

    /// What `convert` makes of each tensor, under its name.
    fn converted(
        &self,
        convert: impl Fn(&Tensor) -> candle_core::Result<Tensor>,
    ) -> Result<Self, ModelError> {
        let converted = self.entries().map(|entry| {
            let (name, tensor) = entry?;
            Ok((name, convert(&tensor)?))
        });
        Ok(Self::of(converted.collect::<Result<_, ModelError>>()?))
    }

    /// Size of all tensors in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let bytes = |tensor: &Tensor| tensor.elem_count() * tensor.dtype().size_in_bytes();
        let packed: u64 = self.packed.values().map(PackedMatrix::bytes).sum();
        self.tensors.values().map(bytes).sum::<usize>() as u64 + packed
    }

    /// Number of parameters.
    #[must_use]
    pub fn parameter_count(&self) -> usize {
        let count = |dims: &Vec<usize>| dims.iter().product::<usize>();
        self.shapes().values().map(count).sum()
    }

    /// Serialises the weights as one safetensors file. Equal weights give equal bytes.
    ///
    /// # Errors
    /// When a tensor cannot be read from its device.
    pub fn to_blob(&self) -> Result<Vec<u8>, ModelError> {
        self.to_blob_with_metadata(&[])
    }

    /// As [`Self::to_blob`], with further entries in the file's metadata, in this order.
    pub(crate) fn to_blob_with_metadata(
        &self,
        entries: &[(&str, String)],
    ) -> Result<Vec<u8>, ModelError> {
        let on_cpu = self.entries().map(|entry| {
            let (name, tensor) = entry?;
            Ok((name, tensor.to_device(&Device::Cpu)?))
        });
        let on_cpu = on_cpu.collect::<Result<Vec<_>, ModelError>>()?;
        // One entry only: with several, the order in the library's hash map would vary between runs.
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let weights_error = |reason: String| ModelError::Weights { reason };
        let blob = safetensors::serialize(on_cpu, Some(metadata));
        let blob = blob.map_err(|error| weights_error(error.to_string()))?;
        if entries.is_empty() {
            return Ok(blob);
        }
        add_metadata(&blob, entries).ok_or_else(|| weights_error("its header is not JSON".into()))
    }

    /// Digest of [`Self::to_blob`].
    ///
    /// # Errors
    /// When a tensor cannot be read from its device.
    pub fn digest(&self) -> Result<Digest, ModelError> {
        Ok(Digest::of(&self.to_blob()?))
    }

    /// Euclidean norm of all values; not finite if any of them is not.
    ///
    /// # Errors
    /// When a tensor cannot be read from its device.
    pub fn norm(&self) -> Result<f64, ModelError> {
        let squares = self
            .entries()
            .map(|entry| Ok(kernels::squared_norm(&entry?.1)?));
        Ok(squares.sum::<Result<f64, ModelError>>()?.sqrt())
    }

    /// Whether all values are finite.
    ///
    /// # Errors
    /// When a tensor cannot be read from its device.
    pub fn is_finite(&self) -> Result<bool, ModelError> {
        for entry in self.entries() {
            if !kernels::squared_norm(&entry?.1)?.is_finite() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The same tensors, not copied, detached from the autograd graph.
    #[must_use]
    pub fn detached(&self) -> Self {
        let detached = |(name, tensor): (&String, &Tensor)| (name.clone(), tensor.detach());
        Self {
            tensors: self.tensors.iter().map(detached).collect(),
            packed: self.packed.clone(),
        }
    }

    /// The subset of tensors with these names and shapes, not copied.
    ///
    /// # Errors
    /// When one is missing or of another shape.
    pub(crate) fn subset(&self, expected: Vec<(String, Vec<usize>)>) -> Result<Self, ModelError> {
        let mut subset = Self::of(BTreeMap::new());
        let shapes = self.shapes();
        for (name, shape) in expected {
            let found = shapes.get(&name).ok_or_else(|| missing(&name))?;
            check_shape(&name, found, &shape)?;
            if let Some(packed) = self.packed.get(&name) {
                subset.packed.insert(name.clone(), packed.clone());
            }
            if let Some(tensor) = self.tensors.get(&name) {
                subset.tensors.insert(name, tensor.clone());
            }
        }
        Ok(subset)
    }

    /// Union of two sets of tensors, not copied; `others` take precedence.
    #[must_use]
    pub(crate) fn union(&self, others: &Self) -> Self {
        let mut both = self.clone();
        for name in others.shapes().keys() {
            both.tensors.remove(name);
            both.packed.remove(name);
        }
        both.tensors.extend(others.tensors.clone());
        both.packed.extend(others.packed.clone());
        both
    }

    /// Whether all tensors have this dtype and device. Packed ones, and what is beside them, stand for weights of any dtype on
    /// the CPU.
    pub(crate) fn all_on(&self, dtype: DType, device: &Device) -> bool {
        let is = |tensor: &Tensor| tensor.dtype() == dtype && tensor.device().same_device(device);
        match self.packed.is_empty() {
            true => self.tensors.values().all(is),
            false => device.is_cpu(),
        }
    }

    /// The weights of a model of this shape with all matrices of blocks packed, the head's too if it is to be, and the rest in
    /// f32, which is shared where it was. Tensors that nothing else holds are released one after another.
    ///
    /// # Errors
    /// When a tensor is missing or not on the CPU.
    pub fn packed_in(
        mut self,
        config: &ModelConfig,
        precision: Precision,
        head: HeadForm,
    ) -> Result<Self, ModelError> {
        let mut stacks: Vec<Vec<String>> = (0..config.layers)
            .flat_map(|layer| BlockStacks::of(layer).all().map(<[String]>::to_vec))
            .collect();
        if head == HeadForm::Packed {
            stacks.push(vec![config.head_name().to_owned()]);
        }
        let mut packed = BTreeMap::new();
        for names in stacks {
            let parts = pack(&self.matrices(&names)?, |weights, width| {
                PackedMatrix::neighbours(weights, width, precision)
            })?;
            for (name, part) in names.into_iter().zip(parts) {
                if !is_embedding(&name) {
                    self.tensors.remove(&name);
                }
                self.packed.remove(&name);
                packed.insert(name, part);
            }
        }
        // What was packed before and is not any more.
        for name in self.packed.keys() {
            if !self.tensors.contains_key(name) {
                self.tensors.insert(name.clone(), self.get(name)?);
            }
        }
        for tensor in self.tensors.values_mut() {
            *tensor = tensor.detach().to_dtype(DType::F32)?;
        }
        Ok(Self {
            tensors: self.tensors,
            packed,
        })
    }

    /// Weights `[out, in]` that read the same rows, packed side by side.
    ///
    /// # Errors
    /// When a tensor is missing or not on the CPU.
    pub(crate) fn stacked(
        &self,
        names: &[String],
        precision: Precision,
    ) -> Result<PackedMatrix, ModelError> {
        let held: Option<Vec<PackedMatrix>> = names
            .iter()
            .map(|name| self.packed.get(name).cloned())
            .collect();
        let joined = held.and_then(|parts| PackedMatrix::joined(&parts));
        if let Some(joined) = joined.filter(|joined| joined.precision() == precision) {
            return Ok(joined);
        }
        let weights = self.matrices(names)?;
        Ok(pack(&weights, |weights, width| {
            PackedMatrix::stacked(weights, width, precision)
        })?)
    }

    fn matrices(&self, names: &[String]) -> Result<Vec<Tensor>, ModelError> {
        // What is trained is read in place.
        let matrix = |name: &String| Ok(self.matrix(name)?.to_tensor()?.detach());
        names.iter().map(matrix).collect()
    }

    /// The weight of a linear layer or of the head, packed if it is.
    ///
    /// # Errors
    /// When there is none of this name.
    pub(crate) fn matrix(&self, name: &str) -> Result<WeightMatrix, ModelError> {
        match self.packed.get(name) {
            Some(packed) => Ok(WeightMatrix::Packed(packed.clone())),
            None => Ok(WeightMatrix::Tensor(self.get(name)?)),
        }
    }

    /// Precision in which the matrices are packed, if they are.
    #[must_use]
    pub fn packed_precision(&self) -> Option<Precision> {
        self.packed.values().next().map(PackedMatrix::precision)
    }

    /// The first values of the tensor with this name in row-major order, at most `count`, in f32.
    ///
    /// # Errors
    /// When there is none of this name.
    pub(crate) fn leading_values(&self, name: &str, count: usize) -> Result<Vec<f32>, ModelError> {
        let packed = self.packed.get(name);
        let rows = packed.filter(|_| !self.tensors.contains_key(name));
        let rows = rows.and_then(|packed| {
            let [out, width] = packed.weight_dims();
            packed.columns(0..count.div_ceil(width.max(1)).min(out))
        });
        let tensor = match rows {
            Some(rows) => WeightMatrix::Packed(rows).to_tensor()?,
            None => self.get(name)?,
        };
        let flat = tensor.flatten_all()?;
        let first = flat.narrow(0, 0, flat.dim(0)?.min(count))?;
        Ok(first.to_dtype(DType::F32)?.to_vec1()?)
    }

    /// The tensor with this name, not copied unless it is packed: then as it was rounded.
    ///
    /// # Errors
    /// When there is none.
    pub fn get(&self, name: &str) -> Result<Tensor, ModelError> {
        if let Some(tensor) = self.tensors.get(name) {
            return Ok(tensor.clone());
        }
        let packed = self.packed.get(name).ok_or_else(|| missing(name))?;
        Ok(WeightMatrix::from(packed).to_tensor()?)
    }
}

fn missing(name: &str) -> ModelError {
    ModelError::Weights {
        reason: format!("the tensor {name} is missing"),
    }
}

fn check_shape(name: &str, found: &[usize], shape: &[usize]) -> Result<(), ModelError> {
    if found == shape {
        return Ok(());
    }
    let reason = format!("{name} has shape {found:?}, the configuration says {shape:?}");
    Err(ModelError::Weights { reason })
}

/// Draws from the standard normal distribution (Box & Muller 1958).
pub(crate) fn normal(random: &mut ChaCha8Rng) -> f64 {
    let u: f64 = 1.0 - random.random::<f64>();
    let v: f64 = random.random();
    (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

/// Message for bytes that are not a complete safetensors file.
pub(crate) fn not_safetensors(error: &candle_core::Error) -> String {
    format!("it is truncated or not a safetensors file ({error})")
}

#[cfg(test)]
impl Weights {
    /// The same weights with one tensor scaled.
    pub(crate) fn scaled(mut self, name: &str, factor: f64) -> Self {
        if let Some(tensor) = self.tensors.get_mut(name) {
            *tensor = (&*tensor * factor).unwrap();
        }
        self
    }
}

/// Adds entries to the metadata of a safetensors file: the header's length in eight bytes, the JSON header padded to a
/// multiple of eight bytes, the tensor data.
fn add_metadata(blob: &[u8], entries: &[(&str, String)]) -> Option<Vec<u8>> {
    let (length, rest) = blob.split_first_chunk::<8>()?;
    let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
    let (header, data) = rest.split_at_checked(length)?;
    let mut header: serde_json::Value = serde_json::from_slice(header).ok()?;
    for (key, value) in entries {
        header["__metadata__"][*key] = value.as_str().into();
    }
    let mut header = serde_json::to_vec(&header).ok()?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend(data);
    Some(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::tiny_model;

    #[test]
    fn a_blob_round_trips_and_equal_weights_have_equal_digests() {
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
    fn truncated_mismatched_and_incomplete_weights_are_refused() {
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
    fn errors_name_a_truncated_or_missing_file() {
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
            let half = Weights::of(tensors.collect());
            let path = folder.path().join(format!("part-{part}.safetensors"));
            std::fs::write(path, half.to_blob().unwrap()).unwrap();
        }
        let index = serde_json::json!({ "weight_map": map }).to_string();
        std::fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
        let whole = Weights::load(folder.path(), model.config(), DType::F32, &Device::Cpu).unwrap();
        assert_eq!(whole.digest().unwrap(), model.weights().digest().unwrap());
    }

    #[test]
    fn half_precision_weights_are_read_exactly() {
        // PyTorch's rounding of these values to f16 and bf16.
        let values = [0.1f32, -1.0 / 3.0, std::f32::consts::PI, 1e-5, -10_000.0];
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
            let tensor = Tensor::new(&values, &Device::Cpu)
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
            let expected = ExpectedTensors {
                tensors: expected.clone(),
                ignorable: Vec::new(),
                tied_head: false,
            };
            let read = Weights::load_expected(folder.path(), &expected, DType::F32, &Device::Cpu);
            let read = read.unwrap().get("x").unwrap();
            assert_eq!(read.to_vec1::<f32>().unwrap(), rounded, "{dtype:?}");
        }
    }

    #[test]
    fn a_blob_with_an_unexpected_tensor_is_refused() {
        let mut model = tiny_model(7, 1);
        let blob = model.weights().to_blob().unwrap();
        model.config.tied_head = true;
        let refused = Weights::from_blob(&blob, model.config(), DType::F32, &Device::Cpu);
        let refused = refused.unwrap_err().to_string();
        assert!(
            refused.contains("unexpected tensor lm_head.weight"),
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
