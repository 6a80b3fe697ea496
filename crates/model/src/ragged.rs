//! Ragged batches: sequences concatenated without padding, with shared prefixes stored once.

use std::sync::Arc;

use candle_core::{Device, Tensor};

use crate::{config::ModelConfig, error::ModelError, rope::Positions};
use kernels::Segments;

/// A prompt with a completion whose tokens are scored.
#[derive(Debug, Clone, Copy)]
pub struct Sequence<'a> {
    /// Context tokens; at least one.
    pub prompt: &'a [u32],
    /// Scored tokens; at least one.
    pub completion: &'a [u32],
}

/// `items` in order, in runs of at most `limit` tokens, unless a single item has more; 0: no limit.
pub fn within_tokens<T>(
    items: &[T],
    limit: usize,
    tokens: impl Fn(&T) -> usize,
) -> impl Iterator<Item = &[T]> {
    let limit = if limit == 0 { usize::MAX } else { limit };
    let mut rest = items;
    std::iter::from_fn(move || {
        let mut total = 0usize;
        let fits = |item: &&T| {
            total = total.saturating_add(tokens(item));
            total <= limit
        };
        let count = rest.iter().take_while(fits).count().max(1).min(rest.len());
        let (run, later) = rest.split_at(count);
        rest = later;
        (!run.is_empty()).then_some(run)
    })
}

/// A prompt that is processed once for several continuations.
#[derive(Debug, Clone)]
pub struct SharedPrefix<'a> {
    /// The shared prefix; at least one token.
    pub prompt: &'a [u32],
    /// Continuations, which do not attend to one another. Each may be empty, and there may be none.
    pub branches: Vec<&'a [u32]>,
}

/// Concatenated sequences, N tokens in total.
#[derive(Debug)]
pub struct RaggedBatch {
    /// Token ids, `[N]`, u32.
    pub(crate) ids: Tensor,
    /// Position of each token in its own sequence.
    pub(crate) positions: Positions,
    /// Row ranges of the sequences.
    pub(crate) segments: Arc<Segments>,
}

impl RaggedBatch {
    /// Concatenates token sequences, one segment each.
    ///
    /// # Errors
    /// When a sequence is empty, longer than the model's positions, or holds a token that is not in the
    /// vocabulary.
    pub fn new(
        sequences: &[Vec<u32>],
        config: &ModelConfig,
        device: &Device,
    ) -> Result<Self, ModelError> {
        let unbranched = |prompt| SharedPrefix {
            prompt,
            branches: Vec::new(),
        };
        let prefixes: Vec<SharedPrefix<'_>> = sequences
            .iter()
            .map(|ids| unbranched(ids.as_slice()))
            .collect();
        Self::with_shared_prefixes(&prefixes, config, device)
    }

    /// Concatenates prompts, each followed by its branches, one segment per shared prefix.
    ///
    /// # Errors
    /// When a prompt is empty, a prompt with a branch is longer than the model's positions, or a token is not in the
    /// vocabulary.
    pub fn with_shared_prefixes(
        prefixes: &[SharedPrefix<'_>],
        config: &ModelConfig,
        device: &Device,
    ) -> Result<Self, ModelError> {
        let (mut ids, mut positions) = (Vec::new(), Vec::new());
        let mut lengths = Vec::with_capacity(prefixes.len());
        for SharedPrefix { prompt, branches } in prefixes {
            let branch_lengths: Vec<usize> = branches.iter().map(|branch| branch.len()).collect();
            check_lengths(prompt.len(), &branch_lengths, config)?;
            ids.extend_from_slice(prompt);
            positions.extend(0..prompt.len() as u32);
            for branch in branches {
                ids.extend_from_slice(branch);
                positions.extend((prompt.len()..prompt.len() + branch.len()).map(|t| t as u32));
            }
            lengths.push((prompt.len(), branch_lengths));
        }
        check_tokens(&ids, config)?;
        let total = ids.len();
        Ok(Self {
            ids: Tensor::from_vec(ids, total, device)?,
            positions: Positions::new(positions, device)?,
            segments: Arc::new(Segments::branching(lengths)),
        })
    }
}

fn check_lengths(
    prompt: usize,
    branches: &[usize],
    config: &ModelConfig,
) -> Result<(), ModelError> {
    let longest = prompt + branches.iter().max().unwrap_or(&0);
    let reason = if prompt == 0 {
        "a sequence without tokens cannot be scored".to_owned()
    } else if longest > config.max_positions {
        format!(
            "{longest} tokens are more than the model's {} positions",
            config.max_positions
        )
    } else {
        return Ok(());
    };
    Err(ModelError::Tokens { reason })
}

/// Checks that all tokens are in the vocabulary.
pub(crate) fn check_tokens(ids: &[u32], config: &ModelConfig) -> Result<(), ModelError> {
    match ids.iter().find(|&&id| id as usize >= config.vocab_size) {
        None => Ok(()),
        Some(id) => Err(ModelError::Tokens {
            reason: format!(
                "token {id} is not in the model's vocabulary of {}",
                config.vocab_size
            ),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures;

    #[test]
    fn positions_of_a_branch_continue_those_of_the_prompt() -> Result<(), ModelError> {
        let prefixes = [
            SharedPrefix {
                prompt: &[5, 6, 7],
                branches: vec![&[1, 2], &[], &[3]],
            },
            SharedPrefix {
                prompt: &[4],
                branches: vec![],
            },
        ];
        let batch =
            RaggedBatch::with_shared_prefixes(&prefixes, &fixtures::config(8), &Device::Cpu)?;
        assert_eq!(batch.ids.to_vec1::<u32>()?, [5, 6, 7, 1, 2, 3, 4]);
        assert_eq!(
            batch.positions.index.to_vec1::<u32>()?,
            [0, 1, 2, 3, 4, 3, 0]
        );
        let expected = Segments::branching([(3, vec![2, 0, 1]), (1, vec![])]);
        assert_eq!(*batch.segments, expected);
        Ok(())
    }

    #[test]
    fn invalid_sequences_are_refused() {
        type Case<'a> = (&'a [u32], Vec<&'a [u32]>, &'a str);
        let config = fixtures::config(8);
        let (long, short) = ([1; 9], [1; 8]);
        let cases: [Case<'_>; 4] = [
            (&[], vec![&[1]], "without tokens"),
            (
                &long,
                vec![&[1], &short],
                "17 tokens are more than the model's 16",
            ),
            (&[8], vec![], "token 8 is not"),
            (&[1], vec![&[1], &[2, 9]], "token 9 is not"),
        ];
        for (prompt, branches, expected) in cases {
            let prefix = SharedPrefix { prompt, branches };
            let error =
                RaggedBatch::with_shared_prefixes(&[prefix], &config, &Device::Cpu).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        }
        let fits = SharedPrefix {
            prompt: &long,
            branches: vec![&short[1..], &[]],
        };
        assert!(RaggedBatch::with_shared_prefixes(&[fits], &config, &Device::Cpu).is_ok());
    }
}
