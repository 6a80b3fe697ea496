//! Differentiable log-probabilities of given completions, over ragged batches. Adjacent completions of the same prompt
//! share its forward pass.

use std::sync::Arc;

use candle_core::Tensor;

use crate::{
    error::ModelError,
    ragged::{RaggedBatch, Sequence, SharedPrefix, check_tokens},
    transformer::{Attend, LanguageModel, LayerAttention},
};

/// Maximum number of completions per shared prefix. Attention processes the branches of a prefix sequentially, so a
/// batch with one common prefix would run on a single thread.
pub(crate) const MAX_BRANCHES: usize = 8;

/// Per-token log-probabilities of completions: R response tokens in total, in the order of the sequences.
#[derive(Debug, Clone)]
pub struct TokenLogprobs {
    /// log π of each token given the preceding ones, `[R]`, f32, with gradient.
    pub logp: Tensor,
    /// Entropy of the predictive distribution of each token, `[R]`, in nats, without gradient.
    pub entropy: Tensor,
    /// Final hidden state, after the last norm, that predicts each token, `[R, hidden_size]`, with gradient.
    pub hidden: Tensor,
    /// Number of tokens of each completion; they sum to R.
    pub lengths: Vec<usize>,
}

struct RaggedAttention<'a> {
    batch: &'a RaggedBatch,
}

impl Attend for RaggedAttention<'_> {
    fn ragged_segments(&self) -> Option<&Arc<kernels::Segments>> {
        Some(&self.batch.segments)
    }

    fn attend(
        &mut self,
        layer: LayerAttention,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> candle_core::Result<Tensor> {
        kernels::causal_attention(q, k, v, &self.batch.segments, layer.params)
    }
}

impl LanguageModel {
    /// Final hidden states, after the last norm, of a ragged batch of N tokens, `[N, hidden_size]`, with gradient.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn hidden(&self, batch: &RaggedBatch) -> Result<Tensor, ModelError> {
        let mut attention = RaggedAttention { batch };
        Ok(self.forward(&batch.ids, &batch.positions, &mut attention)?)
    }

    /// Log-probabilities of every completion given its prompt. Logits are computed for response tokens only, and a
    /// prompt is processed once for up to eight adjacent completions.
    ///
    /// # Errors
    /// When a prompt or completion is empty, a sequence is too long or a token is unknown.
    pub fn logprobs(&self, sequences: &[Sequence<'_>]) -> Result<TokenLogprobs, ModelError> {
        let hidden = self.completion_hidden(sequences)?;
        let targets = sequences.iter().flat_map(|s| s.completion);
        let targets: Vec<u32> = targets.copied().collect();
        check_tokens(&targets, &self.config)?;
        let scored = self.token_logprobs(&hidden, &targets)?;
        Ok(TokenLogprobs {
            logp: scored.logp,
            entropy: scored.entropy,
            hidden,
            lengths: sequences.iter().map(|s| s.completion.len()).collect(),
        })
    }

    /// Final hidden states, after the last norm, that predict the completions' tokens: `[R, hidden_size]` for R
    /// response tokens, with gradient. Equal to [`TokenLogprobs::hidden`], without the cost of the head.
    ///
    /// # Errors
    /// When a prompt or completion is empty, a sequence is too long or an input token is unknown.
    pub fn completion_hidden(&self, sequences: &[Sequence<'_>]) -> Result<Tensor, ModelError> {
        if sequences
            .iter()
            .any(|s| s.prompt.is_empty() || s.completion.is_empty())
        {
            let reason =
                "a prompt and a completion need at least one token each to be scored".into();
            return Err(ModelError::Tokens { reason });
        }
        let batch = RaggedBatch::with_shared_prefixes(
            &shared_prefixes(sequences),
            &self.config,
            self.device(),
        )?;
        let rows = Tensor::new(predicting_rows(&batch.segments), self.device())?;
        Ok(self.hidden(&batch)?.index_select(&rows, 0)?)
    }

    /// Attention parameters of a layer: scale and window.
    pub(crate) fn attention_params(&self, layer: usize) -> kernels::AttentionParams {
        kernels::AttentionParams {
            scale: 1.0 / (self.config.head_dim as f32).sqrt(),
            window: self.config.windows[layer],
        }
    }
}

/// Groups adjacent sequences with equal prompts, at most [`MAX_BRANCHES`] each, in order. A completion's last token is
/// only predicted, never an input.
fn shared_prefixes<'a>(sequences: &[Sequence<'a>]) -> Vec<SharedPrefix<'a>> {
    let prefix = |group: &[Sequence<'a>]| SharedPrefix {
        prompt: group[0].prompt,
        branches: group
            .iter()
            .map(|s| &s.completion[..s.completion.len() - 1])
            .collect(),
    };
    sequences
        .chunk_by(|a, b| a.prompt == b.prompt)
        .flat_map(|group| group.chunks(MAX_BRANCHES))
        .map(prefix)
        .collect()
}

