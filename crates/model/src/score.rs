//! The scoring path: log-probabilities of given completions, differentiable, over packed batches.
//! Completions of one prompt that follow one another share one reading of it.

use std::sync::Arc;

use candle_core::Tensor;

use crate::{
    Fork, LanguageModel, ModelError, Packed, Sequence, network::Attend, ops, packed::check_tokens,
};

/// Completions that share one reading of their prompt, at most: attention takes the completions of one
/// reading in turn, so a batch that all begins with one token would leave it to a single thread.
pub(crate) const SHARED: usize = 8;

/// What a model says of completions: R response tokens in all, in the order of the sequences.
#[derive(Debug, Clone)]
pub struct Scores {
    /// log π of each token given all before it, `[R]`, f32, with gradient.
    pub logp: Tensor,
    /// The entropy of the distribution each token was scored under, `[R]`, in nats, without gradient.
    pub entropy: Tensor,
    /// The final normed hidden state that each token was predicted from, `[R, hidden_size]`, with
    /// gradient.
    pub hidden: Tensor,
    /// How many tokens each completion has; their sum is R.
    pub lengths: Vec<usize>,
}

struct PackedAttention<'a> {
    packed: &'a Packed,
}

impl Attend for PackedAttention<'_> {
    fn packed(&self) -> Option<&Arc<ops::Segments>> {
        Some(&self.packed.segments)
    }

    fn attend(
        &mut self,
        (_, options): (usize, ops::Attention),
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> candle_core::Result<Tensor> {
        ops::causal_attention(q, k, v, &self.packed.segments, options)
    }
}

impl LanguageModel {
    /// The final normed hidden states of a packed batch of N tokens, `[N, hidden_size]`, with gradient.
    ///
    /// # Errors
    /// When a tensor operation fails.
    pub fn hidden(&self, packed: &Packed) -> Result<Tensor, ModelError> {
        let mut attention = PackedAttention { packed };
        Ok(self.forward(&packed.ids, &packed.positions, &mut attention)?)
    }

    /// Scores every completion given its prompt. Logits are computed for response tokens only, and a
    /// prompt is read once for up to eight completions that stand next to one another.
    ///
    /// # Errors
    /// When a prompt or completion is empty, a sequence is too long or a token is unknown.
    pub fn score(&self, sequences: &[Sequence<'_>]) -> Result<Scores, ModelError> {
        let hidden = self.hidden_of(sequences)?;
        let targets = sequences.iter().flat_map(|s| s.completion);
        let targets: Vec<u32> = targets.copied().collect();
        check_tokens(&targets, &self.config)?;
        let scored = ops::token_logprobs(&hidden, &self.head, &targets, self.precision)?;
        Ok(Scores {
            logp: scored.logp,
            entropy: scored.entropy,
            hidden,
            lengths: sequences.iter().map(|s| s.completion.len()).collect(),
        })
    }

    /// The final normed hidden state that each completion's tokens are predicted from: R response tokens
    /// in all, `[R, hidden_size]`, with gradient. It is what [`Self::score`] sees, without the head.
    ///
    /// # Errors
    /// When a prompt or completion is empty, a sequence is too long or a token that is read is unknown.
    pub fn hidden_of(&self, sequences: &[Sequence<'_>]) -> Result<Tensor, ModelError> {
        if sequences
            .iter()
            .any(|s| s.prompt.is_empty() || s.completion.is_empty())
        {
            let reason =
                "a prompt and a completion need at least one token each to be scored".into();
            return Err(ModelError::Tokens { reason });
        }
        let packed = Packed::forked(&forks(sequences), &self.config, self.device())?;
        let rows = Tensor::new(predicting(&packed.segments), self.device())?;
        Ok(self.hidden(&packed)?.index_select(&rows, 0)?)
    }

    /// How this layer attends.
    pub(crate) fn attention_in(&self, layer: usize) -> ops::Attention {
        ops::Attention {
            scale: 1.0 / (self.config.head_dim as f32).sqrt(),
            window: self.config.windows[layer],
        }
    }
}

/// The prompts, each with the completions that share a reading of it, in the order of the sequences. A
/// completion's last token is only predicted, never read.
fn forks<'a>(sequences: &[Sequence<'a>]) -> Vec<Fork<'a>> {
    let fork = |alike: &[Sequence<'a>]| Fork {
        prompt: alike[0].prompt,
        branches: alike
            .iter()
            .map(|s| &s.completion[..s.completion.len() - 1])
            .collect(),
    };
    sequences
        .chunk_by(|a, b| a.prompt == b.prompt)
        .flat_map(|alike| alike.chunks(SHARED))
        .map(fork)
        .collect()
}

