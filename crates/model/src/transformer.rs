//! The decoder: embedding, transformer blocks, final norm. Training and decoding share this forward pass and differ
//! only in the attention over a ragged batch or a KV cache ([`Attend`]).

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use kernels::WeightMatrix;

use crate::{
    config::ModelConfig,
    error::ModelError,
    lora::{Adapter, LowRank},
    rope::{Positions, RopeTable},
    sampling::Precision,
    weights::{HeadForm, Weights},
};

/// A decoder-only transformer with its weights and an optional LoRA adapter. Clones share the weights.
#[derive(Debug, Clone)]
pub struct LanguageModel {
    pub(crate) config: ModelConfig,
    weights: Weights,
    embedding: Tensor,
    blocks: Vec<TransformerBlock>,
    final_norm: Tensor,
    pub(crate) head: WeightMatrix,
    pub(crate) rope: RopeTable,
    pub(crate) adapter: Option<Adapter>,
    /// Precision of matmuls with weights.
    pub(crate) precision: Precision,
    /// Whether the backward pass recomputes activations within blocks.
    recompute: bool,
}

/// Inputs and options that all blocks of a forward pass share.
struct ForwardContext<'a> {
    config: &'a ModelConfig,
    /// cos and sin of every token's position.
    rotation: (Tensor, Tensor),
    precision: Precision,
    recompute: bool,
}

/// Attention of one layer: over a ragged batch or through a KV cache.
pub(crate) trait Attend {
    /// The segments of a ragged batch, when attention is over that batch alone, so that a block can run as one fused
    /// operation; `None` otherwise.
    fn ragged_segments(&self) -> Option<&Arc<kernels::Segments>> {
        None
    }

    /// Attention output of a layer: `q` `[N, heads, head_dim]`, `k` and `v` `[N, kv_heads, head_dim]` → `[N, heads,
    /// head_dim]`.
    fn attend(
        &mut self,
        layer: LayerAttention,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> candle_core::Result<Tensor>;
}

/// Index of a layer and its attention parameters.
#[derive(Clone, Copy)]
pub(crate) struct LayerAttention {
    pub(crate) index: usize,
    pub(crate) params: kernels::AttentionParams,
}

/// A linear layer with an optional low-rank update.
#[derive(Debug, Clone)]
pub(crate) struct LinearLayer {
    weight: WeightMatrix,
    bias: Option<Tensor>,
    /// The adapter's low-rank update.
    pub(crate) low_rank: Option<LowRank>,
}

#[derive(Debug, Clone)]
struct TransformerBlock {
    attention_norm: Tensor,
    query: LinearLayer,
    key: LinearLayer,
    value: LinearLayer,
    output: LinearLayer,
    query_norm: Option<Tensor>,
    key_norm: Option<Tensor>,
    feed_forward_norm: Tensor,
    gate: LinearLayer,
    up: LinearLayer,
    down: LinearLayer,
}

impl LanguageModel {
    /// Builds a model from its configuration and weights.
    ///
    /// # Errors
    /// When a tensor is missing.
    pub fn new(config: ModelConfig, weights: Weights) -> Result<Self, ModelError> {
        let embedding = weights.get("model.embed_tokens.weight")?;
        let head = weights.matrix(config.head_name())?;
        let blocks = (0..config.layers)
            .map(|layer| TransformerBlock::new(layer, &config, &weights))
            .collect::<Result<_, _>>()?;
        let rope = RopeTable::new(&config, embedding.dtype(), embedding.device());
        let final_norm = weights.get("model.norm.weight")?;
        Ok(Self {
            config,
            precision: weights.packed_precision().unwrap_or_default(),
            weights,
            embedding,
            blocks,
            final_norm,
            head,
            rope,
            adapter: None,
            recompute: false,
        })
    }