/// Row that predicts each response token: the prompt's last row, then the rows of the branch.
fn predicting_rows(segments: &kernels::Segments) -> Vec<u32> {
    let of = |segment: &kernels::Segment| {
        let last = segment.prefix.end - 1;
        let branches = segment.branches.clone().into_iter();
        branches.flat_map(move |branch| std::iter::once(last).chain(branch))
    };
    segments.iter().flat_map(of).map(|row| row as u32).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use candle_core::{DType, Device, Var};
    use serde_json::{Value, json};

    use super::*;
    use crate::{config::ModelConfig, weights::Weights};

    const VOCABULARY: u32 = 50;

    /// A model with two layers and grouped-query attention, with `changes` applied to its configuration.
    fn model(changes: Value) -> (LanguageModel, BTreeMap<String, Var>) {
        let mut raw = json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": VOCABULARY, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
            "bos_token_id": 0, "eos_token_id": 1,
        });
        let Value::Object(changes) = changes else {
            panic!("changes are an object")
        };
        raw.as_object_mut().unwrap().extend(changes);
        let config = ModelConfig::from_json(raw, std::path::Path::new("config.json")).unwrap();
        let seed = messages::Seed(3);
        let weights = Weights::initialise(&config, seed, DType::F32, &Device::Cpu).unwrap();
        let (weights, vars) = weights.trainable().unwrap();
        (LanguageModel::new(config, weights).unwrap(), vars)
    }

    fn tokens(count: usize, seed: u32) -> Vec<u32> {
        let token = |i: u32| (i * i * 7 + i * 13 + seed * 31) % VOCABULARY;
        (0..count as u32).map(token).collect()
    }

    /// Log-probabilities without prompt sharing.
    fn unshared_logprobs(model: &LanguageModel, sequences: &[Sequence<'_>]) -> Tensor {
        let whole = |s: &Sequence<'_>| [s.prompt, &s.completion[..s.completion.len() - 1]].concat();
        let whole: Vec<Vec<u32>> = sequences.iter().map(whole).collect();
        let batch = RaggedBatch::new(&whole, &model.config, model.device()).unwrap();
        let rows: Vec<u32> = batch
            .segments
            .ranges()
            .zip(sequences)
            .flat_map(|(rows, s)| rows.skip(s.prompt.len() - 1))
            .map(|row| row as u32)
            .collect();
        let rows = Tensor::new(rows, model.device()).unwrap();
        let hidden = model.hidden(&batch).unwrap();
        let targets: Vec<u32> = sequences
            .iter()
            .flat_map(|s| s.completion)
            .copied()
            .collect();
        kernels::token_logprobs(
            &hidden.index_select(&rows, 0).unwrap(),
            &model.head,
            &targets,
            model.precision,
        )
        .unwrap()
        .logp
    }

    /// Largest absolute difference of two tensors, relative to the largest absolute value of the second.
    fn difference(a: &Tensor, b: &Tensor) -> f32 {
        let values = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let (a, b) = (values(a), values(b));
        assert_eq!(a.len(), b.len());
        assert!(a.iter().all(|x| x.is_finite()));
        let largest = |x: &mut dyn Iterator<Item = f32>| x.fold(0.0, |m, x| f32::max(m, x.abs()));
        largest(&mut a.iter().zip(&b).map(|(a, b)| a - b)) / largest(&mut b.iter().copied())
    }

    #[test]
    fn sharing_a_prompt_changes_neither_logprobs_nor_gradients() {
        let (short, long, one) = (tokens(9, 1), tokens(70, 2), tokens(1, 3));
        let completions: Vec<Vec<u32>> = [16, 1, 5, 90, 30]
            .iter()
            .enumerate()
            .map(|(i, &count)| tokens(count, 4 + i as u32))
            .collect();
        // Groups of two, one and four, then two completions of a single token, then ten identical sequences.
        let prompts = [[&short[..]; 2].as_slice(), &[&one[..]], &[&long[..]; 4]].concat();
        let mut sequences: Vec<Sequence<'_>> = prompts
            .into_iter()
            .zip(completions.iter().cycle())
            .map(|(prompt, completion)| Sequence { prompt, completion })
            .collect();
        let of = |prompt, completion| Sequence { prompt, completion };
        sequences.extend([of(&short, &completions[1]); 2]);
        sequences.extend([of(&one, &completions[3]); 10]);
        for changes in [
            json!({}),
            json!({"architectures": ["MistralForCausalLM"], "sliding_window": 20}),
            json!({"architectures": ["Qwen3ForCausalLM"], "head_dim": 8}),
        ] {
            let (model, vars) = model(changes);
            let shared = model.logprobs(&sequences).unwrap();
            let expected = unshared_logprobs(&model, &sequences);
            assert_eq!(
                shared.logp.dim(0).unwrap(),
                shared.lengths.iter().sum::<usize>()
            );
            assert!(difference(&shared.logp, &expected) < 1e-5);
            let hidden = model.completion_hidden(&sequences).unwrap();
            assert_eq!(difference(&shared.hidden, &hidden), 0.0);
            assert_eq!(hidden.dims(), [expected.elem_count(), 32]);
            let weights = Tensor::arange(0f32, expected.elem_count() as f32, &Device::Cpu)
                .and_then(|x| x.sin())
                .unwrap();
            let gradients =
                |logp: &Tensor| kernels::backward(&(logp * &weights).unwrap().sum_all().unwrap());
            let (found, expected) = (
                gradients(&shared.logp).unwrap(),
                gradients(&expected).unwrap(),
            );
            for (name, var) in &vars {
                let difference = difference(found.get(var).unwrap(), expected.get(var).unwrap());
                assert!(difference < 1e-4, "{name}: {difference}");
            }
        }
    }

    #[test]
    fn checkpointing_changes_no_bit() {
        let (model, vars) = model(json!({"architectures": ["Qwen3ForCausalLM"], "head_dim": 8}));
        let (prompt, completions) = (tokens(9, 1), [tokens(20, 2), tokens(3, 3)]);
        let sequences = completions.each_ref().map(|completion| Sequence {
            prompt: &prompt,
            completion,
        });
        let of = |model: &LanguageModel| {
            let logp = model.logprobs(&sequences).unwrap().logp;
            let found = kernels::backward(&logp.sqr().unwrap().sum_all().unwrap()).unwrap();
            let gradients = vars.values().map(|var| found.get(var).unwrap());
            let all = std::iter::once(&logp).chain(gradients);
            let values = all.map(|x| x.flatten_all().unwrap().to_vec1::<f32>().unwrap());
            values.collect::<Vec<_>>()
        };
        assert!(of(&model) == of(&model.with_checkpointing(true)));
    }

    #[test]
    fn a_prompt_is_in_the_batch_once_for_up_to_eight_completions() {
        let (a, b) = (tokens(5, 1), tokens(5, 2));
        let completion = tokens(4, 3);
        let sequence = |prompt| Sequence {
            prompt,
            completion: completion.as_slice(),
        };
        let sequences = [
            [sequence(a.as_slice()); 9].as_slice(),
            &[sequence(&b), sequence(&b), sequence(&a)],
        ]
        .concat();
        let shapes: Vec<(&[u32], usize)> = shared_prefixes(&sequences)
            .iter()
            .map(|prefix| (prefix.prompt, prefix.branches.len()))
            .collect();
        assert_eq!(shapes, [(&a[..], 8), (&a, 1), (&b, 2), (&a, 1)]);
        let segments = kernels::Segments::branching([(5, vec![3, 0, 1]), (2, vec![1])]);
        assert_eq!(predicting_rows(&segments), [4, 5, 6, 7, 4, 4, 8, 10, 11]);
    }

    #[test]
    fn invalid_sequences_are_refused() {
        let (model, _) = model(json!({}));
        let long = tokens(257, 1);
        let cases: [(&[u32], &[u32], &str); 4] = [
            (&[], &[1], "at least one token"),
            (&[1], &[], "at least one token"),
            (&[1], &[2, 50], "token 50 is not"),
            (&long[..200], &long[..58], "257 tokens are more than"),
        ];
        for (prompt, completion, expected) in cases {
            let sequence = Sequence { prompt, completion };
            let error = model.logprobs(&[sequence]).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let (prompt, completion) = (&long[..200], &long[..57]);
        assert!(model.logprobs(&[Sequence { prompt, completion }]).is_ok());
    }
}
