//! Chat model: answers to prompts, with the log-probability of every token.

use std::{sync::mpsc, time::Duration};

use messages::{Finish, PromptText, Seed};
use model::{
    SamplingSettings,
    sampling::{Scratch, draw},
};
use rand::Rng;
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};

use crate::{
    engine::Engine,
    error::MistralError,
    model_files::ModelFiles,
    request::{EngineRequest, LoadDtype, TokenSelector},
};

/// Grace period added to the completion timeout before the caller gives up.
const TIMEOUT_GRACE: Duration = Duration::from_secs(10);

/// A chat model.
pub struct Chat {
    engine: Engine,
    /// Timeout of one answer.
    timeout: Duration,
}

/// A generated text with its tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct GeneratedText {
    /// Decoded text, without special tokens.
    pub text: String,
    /// Generated tokens, special ones included.
    pub tokens: Vec<GeneratedToken>,
    /// Finish reason.
    pub finish: Finish,
}

/// A generated token and the most likely tokens at its position.
#[derive(Debug, Clone, PartialEq)]
pub struct GeneratedToken {
    /// Decoded text.
    pub text: String,
    /// Log-probability (natural logarithm).
    pub logprob: f64,
    /// Most likely tokens at this position, in descending order of probability.
    pub top_logprobs: Vec<CandidateToken>,
}

/// A token of the vocabulary with its log-probability at a position.
#[derive(Debug, Clone, PartialEq)]
pub struct CandidateToken {
    /// Decoded text.
    pub text: String,
    /// Log-probability (natural logarithm).
    pub logprob: f64,
}

impl Chat {
    /// Loads a model. `timeout` limits each answer.
    ///
    /// # Errors
    /// If the model cannot be loaded.
    pub fn open(source: &ModelFiles, timeout: Duration) -> Result<Self, MistralError> {
        Ok(Self {
            engine: Engine::load(source, LoadDtype::Auto)?,
            timeout,
        })
    }

    /// Whether the model has a chat template, which dialogues need.
    #[must_use]
    pub fn has_chat_template(&self) -> bool {
        self.engine.has_chat_template()
    }

    /// Generates an answer to `prompt`, sampled with `seed`, with `alternatives` top log-probabilities per token.
    /// `sampling.top_k = 1` is greedy decoding.
    ///
    /// # Errors
    /// If the prompt cannot be tokenized, or generation fails or exceeds the timeout.
    pub fn answer(
        &self,
        prompt: &PromptText,
        sampling: &SamplingSettings,
        seed: Seed,
        alternatives: usize,
    ) -> Result<GeneratedText, MistralError> {
        let (sender, receiver) = mpsc::channel();
        let ids = self.engine.encode(prompt)?;
        let request = EngineRequest {
            ids: ids.clone(),
            max_new_tokens: sampling.max_new_tokens,
            timeout: self.timeout,
        };
        let selector = RecordingSelector::new(*sampling, seed, alternatives);
        self.engine
            .start(request, selector, move |selector, result| {
                // The receiver is gone after a timeout.
                drop(sender.send((selector, result)));
            });
        let timeout = |_| MistralError::Timeout(self.timeout);
        let (selector, result) = receiver
            .recv_timeout(self.timeout + TIMEOUT_GRACE)
            .map_err(timeout)?;
        result?;
        self.decode_generated(&ids, &selector)
    }

    /// Decodes the tokens generated after `prompt`.
    fn decode_generated(
        &self,
        prompt: &[u32],
        selector: &RecordingSelector,
    ) -> Result<GeneratedText, MistralError> {
        if selector.has_failed {
            let reason = "the logits are not finite; the weights may be corrupt";
            return Err(MistralError::Failed(reason.into()));
        }
        let ids: Vec<u32> = selector.drawn.iter().map(|token| token.id).collect();
        let is_end = |id: &u32| self.engine.end_tokens().contains(id);
        let previous = prompt.last().into_iter().chain(&ids).copied();
        let decoded = |(previous, token): (u32, &DrawnToken)| {
            let text = |id| decode_after(&[previous], &[id], |ids| self.engine.decode_all(ids));
            let top_logprobs = token.top_logprobs.iter();
            GeneratedToken {
                text: text(token.id),
                logprob: token.logprob,
                top_logprobs: top_logprobs
                    .map(|&(id, logprob)| CandidateToken {
                        text: text(id),
                        logprob,
                    })
                    .collect(),
            }
        };
        Ok(GeneratedText {
            text: decode_after(prompt, &ids, |ids| self.engine.decode(ids)),
            tokens: previous.zip(&selector.drawn).map(decoded).collect(),
            finish: match ids.last().is_some_and(is_end) {
                true => Finish::EndOfText,
                false => Finish::Length,
            },
        })
    }
}