    /// The same weights, not copied, with matmuls of [`Self::logprobs`] and [`Self::hidden`] in this precision on the
    /// CPU; packed weights stay in theirs. Accumulation and trained parameters stay f32.
    #[must_use]
    pub fn with_precision(&self, precision: Precision) -> Self {
        let mut model = self.clone();
        model.precision = self.weights.packed_precision().unwrap_or(precision);
        model
    }

    /// The model with its weights, which nothing trains, packed in the precision of its products: there is no other copy once
    /// this model and its clones are all that is left. An adapter stays as it is, without dropout; what is not packed becomes
    /// f32. Packed weights that are packed anew keep the roundings that they have. On other devices than the CPU the model has
    /// this precision, as by [`Self::with_precision`]; in int8, which only decoders use, it is unchanged.
    ///
    /// # Errors
    /// If a tensor is missing.
    pub fn packed(&self, precision: Precision) -> Result<Self, ModelError> {
        self.packed_with(precision, HeadForm::Packed)
    }

    /// As [`Self::packed`], with the head in this form.
    pub(crate) fn packed_with(
        &self,
        precision: Precision,
        head: HeadForm,
    ) -> Result<Self, ModelError> {
        let is_packed = self.weights.packed_precision() == Some(precision);
        if is_packed || precision == Precision::Int8 {
            return Ok(self.clone());
        }
        if !self.device().is_cpu() {
            return Ok(self.with_precision(precision));
        }
        let weights = self.weights.clone();
        let weights = weights.packed_in(&self.config, precision, head)?;
        let mut model = Self::new(self.config.clone(), weights)?;
        model.recompute = self.recompute;
        match self.adapter() {
            Some(adapter) => model.with_adapter(adapter.clone()),
            None => Ok(model),
        }
    }

    /// The same weights, not copied, with gradient checkpointing on or off: [`Self::logprobs`] and [`Self::hidden`]
    /// keep only the inputs of blocks, and the backward pass recomputes the rest (Chen et al. 2016). Takes effect on
    /// the CPU without dropout; elsewhere all activations are kept.
    #[must_use]
    pub fn with_checkpointing(&self, on: bool) -> Self {
        let mut model = self.clone();
        model.recompute = on;
        model
    }

    /// Model configuration.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The weights, without the adapter.
    #[must_use]
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Device of the weights.
    #[must_use]
    pub fn device(&self) -> &Device {
        self.embedding.device()
    }

    /// Dtype of the weights.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.embedding.dtype()
    }

    /// Linear layers of the blocks by name: the modules that an adapter may target.
    pub(crate) fn linears_mut(&mut self) -> Vec<(String, &mut LinearLayer)> {
        let mut linears = Vec::new();
        for (layer, block) in self.blocks.iter_mut().enumerate() {
            for (name, linear) in block.linears_mut() {
                linears.push((format!("model.layers.{layer}.{name}"), linear));
            }
        }
        linears
    }

    /// Whether both models have the same frozen weights, in the same memory on the CPU, and differ by an adapter alone.
    pub(crate) fn shares_weights(&self, other: &Self) -> bool {
        let has_adapter = self.adapter.is_some() || other.adapter.is_some();
        has_adapter && self.device().is_cpu() && self.weights.are_shared_with(&other.weights)
    }

    /// Low-rank updates of a layer's modules: query, key, value, output, gate, up and down projection.
    pub(crate) fn low_rank_updates(&self, layer: usize) -> [Option<&LowRank>; 7] {
        let linears = self.blocks[layer].linears();
        linears.map(|linear| linear.low_rank.as_ref())
    }

    /// Log-probabilities of `targets` given the final hidden states `[R, hidden_size]` that predict them, in the precision
    /// of the model.
    pub(crate) fn token_logprobs(
        &self,
        hidden: &Tensor,
        targets: &[u32],
    ) -> candle_core::Result<kernels::LogprobsOutput> {
        kernels::token_logprobs(hidden, &self.head, targets, self.precision)
    }

