//! The tensors of an encoder, and which of them its network has taken.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex, PoisonError},
};

use candle_core::{DType, Device, Result, Shape, Tensor};
use candle_nn::{Init, var_builder::SimpleBackend};

/// Tensors by name for a network that is being built.
pub(super) struct Recorded {
    tensors: HashMap<String, Tensor>,
    taken: Taken,
}

/// The names of the tensors that were taken so far.
#[derive(Debug, Clone, Default)]
pub(super) struct Taken(Arc<Mutex<BTreeSet<String>>>);

impl Recorded {
    /// The tensors, and a list that grows as they are taken.
    pub(super) fn new(tensors: HashMap<String, Tensor>) -> (Self, Taken) {
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
        init: Init,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        self.taken.add(name);
        SimpleBackend::get(&self.tensors, shape, name, init, dtype, device)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        self.taken.add(name);
        self.tensors.get_unchecked(name, dtype, device)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }
}
