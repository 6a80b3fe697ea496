//! Computational cost of a token, and synthetic tokens.

use model::ModelConfig;

/// Floating-point operations per token; a multiply-add counts as two.
pub(crate) struct TokenCost {
    /// In the linear layers of the blocks.
    pub(crate) blocks: f64,
    /// In the head.
    pub(crate) head: f64,
    /// In attention, per attended token.
    pub(crate) attention: f64,
}

impl TokenCost {
    /// Cost in a model of this shape.
    pub(crate) fn of(config: &ModelConfig) -> Self {
        let operations = |multiply_adds: usize| 2.0 * multiply_adds as f64;
        let (queries, keys) = (
            config.heads * config.head_dim,
            config.kv_heads * config.head_dim,
        );
        let block = config.hidden_size * (2 * queries + 2 * keys + 3 * config.intermediate_size);
        Self {
            blocks: operations(config.layers * block),
            head: operations(config.vocab_size * config.hidden_size),
            attention: operations(2 * config.layers * queries),
        }
    }

    /// Number of weights that are multiplied per token.
    pub(crate) fn weights(&self) -> f64 {
        (self.blocks + self.head) / 2.0
    }
}

/// Token `index` of a pseudo-random sequence without special tokens.
pub(crate) fn token(config: &ModelConfig, index: usize) -> u32 {
    let ordinary = config.vocab_size.saturating_sub(3).max(1);
    let token = config.vocab_size - ordinary + (index * 7919) % ordinary;
    u32::try_from(token).unwrap_or_default()
}