    /// Final hidden states, after the last norm, of tokens `ids` `[N]` at `positions` `[N]`: `[N, hidden_size]`.
    pub(crate) fn forward(
        &self,
        ids: &Tensor,
        positions: &Positions,
        attention: &mut dyn Attend,
    ) -> candle_core::Result<Tensor> {
        let context = ForwardContext {
            config: &self.config,
            rotation: self.rope.at(positions)?,
            precision: self.precision,
            recompute: self.recompute,
        };
        let mut x = kernels::embedding(&self.embedding, ids)?;
        for (index, block) in self.blocks.iter().enumerate() {
            let layer = LayerAttention {
                index,
                params: self.attention_params(index),
            };
            if let Some(segments) = attention.ragged_segments()
                && let Some(fused) = block.fused(&x, &context, segments, layer)?
            {
                x = fused;
                continue;
            }
            let rows = block.attention(&x, &context, &mut |q, k, v| {
                attention.attend(layer, q, k, v)
            })?;
            x = (x + rows)?;
            let rows = block.feed_forward(&x, &context)?;
            x = (x + rows)?;
        }
        kernels::rms_norm(&x, &self.final_norm, self.config.rms_norm_eps)
    }

    /// Logits of hidden states `[N, hidden_size]`, in f32: `[N, vocab_size]`.
    pub(crate) fn logits(&self, hidden: &Tensor) -> candle_core::Result<Tensor> {
        match &self.head {
            WeightMatrix::Tensor(head) => hidden.matmul(&head.t()?)?.to_dtype(DType::F32),
            WeightMatrix::Packed(head) => kernels::packed_linear(hidden, head),
        }
    }
}

impl LinearLayer {
    fn new(name: &str, has_bias: bool, weights: &Weights) -> Result<Self, ModelError> {
        let bias = has_bias
            .then(|| weights.get(&format!("{name}.bias")))
            .transpose()?;
        Ok(Self {
            weight: weights.matrix(&format!("{name}.weight"))?,
            bias,
            low_rank: None,
        })
    }

    fn params(&self) -> kernels::LinearParams {
        kernels::LinearParams {
            weight: self.weight.clone(),
            bias: self.bias.clone(),
            low_rank: self.low_rank.as_ref().map(LowRank::params),
        }
    }

    fn forward(&self, x: &Tensor, precision: Precision) -> candle_core::Result<Tensor> {
        let mut y = match &self.weight {
            WeightMatrix::Tensor(weight) => kernels::linear(x, weight, precision)?,
            WeightMatrix::Packed(weight) => kernels::packed_linear(x, weight)?,
        };
        if let Some(bias) = &self.bias {
            y = y.broadcast_add(bias)?;
        }
        match &self.low_rank {
            Some(low_rank) => y + low_rank.forward(x, precision)?,
            None => Ok(y),
        }
    }
}

type AttendFn<'a> = dyn FnMut(&Tensor, &Tensor, &Tensor) -> candle_core::Result<Tensor> + 'a;

impl TransformerBlock {
    fn new(layer: usize, config: &ModelConfig, weights: &Weights) -> Result<Self, ModelError> {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let linear = |part: &str, has_bias: bool| LinearLayer::new(&name(part), has_bias, weights);
        let head_norm = |part: &str| config.qk_norm.then(|| weights.get(&name(part))).transpose();
        Ok(Self {
            attention_norm: weights.get(&name("input_layernorm.weight"))?,
            query: linear("self_attn.q_proj", config.qkv_bias)?,
            key: linear("self_attn.k_proj", config.qkv_bias)?,
            value: linear("self_attn.v_proj", config.qkv_bias)?,
            output: linear("self_attn.o_proj", config.output_bias)?,
            query_norm: head_norm("self_attn.q_norm.weight")?,
            key_norm: head_norm("self_attn.k_norm.weight")?,
            feed_forward_norm: weights.get(&name("post_attention_layernorm.weight"))?,
            gate: linear("mlp.gate_proj", false)?,
            up: linear("mlp.up_proj", false)?,
            down: linear("mlp.down_proj", false)?,
        })
    }