/// Text of `ids` in the context of `before`: some decoders drop the first space of a text.
fn decode_after(before: &[u32], ids: &[u32], decode: impl Fn(&[u32]) -> String) -> String {
    let whole = decode(&[before, ids].concat());
    match whole.strip_prefix(&decode(before)) {
        Some(text) => text.to_owned(),
        None => decode(ids),
    }
}

/// Samples an answer and records the top log-probabilities.
struct RecordingSelector {
    sampling: SamplingSettings,
    random: ChaCha8Rng,
    alternatives: usize,
    scratch: Scratch,
    drawn: Vec<DrawnToken>,
    has_failed: bool,
}

struct DrawnToken {
    id: u32,
    logprob: f64,
    top_logprobs: Vec<(u32, f64)>,
}

impl RecordingSelector {
    fn new(sampling: SamplingSettings, seed: Seed, alternatives: usize) -> Self {
        Self {
            sampling,
            random: ChaCha8Rng::seed_from_u64(seed.0),
            alternatives,
            scratch: Scratch::default(),
            drawn: Vec::new(),
            has_failed: false,
        }
    }
}

impl TokenSelector for RecordingSelector {
    fn select(&mut self, logits: &[f32], _context: &[u32]) -> Option<u32> {
        let uniform = self.random.random();
        let drawn = draw(logits, &self.sampling, uniform, &mut self.scratch);
        let Some(drawn) = drawn else {
            self.has_failed = true;
            return None;
        };
        let normaliser = log_sum_exp(logits);
        let logprob = |id: u32| f64::from(logits[id as usize]) - normaliser;
        let top_logprobs = most_likely(logits, self.alternatives);
        self.drawn.push(DrawnToken {
            id: drawn.token,
            logprob: logprob(drawn.token),
            top_logprobs: top_logprobs
                .into_iter()
                .map(|id| (id, logprob(id)))
                .collect(),
        });
        Some(drawn.token)
    }
}

/// ln Σ exp z, in f64.
fn log_sum_exp(logits: &[f32]) -> f64 {
    let maximum = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&z| (f64::from(z) - maximum).exp()).sum();
    maximum + sum.ln()
}

/// The `count` tokens with the highest logits in descending order; ties go to the lower id.
fn most_likely(logits: &[f32], count: usize) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    let descending = |a: &u32, b: &u32| {
        let [a_logit, b_logit] = [a, b].map(|&id| logits[id as usize]);
        b_logit.total_cmp(&a_logit).then(a.cmp(b))
    };
    if count > 0 && count < ids.len() {
        ids.select_nth_unstable_by(count - 1, descending);
    }
    ids.truncate(count);
    ids.sort_unstable_by(descending);
    ids
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decoding_keeps_the_space_between_prompt_and_answer() {
        let decode = |ids: &[u32]| {
            let words: String = ids.iter().map(|id| format!(" w{id}")).collect();
            words.strip_prefix(' ').unwrap_or_default().to_owned()
        };
        assert_eq!(decode_after(&[1, 2], &[3, 4], decode), " w3 w4");
        assert_eq!(decode_after(&[], &[3], decode), "w3");
    }

    #[test]
    fn most_likely_tokens_are_sorted_and_log_sum_exp_normalises() {
        let logits = [0.0f32, 2.0, -1.0, 2.0, 1.0];
        assert_eq!(most_likely(&logits, 3), [1, 3, 4]);
        assert_eq!(most_likely(&logits, 9), [1, 3, 4, 0, 2]);
        assert_eq!(most_likely(&logits, 0), [0u32; 0]);
        let normaliser = log_sum_exp(&logits);
        let sum: f64 = logits
            .iter()
            .map(|&z| (f64::from(z) - normaliser).exp())
            .sum();
        assert!((sum - 1.0).abs() < 1e-12, "{sum}");
    }

    #[test]
    fn greedy_selection_takes_the_most_likely_token_and_fails_on_nan() {
        let greedy = SamplingSettings {
            top_k: 1,
            ..SamplingSettings::plain(4)
        };
        let mut selector = RecordingSelector::new(greedy, Seed(1), 2);
        assert_eq!(selector.select(&[0.0, 1.0, 0.5], &[7]), Some(1));
        let token = &selector.drawn[0];
        assert_eq!(token.top_logprobs[0], (1, token.logprob));
        assert_eq!(token.top_logprobs[1].0, 2);
        assert_eq!(selector.select(&[0.0, f32::NAN], &[7, 1]), None);
        assert!(selector.has_failed);
    }
}
