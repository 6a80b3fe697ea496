//! The smallest Llama: one block of two heads, run over a single token in double precision.
//!
//! It exists so that a bandit's head can be solved for exactly. It knows how a Llama computes and what its tensors
//! are called in a Hugging Face folder; it cannot read more than one token.

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

/// Units of the residual stream.
pub(crate) const HIDDEN: usize = 16;
const HEADS: usize = 2;
const INTERMEDIATE: usize = 32;
const RMS_EPSILON: f64 = 1e-5;
/// Weights are uniform within this distance of zero.
const WEIGHT_RANGE: f32 = 0.3;

/// The norms' weights, each [`HIDDEN`] ones.
pub(crate) const NORMS: [&str; 3] = [
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.post_attention_layernorm.weight",
    "model.norm.weight",
];

/// The `config.json` of a bandit with this many arms.
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

/// A row-major matrix that maps `columns` inputs to `rows` outputs, as PyTorch stores a linear layer.
pub(crate) struct Matrix {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) cells: Vec<f32>,
}

impl Matrix {
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

/// One Llama block and its embeddings; the norms' weights are all one.
pub(crate) struct Weights {
    embedding: Matrix,
    query: Matrix,
    key: Matrix,
    value: Matrix,
    output: Matrix,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
}

impl Weights {
    pub(crate) fn random(arms: usize, rng: &mut ChaCha8Rng) -> Self {
        Self {
            embedding: Matrix::random(arms, HIDDEN, rng),
            query: Matrix::random(HIDDEN, HIDDEN, rng),
            key: Matrix::random(HIDDEN, HIDDEN, rng),
            value: Matrix::random(HIDDEN, HIDDEN, rng),
            output: Matrix::random(HIDDEN, HIDDEN, rng),
            gate: Matrix::random(INTERMEDIATE, HIDDEN, rng),
            up: Matrix::random(INTERMEDIATE, HIDDEN, rng),
            down: Matrix::random(HIDDEN, INTERMEDIATE, rng),
        }
    }

    pub(crate) fn named(&self) -> [(&'static str, &Matrix); 8] {
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

    /// The final normed hidden state after a prompt of one token. A single token attends to itself alone, so
    /// queries, keys and rotations drop out.
    pub(crate) fn hidden_after(&self, token: usize) -> Vec<f64> {
        let embedded = self.embedding.row(token);
        let attended = self.output.apply(&self.value.apply(&rms_norm(&embedded)));
        let middle = sum(&embedded, &attended);
        let normed = rms_norm(&middle);
        let gated = self
            .gate
            .apply(&normed)
            .into_iter()
            .zip(self.up.apply(&normed));
        let inner: Vec<f64> = gated
            .map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up)
            .collect();
        rms_norm(&sum(&middle, &self.down.apply(&inner)))
    }
}

fn sum(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

fn rms_norm(x: &[f64]) -> Vec<f64> {
    let mean_square = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    x.iter()
        .map(|x| x / (mean_square + RMS_EPSILON).sqrt())
        .collect()
}
