//! Frozen weights packed once, in the precision of their products, for all that multiply inputs by them: decoders, blocks
//! and heads of every model that shares the weights.
//!
//! Promises: the panels are the only copy of a packed matrix; forward products read them, and backward products a transpose
//! that is made of them for one product. Only an embedding that is the head too may be there twice, packed and as a tensor.

use candle_core::{Result, Tensor};
use kernels::CpuTensor;

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

    pub(crate) fn all(&self) -> [&[String]; 4] {
        [
            &self.projections,
            &self.output,
            &self.gate_and_up,
            &self.down,
        ]
    }
}

/// Whether a tensor is looked up by token, also where the head is the same.
pub(crate) fn is_embedding(name: &str) -> bool {
    name == "model.embed_tokens.weight"
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
    use candle_core::DType;
    use kernels::{PackedMatrix, Precision};

    use super::*;
    use crate::{
        decode::{Decoder, Prefill},
        fixtures::{adapted, tiny_model},
        ragged::Sequence,
        transformer::LanguageModel,
    };

    const PRECISIONS: [Precision; 2] = [Precision::F32, Precision::Bf16];

    fn logprobs(model: &LanguageModel) -> Vec<f32> {
        let sequence = Sequence {
            prompt: &[0, 3, 4],
            completion: &[2, 6, 1],
        };
        let scored = model.logprobs(&[sequence]);
        scored.unwrap().logp.to_vec1().unwrap()
    }

    /// Logits of a decoder after a prompt.
    fn decoded(model: &LanguageModel, precision: Precision) -> Vec<f32> {
        let mut decoder = Decoder::new(model.clone(), precision, 1, 8).unwrap();
        let prompt = Prefill {
            ids: &[0, 3, 4],
            slots: &[0],
        };
        decoder.prefill(&[prompt]).unwrap().row(0).to_vec()
    }

    #[test]
    fn packed_weights_change_no_bit() {
        let plain = adapted(7, 1, &["q_proj", "down_proj"]);
        for precision in PRECISIONS {
            for model in [&plain, &plain.without_adapter()] {
                let packed = model.packed(precision).unwrap();
                let expected = model.with_precision(precision);
                assert_eq!(logprobs(&packed), logprobs(&expected), "{precision:?}");
                assert_eq!(decoded(&packed, precision), decoded(model, precision));
            }
        }
    }

    /// What is packed is there once, also in a model with another adapter and in a decoder.
    #[test]
    fn nothing_is_packed_or_kept_twice() {
        let model = tiny_model(7, 1).packed(Precision::Bf16).unwrap();
        let (config, weights) = (model.config(), model.weights());
        for name in BlockStacks::of(1).all().concat() {
            assert!(!weights.tensors.contains_key(&name), "{name}");
            let packed = &weights.packed[&name];
            let adapter = adapted(7, 1, &["q_proj"]).adapter().unwrap().clone();
            let other = model.with_adapter(adapter).unwrap();
            assert!(other.weights().packed[&name].is_same(packed));
        }
        for names in BlockStacks::of(1).all() {
            let parts: Vec<_> = names
                .iter()
                .map(|name| weights.packed[name].clone())
                .collect();
            let stacked = weights.stacked(names, Precision::Bf16).unwrap();
            // Some of the tiny matrices do not fill their last panel of 16 columns.
            match PackedMatrix::joined(&parts) {
                Some(joined) => assert!(stacked.is_same(&joined)),
                None => assert!(names.len() > 1),
            }
        }
        assert_eq!(weights.shapes(), tiny_model(7, 1).weights().shapes());
        assert_eq!(weights.parameter_count(), config.parameter_count());
    }

    /// In f32 they are the same; in bf16 they are rounded, and what was not packed is not.
    #[test]
    fn packed_weights_are_read_as_they_are_held() {
        let model = tiny_model(7, 1);
        let exact = model.packed(Precision::F32).unwrap();
        assert_eq!(
            exact.weights().to_blob().unwrap(),
            model.weights().to_blob().unwrap()
        );
        let rounded = model.packed(Precision::Bf16).unwrap();
        for (name, tensor) in &model.weights().tensors {
            let held = rounded.weights().get(name).unwrap();
            let expected = match rounded.weights().tensors.contains_key(name) {
                true => tensor.clone(),
                false => tensor.to_dtype(DType::BF16).unwrap(),
            };
            let expected = expected.to_dtype(DType::F32).unwrap();
            let values = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(values(&held), values(&expected), "{name}");
        }
        // A decoder in another precision packs them anew.
        assert_eq!(
            decoded(&exact, Precision::Bf16),
            decoded(&model, Precision::Bf16)
        );
    }

    #[test]
    fn a_packed_model_keeps_its_precision() {
        let packed = tiny_model(7, 1).packed(Precision::Bf16).unwrap();
        let asked = packed.with_precision(Precision::F32);
        assert_eq!(logprobs(&asked), logprobs(&packed));
    }

    /// A frozen model in bf16 below an adapter computes as one in f32 whose matrices are rounded.
    #[test]
    fn weights_in_bf16_are_packed_too() {
        let half = tiny_model(7, 1).weights().to_dtype(DType::BF16).unwrap();
        let rounded = half.to_dtype(DType::F32).unwrap();
        let config = tiny_model(7, 1).config().clone();
        let [half, rounded] =
            [half, rounded].map(|weights| LanguageModel::new(config.clone(), weights).unwrap());
        for precision in PRECISIONS {
            let packed = half.packed(precision).unwrap();
            assert_eq!(packed.dtype(), DType::F32);
            let expected = rounded.with_precision(precision);
            assert_eq!(logprobs(&packed), logprobs(&expected), "{precision:?}");
        }
    }
}
