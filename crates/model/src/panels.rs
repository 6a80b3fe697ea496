//! Frozen weights packed in bf16, once for all that multiply inputs by them: decoders, blocks and heads of every model that
//! shares the weights.
//!
//! They live as long as the weights. Only a decoder keeps them in f32, which are as large as the weights themselves. The
//! backward packs anew: it needs the transpose.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use candle_core::{DType, Result, Tensor, TensorId};
use kernels::{CpuTensor, PanelStack, Precision};

/// Names of a block's weights: those that read the same rows are stacked.
pub(crate) struct BlockStacks {
    /// Query, key and value.
    pub(crate) projections: [String; 3],
    pub(crate) output: [String; 1],
    pub(crate) gate_and_up: [String; 2],
    pub(crate) down: [String; 1],
}

impl BlockStacks {
    pub(crate) fn of(layer: usize) -> Self {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        Self {
            projections: ["q", "k", "v"].map(|part| name(&format!("self_attn.{part}_proj"))),
            output: [name("self_attn.o_proj")],
            gate_and_up: [name("mlp.gate_proj"), name("mlp.up_proj")],
            down: [name("mlp.down_proj")],
        }
    }
}

/// Packed stacks by the tensors that are in them, which nothing trains in place.
#[derive(Debug, Default)]
pub(crate) struct PanelStore(Mutex<HashMap<Vec<TensorId>, PanelStack>>);

impl PanelStore {
    /// The stack of weights `[out, in]` that read the same rows; `None` in a precision or of tensors whose panels are not
    /// kept.
    pub(crate) fn stack(
        &self,
        weights: &[Tensor],
        precision: Precision,
    ) -> Result<Option<PanelStack>> {
        let fits = |weight: &Tensor| weight.device().is_cpu() && weight.dtype() == DType::F32;
        if precision != Precision::Bf16 || !weights.iter().all(fits) {
            return Ok(None);
        }
        let key: Vec<TensorId> = weights.iter().map(Tensor::id).collect();
        if let Some(stack) = self.stacks().get(&key) {
            return Ok(Some(stack.clone()));
        }
        // Not under the lock: a thread that waits for others of the pool may be given a task that needs it.
        let stack = pack(weights, |weights, width| {
            PanelStack::pack(weights, width, precision)
        })?;
        Ok(Some(self.keep(key, stack)))
    }

    /// Keeps a stack, unless another thread has packed the same.
    fn keep(&self, key: Vec<TensorId>, stack: PanelStack) -> PanelStack {
        self.stacks().entry(key).or_insert(stack).clone()
    }

    fn stacks(&self) -> MutexGuard<'_, HashMap<Vec<TensorId>, PanelStack>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Packs weights `[out, in]` that read the same rows by `pack`, which is given their values and their `in`.
pub(crate) fn pack<P>(weights: &[Tensor], pack: impl FnOnce(&[&[f32]], usize) -> P) -> Result<P> {
    let width = weights[0].dims2()?.1;
    let tensors = weights.iter().map(CpuTensor::of);
    let tensors = tensors.collect::<Result<Vec<_>>>()?;
    let values: Vec<_> = tensors.iter().map(CpuTensor::values).collect();
    let values: Vec<&[f32]> = values.iter().map(|values| &**values).collect();
    Ok(pack(&values, width))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        decode::Decoder,
        fixtures::{adapted, tiny_model},
        ragged::Sequence,
        transformer::LanguageModel,
    };

    /// A model of the same weights, whose panels are kept.
    fn frozen(model: &LanguageModel) -> LanguageModel {
        let weights = model.weights().clone().frozen();
        LanguageModel::new(model.config().clone(), weights).unwrap()
    }

    /// Number of stacks that are kept.
    fn kept(model: &LanguageModel) -> usize {
        let store = model.weights().panels.as_ref().unwrap();
        store.stacks().len()
    }

    fn logprobs(model: &LanguageModel, precision: Precision) -> Vec<f32> {
        let sequence = Sequence {
            prompt: &[0, 3, 4],
            completion: &[2, 6, 1],
        };
        let scored = model.with_precision(precision).logprobs(&[sequence]);
        scored.unwrap().logp.to_vec1().unwrap()
    }

    #[test]
    fn frozen_weights_are_packed_once_in_bf16_and_change_no_bit() {
        let trained = tiny_model(7, 1);
        let model = frozen(&trained);
        let plain = adapted(7, 1, &["q_proj", "down_proj"]);
        let adapter = plain.adapter().unwrap().clone();
        let adapted = model.with_adapter(adapter).unwrap();
        for precision in [Precision::F32, Precision::Bf16] {
            assert_eq!(kept(&model), 0, "before the first pass in bf16");
            assert_eq!(logprobs(&adapted, precision), logprobs(&plain, precision));
        }
        // Four stacks a block, and the head: the same for the model below the adapter, and for a decoder.
        let stacks = 4 * model.config().layers + 1;
        assert_eq!(kept(&adapted), stacks);
        let bits = logprobs(&trained, Precision::Bf16);
        assert_eq!(logprobs(&model, Precision::Bf16), bits);
        Decoder::new(model.clone(), Precision::Bf16, 1, 8).unwrap();
        assert_eq!(kept(&model), stacks);
    }

    /// Kept panels of other values are what a pass multiplies by: nothing is packed anew.
    #[test]
    fn a_pass_and_a_decoder_read_the_kept_panels() {
        let (model, other) = (frozen(&tiny_model(7, 1)), tiny_model(7, 2));
        let names = BlockStacks::of(0).down;
        let values = [other.weights().get(&names[0]).unwrap()];
        let stack = pack(&values, |weights, width| {
            PanelStack::pack(weights, width, Precision::Bf16)
        });
        let before = logprobs(&tiny_model(7, 1), Precision::Bf16);
        let id = model.weights().get(&names[0]).unwrap().id();
        let store = model.weights().panels.as_ref().unwrap();
        let planted = store.keep(vec![id], stack.unwrap());
        assert_ne!(logprobs(&model, Precision::Bf16), before);
        let read = model.weights().packed(&names, Precision::Bf16).unwrap();
        let row = vec![1.0; model.config().intermediate_size];
        assert_eq!(read.multiply(&row), planted.all.multiply(&row));
    }

    #[test]
    fn weights_that_may_be_trained_keep_nothing() {
        let model = frozen(&tiny_model(7, 1));
        let weights = model.weights();
        let subset = weights.subset(model.config().tensors()).unwrap();
        assert!(subset.panels.is_some());
        assert!(weights.trainable().unwrap().0.panels.is_none());
        assert!(weights.detached().panels.is_none());
        assert!(weights.union(weights).panels.is_none());
        assert!(model.snapshot().unwrap().weights().panels.is_none());
    }

    /// A clone in which a tensor was replaced does not read the panels of the one before.
    #[test]
    fn panels_belong_to_tensors_and_not_to_names() {
        let model = frozen(&tiny_model(7, 1));
        let before = logprobs(&model, Precision::Bf16);
        let name = &BlockStacks::of(1).output[0];
        let changed = model.weights().clone().scaled(name, 2.0);
        let changed = LanguageModel::new(model.config().clone(), changed).unwrap();
        assert_ne!(logprobs(&changed, Precision::Bf16), before);
        assert_eq!(logprobs(&model, Precision::Bf16), before);
    }
}
