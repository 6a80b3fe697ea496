//! The tensors of an encoder, and which of them its network has taken.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, PoisonError},
};

use candle_core::{DType, Device, Error, Result, Shape, Tensor};
use candle_nn::{Init, var_builder::SimpleBackend};

/// Tensors by name for a network that is being built.
pub(super) struct Recorded {
    tensors: Source,
    taken: Taken,
}

/// Where tensors come from.
pub(super) enum Source {
    /// They were read.
    Read(HashMap<String, Tensor>),
    /// Their shapes by the headers of their files; what is taken is a zero that takes no room.
    Headers(BTreeMap<String, Vec<usize>>),
}

impl Source {
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

/// The names of the tensors that were taken so far.
#[derive(Debug, Clone, Default)]
pub(super) struct Taken(Arc<Mutex<BTreeSet<String>>>);

impl Recorded {
    /// The tensors, and a list that grows as they are taken.
    pub(super) fn new(tensors: Source) -> (Self, Taken) {
        let taken = Taken::default();
        let recorded = Self {
            tensors,
            taken: taken.clone(),
        };
        (recorded, taken)
    }
}

impl Taken {
    pub(super) fn has(&self, name: &str) -> bool {
        let taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        taken.contains(name)
    }

    fn add(&self, name: &str) {
        let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        taken.insert(name.to_owned());
    }
}

impl SimpleBackend for Recorded {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _init: Init,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        self.taken.add(name);
        self.tensors.get(name, Some(shape), dtype, device)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        self.taken.add(name);
        self.tensors.get(name, None, dtype, device)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.tensors.has(name)
    }
}
