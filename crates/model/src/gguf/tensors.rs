//! Tensors of a GGUF file: their names in Hugging Face's form, and their values.

use std::{fs::File, path::Path, path::PathBuf};

use candle_core::{DType, Shape, Tensor, quantized::gguf_file::TensorInfo};

use crate::{
    error::ModelError,
    gguf::{
        CPU,
        config::{GgufArchitecture, ModelShape},
        header::GgufTensor,
    },
    input_file::InputFile,
};

/// Token embeddings.
pub(super) const EMBEDDING: &str = "token_embd.weight";
/// Head; absent if it is tied to the embeddings.
pub(super) const HEAD: &str = "output.weight";
/// Factors of RoPE's frequencies, of Llama 3.1 and later.
pub(super) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Parts of a block: GGUF's name and Hugging Face's.
const BLOCK: [(&str, &str); 9] = [
    ("attn_norm.weight", "input_layernorm.weight"),
    ("attn_q.weight", "self_attn.q_proj.weight"),
    ("attn_k.weight", "self_attn.k_proj.weight"),
    ("attn_v.weight", "self_attn.v_proj.weight"),
    ("attn_output.weight", "self_attn.o_proj.weight"),
    ("ffn_norm.weight", "post_attention_layernorm.weight"),
    ("ffn_gate.weight", "mlp.gate_proj.weight"),
    ("ffn_up.weight", "mlp.up_proj.weight"),
    ("ffn_down.weight", "mlp.down_proj.weight"),
];
const BIASES: [(&str, &str); 3] = [
    ("attn_q.bias", "self_attn.q_proj.bias"),
    ("attn_k.bias", "self_attn.k_proj.bias"),
    ("attn_v.bias", "self_attn.v_proj.bias"),
];
const HEAD_NORMS: [(&str, &str); 2] = [
    ("attn_q_norm.weight", "self_attn.q_norm.weight"),
    ("attn_k_norm.weight", "self_attn.k_norm.weight"),
];

/// A tensor in Hugging Face's form.
pub(super) struct TargetTensor {
    /// Name of the tensor.
    pub(super) name: String,
    role: TensorRole,
}

/// Role of a tensor, as far as it decides how rows are ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TensorRole {
    Query,
    Key,
    Other,
}

impl TargetTensor {
    fn new(name: String) -> Self {
        let role = match () {
            () if name.ends_with("q_proj.weight") => TensorRole::Query,
            () if name.ends_with("k_proj.weight") => TensorRole::Key,
            () => TensorRole::Other,
        };
        Self { name, role }
    }

    /// Number of heads by which the rows of the tensor are permuted; `None` if they are in order.
    pub(super) fn permuted_heads(
        &self,
        architecture: GgufArchitecture,
        shape: ModelShape,
    ) -> Option<usize> {
        let heads = match self.role {
            TensorRole::Query => shape.heads,
            TensorRole::Key => shape.kv_heads,
            TensorRole::Other => return None,
        };
        architecture.permutes_heads.then_some(heads)
    }
}

/// The tensor that this one of the file is.
///
/// # Errors
/// When the architecture has no such tensor.
pub(super) fn target(
    name: &str,
    architecture: GgufArchitecture,
    layers: usize,
) -> Result<TargetTensor, String> {
    let unknown = || {
        format!(
            "it has the tensor {name}, which {} models here do not have",
            architecture.name
        )
    };
    let whole = match name {
        EMBEDDING => Some("model.embed_tokens.weight"),
        "output_norm.weight" => Some("model.norm.weight"),
        HEAD => Some("lm_head.weight"),
        _ => None,
    };
    if let Some(target) = whole {
        return Ok(TargetTensor::new(target.to_owned()));
    }
    let (layer, part) = name
        .strip_prefix("blk.")
        .and_then(|rest| rest.split_once('.'))
        .ok_or_else(unknown)?;
    let index: usize = layer.parse().map_err(|_| unknown())?;
    let optional = [
        (architecture.has_biases, &BIASES[..]),
        (architecture.has_head_norms, &HEAD_NORMS[..]),
    ];
    let optional = optional.into_iter().filter(|(has, _)| *has);
    let mut parts = BLOCK.iter().chain(optional.flat_map(|(_, parts)| parts));
    let found = parts.find(|(theirs, _)| *theirs == part);
    match found {
        Some((_, ours)) if index < layers && layer == index.to_string() => {
            Ok(TargetTensor::new(format!("model.layers.{index}.{ours}")))
        }
        _ => Err(unknown()),
    }
}

/// Undoes the permutation of llama.cpp's converter: per head, the two halves of the rows were interleaved.
pub(super) fn unpermuted(weight: &Tensor, heads: usize) -> Result<Tensor, ModelError> {
    let (rows, columns) = weight.dims2()?;
    let half = rows / heads / 2;
    let split = weight.reshape((heads, half, 2, columns))?;
    let swapped = split.transpose(1, 2)?.contiguous()?;
    Ok(swapped.reshape((rows, columns))?)
}

/// Reader of tensors' values.
pub(super) struct TensorReader {
    path: PathBuf,
    file: File,
}

impl TensorReader {
    pub(super) fn open(path: &Path) -> Result<Self, ModelError> {
        Ok(Self {
            path: path.to_owned(),
            file: InputFile::open(path)?.into_file(),
        })
    }

    /// The values of a tensor, dequantised, as `dtype`.
    pub(super) fn read(&mut self, tensor: &GgufTensor, dtype: DType) -> Result<Tensor, ModelError> {
        let info = TensorInfo {
            ggml_dtype: tensor.dtype,
            shape: Shape::from(tensor.shape.clone()),
            offset: tensor.start,
        };
        let values = info.read(&mut self.file, 0, &CPU);
        let values = values.and_then(|values| values.dequantize(&CPU)?.to_dtype(dtype));
        values.map_err(|error| ModelError::Malformed {
            path: self.path.clone(),
            reason: format!("the tensor {} cannot be read: {error}", tensor.name),
        })
    }
}