    fn linears(&self) -> [&LinearLayer; 7] {
        [
            &self.query,
            &self.key,
            &self.value,
            &self.output,
            &self.gate,
            &self.up,
            &self.down,
        ]
    }

    fn linears_mut(&mut self) -> [(&'static str, &mut LinearLayer); 7] {
        [
            ("self_attn.q_proj", &mut self.query),
            ("self_attn.k_proj", &mut self.key),
            ("self_attn.v_proj", &mut self.value),
            ("self_attn.o_proj", &mut self.output),
            ("mlp.gate_proj", &mut self.gate),
            ("mlp.up_proj", &mut self.up),
            ("mlp.down_proj", &mut self.down),
        ]
    }

    /// Runs the block as one fused operation; `None` where it must be composed of separate operations.
    fn fused(
        &self,
        x: &Tensor,
        context: &ForwardContext<'_>,
        segments: &Arc<kernels::Segments>,
        layer: LayerAttention,
    ) -> candle_core::Result<Option<Tensor>> {
        let linears = self.linears();
        let has_dropout =
            |linear: &&LinearLayer| linear.low_rank.as_ref().is_some_and(LowRank::has_dropout);
        if linears.iter().any(has_dropout) {
            return Ok(None);
        }
        let [query, key, value, output, gate, up, down] = linears.map(LinearLayer::params);
        let weights = kernels::BlockWeights {
            attention_norm: self.attention_norm.clone(),
            query,
            key,
            value,
            output,
            query_norm: self.query_norm.clone(),
            key_norm: self.key_norm.clone(),
            feed_forward_norm: self.feed_forward_norm.clone(),
            gate,
            up,
            down,
        };
        let config = context.config;
        let options = kernels::BlockOptions {
            heads: kernels::Heads {
                queries: config.heads,
                keys: config.kv_heads,
                width: config.head_dim,
                attention: layer.params,
            },
            eps: config.rms_norm_eps,
            precision: context.precision,
            recompute: context.recompute,
        };
        let (cos, sin) = &context.rotation;
        kernels::block(
            x,
            &weights,
            kernels::Rotation { cos, sin },
            segments,
            options,
        )
    }

    fn attention(
        &self,
        x: &Tensor,
        context: &ForwardContext<'_>,
        attend: &mut AttendFn<'_>,
    ) -> candle_core::Result<Tensor> {
        let ForwardContext {
            config,
            rotation: (cos, sin),
            precision,
            ..
        } = context;
        let (n, eps) = (x.dim(0)?, config.rms_norm_eps);
        let x = kernels::rms_norm(x, &self.attention_norm, eps)?;
        let heads = |linear: &LinearLayer, count: usize, norm: Option<&Tensor>| {
            let y = linear.forward(&x, *precision)?;
            let y = y.reshape((n, count, config.head_dim))?;
            norm.map_or(Ok(y.clone()), |weight| kernels::rms_norm(&y, weight, eps))
        };
        let q = kernels::rope(
            &heads(&self.query, config.heads, self.query_norm.as_ref())?,
            cos,
            sin,
        )?;
        let k = kernels::rope(
            &heads(&self.key, config.kv_heads, self.key_norm.as_ref())?,
            cos,
            sin,
        )?;
        let v = heads(&self.value, config.kv_heads, None)?;
        let y = attend(&q, &k, &v)?;
        let y = y.reshape((n, config.heads * config.head_dim))?;
        self.output.forward(&y, *precision)
    }

    fn feed_forward(
        &self,
        x: &Tensor,
        context: &ForwardContext<'_>,
    ) -> candle_core::Result<Tensor> {
        let x = kernels::rms_norm(x, &self.feed_forward_norm, context.config.rms_norm_eps)?;
        let gate = self.gate.forward(&x, context.precision)?;
        let up = self.up.forward(&x, context.precision)?;
        self.down
            .forward(&kernels::swiglu(&gate, &up)?, context.precision)
    }
}
