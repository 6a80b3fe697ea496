//! The decoder itself: embedding, blocks, final norm. One forward pass serves both paths; they differ
//! only in how a block's queries meet keys and values.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use crate::{
    Adapter, ModelConfig, ModelError, Precision, Weights, lora::LowRank, ops, rope::RopeTable,
};

/// A decoder-only transformer with its weights, and an adapter beside them where it has one. Clones
/// share the weights.
#[derive(Debug, Clone)]
pub struct LanguageModel {
    pub(crate) config: ModelConfig,
    weights: Weights,
    embedding: Tensor,
    blocks: Vec<Block>,
    final_norm: Tensor,
    pub(crate) head: Tensor,
    pub(crate) rope: RopeTable,
    pub(crate) adapter: Option<Adapter>,
    /// Of the products with weights.
    pub(crate) precision: Precision,
    /// Whether a backward pass computes what is between the blocks' ends again.
    recompute: bool,
}

/// What all blocks of a pass have in common.
struct Pass<'a> {
    config: &'a ModelConfig,
    /// cos and sin of every token's place.
    rotation: (Tensor, Tensor),
    precision: Precision,
    recompute: bool,
}

/// How one block's queries meet the keys and values: in a packed batch or through a cache.
pub(crate) trait Attend {
    /// The packed batch, where queries meet the keys of that batch and of nothing else.
    fn packed(&self) -> Option<&Arc<ops::Segments>> {
        None
    }

    /// In this layer, which attends so: `q` `[N, heads, head_dim]`, `k` and `v` `[N, kv_heads, head_dim]` →
    /// `[N, heads, head_dim]`.
    fn attend(
        &mut self,
        of: (usize, ops::Attention),
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> candle_core::Result<Tensor>;
}

#[derive(Debug, Clone)]
pub(crate) struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
    /// What an adapter adds.
    pub(crate) low_rank: Option<LowRank>,
}

#[derive(Debug, Clone)]
struct Block {
    attention_norm: Tensor,
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    query_norm: Option<Tensor>,
    key_norm: Option<Tensor>,
    feed_forward_norm: Tensor,
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl LanguageModel {
    /// A model of this shape with these weights.
    ///
    /// # Errors
    /// When a tensor is missing.
    pub fn new(config: ModelConfig, weights: Weights) -> Result<Self, ModelError> {
        let embedding = weights.get("model.embed_tokens.weight")?;
        let head = if config.tied_head {
            embedding.clone()
        } else {
            weights.get("lm_head.weight")?
        };
        let blocks = (0..config.layers)
            .map(|layer| Block::new(layer, &config, &weights))
            .collect::<Result<_, _>>()?;
        let rope = RopeTable::new(&config, embedding.dtype(), embedding.device())?;
        let final_norm = weights.get("model.norm.weight")?;
        Ok(Self {
            config,
            weights,
            embedding,
            blocks,
            final_norm,
            head,
            rope,
            adapter: None,
            precision: Precision::F32,
            recompute: false,
        })
    }

    /// The same weights, not copied, with the products of [`Self::score`] and [`Self::hidden`] taken in this
    /// precision on the CPU; sums, and all that is trained, stay f32.
    #[must_use]
    pub fn with_products_in(&self, precision: Precision) -> Self {
        let mut model = self.clone();
        model.precision = precision;
        model
    }

    /// The same weights, not copied; when it is on, a backward pass through [`Self::score`] or [`Self::hidden`]
    /// finds only the ends of the blocks and computes what lies between them again (Chen et al. 2016). On the
    /// CPU, without an adapter; elsewhere everything is kept.
    #[must_use]
    pub fn with_checkpointing(&self, on: bool) -> Self {
        let mut model = self.clone();
        model.recompute = on;
        model
    }

    /// The shape of the model.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The weights; where there is an adapter, those it stands beside.
    #[must_use]
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Where the weights lie.
    #[must_use]
    pub fn device(&self) -> &Device {
        self.embedding.device()
    }

    /// The numbers of the weights.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.embedding.dtype()
    }

    /// The linear maps of the blocks, which an adapter may stand beside, under their names.
    pub(crate) fn linears_mut(&mut self) -> Vec<(String, &mut Linear)> {
        let mut linears = Vec::new();
        for (layer, block) in self.blocks.iter_mut().enumerate() {
            for (name, linear) in block.linears_mut() {
                linears.push((format!("model.layers.{layer}.{name}"), linear));
            }
        }
        linears
    }

