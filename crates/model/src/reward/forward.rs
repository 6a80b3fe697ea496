//! Forward pass of a reward model: a ragged batch in, a row of outputs per sequence.

use std::ops::Range;

use candle_core::{DType, Tensor};

use crate::reward::{
    Pooling, RewardModel,
    config::{COEFFICIENT, HEAD},
};
use crate::{
    error::ModelError,
    logprobs::MAX_BRANCHES,
    ragged::{RaggedBatch, Sequence, SharedPrefix},
};

/// Divisor of a sum of hidden states, which brings it to the magnitude of a mean.
const SUM_DIVISOR: f64 = 8.0;
/// Factor on the mean log-likelihood, which brings it to the magnitude of a short sum.
const LIKELIHOOD_FACTOR: f64 = 16.0;

impl RewardModel {
    /// Outputs for every response, `[n, outputs]` in f32, with gradient: the reward, then the embedding of a pairwise
    /// model. A prompt may be empty; the log-likelihood then excludes the first token, which has no context.
    ///
    /// # Errors
    /// When there is no sequence, a response is empty, a sequence is too long or a token is unknown; with
    /// `likelihood` also when a response without a prompt has one token only.
    pub fn rewards(&self, sequences: &[Sequence<'_>]) -> Result<Tensor, ModelError> {
        self.check(sequences)?;
        let batch = RaggedBatch::with_shared_prefixes(
            &shared_prefixes(sequences),
            self.backbone.config(),
            self.device(),
        )?;
        let responses = responses(&batch.segments);
        let hidden = self.backbone.hidden(&batch)?;
        let rewards = self.pooled(&hidden, sequences, &responses)?;
        if !self.config.likelihood {
            return Ok(rewards);
        }
        let likelihood = self.mean_log_likelihood(&hidden, sequences, &responses)?;
        let coefficient = self.head.get(COEFFICIENT)?.to_dtype(DType::F32)?;
        let scaled = (likelihood * LIKELIHOOD_FACTOR)?.broadcast_mul(&coefficient)?;
        let others = self.config.kind.outputs() - 1;
        Ok((rewards + scaled.pad_with_zeros(1, 0, others)?)?)
    }

    fn check(&self, sequences: &[Sequence<'_>]) -> Result<(), ModelError> {
        let is_invalid = |s: &&Sequence<'_>| {
            let alone = s.prompt.is_empty() && s.completion.len() == 1;
            s.completion.is_empty() || (self.config.likelihood && alone)
        };
        let reason = match sequences.iter().find(is_invalid) {
            _ if sequences.is_empty() => "no sequence was given to be scored",
            None => return Ok(()),
            Some(s) if s.completion.is_empty() => "a response without tokens cannot be scored",
            Some(_) => "a response of one token and no prompt has no likelihood; give its prompt",
        };
        Err(ModelError::Tokens {
            reason: reason.into(),
        })
    }

    /// Head outputs of the pooled hidden states, `[n, outputs]` in f32. Since the head is linear, its outputs are
    /// pooled instead of the hidden states.
    fn pooled(
        &self,
        hidden: &Tensor,
        sequences: &[Sequence<'_>],
        responses: &[ResponseRows],
    ) -> Result<Tensor, ModelError> {
        let head = self.head.get(HEAD)?.to_dtype(DType::F32)?.t()?;
        let outputs = |rows: Vec<u32>| -> Result<Tensor, ModelError> {
            let rows = Tensor::new(rows, self.device())?;
            let rows = hidden.index_select(&rows, 0)?.to_dtype(DType::F32)?;
            Ok(rows.matmul(&head)?)
        };
        let rows = |response: &ResponseRows| response.rows.clone().map(|row| row as u32);
        let all = || responses.iter().flat_map(rows);
        let lengths: Vec<usize> = responses.iter().map(|r| r.rows.len()).collect();
        match self.config.pooling {
            Pooling::Last => {
                let padding = self.config.padding(self.backbone.config());
                let pairs = sequences.iter().zip(responses);
                let last = pairs.map(|(sequence, response)| response.last(*sequence, padding));
                outputs(last.map(|row| row as u32).collect())
            }
            Pooling::Mean => means(&outputs(all().collect())?, &lengths),
            Pooling::Sum => Ok((sums(&outputs(all().collect())?, &lengths)? / SUM_DIVISOR)?),
        }
    }

    /// Mean log-probability of each response's tokens under the backbone, `[n, 1]` in f32, in nats.
    fn mean_log_likelihood(
        &self,
        hidden: &Tensor,
        sequences: &[Sequence<'_>],
        responses: &[ResponseRows],
    ) -> Result<Tensor, ModelError> {
        let (mut rows, mut targets, mut lengths) = (Vec::new(), Vec::new(), Vec::new());
        for (sequence, response) in sequences.iter().zip(responses) {
            // A token is predicted by the preceding row; the first token of a sequence by none.
            let unpredicted = usize::from(response.before.is_none());
            let own = response.rows.start..response.rows.end - 1;
            rows.extend(response.before.into_iter().chain(own).map(|row| row as u32));
            targets.extend_from_slice(&sequence.completion[unpredicted..]);
            lengths.push(response.rows.len() - unpredicted);
        }
        let rows = Tensor::new(rows, self.device())?;
        let hidden = hidden.index_select(&rows, 0)?;
        let logp = self.backbone.token_logprobs(&hidden, &targets)?.logp;
        means(&logp.to_dtype(DType::F32)?.unsqueeze(1)?, &lengths)
    }
}

/// Rows of a response in the ragged batch.
struct ResponseRows {
    /// Rows of its tokens.
    rows: Range<usize>,
    /// Row that predicts its first token: the prompt's last.
    before: Option<usize>,
}

impl ResponseRows {
    /// Row of the last token, of response or prompt, that is not `padding`; as in transformers the first row if all
    /// are.
    fn last(&self, sequence: Sequence<'_>, padding: Option<u32>) -> usize {
        let is_content = |id: &u32| Some(*id) != padding;
        if let Some(index) = sequence.completion.iter().rposition(is_content) {
            return self.rows.start + index;
        }
        let prompt = sequence.prompt.iter().rposition(is_content).unwrap_or(0);
        self.before.map_or(self.rows.start, |last| {
            last + 1 + prompt - sequence.prompt.len()
        })
    }
}

/// Groups adjacent sequences with equal prompts, at most [`MAX_BRANCHES`] each, in order. A response without a prompt
/// is a prefix without branches.
fn shared_prefixes<'a>(sequences: &[Sequence<'a>]) -> Vec<SharedPrefix<'a>> {
    let prefix = |group: &[Sequence<'a>]| match group[0].prompt {
        [] => SharedPrefix {
            prompt: group[0].completion,
            branches: Vec::new(),
        },
        prompt => SharedPrefix {
            prompt,
            branches: group.iter().map(|s| s.completion).collect(),
        },
    };
    sequences
        .chunk_by(|a, b| !a.prompt.is_empty() && a.prompt == b.prompt)
        .flat_map(|group| group.chunks(MAX_BRANCHES))
        .map(prefix)
        .collect()
}

