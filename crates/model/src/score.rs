//! The scoring path: log-probabilities of given completions, differentiable, over packed batches.

use candle_core::Tensor;

use crate::{LanguageModel, ModelError, Packed, Sequence, network::Attend, ops};

/// What a model says of completions: R response tokens in all, in the order of the sequences.
#[derive(Debug, Clone)]
pub struct Scores {
    /// log π of each token given all before it, `[R]`, f32, with gradient.
    pub logp: Tensor,
    /// The entropy of the distribution each token was scored under, `[R]`, in nats, without gradient.
    pub entropy: Tensor,
    /// How many tokens each completion has; their sum is R.
    pub lengths: Vec<usize>,
}

struct PackedAttention<'a> {
    packed: &'a Packed,
    options: ops::Attention,
}

impl Attend for PackedAttention<'_> {
    fn attend(
        &mut self,
        _layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> candle_core::Result<Tensor> {
        ops::causal_attention(q, k, v, &self.packed.segments, self.options)
    }
}

impl LanguageModel {
    /// The final normed hidden states of a packed batch of N tokens, `[N, hidden_size]`, with gradient.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn hidden(&self, packed: &Packed) -> Result<Tensor, ModelError> {
        let options = self.attention_options();
        let mut attention = PackedAttention { packed, options };
        Ok(self.forward(&packed.ids, &packed.positions, &mut attention)?)
    }

    /// Scores every completion given its prompt. Logits are computed for response tokens only.
    ///
    /// # Errors
    /// When a prompt or completion is empty, a sequence is too long or a token is unknown.
    pub fn score(&self, sequences: &[Sequence<'_>]) -> Result<Scores, ModelError> {
        if sequences
            .iter()
            .any(|s| s.prompt.is_empty() || s.completion.is_empty())
        {
            let reason =
                "a prompt and a completion need at least one token each to be scored".into();
            return Err(ModelError::Tokens { reason });
        }
        // The last token is only predicted, never read.
        let inputs: Vec<Vec<u32>> = sequences
            .iter()
            .map(|s| [s.prompt, &s.completion[..s.completion.len() - 1]].concat())
            .collect();
        let packed = Packed::new(&inputs, &self.config, self.device())?;
        let targets: Vec<u32> = sequences
            .iter()
            .flat_map(|s| s.completion)
            .copied()
            .collect();
        if let Some(id) = targets
            .iter()
            .find(|&&id| id as usize >= self.config.vocab_size)
        {
            let reason = format!(
                "token {id} is not in the model's vocabulary of {}",
                self.config.vocab_size
            );
            return Err(ModelError::Tokens { reason });
        }
        let rows: Vec<u32> = sequences
            .iter()
            .enumerate()
            .flat_map(|(i, s)| {
                let range = packed.segments.range(i);
                (range.start + s.prompt.len() - 1..range.end).map(|row| row as u32)
            })
            .collect();
        let rows = Tensor::new(rows, self.device())?;
        let hidden = self.hidden(&packed)?.index_select(&rows, 0)?;
        let scored = ops::token_logprobs(&hidden, &self.head, &targets)?;
        Ok(Scores {
            logp: scored.logp,
            entropy: scored.entropy,
            lengths: sequences.iter().map(|s| s.completion.len()).collect(),
        })
    }

    pub(crate) fn attention_options(&self) -> ops::Attention {
        ops::Attention {
            scale: 1.0 / (self.config.head_dim as f32).sqrt(),
            window: self.config.sliding_window,
        }
    }
}
