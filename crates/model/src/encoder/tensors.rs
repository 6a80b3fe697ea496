//! Tensors of an encoder, with a record of those that its network uses.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, PoisonError},
};

use candle_core::{DType, Device, Error, Result, Shape, Tensor};
use candle_nn::{Init, var_builder::SimpleBackend};

/// Backend of a `VarBuilder` that records the names of the tensors it hands out.
pub(super) struct RecordingBackend {
    tensors: TensorSource,
    used: UsedTensors,
}

/// Source of tensors.
pub(super) enum TensorSource {
    /// Loaded tensors by name.
    Read(HashMap<String, Tensor>),
    /// Shapes from file headers; a used tensor is a broadcast zero, which needs no memory.
    Headers(BTreeMap<String, Vec<usize>>),
}

impl TensorSource {
    fn get(
        &self,
        name: &str,
        shape: Option<Shape>,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        match (self, shape) {
            (Self::Read(tensors), Some(shape)) => {
                SimpleBackend::get(tensors, shape, name, Init::Const(0.0), dtype, device)
            }
            (Self::Read(tensors), None) => tensors.get_unchecked(name, dtype, device),
            (Self::Headers(shapes), wanted) => {
                let found = shapes.get(name).ok_or_else(|| Error::CannotFindTensor {
                    path: name.to_owned(),
                });
                let found = Shape::from(found?.as_slice());
                match wanted.filter(|wanted| *wanted != found) {
                    None => Tensor::zeros(1, dtype, device)?.broadcast_as(found),
                    Some(expected) => Err(Error::UnexpectedShape {
                        msg: format!("shape mismatch for {name}"),
                        expected,
                        got: found,
                    }),
                }
            }
        }
    }

    fn has(&self, name: &str) -> bool {
        match self {
            Self::Read(tensors) => tensors.contains_key(name),
            Self::Headers(shapes) => shapes.contains_key(name),
        }
    }
}

/// Names of the tensors used so far.
#[derive(Debug, Clone, Default)]
pub(super) struct UsedTensors(Arc<Mutex<BTreeSet<String>>>);

impl RecordingBackend {
    /// Creates the backend and the shared record of used tensors.
    pub(super) fn new(tensors: TensorSource) -> (Self, UsedTensors) {
        let used = UsedTensors::default();
        let backend = Self {
            tensors,
            used: used.clone(),
        };
        (backend, used)
    }
}

impl UsedTensors {
    pub(super) fn contains(&self, name: &str) -> bool {
        let used = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        used.contains(name)
    }

    fn insert(&self, name: &str) {
        let mut used = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        used.insert(name.to_owned());
    }
}

impl SimpleBackend for RecordingBackend {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _init: Init,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        self.used.insert(name);
        self.tensors.get(name, Some(shape), dtype, device)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        self.used.insert(name);
        self.tensors.get(name, None, dtype, device)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.tensors.has(name)
    }
}