    /// The final normed hidden states of tokens `ids` `[N]` at `positions` `[N]`: `[N, hidden_size]`.
    pub(crate) fn forward(
        &self,
        ids: &Tensor,
        positions: &Tensor,
        attention: &mut dyn Attend,
    ) -> candle_core::Result<Tensor> {
        let pass = Pass {
            config: &self.config,
            rotation: self.rope.at(positions)?,
            precision: self.precision,
            recompute: self.recompute,
        };
        let mut x = ops::embedding(&self.embedding, ids)?;
        for (layer, block) in self.blocks.iter().enumerate() {
            let options = self.attention_in(layer);
            if let Some(segments) = attention.packed()
                && let Some(whole) = block.whole(&x, &pass, segments, options)?
            {
                x = whole;
                continue;
            }
            let rows = block.attention(&x, &pass, &mut |q, k, v| {
                attention.attend((layer, options), q, k, v)
            })?;
            x = (x + rows)?;
            let rows = block.feed_forward(&x, &pass)?;
            x = (x + rows)?;
        }
        ops::rms_norm(&x, &self.final_norm, self.config.rms_norm_eps)
    }

    /// The logits of hidden states `[N, hidden_size]`, in f32: `[N, vocab_size]`.
    pub(crate) fn logits(&self, hidden: &Tensor) -> candle_core::Result<Tensor> {
        hidden.matmul(&self.head.t()?)?.to_dtype(DType::F32)
    }
}

impl Linear {
    fn new(name: &str, biased: bool, weights: &Weights) -> Result<Self, ModelError> {
        let bias = biased
            .then(|| weights.get(&format!("{name}.bias")))
            .transpose()?;
        Ok(Self {
            weight: weights.get(&format!("{name}.weight"))?,
            bias,
            low_rank: None,
        })
    }

    /// The map without what an adapter adds.
    fn affine(&self) -> ops::Affine {
        ops::Affine {
            weight: self.weight.clone(),
            bias: self.bias.clone(),
        }
    }

    fn forward(&self, x: &Tensor, precision: Precision) -> candle_core::Result<Tensor> {
        let mut y = ops::linear(x, &self.weight, precision)?;
        if let Some(bias) = &self.bias {
            y = y.broadcast_add(bias)?;
        }
        match &self.low_rank {
            Some(low_rank) => y + low_rank.forward(x)?,
            None => Ok(y),
        }
    }
}

type AttendFn<'a> = dyn FnMut(&Tensor, &Tensor, &Tensor) -> candle_core::Result<Tensor> + 'a;

impl Block {
    fn new(layer: usize, config: &ModelConfig, weights: &Weights) -> Result<Self, ModelError> {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let linear = |part: &str, biased: bool| Linear::new(&name(part), biased, weights);
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

    fn linears_mut(&mut self) -> [(&'static str, &mut Linear); 7] {
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

    /// The whole block as one operation; `None` where it has to be composed.
    fn whole(
        &self,
        x: &Tensor,
        pass: &Pass<'_>,
        segments: &Arc<ops::Segments>,
        attention: ops::Attention,
    ) -> candle_core::Result<Option<Tensor>> {
        let plain = [
            &self.query,
            &self.key,
            &self.value,
            &self.output,
            &self.gate,
            &self.up,
            &self.down,
        ];
        if plain.iter().any(|linear| linear.low_rank.is_some()) {
            return Ok(None);
        }
        let [query, key, value, output, gate, up, down] = plain.map(Linear::affine);
        let weights = ops::BlockWeights {
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
        let config = pass.config;
        let options = ops::BlockOptions {
            heads: (config.heads, config.kv_heads, config.head_dim),
            eps: config.rms_norm_eps,
            precision: pass.precision,
            attention,
            recompute: pass.recompute,
        };
        let (cos, sin) = &pass.rotation;
        ops::block(x, &weights, (cos, sin), segments, options)
    }

    fn attention(
        &self,
        x: &Tensor,
        pass: &Pass<'_>,
        attend: &mut AttendFn<'_>,
    ) -> candle_core::Result<Tensor> {
        let Pass {
            config,
            rotation: (cos, sin),
            precision,
            ..
        } = pass;
        let (n, eps) = (x.dim(0)?, config.rms_norm_eps);
        let x = ops::rms_norm(x, &self.attention_norm, eps)?;
        let heads = |linear: &Linear, count: usize, norm: Option<&Tensor>| {
            let y = linear.forward(&x, *precision)?;
            let y = y.reshape((n, count, config.head_dim))?;
            norm.map_or(Ok(y.clone()), |weight| ops::rms_norm(&y, weight, eps))
        };
        let q = ops::rope(
            &heads(&self.query, config.heads, self.query_norm.as_ref())?,
            cos,
            sin,
        )?;
        let k = ops::rope(
            &heads(&self.key, config.kv_heads, self.key_norm.as_ref())?,
            cos,
            sin,
        )?;
        let v = heads(&self.value, config.kv_heads, None)?;
        let y = attend(&q, &k, &v)?;
        let y = y.reshape((n, config.heads * config.head_dim))?;
        self.output.forward(&y, *precision)
    }

    fn feed_forward(&self, x: &Tensor, pass: &Pass<'_>) -> candle_core::Result<Tensor> {
        let x = ops::rms_norm(x, &self.feed_forward_norm, pass.config.rms_norm_eps)?;
        let gate = self.gate.forward(&x, pass.precision)?;
        let up = self.up.forward(&x, pass.precision)?;
        self.down.forward(&ops::swiglu(&gate, &up)?, pass.precision)
    }
}
