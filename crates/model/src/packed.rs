//! Ragged batches without padding: sequences laid end to end, a beginning that several share only once.

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

/// A prompt that is read once for all that continue it.
#[derive(Debug, Clone)]
pub struct Fork<'a> {
    /// What all branches share; at least one token.
    pub prompt: &'a [u32],
    /// What continues it, each branch blind to the others; any may be empty, and there may be none.
    pub branches: Vec<&'a [u32]>,
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
    /// Packs these token sequences, each a segment by itself.
    ///
    /// # Errors
    /// When a sequence is empty, longer than the model's positions, or holds a token that is not in the
    /// vocabulary.
    pub fn new(
        sequences: &[Vec<u32>],
        config: &ModelConfig,
        device: &Device,
    ) -> Result<Self, ModelError> {
        let alone = |prompt| Fork {
            prompt,
            branches: Vec::new(),
        };
        let forks: Vec<Fork<'_>> = sequences.iter().map(|ids| alone(ids.as_slice())).collect();
        Self::forked(&forks, config, device)
    }

    /// Packs prompts, each followed by its branches, a segment a fork.
    ///
    /// # Errors
    /// When a prompt is empty, a prompt and a branch are together longer than the model's positions, or
    /// a token is not in the vocabulary.
    pub fn forked(
        forks: &[Fork<'_>],
        config: &ModelConfig,
        device: &Device,
    ) -> Result<Self, ModelError> {
        let (mut ids, mut positions) = (Vec::new(), Vec::new());
        let mut lengths = Vec::with_capacity(forks.len());
        for Fork { prompt, branches } in forks {
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
            positions: Tensor::from_vec(positions, total, device)?,
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

/// An error if one of these tokens is not in the vocabulary.
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
    fn a_branch_takes_up_where_the_prompt_ends() -> Result<(), ModelError> {
        let forks = [
            Fork {
                prompt: &[5, 6, 7],
                branches: vec![&[1, 2], &[], &[3]],
            },
            Fork {
                prompt: &[4],
                branches: vec![],
            },
        ];
        let packed = Packed::forked(&forks, &fixtures::config(8), &Device::Cpu)?;
        assert_eq!(packed.ids.to_vec1::<u32>()?, [5, 6, 7, 1, 2, 3, 4]);
        assert_eq!(packed.positions.to_vec1::<u32>()?, [0, 1, 2, 3, 4, 3, 0]);
        let expected = Segments::branching([(3, vec![2, 0, 1]), (1, vec![])]);
        assert_eq!(*packed.segments, expected);
        Ok(())
    }

    #[test]
    fn what_a_model_cannot_read_is_refused() {
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
            let fork = Fork { prompt, branches };
            let error = Packed::forked(&[fork], &config, &Device::Cpu).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        }
        let just = Fork {
            prompt: &long,
            branches: vec![&short[1..], &[]],
        };
        assert!(Packed::forked(&[just], &config, &Device::Cpu).is_ok());
    }
}