/// Rows of the responses in the ragged batch, in the order of the sequences.
fn responses(segments: &kernels::Segments) -> Vec<ResponseRows> {
    let of = |segment: &kernels::Segment| {
        let (prefix, before) = (segment.prefix.clone(), segment.prefix.end.checked_sub(1));
        let alone = segment.branches.is_empty().then_some(ResponseRows {
            rows: prefix,
            before: None,
        });
        let branches = segment.branches.clone().into_iter();
        alone
            .into_iter()
            .chain(branches.map(move |rows| ResponseRows { rows, before }))
    };
    segments.iter().flat_map(of).collect()
}

/// Segment sums: of the first `lengths[0]` rows of `[R, k]`, the next `lengths[1]`, …: `[n, k]`.
fn sums(rows: &Tensor, lengths: &[usize]) -> Result<Tensor, ModelError> {
    let segments: Vec<u32> = lengths
        .iter()
        .enumerate()
        .flat_map(|(segment, &length)| std::iter::repeat_n(segment as u32, length))
        .collect();
    let segments = Tensor::new(segments, rows.device())?;
    let zeros = Tensor::zeros((lengths.len(), rows.dim(1)?), rows.dtype(), rows.device())?;
    Ok(zeros.index_add(&segments, rows, 0)?)
}