/// The row that predicts each response token: a prompt's last, then those of the branch.
fn predicting(segments: &ops::Segments) -> Vec<u32> {
    let of = |segment: &ops::Segment| {
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
    use crate::{ModelConfig, Weights};

    const VOCABULARY: u32 = 50;

    /// Two blocks of grouped queries with these keys of its configuration changed.
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

    /// Every sequence with a prompt of its own.
    fn apart(model: &LanguageModel, sequences: &[Sequence<'_>]) -> Tensor {
        let whole = |s: &Sequence<'_>| [s.prompt, &s.completion[..s.completion.len() - 1]].concat();
        let whole: Vec<Vec<u32>> = sequences.iter().map(whole).collect();
        let packed = Packed::new(&whole, &model.config, model.device()).unwrap();
        let rows: Vec<u32> = packed
            .segments
            .ranges()
            .zip(sequences)
            .flat_map(|(rows, s)| rows.skip(s.prompt.len() - 1))
            .map(|row| row as u32)
            .collect();
        let rows = Tensor::new(rows, model.device()).unwrap();
        let hidden = model.hidden(&packed).unwrap();
        let targets: Vec<u32> = sequences
            .iter()
            .flat_map(|s| s.completion)
            .copied()
            .collect();
        ops::token_logprobs(
            &hidden.index_select(&rows, 0).unwrap(),
            &model.head,
            &targets,
            model.precision,
        )
        .unwrap()
        .logp
    }

    /// The largest difference of two tensors, relative to the largest number of the second.
    fn difference(a: &Tensor, b: &Tensor) -> f32 {
        let numbers = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let (a, b) = (numbers(a), numbers(b));
        assert_eq!(a.len(), b.len());
        assert!(a.iter().all(|x| x.is_finite()));
        let largest = |x: &mut dyn Iterator<Item = f32>| x.fold(0.0, |m, x| f32::max(m, x.abs()));
        largest(&mut a.iter().zip(&b).map(|(a, b)| a - b)) / largest(&mut b.iter().copied())
    }

    #[test]
    fn sharing_a_prompt_changes_neither_scores_nor_gradients() {
        let (short, long, one) = (tokens(9, 1), tokens(70, 2), tokens(1, 3));
        let completions: Vec<Vec<u32>> = [16, 1, 5, 90, 30]
            .iter()
            .enumerate()
            .map(|(i, &count)| tokens(count, 4 + i as u32))
            .collect();
        // A pair, one alone, four with one of a single token, two of a single token only, ten alike.
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
            let shared = model.score(&sequences).unwrap();
            let expected = apart(&model, &sequences);
            assert_eq!(
                shared.logp.dim(0).unwrap(),
                shared.lengths.iter().sum::<usize>()
            );
            assert!(difference(&shared.logp, &expected) < 1e-5);
            let hidden = model.hidden_of(&sequences).unwrap();
            assert_eq!(difference(&shared.hidden, &hidden), 0.0);
            assert_eq!(hidden.dims(), [expected.elem_count(), 32]);
            let weights = Tensor::arange(0f32, expected.elem_count() as f32, &Device::Cpu)
                .and_then(|x| x.sin())
                .unwrap();
            let gradients =
                |logp: &Tensor| ops::backward(&(logp * &weights).unwrap().sum_all().unwrap());
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
        let (kept, vars) = model(json!({"architectures": ["Qwen3ForCausalLM"], "head_dim": 8}));
        let (prompt, completions) = (tokens(9, 1), [tokens(20, 2), tokens(3, 3)]);
        let sequences = completions.each_ref().map(|completion| Sequence {
            prompt: &prompt,
            completion,
        });
        let of = |model: &LanguageModel| {
            let logp = model.score(&sequences).unwrap().logp;
            let found = ops::backward(&logp.sqr().unwrap().sum_all().unwrap()).unwrap();
            let gradients = vars.values().map(|var| found.get(var).unwrap());
            let all = std::iter::once(&logp).chain(gradients);
            let numbers = all.map(|x| x.flatten_all().unwrap().to_vec1::<f32>().unwrap());
            numbers.collect::<Vec<_>>()
        };
        assert!(of(&kept) == of(&kept.with_checkpointing(true)));
    }

    #[test]
    fn a_prompt_lies_in_the_batch_once_for_up_to_eight_completions() {
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
        let shapes: Vec<(&[u32], usize)> = forks(&sequences)
            .iter()
            .map(|fork| (fork.prompt, fork.branches.len()))
            .collect();
        assert_eq!(shapes, [(&a[..], 8), (&a, 1), (&b, 2), (&a, 1)]);
        let segments = ops::Segments::branching([(5, vec![3, 0, 1]), (2, vec![1])]);
        assert_eq!(predicting(&segments), [4, 5, 6, 7, 4, 4, 8, 10, 11]);
    }

    #[test]
    fn what_cannot_be_scored_is_refused() {
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
            let error = model.score(&[sequence]).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let (prompt, completion) = (&long[..200], &long[..57]);
        assert!(model.score(&[Sequence { prompt, completion }]).is_ok());
    }
}
