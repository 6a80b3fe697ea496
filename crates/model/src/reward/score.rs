//! The forward pass of a reward model: packed sequences in, a row of outputs each.

use std::ops::Range;

use candle_core::{DType, Tensor};

use super::{
    Pooling, RewardModel,
    config::{COEFFICIENT, HEAD},
};
use crate::{Fork, ModelError, Packed, Sequence, ops, score::SHARED};

/// What a sum of hidden states is divided by, so that its size is that of a mean.
const SUM_DIVISOR: f64 = 8.0;
/// What a mean log-likelihood is multiplied by, so that its size is that of a short sum.
const LIKELIHOOD_FACTOR: f64 = 16.0;

impl RewardModel {
    /// The outputs for every response, `[n, outputs]` in f32, with gradient. A prompt may be empty: then
    /// the whole sequence is the response, and of its likelihood the first token, which nothing
    /// predicts, has no part.
    ///
    /// # Errors
    /// When there is no sequence, a response is empty, a sequence is too long or a token is unknown; with
    /// `likelihood` also when a response without a prompt has one token only.
    pub fn score(&self, sequences: &[Sequence<'_>]) -> Result<Tensor, ModelError> {
        self.check(sequences)?;
        let packed = Packed::forked(&forks(sequences), self.trunk.config(), self.device())?;
        let responses = responses(&packed.segments);
        let hidden = self.trunk.hidden(&packed)?;
        let scores = self.pooled(&hidden, sequences, &responses)?;
        if !self.config.likelihood {
            return Ok(scores);
        }
        let likelihood = self.mean_log_likelihood(&hidden, sequences, &responses)?;
        let coefficient = self.head.get(COEFFICIENT)?.to_dtype(DType::F32)?;
        let scaled = (likelihood * LIKELIHOOD_FACTOR)?.broadcast_mul(&coefficient)?;
        let others = self.config.kind.outputs() - 1;
        Ok((scores + scaled.pad_with_zeros(1, 0, others)?)?)
    }

    fn check(&self, sequences: &[Sequence<'_>]) -> Result<(), ModelError> {
        let unscored = |s: &&Sequence<'_>| {
            let alone = s.prompt.is_empty() && s.completion.len() == 1;
            s.completion.is_empty() || (self.config.likelihood && alone)
        };
        let reason = match sequences.iter().find(unscored) {
            _ if sequences.is_empty() => "no sequence was given to be scored",
            None => return Ok(()),
            Some(s) if s.completion.is_empty() => "a response without tokens cannot be scored",
            Some(_) => "a response of one token and no prompt has no likelihood; give its prompt",
        };
        Err(ModelError::Tokens {
            reason: reason.into(),
        })
    }

    /// The head's outputs of the pooled hidden states, `[n, outputs]` in f32. The head is linear, so what
    /// is pooled are its outputs.
    fn pooled(
        &self,
        hidden: &Tensor,
        sequences: &[Sequence<'_>],
        responses: &[Response],
    ) -> Result<Tensor, ModelError> {
        let head = self.head.get(HEAD)?.to_dtype(DType::F32)?.t()?;
        let outputs = |rows: Vec<u32>| -> Result<Tensor, ModelError> {
            let rows = Tensor::new(rows, self.device())?;
            let rows = hidden.index_select(&rows, 0)?.to_dtype(DType::F32)?;
            Ok(rows.matmul(&head)?)
        };
        let rows = |response: &Response| response.rows.clone().map(|row| row as u32);
        let all = || responses.iter().flat_map(rows);
        let lengths: Vec<usize> = responses.iter().map(|r| r.rows.len()).collect();
        match self.config.pooling {
            Pooling::Last => {
                let padding = self.config.padding(self.trunk.config());
                let read = sequences.iter().zip(responses);
                let last = read.map(|(sequence, response)| response.last(*sequence, padding));
                outputs(last.map(|row| row as u32).collect())
            }
            Pooling::Mean => means(&outputs(all().collect())?, &lengths),
            Pooling::Sum => Ok((sums(&outputs(all().collect())?, &lengths)? / SUM_DIVISOR)?),
        }
    }

    /// The mean of the trunk's own log p over the tokens of each response, `[n, 1]` in f32, in nats.
    fn mean_log_likelihood(
        &self,
        hidden: &Tensor,
        sequences: &[Sequence<'_>],
        responses: &[Response],
    ) -> Result<Tensor, ModelError> {
        let (mut rows, mut targets, mut lengths) = (Vec::new(), Vec::new(), Vec::new());
        for (sequence, response) in sequences.iter().zip(responses) {
            // A token is predicted by the row before it; the first of all by none.
            let unpredicted = usize::from(response.before.is_none());
            let read = response.rows.start..response.rows.end - 1;
            rows.extend(
                response
                    .before
                    .into_iter()
                    .chain(read)
                    .map(|row| row as u32),
            );
            targets.extend_from_slice(&sequence.completion[unpredicted..]);
            lengths.push(response.rows.len() - unpredicted);
        }
        let rows = Tensor::new(rows, self.device())?;
        let hidden = hidden.index_select(&rows, 0)?;
        let logp =
            ops::token_logprobs(&hidden, &self.trunk.head, &targets, self.trunk.precision)?.logp;
        means(&logp.to_dtype(DType::F32)?.unsqueeze(1)?, &lengths)
    }
}

/// Where a response lies in the packed batch.
struct Response {
    /// The rows of its tokens.
    rows: Range<usize>,
    /// The row that predicts its first token: the prompt's last.
    before: Option<usize>,
}

impl Response {
    /// The row of the last token that is not `padding`, in the prompt too; as in transformers the first row of all where
    /// there is no such token.
    fn last(&self, sequence: Sequence<'_>, padding: Option<u32>) -> usize {
        let is_read = |id: &u32| Some(*id) != padding;
        if let Some(place) = sequence.completion.iter().rposition(is_read) {
            return self.rows.start + place;
        }
        let prompt = sequence.prompt.iter().rposition(is_read).unwrap_or(0);
        self.before.map_or(self.rows.start, |last| {
            last + 1 + prompt - sequence.prompt.len()
        })
    }
}

/// The prompts, each with the responses that share a reading of it, in the order of the sequences. A
/// response without a prompt stands alone.
fn forks<'a>(sequences: &[Sequence<'a>]) -> Vec<Fork<'a>> {
    let fork = |alike: &[Sequence<'a>]| match alike[0].prompt {
        [] => Fork {
            prompt: alike[0].completion,
            branches: Vec::new(),
        },
        prompt => Fork {
            prompt,
            branches: alike.iter().map(|s| s.completion).collect(),
        },
    };
    sequences
        .chunk_by(|a, b| !a.prompt.is_empty() && a.prompt == b.prompt)
        .flat_map(|alike| alike.chunks(SHARED))
        .map(fork)
        .collect()
}

