//! Ragged batches without padding: sequences laid end to end.

use std::sync::Arc;

use candle_core::{Device, Tensor};

use crate::{ModelConfig, ModelError, ops::Segments};

/// A prompt and the completion whose tokens are to be scored.
#[derive(Debug, Clone, Copy)]
pub struct Sequence<'a> {
    /// What the model reads; at least one token.
    pub prompt: &'a [u32],
    /// What it is asked the log-probabilities of; at least one token.
    pub completion: &'a [u32],
}

/// Sequences laid end to end, N tokens in all.
#[derive(Debug)]
pub struct Packed {
    /// The tokens, `[N]`, u32.
    pub(crate) ids: Tensor,
    /// Each token's place in its own sequence, `[N]`, u32.
    pub(crate) positions: Tensor,
    /// Where each sequence lies.
    pub(crate) segments: Arc<Segments>,
}

impl Packed {
    /// Packs these token sequences.
    ///
    /// # Errors
    /// When a sequence is empty, longer than the model's positions, or holds a token that is not in the
    /// vocabulary.
    pub fn new(
        sequences: &[Vec<u32>],
        config: &ModelConfig,
        device: &Device,
    ) -> Result<Self, ModelError> {
        for ids in sequences {
            check(ids, config)?;
        }
        let lengths: Vec<usize> = sequences.iter().map(Vec::len).collect();
        let segments = Arc::new(Segments::new(&lengths));
        let total = segments.total();
        let ids: Vec<u32> = sequences.concat();
        let positions: Vec<u32> = lengths.iter().flat_map(|&n| 0..n as u32).collect();
        Ok(Self {
            ids: Tensor::from_vec(ids, total, device)?,
            positions: Tensor::from_vec(positions, total, device)?,
            segments,
        })
    }
}

fn check(ids: &[u32], config: &ModelConfig) -> Result<(), ModelError> {
    let reason = if ids.is_empty() {
        "a sequence without tokens cannot be scored".to_owned()
    } else if ids.len() > config.max_positions {
        format!(
            "{} tokens are more than the model's {} positions",
            ids.len(),
            config.max_positions
        )
    } else if let Some(id) = ids.iter().find(|&&id| id as usize >= config.vocab_size) {
        format!(
            "token {id} is not in the model's vocabulary of {}",
            config.vocab_size
        )
    } else {
        return Ok(());
    };
    Err(ModelError::Tokens { reason })
}
