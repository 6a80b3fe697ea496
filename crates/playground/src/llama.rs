//! A minimal Llama: one layer, two heads, evaluated on a single token in double precision.
//!
//! Its final hidden state determines the LM head of a bandit exactly. It knows the Llama forward pass and the tensor
//! names of a Hugging Face folder; sequences longer than one token are not supported.

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

/// Hidden size: width of the residual stream.
pub(crate) const HIDDEN: usize = 16;
const HEADS: usize = 2;
const INTERMEDIATE: usize = 32;
const RMS_EPSILON: f64 = 1e-5;
/// Half-width of the uniform distribution that weights are drawn from.
const WEIGHT_RANGE: f32 = 0.3;

/// Names of the RMSNorm weights, each a vector of [`HIDDEN`] ones.
pub(crate) const NORMS: [&str; 3] = [
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.post_attention_layernorm.weight",
    "model.norm.weight",
];

/// The `config.json` of a bandit with `arms` arms.
pub(crate) fn config(arms: usize) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": arms,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HIDDEN / HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": 16,
        "rms_norm_eps": RMS_EPSILON,
        "rope_theta": 10000.0,
        "attention_bias": false,
        "mlp_bias": false,
        "tie_word_embeddings": false,
        "bos_token_id": 0,
        "eos_token_id": null,
        "use_cache": true,
        "torch_dtype": "float32",
    })
}

/// A row-major matrix of shape (`rows`, `columns`) = (outputs, inputs), the layout of `torch.nn.Linear`.
pub(crate) struct LinearWeight {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) cells: Vec<f32>,
}

impl LinearWeight {
    fn random(rows: usize, columns: usize, rng: &mut ChaCha8Rng) -> Self {
        let cells = (0..rows * columns)
            .map(|_| rng.random_range(-WEIGHT_RANGE..WEIGHT_RANGE))
            .collect();
        Self {
            rows,
            columns,
            cells,
        }
    }

    fn row(&self, index: usize) -> Vec<f64> {
        self.cells[index * self.columns..][..self.columns]
            .iter()
            .map(|cell| f64::from(*cell))
            .collect()
    }

    fn apply(&self, input: &[f64]) -> Vec<f64> {
        (0..self.rows)
            .map(|row| self.row(row).iter().zip(input).map(|(w, x)| w * x).sum())
            .collect()
    }
}

/// Weights of one Llama layer and its embeddings; RMSNorm weights are all one.
pub(crate) struct LlamaWeights {
    embedding: LinearWeight,
    query: LinearWeight,
    key: LinearWeight,
    value: LinearWeight,
    output: LinearWeight,
    gate: LinearWeight,
    up: LinearWeight,
    down: LinearWeight,
}

impl LlamaWeights {
    pub(crate) fn random(arms: usize, rng: &mut ChaCha8Rng) -> Self {
        Self {
            embedding: LinearWeight::random(arms, HIDDEN, rng),
            query: LinearWeight::random(HIDDEN, HIDDEN, rng),
            key: LinearWeight::random(HIDDEN, HIDDEN, rng),
            value: LinearWeight::random(HIDDEN, HIDDEN, rng),
            output: LinearWeight::random(HIDDEN, HIDDEN, rng),
            gate: LinearWeight::random(INTERMEDIATE, HIDDEN, rng),
            up: LinearWeight::random(INTERMEDIATE, HIDDEN, rng),
            down: LinearWeight::random(HIDDEN, INTERMEDIATE, rng),
        }
    }

    pub(crate) fn named(&self) -> [(&'static str, &LinearWeight); 8] {
        [
            ("model.embed_tokens.weight", &self.embedding),
            ("model.layers.0.self_attn.q_proj.weight", &self.query),
            ("model.layers.0.self_attn.k_proj.weight", &self.key),
            ("model.layers.0.self_attn.v_proj.weight", &self.value),
            ("model.layers.0.self_attn.o_proj.weight", &self.output),
            ("model.layers.0.mlp.gate_proj.weight", &self.gate),
            ("model.layers.0.mlp.up_proj.weight", &self.up),
            ("model.layers.0.mlp.down_proj.weight", &self.down),
        ]
    }

    /// The normalised final hidden state after a prompt of one token. A single token attends only to itself, so
    /// queries, keys and rotary embeddings cancel.
    pub(crate) fn hidden_after(&self, token: usize) -> Vec<f64> {
        let embedded = self.embedding.row(token);
        let attended = self.output.apply(&self.value.apply(&rms_norm(&embedded)));
        let residual = add(&embedded, &attended);
        let normed = rms_norm(&residual);
        let gated = self
            .gate
            .apply(&normed)
            .into_iter()
            .zip(self.up.apply(&normed));
        let inner: Vec<f64> = gated
            .map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up)
            .collect();
        rms_norm(&add(&residual, &self.down.apply(&inner)))
    }
}

fn add(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

fn rms_norm(x: &[f64]) -> Vec<f64> {
    let mean_square = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    x.iter()
        .map(|x| x / (mean_square + RMS_EPSILON).sqrt())
        .collect()
}