/// Segment means, as [`sums`].
fn means(rows: &Tensor, lengths: &[usize]) -> Result<Tensor, ModelError> {
    let counts: Vec<f32> = lengths.iter().map(|&length| length as f32).collect();
    let counts = Tensor::from_vec(counts, (lengths.len(), 1), rows.device())?;
    Ok(sums(rows, lengths)?.broadcast_div(&counts)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        fixtures::{adapted, tiny_model},
        reward::{
            RewardConfig, RewardKind,
            config::{COEFFICIENT, HEAD},
            tests::{close, reward},
        },
        sampling::Precision,
        transformer::LanguageModel,
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

    fn rewards(model: &RewardModel, sequences: &[Sequence<'_>]) -> Vec<Vec<f32>> {
        model.rewards(sequences).unwrap().to_vec2().unwrap()
    }

    /// Head outputs of every response token, with each sequence in a batch of its own.
    fn by_token(model: &RewardModel) -> Vec<Vec<Vec<f32>>> {
        let head: Vec<Vec<f32>> = model.weights().get(HEAD).unwrap().to_vec2().unwrap();
        let dot = |h: &[f32]| -> Vec<f32> {
            let output = |w: &Vec<f32>| h.iter().zip(w).map(|(h, w)| h * w).sum();
            head.iter().map(output).collect()
        };
        let alone = |s: &Sequence<'_>| {
            let ids = [s.prompt, s.completion].concat();
            let batch = RaggedBatch::new(&[ids], model.backbone.config(), model.device()).unwrap();
            let hidden: Vec<Vec<f32>> = model.backbone.hidden(&batch).unwrap().to_vec2().unwrap();
            hidden[s.prompt.len()..].iter().map(|h| dot(h)).collect()
        };
        SEQUENCES.iter().map(alone).collect()
    }

    #[test]
    fn sharing_a_prompt_does_not_change_rewards() {
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
            let found = rewards(&model, &together);
            for (found, sequence) in found.iter().zip(&together) {
                close(found, &rewards(&model, &[*sequence])[0], 1e-5);
            }
        }
    }

    #[test]
    fn pooling_matches_its_definition() {
        for kind in [RewardKind::BradleyTerry, PAIRWISE] {
            for pooling in [Pooling::Last, Pooling::Mean, Pooling::Sum] {
                let config = RewardConfig {
                    kind,
                    pooling,
                    likelihood: false,
                };
                let model = reward(&tiny_model(7, 1), config);
                for (found, tokens) in rewards(&model, &SEQUENCES).iter().zip(by_token(&model)) {
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
    fn reduced_precision_changes_rewards_slightly() {
        let config = RewardConfig {
            kind: PAIRWISE,
            pooling: Pooling::Last,
            likelihood: false,
        };
        let model = reward(&tiny_model(7, 1), config);
        let exact = rewards(&model, &SEQUENCES).concat();
        let reduced = rewards(&model.with_precision(Precision::Bf16), &SEQUENCES).concat();
        close(&reduced, &exact, 0.05);
        assert_ne!(reduced, exact);
    }

    #[test]
    fn the_likelihood_feature_is_the_mean_log_likelihood() {
        let backbone = tiny_model(7, 1);
        let config = |likelihood| RewardConfig {
            kind: PAIRWISE,
            pooling: Pooling::Mean,
            likelihood,
        };
        let (with, without) = (
            reward(&backbone, config(true)),
            reward(&backbone, config(false)),
        );
        let (with, without) = (rewards(&with, &SEQUENCES), rewards(&without, &SEQUENCES));
        for ((with, without), sequence) in with.iter().zip(&without).zip(SEQUENCES) {
            let added = with[0] - without[0];
            let expected = 0.05 * 16.0 * mean_logp(&backbone, sequence);
            assert!((added - expected).abs() < 1e-5, "{added}, not {expected}");
            assert_eq!(with[1..], without[1..]);
        }
    }

    fn mean_logp(backbone: &LanguageModel, sequence: Sequence<'_>) -> f32 {
        let (prompt, completion) = match sequence.prompt {
            [] => sequence.completion.split_at(1),
            prompt => (prompt, sequence.completion),
        };
        let scored = backbone
            .logprobs(&[Sequence { prompt, completion }])
            .unwrap();
        let logp = scored.logp.to_vec1::<f32>().unwrap();
        logp.iter().sum::<f32>() / logp.len() as f32
    }

    #[test]
    fn invalid_sequences_are_refused() {
        let backbone = tiny_model(7, 1);
        let model = |likelihood| {
            let config = RewardConfig {
                likelihood,
                ..RewardConfig::default()
            };
            reward(&backbone, config)
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
            let refused = model.rewards(&sequences).unwrap_err().to_string();
            assert!(refused.contains(expected), "{refused}");
        }
        assert_eq!(rewards(&plain, &[alone]).len(), 1);
    }

    /// A change of one weight.
    #[derive(Clone, Copy)]
    struct Perturbation<'a> {
        name: &'a str,
        index: usize,
        by: f32,
    }

    /// A loss that depends on every part of the model, optionally with one weight perturbed.
    fn loss(model: &RewardModel, perturbation: Option<Perturbation<'_>>) -> Tensor {
        let model = match perturbation {
            None => model.clone(),
            Some(Perturbation { name, index, by }) => {
                let mut weights = model.trained();
                let tensor = weights.get(name).unwrap();
                let mut values: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
                values[index] += by;
                let tensor = Tensor::from_vec(values, tensor.shape(), tensor.device()).unwrap();
                weights.tensors.insert(name.to_owned(), tensor);
                let head_tensors = model.config.head(model.backbone.config());
                let head = weights.subset(head_tensors).unwrap();
                weights
                    .tensors
                    .retain(|name, _| !head.tensors.contains_key(name));
                RewardModel {
                    config: model.config,
                    backbone: model.backbone.with_trained(weights).unwrap(),
                    head,
                }
            }
        };
        let features = model.rewards(&SEQUENCES).unwrap();
        let margins = model.margins(&features, &[0, 1, 3], &[2, 0, 1]).unwrap();
        let weights = Tensor::new(&[0.3f32, -0.5, 0.7], model.device()).unwrap();
        let of_margins = (margins.sqr().unwrap() * weights).unwrap().sum_all();
        (of_margins.unwrap() + features.sum_all().unwrap()).unwrap()
    }

    #[test]
    fn gradients_match_finite_differences() {
        for pooling in [Pooling::Last, Pooling::Mean, Pooling::Sum] {
            let config = RewardConfig {
                kind: RewardKind::Pairwise { planes: 2 },
                pooling,
                likelihood: true,
            };
            let full = [
                HEAD,
                COEFFICIENT,
                "lm_head.weight",
                "model.layers.0.mlp.up_proj.weight",
            ];
            let adapter = [
                HEAD,
                COEFFICIENT,
                "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight",
                "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight",
            ];
            for (backbone, names) in [
                (tiny_model(7, 1), full),
                (adapted(7, 1, &["all-linear"]), adapter),
            ] {
                assert_finite_differences(&reward(&backbone, config), names);
            }
        }
    }

    fn assert_finite_differences(model: &RewardModel, names: [&str; 4]) {
        let step = 1e-2;
        let (trainable, vars) = model.trainable().unwrap();
        let gradients = kernels::backward(&loss(&trainable, None)).unwrap();
        for name in names {
            let gradient = gradients.get(vars[name].as_tensor()).unwrap();
            let gradient: Vec<f32> = gradient.flatten_all().unwrap().to_vec1().unwrap();
            assert!(
                gradient.iter().any(|g| g.abs() > 1e-2),
                "{name}: {gradient:?}"
            );
            for index in (0..gradient.len()).step_by(gradient.len().div_ceil(24)) {
                let at = |by| {
                    let loss = loss(model, Some(Perturbation { name, index, by }));
                    loss.to_scalar::<f32>().unwrap()
                };
                let difference = (at(step) - at(-step)) / (2.0 * step);
                let tolerance = 3e-3 * (1.0 + difference.abs());
                assert!(
                    (gradient[index] - difference).abs() < tolerance,
                    "{name} at {index}: {} is not {difference}",
                    gradient[index]
                );
            }
        }
    }
}