/// The responses of the packed batch, in the order of the sequences.
fn responses(segments: &ops::Segments) -> Vec<Response> {
    let of = |segment: &ops::Segment| {
        let (prefix, before) = (segment.prefix.clone(), segment.prefix.end.checked_sub(1));
        let alone = segment.branches.is_empty().then_some(Response {
            rows: prefix,
            before: None,
        });
        let branches = segment.branches.clone().into_iter();
        alone
            .into_iter()
            .chain(branches.map(move |rows| Response { rows, before }))
    };
    segments.iter().flat_map(of).collect()
}

/// The sums of the first `lengths[0]` rows of `[R, k]`, of the next `lengths[1]`, …: `[n, k]`.
fn sums(rows: &Tensor, lengths: &[usize]) -> Result<Tensor, ModelError> {
    let owners: Vec<u32> = lengths
        .iter()
        .enumerate()
        .flat_map(|(owner, &length)| std::iter::repeat_n(owner as u32, length))
        .collect();
    let owners = Tensor::new(owners, rows.device())?;
    let none = Tensor::zeros((lengths.len(), rows.dim(1)?), rows.dtype(), rows.device())?;
    Ok(none.index_add(&owners, rows, 0)?)
}

/// As [`sums`], divided by the lengths.
fn means(rows: &Tensor, lengths: &[usize]) -> Result<Tensor, ModelError> {
    let counts: Vec<f32> = lengths.iter().map(|&length| length as f32).collect();
    let counts = Tensor::from_vec(counts, (lengths.len(), 1), rows.device())?;
    Ok(sums(rows, lengths)?.broadcast_div(&counts)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        LanguageModel, Precision, RewardConfig, RewardKind,
        fixtures::{adapted, tiny_model},
        reward::{
            config::{COEFFICIENT, HEAD},
            tests::{close, reward},
        },
    };

    const SEQUENCES: [Sequence<'static>; 4] = [
        Sequence {
            prompt: &[0, 3, 4],
            completion: &[2, 6, 1],
        },
        Sequence {
            prompt: &[0],
            completion: &[5],
        },
        Sequence {
            prompt: &[],
            completion: &[4, 4, 2, 1],
        },
        Sequence {
            prompt: &[2, 2],
            completion: &[3, 1],
        },
    ];
    const PAIRWISE: RewardKind = RewardKind::Pairwise { planes: 1 };

    fn scores(model: &RewardModel, sequences: &[Sequence<'_>]) -> Vec<Vec<f32>> {
        model.score(sequences).unwrap().to_vec2().unwrap()
    }

    /// The head's outputs of every response token, one sequence after the other, each read alone.
    fn by_token(model: &RewardModel) -> Vec<Vec<Vec<f32>>> {
        let head: Vec<Vec<f32>> = model.weights().get(HEAD).unwrap().to_vec2().unwrap();
        let dot = |h: &[f32]| -> Vec<f32> {
            let output = |w: &Vec<f32>| h.iter().zip(w).map(|(h, w)| h * w).sum();
            head.iter().map(output).collect()
        };
        let alone = |s: &Sequence<'_>| {
            let ids = [s.prompt, s.completion].concat();
            let packed = Packed::new(&[ids], model.trunk.config(), model.device()).unwrap();
            let hidden: Vec<Vec<f32>> = model.trunk.hidden(&packed).unwrap().to_vec2().unwrap();
            hidden[s.prompt.len()..].iter().map(|h| dot(h)).collect()
        };
        SEQUENCES.iter().map(alone).collect()
    }

    #[test]
    fn responses_that_share_a_reading_of_their_prompt_get_what_they_get_alone() {
        let prompt: &[u32] = &[0, 3, 4];
        let completions: [&[u32]; 3] = [&[2, 6, 1], &[5], &[6, 6, 6, 1]];
        let mut together: Vec<_> = completions
            .map(|completion| Sequence { prompt, completion })
            .to_vec();
        together.extend(SEQUENCES);
        for pooling in [Pooling::Last, Pooling::Mean, Pooling::Sum] {
            let config = RewardConfig {
                kind: PAIRWISE,
                pooling,
                likelihood: true,
            };
            let model = reward(&tiny_model(7, 1), config);
            let found = scores(&model, &together);
            for (found, sequence) in found.iter().zip(&together) {
                close(found, &scores(&model, &[*sequence])[0], 1e-5);
            }
        }
    }

    #[test]
    fn pooling_is_what_it_says() {
        for kind in [RewardKind::BradleyTerry, PAIRWISE] {
            for pooling in [Pooling::Last, Pooling::Mean, Pooling::Sum] {
                let config = RewardConfig {
                    kind,
                    pooling,
                    likelihood: false,
                };
                let model = reward(&tiny_model(7, 1), config);
                for (found, tokens) in scores(&model, &SEQUENCES).iter().zip(by_token(&model)) {
                    let sum = |output: usize| tokens.iter().map(|t| t[output]).sum::<f32>();
                    let expected: Vec<f32> = (0..kind.outputs())
                        .map(|output| match pooling {
                            Pooling::Last => tokens[tokens.len() - 1][output],
                            Pooling::Mean => sum(output) / tokens.len() as f32,
                            Pooling::Sum => sum(output) / 8.0,
                        })
                        .collect();
                    close(found, &expected, 1e-5);
                }
            }
        }
    }

    #[test]
    fn coarser_products_change_scores_a_little() {
        let config = RewardConfig {
            kind: PAIRWISE,
            pooling: Pooling::Last,
            likelihood: false,
        };
        let model = reward(&tiny_model(7, 1), config);
        let exact = scores(&model, &SEQUENCES).concat();
        let coarse = scores(&model.with_products_in(Precision::Bf16), &SEQUENCES).concat();
        close(&coarse, &exact, 0.05);
        assert_ne!(coarse, exact);
    }

    #[test]
    fn the_likelihood_is_the_language_models_mean() {
        let trunk = tiny_model(7, 1);
        let config = |likelihood| RewardConfig {
            kind: PAIRWISE,
            pooling: Pooling::Mean,
            likelihood,
        };
        let (with, without) = (reward(&trunk, config(true)), reward(&trunk, config(false)));
        let (with, without) = (scores(&with, &SEQUENCES), scores(&without, &SEQUENCES));
        for ((with, without), sequence) in with.iter().zip(&without).zip(SEQUENCES) {
            let added = with[0] - without[0];
            let expected = 0.05 * 16.0 * mean_logp(&trunk, sequence);
            assert!((added - expected).abs() < 1e-5, "{added}, not {expected}");
            assert_eq!(with[1..], without[1..]);
        }
    }

    fn mean_logp(trunk: &LanguageModel, sequence: Sequence<'_>) -> f32 {
        let (prompt, completion) = match sequence.prompt {
            [] => sequence.completion.split_at(1),
            prompt => (prompt, sequence.completion),
        };
        let scores = trunk.score(&[Sequence { prompt, completion }]).unwrap();
        let logp = scores.logp.to_vec1::<f32>().unwrap();
        logp.iter().sum::<f32>() / logp.len() as f32
    }

    #[test]
    fn what_cannot_be_scored_is_refused() {
        let trunk = tiny_model(7, 1);
        let model = |likelihood| {
            let config = RewardConfig {
                likelihood,
                ..RewardConfig::default()
            };
            reward(&trunk, config)
        };
        let (plain, with_likelihood) = (model(false), model(true));
        let alone = Sequence {
            prompt: &[],
            completion: &[3],
        };
        let long = [0; 65];
        let cases = [
            (&plain, vec![], "no sequence"),
            (
                &plain,
                vec![
                    SEQUENCES[0],
                    Sequence {
                        prompt: &[1],
                        completion: &[],
                    },
                ],
                "a response without tokens",
            ),
            (
                &with_likelihood,
                vec![SEQUENCES[0], alone],
                "has no likelihood",
            ),
            (
                &plain,
                vec![Sequence {
                    prompt: &[],
                    completion: &long,
                }],
                "65 tokens are more",
            ),
            (
                &plain,
                vec![Sequence {
                    prompt: &[7],
                    completion: &[1],
                }],
                "token 7 is not in",
            ),
        ];
        for (model, sequences, expected) in cases {
            let refused = model.score(&sequences).unwrap_err().to_string();
            assert!(refused.contains(expected), "{refused}");
        }
        assert_eq!(scores(&plain, &[alone]).len(), 1);
    }

    /// A number that depends on every part of the model, and where `name` has moved at `place`.
    fn loss(model: &RewardModel, moved: Option<(&str, usize, f32)>) -> Tensor {
        let model = match moved {
            None => model.clone(),
            Some((name, place, by)) => {
                let mut weights = model.trained();
                let tensor = weights.get(name).unwrap();
                let mut numbers: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
                numbers[place] += by;
                let tensor = Tensor::from_vec(numbers, tensor.shape(), tensor.device()).unwrap();
                weights.tensors.insert(name.to_owned(), tensor);
                let of_head = model.config.head(model.trunk.config());
                let head = weights.part(of_head).unwrap();
                weights
                    .tensors
                    .retain(|name, _| !head.tensors.contains_key(name));
                RewardModel {
                    config: model.config,
                    trunk: model.trunk.with_trained(weights).unwrap(),
                    head,
                }
            }
        };
        let features = model.score(&SEQUENCES).unwrap();
        let margins = model.margins(&features, &[0, 1, 3], &[2, 0, 1]).unwrap();
        let weights = Tensor::new(&[0.3f32, -0.5, 0.7], model.device()).unwrap();
        let of_margins = (margins.sqr().unwrap() * weights).unwrap().sum_all();
        (of_margins.unwrap() + features.sum_all().unwrap()).unwrap()
    }

    #[test]
    fn gradients_are_finite_differences() {
        for pooling in [Pooling::Last, Pooling::Mean, Pooling::Sum] {
            let config = RewardConfig {
                kind: RewardKind::Pairwise { planes: 2 },
                pooling,
                likelihood: true,
            };
            let whole = [
                HEAD,
                COEFFICIENT,
                "lm_head.weight",
                "model.layers.0.mlp.up_proj.weight",
            ];
            let beside = [
                HEAD,
                COEFFICIENT,
                "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight",
                "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight",
            ];
            for (trunk, names) in [
                (tiny_model(7, 1), whole),
                (adapted(7, 1, &["all-linear"]), beside),
            ] {
                are_finite_differences(&reward(&trunk, config), names);
            }
        }
    }

    fn are_finite_differences(model: &RewardModel, names: [&str; 4]) {
        let step = 1e-2;
        let (trainable, vars) = model.trainable().unwrap();
        let gradients = crate::ops::backward(&loss(&trainable, None)).unwrap();
        for name in names {
            let gradient = gradients.get(vars[name].as_tensor()).unwrap();
            let gradient: Vec<f32> = gradient.flatten_all().unwrap().to_vec1().unwrap();
            assert!(
                gradient.iter().any(|g| g.abs() > 1e-2),
                "{name}: {gradient:?}"
            );
            for place in (0..gradient.len()).step_by(gradient.len().div_ceil(24)) {
                let at = |by| {
                    let loss = loss(model, Some((name, place, by)));
                    loss.to_scalar::<f32>().unwrap()
                };
                let difference = (at(step) - at(-step)) / (2.0 * step);
                let tolerance = 3e-3 * (1.0 + difference.abs());
                assert!(
                    (gradient[place] - difference).abs() < tolerance,
                    "{name} at {place}: {} is not {difference}",
                    gradient[place]
                );
            }
        }
    }
}
